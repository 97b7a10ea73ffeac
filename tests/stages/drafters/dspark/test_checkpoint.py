"""DSpark checkpoints: round trips, checkpoints of other trainers, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import load_drafter, plan_of_checkpoint, save_drafter
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.target.causal_lm import Target
from tests.stages.drafters.edits import edit_config
from tests.testbed.dspark import random_dspark


@pytest.fixture
def saved(tmp_path: Path, plain_target: Target) -> Path:
    save_drafter(random_dspark(plain_target), tmp_path / "drafter", torch.float32)
    return tmp_path / "drafter"


def same(a: DSparkDrafter, b: Any) -> bool:
    assert isinstance(b, DSparkDrafter)
    theirs = dict(b.named_parameters())
    return (a.block_size, a.from_anchor) == (b.block_size, b.from_anchor) and all(
        torch.equal(p, theirs[name]) for name, p in a.named_parameters()
    )


@pytest.mark.parametrize("from_anchor", [True, False])
@pytest.mark.parametrize("reads_token", [True, False])
def test_the_round_trip_with_a_confidence_head(
    from_anchor: bool, reads_token: bool, plain_target: Target, tmp_path: Path
) -> None:
    drafter = random_dspark(plain_target, from_anchor=from_anchor, confidence_reads_token=reads_token)
    save_drafter(drafter, tmp_path / "first", torch.float32)
    loaded = load_drafter(tmp_path / "first", plain_target)
    assert same(drafter, loaded)
    save_drafter(loaded, tmp_path / "again", torch.float32)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_in_half_precision_the_confidence_stays_float32(plain_target: Target, tmp_path: Path) -> None:
    save_drafter(random_dspark(plain_target), tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float32} == {
        "confidence_head.proj.weight",
        "confidence_head.proj.bias",
    }
    loaded = load_drafter(tmp_path, plain_target, torch.bfloat16)
    assert isinstance(loaded, DSparkDrafter) and loaded.confidence_head is not None
    assert loaded.confidence_head.proj.weight.dtype == torch.float32
    assert loaded.markov_head.markov_w1.weight.dtype == torch.bfloat16


def test_the_authors_own_layout_is_read(saved: Path, plain_target: Target) -> None:
    """It has fields at the top, the target's embedding and head among the tensors, and names with a prefix."""

    def flat(raw: dict[str, Any]) -> None:
        nested = raw.pop("dflash_config")
        raw |= {name: nested[name] for name in ("mask_token_id", "target_layer_ids")}
        raw |= {"architectures": ["DSparkDraftModel"], "num_anchors": 512}
        del raw["sample_from_anchor"]

    edit_config(flat)(saved)
    tensors = {f"model.{name}": tensor for name, tensor in load_file(saved / "model.safetensors").items()}
    shared = {"model.embed_tokens.weight": plain_target.embedding, "lm_head.weight": plain_target.head_weight}
    save_file(tensors | {name: tensor.clone() for name, tensor in shared.items()}, saved / "model.safetensors")
    assert same(random_dspark(plain_target), load_drafter(saved, plain_target))


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no bias": (lambda raw: raw.update(markov_rank=0), "markov_rank is 0"),
    "no rank": (lambda raw: raw.pop("markov_rank"), "markov_rank is missing"),
    "no kind": (lambda raw: raw.pop("markov_head_type"), "markov_head_type is missing"),
    "two kinds": (lambda raw: raw["dflash_config"].update(markov_head_type="rnn"), "is given as vanilla and as rnn"),
    "another head": (
        lambda raw: raw.update(markov_head_type="rnn"),
        "markov_head_type is 'rnn'",
    ),
    "a confidence without its width": (
        lambda raw: raw.update(confidence_head_with_markov=False),
        r"has the wrong shape for confidence_head\.proj\.weight",
    ),
    "no word of a confidence": (
        lambda raw: raw.update(confidence_head_with_markov=None),
        "confidence_head_with_markov is",
    ),
    "two block sizes": (lambda raw: raw.update(block_size=7), "block_size is given as 7 and as 4"),
    "no proposals": (lambda raw: (raw.update(block_size=0), raw["dflash_config"].pop("block_size")), "block_size is 0"),
    "inside its target": (lambda raw: raw.update(dspark_markov_rank=6), "dspark_markov_rank is of a drafter inside"),
    "no word": (lambda raw: raw.update(sample_from_anchor="yes"), "sample_from_anchor is 'yes'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_configs_are_refused(name: str, saved: Path, plain_target: Target) -> None:
    change, message = REFUSED[name]
    edit_config(change)(saved)
    with pytest.raises(DraftsmithError, match=message):
        load_drafter(saved, plain_target)


def test_the_plan_of_an_upgrade_describes_the_trained_drafter(plain_target: Target, tmp_path: Path) -> None:
    from tests.testbed.random_target import random_drafter

    before = random_drafter(plain_target)
    save_drafter(before, tmp_path, torch.float32)
    shape = DSparkConfig(kind="dspark", markov_rank=6)
    tokenizer = lambda: plain_target.tokenizer  # noqa: E731
    plan = plan_of_checkpoint(tmp_path, plain_target.model.config, "here", tokenizer, shape)
    assert (plan.kind, plan.block_size) == ("dspark", before.block_size)
    own = sum(p.numel() for p in before.parameters())
    assert plan.parameters == own + 2 * 6 * 64 + (32 + 6) + 1
    assert "DSpark" in plan.description and "rank 6" in plan.description
