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
    return pad_anchors([draw_evenly(anchor_positions(t), per_sequence, rng) for t in trajectories], device)


def anchor_positions(trajectory: Trajectory) -> np.ndarray:
    """Every position of the response with a token behind it. Raises DraftsmithError if there is none."""
    if trajectory.last_anchor < trajectory.first_anchor:
        raise DraftsmithError(
            f"trajectory {trajectory.trajectory_id}: an answer of one token trains nothing: leave it out"
        )
    return np.arange(trajectory.first_anchor, trajectory.last_anchor + 1)


def draw_evenly(candidates: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the candidates [N], in order: one of every N/count neighbours, all at one random phase.

    Systematic sampling: each is as probable as if it were drawn alone, but the blocks behind them overlap little, and a
    step sees the whole response. One is drawn again only where there are fewer, so that every step of training has the
    same number of blocks whatever its anchors are.
    """
    return evenly(candidates, count, rng.random())


def evenly(candidates: np.ndarray, count: int, phase: float) -> np.ndarray:
    """The same at a phase in [0, 1)."""
    places = ((np.arange(count) + phase) * len(candidates) / count).astype(np.int64)
    return candidates[np.minimum(places, len(candidates) - 1)]  # rounding


def pad_anchors(chosen: Sequence[np.ndarray], device: torch.device) -> Anchors:
    """Positions of each row, padded with copies of the last one that are not valid."""
    A = max(len(row) for row in chosen)
    positions = np.stack([np.pad(row, (0, A - len(row)), mode="edge") for row in chosen])
    valid = np.stack([np.arange(A) < len(row) for row in chosen])
    return Anchors(torch.from_numpy(positions).to(device), torch.from_numpy(valid).to(device))
