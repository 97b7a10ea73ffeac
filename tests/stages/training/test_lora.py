"""An adapter of a drafter: two steps against autograd of W + B A, what is merged, what stays, and a killed training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter, read_info
from draftsmith.stages.runtime.checkpoint import list_checkpoints
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import Batch, FeatureSource, step_rng
from draftsmith.stages.training.config import LoraOptions, SftConfig, TrainingConfig
from draftsmith.stages.training.drafted_blocks import draft_blocks, encode_batch
from draftsmith.stages.training.lora import Adapter
from draftsmith.stages.training.optimiser import cosine
from draftsmith.stages.training.sft.body import SftTraining
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
    """Train an adapter of a copy of the drafter, and save the drafter with it."""
    context, training = RecordingContext.under(folder), training_of(copy.deepcopy(drafter), target, **fields)
    training.save(context, "sft", ("digest of the base",), training.train(context))
    return context


@torch.no_grad()
def hidden_states(drafter: Drafter, target: Target) -> torch.Tensor:
    """Return the hidden states of blocks all over two trajectories."""
    batch: Batch = FeatureSource(target, drafter.target_layer_ids, TRAJECTORIES, TrainingConfig()).batch([0, 1])
    anchors = position_anchors(batch.trajectories, 4, step_rng(0, 0).random(2), target.device)
    return draft_blocks(drafter, encode_batch(drafter, batch), batch, anchors).hidden


def factors_of(drafter: Drafter) -> dict[str, torch.Tensor]:
    """Return copies of A and B of each map, by the map's name with `.lora_A` or `.lora_B`."""
    named = drafter.named_parameters()
    return {name.removesuffix(".default.weight"): p.detach().clone() for name, p in named if ".lora_" in name}


def test_steps_are_adamws_on_the_gradients_of_a_and_b(base: Drafter, plain_target: Target, tmp_path: Path) -> None:
    """By autograd through W + B A, which a plain copy has for weights; A moves from the second step on."""
    plain, context = copy.deepcopy(base).requires_grad_(False), RecordingContext.under(tmp_path)
    fields = {"steps": 2, "warmup_fraction": 0.0}
    training = training_of(base, plain_target, **fields)
    Adapter(start := copy.deepcopy(base), LoraOptions(rank=4), "float32", SEED)
    training.train(context)

    maps = plain.linear_maps()
    weights = {name: module.weight.detach() for name, module in maps.items()}
    factors = {name: tensor.requires_grad_() for name, tensor in factors_of(start).items()}
    assert {name.rpartition(".lora_")[0] for name in factors} == maps.keys()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in factors.items()}
    for module in maps.values():
        del module.weight
    reference = training_of(plain, plain_target, **fields)
    for step in range(2):
        for name, module in maps.items():
            product = factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"]
            module.weight = weights[name] + product
        (report,) = reference.micro_batches(step, None)
        assert context.measured[step][1]["loss"] == pytest.approx(float(report.loss.detach()), rel=1e-5)
        gradients = torch.autograd.grad(report.loss, list(factors.values()), materialize_grads=True)
        norm = torch.stack([g.norm() for g in gradients]).norm()
        assert context.measured[step][1]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        with torch.no_grad():
            for (name, factor), gradient in zip(factors.items(), gradients, strict=True):
                g = gradient * min(1.0, 1.0 / float(norm))
                first, second = moments[name]
                first.lerp_(g, 0.1)
                second.lerp_(g**2, 0.05)
                rate = reference.config.learning_rate * cosine(step, reference.config)
                corrected = (second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
                factor -= rate * first / (1 - 0.9 ** (step + 1)) / corrected
    for name, ours in factors_of(base).items():
        torch.testing.assert_close(ours, factors[name].detach(), atol=1e-4, rtol=1e-3)


def test_the_merged_drafter_proposes_as_the_live_adapter(base: Drafter, plain_target: Target, tmp_path: Path) -> None:
    start = copy.deepcopy(base)
    training, context = training_of(base, plain_target), RecordingContext.under(tmp_path)
    totals = training.train(context)
    live = hidden_states(base, plain_target)
    assert (live - hidden_states(start, plain_target)).abs().max() > 0.1
    training.save(context, "sft", ("earlier", "digest of the base"), totals)
    merged = load_drafter(context.out / DRAFTER_FOLDER, plain_target)
    torch.testing.assert_close(hidden_states(merged, plain_target), live, atol=1e-4, rtol=1e-4)
    assert read_info(context.out / DRAFTER_FOLDER).training["lora"] == {"rank": 4, "base": "digest of the base"}
    maps, before = start.linear_maps(), start.state_dict()
    for name, after in merged.state_dict().items():
        assert torch.equal(after, before[name]) == (name.removesuffix(".weight") not in maps), name


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_killed_training_ends_with_the_same_bits(
    base: Drafter, plain_target: Target, tmp_path: Path, compute_dtype: str
) -> None:
    """From a checkpoint that has only A and B, and their moments."""
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
    weights = f"{DRAFTER_FOLDER}/model.safetensors"
    assert (cut.out / weights).read_bytes() == (whole.out / weights).read_bytes()
    state = torch.load(list_checkpoints(cut.work)[0], weights_only=True)
    assert len(state["drafter"]) == len(state["optimiser"]["state"]) == 2 * len(base.linear_maps())
    assert sum(tensor.numel() for tensor in state["drafter"].values()) == 4 * base.map_sizes[1]


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
