"""Acceptance of several drafters on identical trajectories: paired, so that small differences become visible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.stages.measure.gate import CHAMPION, compared
from draftsmith.stages.measure.verdicts import Pair, pairs
from draftsmith.stages.replay.kept import KeptTraces
from draftsmith.stages.replay.trace import Trace, Trajectory
from draftsmith.stages.statistics import Estimate, jackknife, ratio, ratio_difference, sums_of
from draftsmith.stages.targets.causal_lm import Target

_CEILING = "ceiling"


def ceiling_traces(
    target: Target,
    trajectories: Sequence[Trajectory],
    block_size: int,
    *,
    progress: Callable[[int, int], Any] = lambda _done, _total: None,
    kept: Path | None = None,
) -> list[Trace]:
    """Traces of a perfect drafter: every proposal is the target's own best token. Its tau is what no drafter can pass.

    In greedy trajectories everything is accepted, so only blocks that are cut by the end keep it below `block_size`.
    progress, kept: as in `replay_all`.
    """
    store = KeptTraces(kept, [_CEILING]) if kept is not None else None
    traces = {place: each[_CEILING] for place, each in store.traces.items()} if store is not None else {}
    try:
        for place, trajectory in enumerate(trajectories):
            if place not in traces:
                traces[place] = _ceiling(target, trajectory, block_size)
                if store is not None:
                    store.add([place], {_CEILING: [traces[place]]})
            progress(place + 1, len(trajectories))
    finally:
        if store is not None:
            store.flush()
    return [traces[place] for place in range(len(trajectories))]


def _ceiling(target: Target, trajectory: Trajectory, block_size: int) -> Trace:
    K = block_size - 1
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
    steps = np.array(anchors, dtype=np.int64), np.array(accepted, dtype=np.int64), np.stack(proposed)
    return Trace(len(trajectory.tokens), *steps, unknown, len(anchors))


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
    traces: Mapping[str, Sequence[Trace]], prompts: Sequence[str], looping: Sequence[bool]
) -> dict[str, dict[str, Any]]:
    """Figures of each drafter, with 95 % intervals over prompts; differences to others are paired.

    prompts, looping: of each trajectory, the id of its prompt, and whether its answer repeats itself. A single prompt
    has no interval.
    """
    keep = ~np.asarray(looping)
    differences = tau_differences(traces, prompts)
    table: dict[str, dict[str, Any]] = {}
    for name, found in traces.items():
        committed, steps = _sums(found)
        tau = jackknife(ratio, *_by_prompt(found, prompts))
        low, high = tau.interval() or (None, None)
        K = found[0].proposed.shape[1]
        accepted = np.concatenate([t.accepted for t in found])
        judged = np.concatenate([t.judged for t in found])
        table[name] = {
            "tau": tau.value,
            "tau_low": low,
            "tau_high": high,
            "prompts": tau.units,
            "verify_steps": int(steps.sum()),
            "block_size": K + 1,
            "acceptance_by_offset": [
                float((accepted >= k).sum() / max(1, (judged >= k).sum())) for k in range(1, K + 1)
            ],
            "accepted_histogram": np.bincount(accepted, minlength=K + 1).tolist(),
            "tau_without_loops": float(committed[keep].sum() / steps[keep].sum()) if keep.any() else None,
            "differences": {},
        }
        for (arm, other), difference in differences.items():
            if arm == name:
                low, high = difference.interval() or (None, None)
                table[name]["differences"][other] = {"value": difference.value, "low": low, "high": high}
    return table


def tau_differences(traces: Mapping[str, Sequence[Trace]], prompts: Sequence[str]) -> dict[Pair, Estimate]:
    """`tau_difference` of each compared pair."""
    return {(arm, other): tau_difference(traces[arm], traces[other], prompts) for arm, other in pairs(list(traces))}


def tau_difference(traces: Sequence[Trace], other: Sequence[Trace], prompts: Sequence[str] | None = None) -> Estimate:
    """tau of a drafter minus that of another one on the same trajectories, paired over prompts.

    prompts: the id of each trajectory's prompt; left out: every trajectory has its own.
    """
    prompts = [str(index) for index in range(len(traces))] if prompts is None else prompts
    return jackknife(ratio_difference, *_by_prompt(traces, prompts), *_by_prompt(other, prompts))


def tau_by_set(
    traces: Mapping[str, Sequence[Trace]], prompts: Sequence[str], sets: Sequence[str]
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Set -> drafter -> tau with its 95 % interval over prompts. sets: of each trajectory."""
    found: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for name in dict.fromkeys(sets):
        for arm, (part, of_part) in _of_set(traces, prompts, sets, name).items():
            tau = jackknife(ratio, *_by_prompt(part, of_part))
            low, high = tau.interval() or (None, None)
            found.setdefault(name, {})[arm] = {"tau": tau.value, "low": low, "high": high, "prompts": tau.units}
    return found


def taus_compared(
    traces: Mapping[str, Sequence[Trace]], prompts: Sequence[str], sets: Sequence[str]
) -> list[dict[str, Any]]:
    """Every drafter against the champion, over all prompts (set None) and within each set; empty without a champion."""
    if CHAMPION not in traces:
        return []
    found = []
    for name in (None, *dict.fromkeys(sets)):
        parts = _of_set(traces, prompts, sets, name)
        champion, of_part = parts[CHAMPION]
        base = float(ratio(*(sums.sum() for sums in _sums(champion))))
        for arm, (part, _) in parts.items():
            if arm != CHAMPION:
                difference = tau_difference(part, champion, of_part)
                found.append(compared("tau", arm, CHAMPION, difference, set=name, base=base))
    return found


def _of_set(
    traces: Mapping[str, Sequence[Trace]], prompts: Sequence[str], sets: Sequence[str], name: str | None
) -> dict[str, tuple[list[Trace], list[str]]]:
    """By drafter, the traces of one set and their prompts; of all sets for None."""
    places = [index for index, each in enumerate(sets) if name is None or each == name]
    return {arm: ([found[i] for i in places], [prompts[i] for i in places]) for arm, found in traces.items()}


def _by_prompt(traces: Sequence[Trace], prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """[prompts] committed tokens and verify steps of all answers to each prompt."""
    committed, steps = _sums(traces)
    return sums_of(prompts, committed), sums_of(prompts, steps)


def _sums(traces: Sequence[Trace]) -> tuple[np.ndarray, np.ndarray]:
    """Committed tokens and verify steps of each trajectory."""
    committed = np.array([t.committed.sum() for t in traces], dtype=np.float64)
    return committed, np.array([len(t.anchors) for t in traces], dtype=np.float64)
