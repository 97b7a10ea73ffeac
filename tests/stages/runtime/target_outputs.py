"""The outputs of ranks that share a target: the entry of a rank, and the files that it writes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from draftsmith.stages.runtime.launch import note_start
from draftsmith.stages.runtime.ranks import Ranks, process_group
from draftsmith.stages.targets.causal_lm import Target

SHARING = 2
IDS = (torch.arange(3 * 26).view(3, 26) * 7 + 3).remainder(50)  # several windows long
LAYERS = (1, 0)


@dataclass(frozen=True)
class TargetOutputs:
    """The outputs of a target, whole or divided."""

    features: torch.Tensor  # [B, T, K*H]
    deepest_alone: torch.Tensor  # the same, of a forward that ends after the deepest layer
    logprobs: torch.Tensor  # [B, T, V]
    parameters: int  # in memory

    @classmethod
    def compute(cls, target: Target) -> TargetOutputs:
        out = target.read(IDS, LAYERS)
        assert out.features is not None
        parameters = [getattr(p, "_local_tensor", p) for p in target.model.parameters()]
        logprobs = target.logits(out.hidden).log_softmax(-1)
        return cls(out.features, target.features(IDS, LAYERS), logprobs, sum(p.numel() for p in parameters))


def write_outputs(artifacts: Mapping[str, str], folder: str) -> int:
    """Write the outputs of one rank for every artifact."""
    torch.set_num_threads(1)
    note_start(Path(folder) / "ranks", int(os.environ["RANK"]))
    with process_group():
        ranks = Ranks.current(SHARING)
        for name, artifact in artifacts.items():
            outputs = TargetOutputs.compute(Target.load(Path(artifact), device="cpu", ranks=ranks))
            torch.save(vars(outputs), Path(folder) / f"{name}.{ranks.rank}")
    return 0


def load_outputs(name: str, rank: int, folder: Path) -> TargetOutputs:
    return TargetOutputs(**torch.load(folder / f"{name}.{rank}"))
