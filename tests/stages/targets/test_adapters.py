"""Rows of a batch under several LoRA adapters equal models with these merged, by reads, caches, scores and answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import Trajectory, pad_tokens
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.chains import replay_chains
from draftsmith.stages.replay.replayer import Replayer, encode_group, score, tree_tokens_of
from draftsmith.stages.replay.scoring import score_traces
from draftsmith.stages.replay.trace import Trace
from draftsmith.stages.targets.adapters import AdaptedLinear, linear_maps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.config import weight_files
from draftsmith.stages.targets.info import adapter_folders, model_digest, read_target_info
from draftsmith.stages.targets.layers import model_class
from draftsmith.stages.targets.loading import check_divides, load_weights
from draftsmith.stages.targets.resolve import resolve_target
from draftsmith.stages.targets.stage import TargetConfig
from draftsmith.stages.training.batches import FeatureSource
from draftsmith.stages.training.config import SftConfig
from tests.stages.drafters.edits import Edit, remove, set_fields
from tests.testbed.adapters import ALL, ATTENTION, PREFIX, merge, write_adapter
from tests.testbed.families import write_family
from tests.testbed.random_target import random_drafter, trajectories, write_model

TOLERANCE = 1e-4  # float32, of states up to 20: W x + s B A x is rounded otherwise than (W + s B A) x
SCORE_TOLERANCE = 3e-4  # nats
ROWS = ["a", "", "b", "a"]


@dataclass(frozen=True)
class Adapted:
    """A random target with two adapters, and its models merged."""

    target: Target
    artifact: Path
    model: Path
    merged: dict[str, Target]  # "" is the model itself


def resolve(folder: Path, model: Path, adapters: dict[str, Path], dtype: Any = "float32") -> Path:
    """Return the artifact of a target."""
    folder.mkdir(parents=True, exist_ok=True)
    config = TargetConfig(source=str(model), dtype=dtype, adapters={name: str(path) for name, path in adapters.items()})
    resolve_target(config, folder, lambda _line: None)
    return folder


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    root = tmp_path_factory.mktemp("adapted")
    model = root / "model"
    write_model(model)
    # B alone of partly joined maps, of another rank than A
    folders = {
        "a": write_adapter(root / "a", model, ALL, seed=1),
        "b": write_adapter(root / "b", model, ATTENTION[1:], rank=5, alpha=3, seed=2),
    }
    models = {name: merge(model, folder, root / f"merged-{name}") for name, folder in folders.items()} | {"": model}
    merged = {
        name: Target.load(resolve(root / f"t-{name}", folder, {}), device="cpu") for name, folder in models.items()
    }
    artifact = resolve(root / "target", model, folders)
    return Adapted(Target.load(artifact, device="cpu"), artifact, model, merged)


def texts() -> list[Trajectory]:
    return [
        Trajectory(t.trajectory_id, t.tokens, t.prompt_length, a) for t, a in zip(trajectories(4), ROWS, strict=True)
    ]


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def test_reads_and_features_equal_those_of_merged_models(adapted: Adapted) -> None:
    ids = pad_tokens(texts(), torch.device("cpu"))
    read = adapted.target.read(ids, (2, 0), ROWS)
    features = adapted.target.features(ids, (2, 0), ROWS)
    alone = adapted.merged[""].read(ids, (2, 0))
    for row, name in enumerate(ROWS):
        expected = adapted.merged[name].read(ids[row : row + 1], (2, 0))
        close(read.hidden[row], expected.hidden[0])
        assert expected.features is not None
        close(features[row], expected.features[0])
        assert (float((read.hidden[row] - alone.hidden[row]).abs().max()) > 0.1) == bool(name)
    assert torch.equal(adapted.target.read(ids).hidden, alone.hidden)  # bit for bit


@pytest.mark.parametrize("fast", [True, False])
def test_steps_on_a_cache_equal_those_of_merged_models(
    fast: bool, adapted: Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = adapted.target
    assert target._fast is not None
    if not fast:
        monkeypatch.setitem(target.__dict__, "_fast", None)
    ids = torch.randint(0, 60, (3, 12), generator=torch.Generator().manual_seed(1))
    cache, positions = target.new_cache(4, 20), torch.arange(12)[None].expand(3, -1)
    target.set_adapters(cache, slice(0, 1), ["b"])
    target.set_adapters(cache, slice(1, 4), ["", "b", "a"])
    prefix = target.step(ids[:, :7], positions[:, :7], cache, slice(1, 4), layer_ids=(1,))
    cache.move_row(3, 0)  # the last request retires into the first row
    rows, names = torch.tensor([0, 2]), ["a", "b"]
    visible = torch.ones(2, 4, 11, dtype=torch.bool).tril(7)
    visible[:, 2:, 7:9] = False  # two branches of two
    tree = target.step(
        ids[[2, 1], 7:11], torch.tensor([[7, 8, 7, 8]] * 2), cache, rows,
        write_at=torch.tensor([[7, 8, 9, 10]] * 2), visible=visible,
    )  # fmt: skip
    target.set_adapters(cache, slice(1, 2), ["a"])  # another request of its row
    again = target.step(ids[:1, :5], positions[:1, :5], cache, slice(1, 2))
    for row, name in enumerate(["", "b", "a"]):
        expected = adapted.merged[name].read(ids[row : row + 1, :7], (1,))
        close(prefix.hidden[row], expected.hidden[0])
        assert prefix.features is not None and expected.features is not None
        close(prefix.features[row], expected.features[0])
    for row, name in enumerate(names):
        text = ids[[2, 1][row]]
        for branch in (slice(0, 2), slice(2, 4)):
            one = torch.cat([text[:7], text[7:11][branch]])[None]
            close(tree.hidden[row, branch], adapted.merged[name].read(one).hidden[0, 7:])
    close(again.hidden[0], adapted.merged["a"].read(ids[:1, :5]).hidden[0])


def test_scores_of_rejected_proposals_equal_those_under_merged_models(adapted: Adapted) -> None:
    group, drafter = texts(), random_drafter(adapted.target)
    tree_tokens = tree_tokens_of(drafter.block_size)

    def scored(target: Target, some: list[Trajectory], names: list[str]) -> list[Any]:
        ids = pad_tokens(some, target.device)
        encoded = encode_group(target, ids, drafter.target_layer_ids, tree_tokens, names)
        assert encoded.features is not None
        with torch.no_grad():
            context = drafter.encode(encoded.features, ids, torch.arange(ids.shape[1]).expand(len(some), -1))
        traces = replay_chains(Replayer(target).prepare(drafter), context, some)
        return list(zip(traces, score_traces(target, encoded, traces), strict=True))

    for text, (trace, scores) in zip(group, scored(adapted.target, group, ROWS), strict=True):
        ((expected, wanted),) = scored(adapted.merged[text.adapter], [text], [""])
        np.testing.assert_array_equal(trace.proposed, expected.proposed)
        np.testing.assert_allclose(scores.target_logprobs, wanted.target_logprobs, atol=SCORE_TOLERANCE)
        np.testing.assert_allclose(scores.best_logprob, wanted.best_logprob, atol=SCORE_TOLERANCE)


def test_speculative_answers_under_adapters_are_those_of_merged_models(adapted: Adapted) -> None:
    prompts = [each.tokens[:6] for each in trajectories(9, seed=3)]
    names = [["a", "b", ""][index % 3] for index in range(9)]
    requests = [Request(str(i), ids, 24, adapter=names[i]) for i, ids in enumerate(prompts)]
    drafter = random_drafter(adapted.target)
    engine = EmbeddedEngine(adapted.target, drafter, slots=3, capacity=64)  # rows are used by several adapters
    answers = {done.request.request_id: done.response_ids for done in engine.generate(requests)}
    for name in ("a", "b", ""):
        own = [Request(r.request_id, r.prompt_ids, 24) for r in requests if r.adapter == name]
        for done in EmbeddedEngine(adapted.merged[name], slots=1, capacity=64).generate(own):
            assert answers[done.request.request_id] == done.response_ids


@pytest.mark.parametrize("memory", ["none", "keys", "features"])
def test_a_training_reads_each_answer_under_its_adapter(memory: str, adapted: Adapted) -> None:
    layer_ids = (2, 0, 1, 3)  # features of 640 bytes a token, keys and values of 512
    of_token = {"none": 100, "keys": 576, "features": 1000}[memory]
    megabytes = sum(len(text.tokens) for text in texts()) * of_token / 2**20
    config = SftConfig(tokens_per_target_forward=60).model_copy(update={"feature_memory_mb": megabytes})
    batch = FeatureSource(adapted.target, layer_ids, texts(), config, tree_tokens=16).batch([3, 0, 2, 1])
    assert bool(batch.kept) == (memory == "keys")
    if batch.kept:
        steps = np.zeros((1, 4), dtype=np.int64)
        traces = [Trace(len(t.tokens), np.array([5]), np.array([0]), steps + 1, 1) for t in batch.trajectories]
        ours, again = (score(adapted.target, batch.trajectories, traces, 60, kept) for kept in (batch.kept, ()))
        for one, other in zip(ours, again, strict=True):
            np.testing.assert_allclose(one.target_logprobs, other.target_logprobs, atol=SCORE_TOLERANCE)
    for row, text in enumerate(batch.trajectories):
        expected = adapted.merged[text.adapter].read(torch.tensor([text.tokens]), layer_ids)
        assert expected.features is not None and batch.hidden is not None
        close(batch.features[row, : len(text.tokens)], expected.features[0])
        close(batch.hidden[row, : len(text.tokens)], expected.hidden[0])


@pytest.mark.parametrize(
    "family",
    [
        "gpt-oss",
        "Gemma 3 with images",
        "Qwen3-Next",
        "Nemotron-H",
        "Kimi Linear",
        "DeepSeek-V3",
        "Llama 4",
        "Gemma 4 E2B",
    ],
)
def test_all_maps_of_other_families_are_adapted(family: str, tmp_path: Path) -> None:
    """Some read positions of all rows at once, some have states."""
    write_family(tmp_path / "model", family)
    kind = model_class(AutoConfig.from_pretrained(tmp_path / "model"))
    model = load_weights(kind, tmp_path / "model", dtype=torch.float32).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, module in linear_maps(model).items():
        a, b = (0.2 * torch.randn(s, generator=generator) for s in ((2, module.in_features), (module.out_features, 2)))
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        module.weight += b @ a
    (tmp_path / "x").mkdir()
    save_file(tensors, tmp_path / "x" / "adapter_model.safetensors")
    (tmp_path / "x" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    target = Target.from_source(tmp_path / "model", "float32", "cpu", {"x": tmp_path / "x"})
    ids, names = torch.randint(0, 50, (3, 12), generator=generator), ["x", "", "x"]
    expected, alone = Target(model, None, target.info).read(ids).hidden, target.read(ids).hidden
    read = target.read(ids, adapters=names).hidden
    cache, positions = target.new_cache(3, 12), torch.arange(12).expand(3, -1)
    target.set_adapters(cache, slice(0, 3), names)
    begun = target.step(ids[:, :7], positions[:, :7], cache, slice(0, 3)).hidden
    rest = target.step(ids[:, 7:], positions[:, 7:], cache, torch.arange(3), length=12).hidden
    for ours in (read, torch.cat([begun, rest], 1)):
        for row, wanted in ((0, expected), (1, alone), (2, expected)):
            assert float((ours[row] - wanted[row]).norm() / wanted[row].norm()) < 1e-5
    assert float((expected[0] - alone[0]).norm() / alone[0].norm()) > 0.3


def test_packed_maps_in_bfloat16_are_adapted(tmp_path: Path, adapted: Adapted) -> None:
    """The last map of a joined group alone has an adapter; the fast forward has the bits of the model's own."""
    folders = {"b": adapter_folders(adapted.artifact)["b"]}
    target = Target.load(resolve(tmp_path / "t", adapted.model, folders, "bfloat16"), device="cpu")
    ids, cache = torch.arange(24).view(2, 12), target.new_cache(2, 12)
    target.set_adapters(cache, slice(0, 2), ["b", ""])
    fast = target.step(ids, torch.arange(12).expand(2, -1), cache, slice(0, 2)).hidden
    target.__dict__["_fast"] = None
    own = target.step(ids, torch.arange(12).expand(2, -1), cache, slice(0, 2)).hidden
    assert torch.equal(fast, own)
    exact = adapted.target.read(ids, adapters=["b", ""]).hidden
    assert float((fast.float() - exact).norm() / exact.norm()) < 0.05
    assert isinstance(target.decoder.layers[0].self_attn.v_proj, AdaptedLinear)


def test_an_adapter_of_peft_is_read_as_peft_reads_it(tmp_path: Path, adapted: Adapted) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(adapted.model, dtype=torch.float32)

    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["k_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model(), config).save_pretrained(tmp_path / "adapter")
    ours = Target.from_source(adapted.model, "float32", "cpu", {"x": tmp_path / "adapter"})
    theirs = PeftModel.from_pretrained(model(), tmp_path / "adapter")
    ids = torch.arange(30).view(2, 15)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    logits = ours.logits(ours.read(ids, adapters=["x", "x"]).hidden)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)
    assert float((logits - ours.logits(ours.read(ids).hidden)).abs().max()) > 0.1


def test_the_digest_knows_the_adapters_and_without_them_nothing_changes(tmp_path: Path, adapted: Adapted) -> None:
    plain = resolve(tmp_path / "plain", adapted.model, {})
    raw = json.loads((plain / "target.json").read_text())
    assert "adapters" not in raw and not (plain / "adapters").exists()
    assert raw["digest"] == model_digest(adapted.model, weight_files(adapted.model))
    info = read_target_info(adapted.artifact)
    assert list(info.adapters) == ["a", "b"] and info.digest != raw["digest"]
    assert info.tokenizer_digest == raw["tokenizer_digest"]
    other = adapter_folders(adapted.artifact)
    changed = write_adapter(tmp_path / "b", adapted.model, ATTENTION[1:], rank=5, alpha=3, seed=3)
    again = read_target_info(resolve(tmp_path / "again", adapted.model, other))
    assert again == info.model_copy(update={"location": again.location})
    assert read_target_info(resolve(tmp_path / "new", adapted.model, other | {"b": changed})).digest != info.digest
    renamed = {"a": other["a"], "c": other["b"]}
    assert read_target_info(resolve(tmp_path / "renamed", adapted.model, renamed)).digest != info.digest


edit = partial(set_fields, "adapter_config.json")


def add(name: str, *shape: int) -> Edit:
    def change(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(load_file(path) | {name: torch.zeros(shape)}, path)

    return change


V = f"{PREFIX}model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (remove("adapter_config.json"), "has no adapter_config.json. Give a folder that peft's"),
        (remove("adapter_model.safetensors"), "has no adapter_model.safetensors"),
        (edit(peft_type="IA3"), "is of type IA3. Give a LoRA adapter"),
        (edit(r=None), "is no LoRA adapter (TypeError"),
        (edit(use_dora=True), "has use_dora. Give a LoRA adapter"),
        (edit(use_rslora=True), "has use_rslora."),
        (edit(modules_to_save=["lm_head"]), "has modules_to_save."),
        (edit(alpha_pattern={"v_proj": 2}), "has alpha_pattern."),
        (edit(bias="all"), "has bias."),
        (edit(r=4), "q_proj of shapes {'A': (3, 32), 'B': (32, 3)}, the target needs {'A': (4, 32), 'B': (32, 4)}"),
        (add(f"{V}.lora_A.weight", 3, 30), "of shapes {'A': (3, 30), 'B'"),
        (add(f"{V[:-6]}k_proj.lora_A.weight", 3, 32), "k_proj of shapes {'A': (3, 32)}, the target"),
        (add(f"{PREFIX}lm_head.lora_A.weight", 3, 32), "has base_model.model.lm_head.lora_A.weight, which adapts no"),
        (add(f"{PREFIX}model.embed_tokens.lora_embedding_A", 3, 32), "embed_tokens.lora_embedding_A, which adapts no"),
        (add(f"{PREFIX}model.layers.9.mlp.up_proj.lora_A.weight", 3, 32), "layers.9.mlp.up_proj.lora_A.weight, which"),
    ],
)
def test_what_is_no_adapter_of_the_target_is_refused(damage: Edit, text: str, tmp_path: Path, adapted: Adapted) -> None:
    folder = write_adapter(tmp_path / "x", adapted.model, ATTENTION)
    damage(folder)
    with pytest.raises(DraftsmithError) as caught:
        resolve(tmp_path / "out", adapted.model, {"x": folder})
    assert str(caught.value).startswith(f"target.adapters.x: {folder} ") and "\n" not in str(caught.value)
    assert text in str(caught.value)


@pytest.mark.parametrize("name", ["base", "a b", "x=y", "", "-r"])
def test_names_of_adapters_are_plain(name: str) -> None:
    with pytest.raises(ValueError, match="is no adapter's name"):
        TargetConfig(source="x", adapters={name: "folder"})


def test_an_unknown_adapter_and_a_divided_target_are_refused(adapted: Adapted) -> None:
    with pytest.raises(DraftsmithError, match=r"adapter c: the target has a, b\. Add it to target\.adapters\."):
        adapted.target.read(torch.zeros(1, 3, dtype=torch.long), adapters=["c"])
    with pytest.raises(DraftsmithError, match=r"adapter a: the target has none\."):
        adapted.merged[""].features(torch.zeros(1, 3, dtype=torch.long), (0,), ["a"])
    with pytest.raises(DraftsmithError, match=r"target_parallel: a target with adapters cannot be divided"):
        check_divides(adapted.model, 2, ["a"])
