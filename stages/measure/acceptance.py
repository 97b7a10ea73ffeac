"""Acceptance of several drafters on identical trajectories: paired, so that small differences become visible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from draftsmith.stages.contract import StageContext
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.measure.bootstrap import interval, ratio, ratio_difference
from draftsmith.stages.replay.chains import replay_chains
from draftsmith.stages.replay.trace import Trace, Trajectory, groups_by_length, pad_tokens
from draftsmith.stages.targets.causal_lm import Target


def replay_all(
    ctx: StageContext,
    target: Target,
    drafters: Mapping[str, Drafter],
    trajectories: Sequence[Trajectory],
    drafting: DraftingConfig,
    chains: int | None,
    tokens_per_group: int,
) -> dict[str, list[Trace]]:
    """Traces of every drafter, in the order of the trajectories. The target reads each trajectory once."""
    layer_ids = sorted({layer for d in drafters.values() for layer in d.target_layer_ids})
    traces: dict[str, dict[int, Trace]] = {name: {} for name in drafters}
    for group in groups_by_length([len(t.tokens) for t in trajectories], tokens_per_group):
        members = [trajectories[i] for i in group]
        ids = pad_tokens(members, target.device)
        by_layer = dict(zip(layer_ids, target.features(ids, layer_ids).chunk(len(layer_ids), -1), strict=True))
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(members), -1)
        for name, drafter in drafters.items():
            with torch.no_grad():
                read = torch.cat([by_layer[k] for k in drafter.target_layer_ids], -1)
                context = drafter.encode(read, ids, positions)
            head = drafter.drafting_head(target.head_weight, drafting.head_tokens)
            block_size = drafting.block_size or drafter.block_size
            found = replay_chains(drafter, context, members, block_size, head, chains, with_logprobs=False)
            traces[name] |= dict(zip(group, found, strict=True))
        ctx.progress(len(next(iter(traces.values()))), len(trajectories), "trajectories")
        ctx.check_interrupted()
    return {name: [by_index[i] for i in range(len(trajectories))] for name, by_index in traces.items()}


def ceiling_traces(target: Target, trajectories: Sequence[Trajectory], block_size: int) -> list[Trace]:
    """Traces of a perfect drafter: every proposal is the target's own best token. Its tau is what no drafter can pass.

    In greedy trajectories everything is accepted, so only blocks that are cut by the end keep it below `block_size`.
    """
    K = block_size - 1
    traces = []
    for trajectory in trajectories:
        tokens = torch.tensor([trajectory.tokens], device=target.device)
        hidden = target.read(tokens).hidden[0, trajectory.first_anchor : -1]
        best = np.concatenate([target.logits(part).argmax(-1).cpu().numpy() for part in hidden.split(1024)])
        anchors, accepted, proposed = [], [], []
        anchor = trajectory.first_anchor
        while anchor <= trajectory.last_anchor:
            ahead = best[anchor - trajectory.first_anchor :][:K]
            right = ahead == np.array(trajectory.tokens[anchor + 1 :][:K])
            kept = len(right) if right.all() else int(right.argmin())
            anchors.append(anchor)
            accepted.append(kept)
            proposed.append(np.pad(ahead, (0, K - len(ahead))))
            anchor += kept + 1
        unknown = np.full((len(anchors), K), np.nan, dtype=np.float32)
        length = len(trajectory.tokens)
        steps = np.array(anchors, dtype=np.int64), np.array(accepted, dtype=np.int64), np.stack(proposed)
        traces.append(Trace(length, *steps, unknown, len(anchors)))
    return traces


def has_loop(tokens: Sequence[int], n: int = 6, times: int = 3) -> bool:
    """Does the answer repeat an n-gram `times` times? Its tau may then say little about other text."""
    counts: dict[tuple[int, ...], int] = {}
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        counts[gram] = counts.get(gram, 0) + 1
        if counts[gram] >= times:
            return True
    return False


def acceptance_table(
    traces: Mapping[str, Sequence[Trace]], looping: Sequence[bool], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Figures of each drafter; differences are to the drafter named `sft`, paired over trajectories; else none."""
    sums = {name: _sums(found) for name, found in traces.items()}
    keep = ~np.asarray(looping)
    table: dict[str, dict[str, Any]] = {}
    for name, (committed, steps) in sums.items():
        low, high = interval(ratio, (committed, steps), resamples, seed)
        K = traces[name][0].proposed.shape[1]
        accepted = np.concatenate([t.accepted for t in traces[name]])
        judged = np.concatenate([t.judged for t in traces[name]])
        table[name] = {
            "tau": float(ratio(committed, steps)),
            "tau_low": low,
            "tau_high": high,
            "verify_steps": int(steps.sum()),
            "block_size": K + 1,
            "acceptance_by_offset": [
                float((accepted >= k).sum() / max(1, (judged >= k).sum())) for k in range(1, K + 1)
            ],
            "accepted_histogram": np.bincount(accepted, minlength=K + 1).tolist(),
            "tau_without_loops": float(ratio(committed[keep], steps[keep])) if keep.any() else None,
        }
        if name != "sft" and "sft" in sums:
            paired = (committed, steps, *sums["sft"])
            low, high = interval(ratio_difference, paired, resamples, seed)
            table[name] |= {"diff_to_sft": float(ratio_difference(*paired)), "diff_low": low, "diff_high": high}
    if {"opd", "control"} <= sums.keys():
        paired = (*sums["opd"], *sums["control"])
        low, high = interval(ratio_difference, paired, resamples, seed)
        table["opd"] |= {
            "diff_to_control": float(ratio_difference(*paired)),
            "diff_to_control_low": low,
            "diff_to_control_high": high,
        }
    return table


def _sums(traces: Sequence[Trace]) -> tuple[np.ndarray, np.ndarray]:
    """Committed tokens and verify steps of each trajectory."""
    committed = np.array([t.committed.sum() for t in traces], dtype=np.float64)
    return committed, np.array([len(t.anchors) for t in traces], dtype=np.float64)
