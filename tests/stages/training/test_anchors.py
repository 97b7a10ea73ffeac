"""Anchors of a step: which positions are sampled, and answers that have none."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.training.anchors import position_anchors, systematic_sample
from draftsmith.stages.training.batches import step_rng

CPU = torch.device("cpu")


def test_an_answer_of_one_token_is_named() -> None:
    answers = [Trajectory("two", [1, 2, 3], 1), Trajectory("one", [1, 2], 1)]
    anchors = position_anchors(answers[:1], 3, np.zeros(1), CPU)
    assert anchors.tolist() == [[1, 1, 1]]
    with pytest.raises(DraftsmithError, match="trajectory one"):
        position_anchors(answers, 3, np.zeros(2), CPU)


def test_anchors_are_different_positions_with_a_following_token() -> None:
    """Positions of a shorter answer are taken several times, so that all steps have equally many blocks."""
    short, long = Trajectory("a", list(range(7)), 4), Trajectory("b", list(range(30)), 4)
    seen: Counter[tuple[int, int]] = Counter()
    for step in range(200):
        anchors = position_anchors([short, long], 5, step_rng(0, step).random(2), CPU)
        assert anchors.shape == (2, 5)
        assert len(set(anchors[1].tolist())) == 5
        seen.update((row, p) for row, positions in enumerate(anchors.tolist()) for p in positions)
    assert {p for row, p in seen if row == 0} == {4, 5}  # from the first answer token to the last but one
    assert {p for row, p in seen if row == 1} == set(range(4, 29))


def test_every_candidate_is_sampled_equally_often() -> None:
    """A mean over steps then weighs all positions alike: 5 of 23, 4,000 times, within 4 σ."""
    candidates, rng, seen = np.arange(10, 33), step_rng(0, 0), Counter[int]()
    for _ in range(4000):
        sampled = systematic_sample(candidates, 5, rng.random())
        assert list(sampled) == sorted(set(sampled))
        seen.update(sampled.tolist())
    expected = 4000 * 5 / 23
    assert set(seen) == set(candidates.tolist())
    assert max(abs(count - expected) for count in seen.values()) < 4 * (expected * (1 - 5 / 23)) ** 0.5
