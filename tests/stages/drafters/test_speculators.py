"""The layout of the speculators library, written and read back: what vLLM loads is the drafter that was trained here.

Its fields are held here; `tests/integration/test_speculators.py` has them read by the library itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import check_complete, load_drafter, save_drafter
from draftsmith.stages.drafters.export import export_speculators
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import SGLangEngineConfig, VLLMEngineConfig
from draftsmith.stages.engines.servers.requirements import server_requirements
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import model_path
from tests.stages.drafters.edits import Edit, edit_tensors, setting, without
from tests.testbed.dflash2 import random_dflash2
from tests.testbed.dspark import random_dspark
from tests.testbed.eagle3 import random_eagle3
from tests.testbed.families import write_family
from tests.testbed.random_target import random_drafter, windows

FORMS: dict[str, Any] = {
    "dflash": random_drafter,
    "dflash, windows": lambda t: random_drafter(t, **windows(3)),
    "dflash, windows read both ways": lambda t: random_drafter(t, **windows(6), is_causal=False),
    "dflash2": random_dflash2,
    "dflash2, windows": lambda t: random_dflash2(t, **windows(6)),
    "dspark": random_dspark,
    "dspark, confidence of states": lambda t: random_dspark(t, confidence_reads_token=False),
    "dspark, upgraded": lambda t: random_dspark(t, from_anchor=False, confidence_head=False),
}


Export = Callable[[Drafter], Path]


@pytest.fixture
def exported(plain_artifact: Path, tmp_path: Path) -> Export:
    """Return a function that saves a drafter in the folder `own`, and returns the folder that it exports it to."""

    def export(drafter: Drafter, dtype: torch.dtype = torch.float32) -> Path:
        save_drafter(drafter, tmp_path / "own", dtype)
        export_speculators(tmp_path / "own", model_path(plain_artifact), "someone/target", tmp_path / "out")
        return tmp_path / "out"

    return export


@pytest.mark.parametrize("form", FORMS)
def test_an_exported_drafter_is_read_back_unchanged(
    form: str, plain_target: Target, exported: Export, tmp_path: Path
) -> None:
    drafter = FORMS[form](plain_target)
    folder = exported(drafter)
    check_complete(folder)
    loaded = load_drafter(folder, plain_target)
    assert type(loaded) is type(drafter)
    assert loaded.state_dict().keys() == drafter.state_dict().keys()
    assert all(tensor.equal(drafter.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert (loaded.spans, loaded.mask_token_id) == (drafter.spans, drafter.mask_token_id)
    assert (loaded.block_size, loaded.target_layer_ids) == (drafter.block_size, drafter.target_layer_ids)
    save_drafter(loaded, tmp_path / "again", torch.float32)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "own" / name).read_bytes(), name


def test_exported_fields_are_those_of_the_library(plain_target: Target, exported: Export, tmp_path: Path) -> None:
    folder = exported(random_dflash2(plain_target, **windows(6)))
    config = json.loads((folder / "config.json").read_text())
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "dflash2"
    verifier = {"name_or_path": "someone/target", "architectures": ["Qwen3ForCausalLM"]}
    assert config["speculators_config"]["verifier"] == verifier
    assert config["speculators_config"]["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 4}]
    assert config["aux_hidden_state_layer_ids"] == [3, 1]  # of layers 2 and 0
    assert (config["block_size"], config["mask_token_id"], config["draft_vocab_size"]) == (5, 62, 64)
    assert (config["sliding_window_non_causal"], config["sample_from_anchor"]) == (False, False)
    layers = config["transformer_layer_config"]
    assert (layers["sliding_window"], layers["layer_types"][0]) == (6, "sliding_attention")
    assert layers["model_type"] == "qwen3"
    assert "dflash_config" not in layers and "architectures" not in layers
    tensors = load_file(folder / "model.safetensors")
    assert tensors["embed_tokens.weight"].equal(plain_target.embedding)
    assert tensors["lm_head.weight"].equal(plain_target.head_weight)
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert tensors.keys() == {*own, "embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("from_anchor", [True, False])
def test_exported_dspark_fields_are_those_of_the_library(
    from_anchor: bool, plain_target: Target, exported: Export
) -> None:
    folder = exported(random_dspark(plain_target, from_anchor=from_anchor))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["DSparkDraftModel"]
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "dspark"
    assert config["speculators_config"]["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 4}]
    assert (config["sample_from_anchor"], config["block_size"]) == (from_anchor, 4 if from_anchor else 5)
    assert (config["markov_rank"], config["markov_head_type"]) == (6, "vanilla")
    assert config["enable_confidence_head"] and config["confidence_head_with_markov"]
    layers = config["transformer_layer_config"]
    assert not {"markov_rank", "sample_from_anchor", "dflash_config", "block_size"} & layers.keys()

    for field in ("sample_from_anchor", "markov_head_type", "enable_confidence_head"):  # what the library takes then
        config.pop(field)
    if from_anchor:
        (folder / "config.json").write_text(json.dumps(config))
        assert load_drafter(folder, plain_target).block_size == 5


TRAPS: dict[str, tuple[Edit, str]] = {
    "another kind": (setting(speculators_model_type="peagle"), "'peagle'"),
    "a reduced vocabulary": (setting(draft_vocab_size=40), "draft_vocab_size is 40"),
    "proposals from the anchor on": (setting(sample_from_anchor=True), "sample_from_anchor"),
    "no layer ids": (without("aux_hidden_state_layer_ids"), "target_layer_ids is missing"),
    "no layers": (without("transformer_layer_config"), "transformer_layer_config is missing"),
    "another head": (edit_tensors(lambda t: t["lm_head.weight"].add_(1)), r"lm_head\.weight is not the target's"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_unsupported_configs_are_refused(name: str, plain_target: Target, exported: Export) -> None:
    folder, (edit, message) = exported(random_drafter(plain_target)), TRAPS[name]
    edit(folder)
    with pytest.raises(DraftsmithError, match=message):
        load_drafter(folder, plain_target)


@pytest.mark.parametrize("from_anchor", [True, False])
def test_a_dspark_that_sglang_reads_one_slot_off_is_refused_in_this_layout_alone(
    from_anchor: bool, plain_target: Target, plain_artifact: Path, exported: Export, tmp_path: Path
) -> None:
    folder = exported(random_dspark(plain_target, from_anchor=from_anchor, target_layer_ids=(0, 2)))

    def block_size(drafter: Path, engine: Any) -> int | None:
        return server_requirements(engine, plain_artifact, drafter, DraftingConfig(), 50).block_size

    sglang = SGLangEngineConfig(kind="sglang", urls=("http://localhost:1",))
    vllm = VLLMEngineConfig(kind="vllm", urls=("http://localhost:1",))
    if not from_anchor:
        with pytest.raises(DraftsmithError, match=r"out: .*sample_from_anchor: false, which SGLang reads one slot off"):
            block_size(folder, sglang)
    assert {block_size(tmp_path / "own", sglang), block_size(folder, vllm)} == {5}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (random_eagle3, "does not support LlamaForCausalLMEagle3"),
        (lambda t: random_drafter(t, is_causal=True), "is_causal is true"),
        (lambda t: random_dflash2(t, conv_kernel_size=0, conv_group_size=0), "has no convolutions"),
        (
            lambda t: random_dflash2(t, **windows(6, "sliding_attention", "full_attention")),
            "vLLM would make all layers alike",
        ),
    ],
)
def test_a_drafter_that_the_library_cannot_represent_is_not_exported(
    make: Any, message: str, plain_target: Target, exported: Export, tmp_path: Path
) -> None:
    with pytest.raises(DraftsmithError, match=message):
        exported(make(plain_target))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("form", "both_ways"),
    [("dflash", True), ("dflash, windows", False), ("dflash, windows read both ways", True), ("dspark", True)],
)
def test_one_field_sets_the_reading_direction_of_all_layers(
    form: str, both_ways: bool, plain_target: Target, exported: Export
) -> None:
    """vLLM applies the opposite of the field as `causal` to full layers too (vllm-project/vllm#56692)."""
    drafter = FORMS[form](plain_target)
    config = json.loads((exported(drafter) / "config.json").read_text())
    assert config["sliding_window_non_causal"] is both_ways
    assert {sight.causal for sight in drafter.spans} == {not both_ways}


def test_embedding_and_head_are_stored_in_the_backbones_dtype(plain_target: Target, exported: Any) -> None:
    tensors = load_file(exported(random_dspark(plain_target), torch.bfloat16) / "model.safetensors")
    assert {tensors[name].dtype for name in ("embed_tokens.weight", "lm_head.weight", "fc.weight")} == {torch.bfloat16}
    assert tensors["confidence_head.proj.weight"].dtype == torch.float32


def test_a_target_that_scales_its_embedding_is_refused(plain_target: Target, tmp_path: Path) -> None:
    write_family(tmp_path / "gemma", "Gemma 2")
    save_drafter(random_drafter(plain_target), tmp_path / "own", torch.float32)
    with pytest.raises(DraftsmithError, match="multiplies its embedding by 5"):
        export_speculators(tmp_path / "own", tmp_path / "gemma", "someone/target", tmp_path / "out")
