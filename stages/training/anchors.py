"""Where blocks are trained: random positions of the response, or verify steps that mining found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stages.replay.trace import Trajectory
from stages.training.blocks import Anchors


def random_anchors(
    trajectories: Sequence[Trajectory], per_sequence: int, rng: np.random.Generator, device: torch.device
) -> Anchors:
    """Up to `per_sequence` positions with a token behind them, drawn without replacement."""
    chosen = []
    for trajectory in trajectories:
        positions = anchor_positions(trajectory)
        chosen.append(np.sort(rng.choice(positions, min(per_sequence, len(positions)), replace=False)))
    return pad_anchors(chosen, device)


def anchor_positions(trajectory: Trajectory) -> np.ndarray:
    """Every position of the response with a token behind it."""
    return np.arange(trajectory.first_anchor, trajectory.last_anchor + 1)


def draw_exactly(candidates: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` of the candidates in order; one is drawn again only where there are fewer, so that every step of training
    has the same number of blocks whatever its anchors are."""
    return np.sort(rng.choice(candidates, count, replace=len(candidates) < count))


def pad_anchors(chosen: Sequence[np.ndarray], device: torch.device) -> Anchors:
    """Positions of each row, padded with copies of the last one that are not valid."""
    A = max(len(row) for row in chosen)
    positions = np.stack([np.pad(row, (0, A - len(row)), mode="edge") for row in chosen])
    valid = np.stack([np.arange(A) < len(row) for row in chosen])
    return Anchors(torch.from_numpy(positions).to(device), torch.from_numpy(valid).to(device))
