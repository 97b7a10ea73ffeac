"""Spreads anchors evenly over answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.runtime.memory import to_device


def position_anchors(
    trajectories: Sequence[Trajectory], per_sequence: int, shifts: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Return `per_sequence` evenly spaced positions of each answer as anchors [B, A], offset by its shift.

    shifts: [B], in [0, 1).
    Positions are different if the answer is long enough. Raises DraftsmithError for an answer without a position that
    has a following token.
    """
    for t in trajectories:
        if t.last_anchor < t.first_anchor:
            raise DraftsmithError(f"trajectory {t.trajectory_id}: the answer has one token. Remove it.")
    positions = [
        systematic_sample(np.arange(t.first_anchor, t.last_anchor + 1), per_sequence, shift)
        for t, shift in zip(trajectories, shifts, strict=True)
    ]
    return to_device(np.stack(positions), device)


def systematic_sample(candidates: np.ndarray, count: int, shift: float) -> np.ndarray:
    """Return `count` of the candidates [N], evenly spaced and in order, offset by `shift` in [0, 1).

    At a random shift each candidate is as probable as in independent sampling, but the blocks overlap little, and a
    step sees the whole answer. A candidate is taken twice only if there are fewer than `count`, so that all steps of a
    training have the same number of blocks whatever their anchors are.
    """
    indices = ((np.arange(count) + shift) * len(candidates) / count).astype(np.int64)
    return candidates[np.minimum(indices, len(candidates) - 1)]  # rounding may reach N
