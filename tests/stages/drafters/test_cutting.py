"""The rule by which blocks are cut, against plain loops and against SGLang's; where it may be asked for."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.drafters.cutting import KeptSoFar, verified
from draftsmith.stages.measure.config import EvaluationConfig
from draftsmith.stages.measure.drift import DriftConfig
from draftsmith.stages.mining import MiningConfig
from draftsmith.stages.rollout import RolloutConfig

SAID = 2 * torch.randn(40, 6, generator=torch.Generator().manual_seed(0))  # logits
THRESHOLDS = [0.05, 0.3, 0.7]


def plainly(logits: list[float], threshold: float) -> int:
    kept = 1.0
    for count, logit in enumerate(logits):
        kept *= 1 / (1 + math.exp(-logit))
        if kept < threshold:
            return count
    return len(logits)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_a_block_is_cut_where_it_is_no_longer_probable_that_all_is_kept(threshold: float) -> None:
    expected = [plainly(row, threshold) for row in SAID.tolist()]
    assert len(set(expected)) > 2
    assert verified(SAID, threshold).tolist() == expected
    kept = KeptSoFar(threshold)
    by_offset = torch.stack([kept.take(SAID[:, k]) for k in range(SAID.shape[1])], 1)
    assert by_offset.sum(1).tolist() == expected
    assert torch.equal(by_offset, by_offset.long().cumprod(1).bool())  # nothing behind the cut


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_it_is_sglangs_rule_for_as_many_proposals(threshold: float) -> None:
    """SGLang gives so many proposals to all requests together, in the order of the probability that they are reached
    and kept (srt/speculative/dspark_components/dspark_planner.py)."""
    lengths = verified(SAID, threshold)
    survival = [(value, row) for row, of_row in enumerate(SAID.sigmoid().cumprod(1).tolist()) for value in of_row]
    admitted = [row for _, row in sorted(survival, reverse=True)[: int(lengths.sum())]]
    assert lengths.tolist() == [admitted.count(row) for row in range(len(SAID))]


def test_it_is_a_part_of_keys_only_where_it_is_set() -> None:
    """What is made without it keeps its key."""
    cut = DraftingConfig(confidence=0.4)
    assert DraftingConfig().key_material() == {"block_size": None, "head_tokens": None}
    assert cut.key_material() == {"block_size": None, "head_tokens": None, "confidence": 0.4}
    for kind in (RolloutConfig, MiningConfig, DriftConfig):
        material = kind(drafting=cut).key_material()
        assert material["drafting"].pop("confidence") == 0.4
        assert material == kind().key_material()
    material = EvaluationConfig(confidence=0.4).key_material()
    assert material.pop("confidence") == 0.4
    assert material == EvaluationConfig().key_material()


SGLANG = {"kind": "sglang", "launch": {}, "python": "p"}


@pytest.mark.parametrize("value", [0, 1, -0.5, "half"])
def test_it_is_a_probability(value: object) -> None:
    with pytest.raises(ValidationError, match="confidence"):
        DraftingConfig.model_validate({"confidence": value})


def test_sglang_is_not_asked_for_it() -> None:
    with pytest.raises(ValidationError, match=r"drafting\.confidence: SGLang cuts blocks by its load"):
        RolloutConfig.model_validate({"engine": SGLANG, "drafting": {"confidence": 0.5}})
    with pytest.raises(ValidationError, match="confidence: SGLang cuts blocks by its load"):
        EvaluationConfig.model_validate({"engine": SGLANG, "confidence": 0.5})
