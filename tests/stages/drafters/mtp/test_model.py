"""Native heads of every family against a plain reference, and in decoding and replay."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.stages.drafters.mtp.model import MtpDrafter
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.mtp.reference import RULES, Reference, Rules
from tests.stages.drafters.test_architectures import (  # noqa: F401  the shared checks, on a target with a head
    test_decoding_is_lossless_and_its_steps_are_those_of_replay,
    test_drafting_from_slots_equals_drafting_from_a_full_context,
    test_packed_blocks_equal_one_at_a_time,
    test_proposals_are_the_best_token_of_every_offset_also_in_chunks,
    test_replay_is_sequential_speculative_decoding,
    test_sampler_probabilities_equal_those_of_training,
)
from tests.stages.drafters.texts import Texts
from tests.testbed.mtp import MODELS, native_head

TOLERANCE = 1e-5  # float32 against float64, relative and absolute, on values of order one
ANCHORS = torch.tensor([[4, 7, 1, 11, 8]])


@pytest.fixture(params=MODELS)
def plain_target(request: pytest.FixtureRequest, targets: dict[str, Target]) -> Target:
    """Return a target for the shared checks."""
    return targets[request.param]


@pytest.fixture
def drafter(plain_target: Target) -> MtpDrafter:
    return native_head(plain_target, block_size=5)


@pytest.fixture
def texts(plain_target: Target, drafter: MtpDrafter) -> Texts:
    return Texts(plain_target, drafter)


def unrolled(target: Target, family: str, rules: Rules, texts: Texts) -> torch.Tensor:
    """Return the reference's hidden states [A, K, H] of the chains after `ANCHORS` on the text's own tokens."""
    assert target.folder is not None
    plain = Reference(_tensors(target.folder), target.config, family, rules)
    tokens, chains = texts.trajectories[0].tokens, texts.chains(ANCHORS)[0].tolist()
    each = zip(ANCHORS[0].tolist(), chains, strict=True)
    return torch.stack([plain.unroll(texts.features[0], tokens, anchor, chain) for anchor, chain in each])


@cache
def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("family", "engine"), RULES)
@torch.no_grad()
def test_chains_equal_the_plain_float64_reference(family: str, engine: str, targets: dict[str, Target]) -> None:
    target = targets[family]
    texts = Texts(target, native_head(target, 5, engine), count=1, seed=3)
    hidden = texts.drafter.block_hidden(texts.context(), texts.chains(ANCHORS), ANCHORS)[0]
    expected = unrolled(target, family, RULES[family, engine], texts)
    torch.testing.assert_close(hidden.double(), expected, atol=TOLERANCE, rtol=TOLERANCE)
    head = target.head_weight.double()
    assert torch.equal((hidden.double() @ head.T).argmax(-1), (expected @ head.T).argmax(-1))


PARTS: dict[str, dict[str, Any]] = {
    "the order of the joined parts": {"hidden_first": None},
    "the embedding at position 0": {"zeroes_first": None},
    "the target's final norm": {"from_normed": None},
    "what is fed back": {"feeds_normed": None},
    "the embedding's norm": {"skips": frozenset({"embedding's norm"})},
    "the hidden state's norm": {"skips": frozenset({"hidden norm"})},
    "shared experts": {"skips": frozenset({"shared experts"})},
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_shows_in_the_result(part: str, targets: dict[str, Target]) -> None:
    """So that equality with the reference means that the part is right."""
    family = "glm4_moe"
    texts = Texts(targets[family], native_head(targets[family], 5), count=1, seed=3)
    rules = RULES[family, "sglang"]
    changed: dict[str, Any] = {
        name: not getattr(rules, name) if value is None else value for name, value in PARTS[part].items()
    }
    right, wrong = (unrolled(targets[family], family, each, texts) for each in (rules, replace(rules, **changed)))
    assert float((right - wrong).abs().max()) > 100 * TOLERANCE


def test_engines_read_some_heads_differently(targets: dict[str, Target]) -> None:
    for family, differ in {"mimo": True, "glm4_moe": True, "deepseek_v3": True, "qwen3_5_text": False}.items():
        found = []
        for engine in ("sglang", "vllm"):
            texts = Texts(targets[family], native_head(targets[family], 5, engine), count=1, seed=3)
            with torch.no_grad():
                found.append(texts.drafter.block_hidden(texts.context(), texts.chains(ANCHORS), ANCHORS))
        assert torch.equal(*found) is not differ
