"""Near-ties in float32: steps of the same drafter where sums in another order have made another token the best.

An engine's kernels, those of replay and those of a batch of another shape add in other orders. Such steps lead to other
anchors, so all steps of the answer are judged: each by itself, at its own anchor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pyarrow as pa
import torch

from draftsmith.artifacts.tables.parquet import pad_lists
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import PreparedDrafter
from draftsmith.stages.replay.parity import ExplainedByTies
from draftsmith.stages.replay.proof import Anchored
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target

TIE = 1e-4  # logits: kernels differ by about a tenth of it


def explained_by_ties(
    load: Callable[[], tuple[Target, PreparedDrafter]], trajectory: Callable[[str], Trajectory]
) -> ExplainedByTies:
    """Return a function of a trajectory's id and its served steps (TRACE): whether near-ties alone explain them.

    load: loads target and drafter, at the first call. trajectory: returns the one of an id.
    """
    loaded = cache(load)

    def explained(name: str, served: pa.Table) -> bool:
        return are_near_best(*loaded(), trajectory(name), served)

    return explained


@torch.no_grad()
def are_near_best(target: Target, drafter: PreparedDrafter, answer: Trajectory, served: pa.Table) -> bool:
    """Return whether a drafter could have made the steps: every proposal is within `TIE` of its best.

    served: all steps of the answer (TRACE), with proposals; as many are accepted as the answer has.
    """
    served, K = served.sort_by("anchor"), drafter.block_size - 1
    anchors, accepted = (served[name].to_numpy().astype(np.int64) for name in ("anchor", "accepted"))
    proposed = pad_lists(served, "proposed_ids", K, -1, np.int64)
    follows = [answer.first_anchor, *(anchors + accepted + 1)[:-1].tolist()]
    if (proposed < 0).any() or anchors.tolist() != follows or anchors[-1] + accepted[-1] < answer.last_anchor:
        return False
    at = Anchored.read(target, drafter, (answer, Steps(len(answer.tokens), anchors, accepted, proposed)))
    tokens = torch.from_numpy(proposed)[None].to(target.device)  # [1, S, K]
    ahead = torch.stack([at.at(k) for k in range(1, K + 1)], -1)
    if ((tokens == ahead).long().cumprod(-1).sum(-1)[0].cpu().numpy() != accepted).any():
        return False
    blocks, before = drafter.sampler(at.context, at.at(0), at.anchors), at.at(0)
    for k in range(K):
        logits = blocks.logits(before)
        before = tokens[..., k]
        columns, present = drafter.head.to_columns(before)
        own = logits.gather(-1, columns[..., None])[..., 0]
        if not bool((present & (logits.amax(-1) - own <= TIE)).all()):
            return False
    return True
