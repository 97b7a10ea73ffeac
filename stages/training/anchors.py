"""Which anchors a step trains, of all positions of a response or of the verify steps that mining found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.replay.trace import Trajectory
from draftsmith.stages.training.blocks import Anchors


def position_anchors(
    trajectories: Sequence[Trajectory], per_sequence: int, rng: np.random.Generator, device: torch.device
) -> Anchors:
    """`per_sequence` positions of each response, different ones where it is long enough."""
    return pad_anchors(drawn_positions(trajectories, per_sequence, rng.random(len(trajectories))), device)


def drawn_positions(trajectories: Sequence[Trajectory], per_sequence: int, phases: np.ndarray) -> list[np.ndarray]:
    """The same as [per_sequence] of each, at its phase in [0, 1) of `phases` [B].

    Raises DraftsmithError for a response without a position that has a token behind it.
    """
    for t in trajectories:
        if t.last_anchor < t.first_anchor:
            raise DraftsmithError(f"trajectory {t.trajectory_id}: an answer of one token trains nothing: leave it out")
    return [
        evenly(np.arange(t.first_anchor, t.last_anchor + 1), per_sequence, phase)
        for t, phase in zip(trajectories, phases, strict=True)
    ]


def evenly(candidates: np.ndarray, count: int, phase: float) -> np.ndarray:
    """`count` of the candidates [N], in order: one of every N/count neighbours, all at one phase in [0, 1).

    Systematic sampling: at a random phase each is as probable as if it were drawn alone, but the blocks behind them
    overlap little, and a step sees the whole response. One is drawn again only where there are fewer, so that every
    step of training has the same number of blocks whatever its anchors are.
    """
    places = ((np.arange(count) + phase) * len(candidates) / count).astype(np.int64)
    return candidates[np.minimum(places, len(candidates) - 1)]  # rounding


def pad_anchors(chosen: Sequence[np.ndarray], device: torch.device) -> Anchors:
    """Positions of each row, padded with copies of the last one that are not valid."""
    A = max(len(row) for row in chosen)
    positions = np.stack([np.pad(row, (0, A - len(row)), mode="edge") for row in chosen])
    valid = np.stack([np.arange(A) < len(row) for row in chosen])
    return Anchors(torch.from_numpy(positions).to(device), torch.from_numpy(valid).to(device))
