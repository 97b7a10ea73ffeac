"""An adapter of a drafter: two steps against autograd of W + B A, what is saved, what stays, and a killed training."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.adapters import ADAPTERS, adapted, assemble
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter, read_info, save_drafter
from draftsmith.stages.drafters.digest import content_digest, drafter_digest
from draftsmith.stages.runtime.checkpoint import list_checkpoints
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.batches import Batch, FeatureSource, step_rng
from draftsmith.stages.training.blocks import draft_blocks, encode_batch, position_anchors
from draftsmith.stages.training.config import LoraOptions, SftConfig, TrainingConfig
from draftsmith.stages.training.loop import cosine
from draftsmith.stages.training.lora import Adapter
from draftsmith.stages.training.sft.trainer import SftTraining
from draftsmith.stages.training.trainer import TrainingData
from tests.testbed import random_target
from tests.testbed.architectures import RANDOM
from tests.testbed.context import RecordingContext
from tests.testbed.dspark import random_dspark

DRAFTERS = {name: RANDOM[name] for name in ("dflash", "dflash2", "eagle3")} | {"dspark": random_dspark}
TRAJECTORIES = random_target.trajectories(6, seed=3)
FIELDS: dict[str, Any] = {
    "steps": 6, "learning_rate": 1e-2, "sequences_per_step": 3, "anchors_per_sequence": 3, "compute_dtype": "float32",
}  # fmt: skip
SEED = 5


@pytest.fixture(params=DRAFTERS)
def base(request: pytest.FixtureRequest, plain_target: Target) -> Drafter:
    return DRAFTERS[request.param](plain_target)


def training_of(drafter: Drafter, target: Target, **fields: Any) -> SftTraining:
    config = SftConfig.model_validate({**FIELDS, "lora": {"rank": 4}, **fields})
    return SftTraining(drafter, target, TrainingData(trajectories=TRAJECTORIES), config, seed=SEED)


def trained(folder: Path, drafter: Drafter, target: Target, **fields: Any) -> RecordingContext:
    """Train and save an adapter of a copy of the drafter."""
    context, training = RecordingContext.under(folder), training_of(copy.deepcopy(drafter), target, **fields)
    training.save(context, "sft", ("digest of the base",), training.train(context))
    return context


@torch.no_grad()
def hidden_states(drafter: Drafter, target: Target) -> torch.Tensor:
    """Return the hidden states of blocks all over two trajectories."""
    batch: Batch = FeatureSource(target, drafter.target_layer_ids, TRAJECTORIES, TrainingConfig()).batch([0, 1])
    anchors = position_anchors(batch.trajectories, 4, step_rng(0, 0).random(2), target.device)
    return draft_blocks(drafter, encode_batch(drafter, batch), batch, anchors).hidden


def test_steps_are_adamws_on_the_gradients_of_a_and_b(base: Drafter, plain_target: Target, tmp_path: Path) -> None:
    """By autograd through W + B A, which a plain copy has for weights; A moves from the second step on."""
    plain, context = copy.deepcopy(base).requires_grad_(False), RecordingContext.under(tmp_path)
    fields = {"steps": 2, "warmup_fraction": 0.0, "clip_norm": 0.5}
    training = training_of(base, plain_target, **fields)
    Adapter(copy.deepcopy(base), LoraOptions(rank=4), "float32", SEED).save(tmp_path / "start")
    training.train(context)

    maps = plain.linear_maps()
    weights = {name: module.weight.detach() for name, module in maps.items()}
    start = load_file(tmp_path / "start" / "adapter_model.safetensors")
    factors = {name.removeprefix("base_model.model."): tensor.requires_grad_() for name, tensor in start.items()}
    assert {name.rpartition(".lora_")[0] for name in factors} == maps.keys()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in factors.items()}
    for module in maps.values():
        del module.weight
    reference = training_of(plain, plain_target, **fields)
    for step in range(2):
        for name, module in maps.items():
            product = factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
            module.weight = weights[name] + product
        (report,) = reference.micro_batches(step, None)
        assert context.measured[step][1]["loss"] == pytest.approx(float(report.loss.detach()), rel=1e-5)
        gradients = torch.autograd.grad(report.loss, list(factors.values()), materialize_grads=True)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert context.measured[step][1]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        with torch.no_grad():
            for (name, factor), gradient in zip(factors.items(), gradients, strict=True):
                g = gradient * min(1.0, 0.5 / float(norm))
                first, second = moments[name]
                first.lerp_(g, 0.1)
                second.lerp_(g**2, 0.05)
                rate = reference.config.learning_rate * cosine(step, reference.config)
                corrected = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                factor -= rate * first / (1 - 0.9 ** (step + 1)) / corrected
    training.adapter.save(tmp_path / "end")  # type: ignore[union-attr]
    ours = load_file(tmp_path / "end" / "adapter_model.safetensors")
    for name, factor in factors.items():
        torch.testing.assert_close(ours[f"base_model.model.{name}"], factor.detach(), atol=1e-4, rtol=1e-3)


def test_the_merged_drafter_and_pefts_files_propose_as_the_live_adapter(
    base: Drafter, plain_target: Target, tmp_path: Path
) -> None:
    start = copy.deepcopy(base)
    training, context = training_of(base, plain_target), RecordingContext.under(tmp_path)
    totals = training.train(context)
    live = hidden_states(base, plain_target)
    assert (live - hidden_states(start, plain_target)).abs().max() > 0.1
    training.save(context, "sft", ("earlier", "digest of the base"), totals)
    merged = load_drafter(context.out / DRAFTER_FOLDER, plain_target)
    torch.testing.assert_close(hidden_states(merged, plain_target), live, atol=1e-4, rtol=1e-4)
    by_peft = copy.deepcopy(start)
    PeftModel.from_pretrained(by_peft, str(context.out / "adapter"))
    torch.testing.assert_close(hidden_states(by_peft, plain_target), live, atol=1e-6, rtol=1e-6)
    assert read_info(context.out / DRAFTER_FOLDER).training["lora"] == {"rank": 4, "base": "digest of the base"}
    maps, before = start.linear_maps(), start.state_dict()
    for name, after in merged.state_dict().items():
        assert torch.equal(after, before[name]) == (name.removesuffix(".weight") not in maps), name


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_killed_training_ends_with_the_same_bits(
    base: Drafter, plain_target: Target, tmp_path: Path, compute_dtype: str
) -> None:
    """From a checkpoint that has A and B, and their moments, alone."""
    fields = {"compute_dtype": compute_dtype, "checkpoint_every": 2}
    whole, cut = trained(tmp_path / "whole", base, plain_target, **fields), RecordingContext.under(tmp_path / "cut")

    def kill(step: int, *_: Any, **__: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    cut.metrics = kill  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        training_of(copy.deepcopy(base), plain_target, **fields).train(cut)
    assert [path.name[11:19] for path in list_checkpoints(cut.work)] == ["00000002"]
    assert [step for step, _ in trained(tmp_path / "cut", base, plain_target, **fields).measured] == [2, 3, 4, 5]
    files = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", f"{DRAFTER_FOLDER}/model.safetensors"]
    for file in files:
        assert (cut.out / file).read_bytes() == (whole.out / file).read_bytes()
    state = torch.load(list_checkpoints(cut.work)[0], weights_only=True)
    adapter = load_file(cut.out / "adapter" / "adapter_model.safetensors")
    count = sum(tensor.numel() for tensor in adapter.values())
    assert len(state["drafter"]) == len(state["optimiser"]["state"]) == len(adapter)
    assert sum(tensor.numel() for tensor in state["drafter"].values()) == count == 4 * base.map_sizes[1]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_files_of_adapters_give_the_trained_checkpoint_bit_by_bit(
    base: Drafter, plain_target: Target, tmp_path: Path, stored: torch.dtype, compute_dtype: str
) -> None:
    """On the files of the base, after two trainings, each of which rounded its checkpoint to the stored dtype."""
    save_drafter(base, tmp_path / "0", stored)
    for number in range(2):
        drafter = load_drafter(tmp_path / str(number), plain_target, torch.float32)
        adapter = Adapter(drafter, LoraOptions(rank=4), compute_dtype, SEED + number)
        for name, parameter in drafter.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
        adapter.save(tmp_path / "upload" / ADAPTERS / str(number))
        adapter.merge()
        save_drafter(drafter, tmp_path / str(number + 1), stored)
    shutil.copy(tmp_path / "2" / "config.json", tmp_path / "upload")
    content = assemble([tmp_path / "0", tmp_path / "upload"])
    assert content_digest(content) == drafter_digest(tmp_path / "2") != drafter_digest(tmp_path / "0")
    assert content["model.safetensors"] == (tmp_path / "2" / "model.safetensors").read_bytes()


def test_products_are_added_in_float64_rank_by_rank() -> None:
    """Against Python's floats: no sum depends on how a library orders it."""
    generator = torch.Generator().manual_seed(SEED)
    weight, a, b = (torch.randn(shape, generator=generator) for shape in ((70, 3), (16, 3), (70, 16)))
    sums = [[w] for w in weight.flatten().tolist()]
    for rank in range(16):
        for place, total in enumerate(sums):
            total[0] += b[place // 3, rank].item() * a[rank, place % 3].item()
    assert torch.equal(adapted(weight, a, b), torch.tensor(sums, dtype=torch.float64).float().view(70, 3))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_bits_of_the_base(base: Drafter, stored: torch.dtype) -> None:
    """Maps that were saved in bfloat16 are held in it. An adapter whose B is zero changes no bit."""
    for parameter in base.parameters():
        parameter.data = parameter.data.to(stored).float()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    maps, adapter = list(base.linear_maps()), Adapter(base, LoraOptions(rank=4), "bfloat16", SEED)
    assert {base.get_submodule(f"{name}.base_layer").weight.dtype for name in maps} == {stored}
    assert {p.dtype for p in base.parameters() if p.requires_grad} == {torch.float32}
    adapter.merge()
    after = base.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
