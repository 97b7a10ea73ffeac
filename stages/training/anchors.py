"""Where blocks are trained: random positions of the response, or verify steps that mining found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from stages.replay.trace import Trajectory
from stages.training.objectives import Anchors


def random_anchors(
    trajectories: Sequence[Trajectory], per_sequence: int, rng: np.random.Generator, device: torch.device
) -> Anchors:
    """Up to `per_sequence` positions with a token behind them, drawn without replacement."""
    chosen = []
    for trajectory in trajectories:
        positions = np.arange(trajectory.first_anchor, trajectory.last_anchor + 1)
        chosen.append(np.sort(rng.choice(positions, min(per_sequence, len(positions)), replace=False)))
    return pad_anchors(chosen, device)


def pad_anchors(chosen: Sequence[np.ndarray], device: torch.device) -> Anchors:
    """Positions of each row, padded with copies of the last one that are not valid."""
    A = max(len(row) for row in chosen)
    positions = np.stack([np.pad(row, (0, A - len(row)), mode="edge") for row in chosen])
    valid = np.stack([np.arange(A) < len(row) for row in chosen])
    return Anchors(torch.from_numpy(positions).to(device), torch.from_numpy(valid).to(device))
