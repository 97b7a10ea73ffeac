"""What ranks say that share targets: body of a rank, and where it leaves it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from draftsmith.stages.runtime.launch import note_start
from draftsmith.stages.runtime.ranks import Ranks, process_group
from draftsmith.stages.target.causal_lm import Target

SHARING = 2
IDS = (torch.arange(3 * 26).view(3, 26) * 7 + 3).remainder(50)  # several windows long
LAYERS = (1, 0)


@dataclass(frozen=True)
class Said:
    """Of one target, whole or a part of it."""

    features: torch.Tensor  # [B, T, K*H]
    alone: torch.Tensor  # the same, of a forward that ends behind the deepest layer
    logprobs: torch.Tensor  # [B, T, V]
    parameters: int  # that are held

    @classmethod
    def by(cls, target: Target) -> Said:
        out = target.read(IDS, LAYERS)
        assert out.features is not None
        held = [getattr(p, "_local_tensor", p) for p in target.model.parameters()]
        logprobs = target.logits(out.hidden).log_softmax(-1)
        return cls(out.features, target.features(IDS, LAYERS), logprobs, sum(p.numel() for p in held))


def say(artifacts: Mapping[str, str], folder: str) -> int:
    """Body of a rank."""
    torch.set_num_threads(1)
    note_start(Path(folder) / "ranks", int(os.environ["RANK"]))
    with process_group():
        ranks = Ranks.current(SHARING)
        for name, artifact in artifacts.items():
            said = Said.by(Target.load(Path(artifact), device="cpu", ranks=ranks))
            torch.save(vars(said), Path(folder) / f"{name}.{ranks.rank}")
    return 0


def said_by(name: str, rank: int, folder: Path) -> Said:
    return Said(**torch.load(folder / f"{name}.{rank}"))
