"""How many answers prove which of two drafters served, and how often that is wrong (`stages/replay/proof.py`).

A drafter is compared with others that are 2, 5 and 20 % apart in tau: its weights, moved towards noise. Both are
replayed at all anchors of stored answers, in the target's dtype. Then a server is simulated many times: it draws
answers, and walks through each with the drafter that it serves. Its steps are

- those of the same drafter with the noise of the parity gate on its logits, or
- with `--other-dtype`, those of the same drafter computed in another dtype: rounding as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import numpy as np
import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory, load_trajectories
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.replay import proof
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY
from tests.benchmarks import harness

APART = (0.02, 0.05, 0.2)


@dataclass(frozen=True)
class Side:
    """One drafter at all anchors of some answers, one entry an answer."""

    table: list[np.ndarray]  # [anchors, K + 1] log-probabilities of each count, as `proof` reads them
    chances: list[np.ndarray]  # [anchors, K] that a proposal is accepted, under noise
    rounded: list[np.ndarray]  # [anchors] counts of the drafter in the other dtype


def everywhere(trajectories: Sequence[Trajectory]) -> list[proof.ServedAnswer]:
    """Return the answers with a verify step after every token."""
    answers = []
    for t in trajectories:
        anchors = np.arange(t.first_anchor, t.last_anchor + 1)
        nothing = np.zeros_like(anchors)
        answers.append((t, Steps(len(t.tokens), anchors, nothing, np.zeros((len(anchors), 0), np.int64))))
    return answers


def read(target: Target, drafter: Drafter, trajectories: Sequence[Trajectory], other: Target | None = None) -> Side:
    """Replay a drafter at all anchors. other: the target in another dtype."""
    answers = everywhere(trajectories)
    ends = np.cumsum([len(served.anchors) for _, served in answers])[:-1]
    chances = proof.chances(target, Replayer(target).prepare(drafter), answers, GREEDY)
    table = proof.log_probabilities(chances, answers)
    counts = np.zeros(len(table), dtype=np.int64)
    if other is not None:
        elsewhere = copy.deepcopy(drafter).to(other.dtype)
        prepared = Replayer(other).prepare(elsewhere)
        likely = proof.chances(other, prepared, answers, GREEDY) > 0.5  # the answer's token has the highest logit
        counts = likely.cumprod(1).sum(1)
    left = np.concatenate([len(t.tokens) - 1 - served.anchors for t, served in answers])
    return Side(*(np.split(each, ends) for each in (table, chances, np.minimum(counts, left))))


def served_counts(side: Side, answer: int, rng: np.random.Generator | None) -> np.ndarray:
    """Return [anchors] how many proposals a server accepts after each, once. rng: of the noise; None: rounding."""
    if rng is None:
        return side.rounded[answer]
    chances = side.chances[answer]
    left = len(chances) - np.arange(len(chances))
    counts: np.ndarray = np.minimum((rng.random(chances.shape) < chances).cumprod(1).sum(1), left)
    return counts


def walk(counts: np.ndarray) -> list[int]:
    """Return the indices of the anchors that these counts lead to."""
    visited, at = [], 0
    while at < len(counts):
        visited.append(at)
        at += int(counts[at]) + 1
    return visited


def answers_needed(
    old: Side, new: Side, serving: Side, rng: np.random.Generator, *, noisy: bool
) -> tuple[bool | None, int]:
    """Return the proof's verdict on a server, and the number of answers that it took."""
    total = np.zeros(3)
    order = rng.permutation(len(new.table))
    for asked, answer in enumerate(order, 1):
        counts = served_counts(serving, answer, rng if noisy else None)
        visited = walk(counts)
        by_old, by_new = (side.table[answer][visited] for side in (old, new))
        total += proof.step_evidence(by_old, by_new, counts[visited]).sum(0)
        if (swapped := proof.decide(total)) is not None:
            return swapped, asked
    return None, len(order)


def simulate(old: Side, new: Side, times: int, *, noisy: bool, seed: int = 0) -> dict[str, Any]:
    """Simulate `times` swaps that happened and as many that did not; return their results."""
    rng = np.random.default_rng(seed)
    happened, failed = (
        [answers_needed(old, new, serving, rng, noisy=noisy) for _ in range(times)] for serving in (new, old)
    )
    needed = [asked for swapped, asked in [*happened, *failed] if swapped is not None]
    return {
        "answers_median": float(np.median(needed)) if needed else math.nan,
        "answers_99": float(np.quantile(needed, 0.99)) if needed else math.nan,
        "missed": mean([swapped is True for swapped, _ in failed]),
        "false_alarms": mean([swapped is False for swapped, _ in happened]),
        "inconclusive": mean([swapped is None for swapped, _ in [*happened, *failed]]),
    }


def moved(drafter: Drafter, towards: Drafter, share: float) -> Drafter:
    """Return a copy of the drafter whose weights are moved by a share of the way to another one's, or beyond."""
    copied = copy.deepcopy(drafter)
    with torch.no_grad():
        for ours, theirs in zip(copied.parameters(), towards.parameters(), strict=True):
            ours.lerp_(theirs, share)
    return copied


def scrambled(drafter: Drafter) -> Drafter:
    """Return a copy with noise on every weight, as large as the weights of its tensor."""
    copied, generator = copy.deepcopy(drafter), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(noise * parameter.float().std())
    return copied


def taus(target: Target, drafters: Sequence[Drafter], trajectories: Sequence[Trajectory]) -> list[float]:
    stats = Replayer(target).acceptance({str(i): drafter for i, drafter in enumerate(drafters)}, trajectories)
    return [stats[str(i)].tau for i in range(len(drafters))]


def shares_apart(target: Target, drafter: Drafter, towards: Drafter, trajectories: Sequence[Trajectory]) -> list[float]:
    """Return by which shares of the way the weights must move for tau to differ by `APART`."""
    shares = np.concatenate([[0], np.geomspace(0.05, 8, 18)])
    own, *others = taus(target, [moved(drafter, towards, share) for share in shares], trajectories)
    differences = np.maximum.accumulate([0.0, *(abs(tau / own - 1) for tau in others)])
    return [float(share) for share in np.interp(APART, differences, shares)]


def row(
    target: Target, drafters: tuple[Drafter, Drafter], trajectories: Sequence[Trajectory], other: Target, times: int
) -> dict[str, Any]:
    """Measure one pair (old, new)."""
    old, new = (read(target, drafter, trajectories, other) for drafter in drafters)
    tau_old, tau_new = taus(target, drafters, trajectories)
    steps = [walk(counts) for counts in new.rounded]
    differ = [old.rounded[i][visited] != new.rounded[i][visited] for i, visited in enumerate(steps)]
    equal = mean([not each.any() for each in differ])  # share of answers that do not tell them apart if exact
    return {
        "tau_old": tau_old,
        "tau_new": tau_new,
        "apart": abs(tau_old / tau_new - 1),
        "steps_an_answer": mean([len(each) for each in steps]),
        "steps_differ": float(np.concatenate(differ).mean()),
        "exact_99": math.ceil(math.log(0.01) / math.log(equal)) if 0 < equal < 1 else 1 if equal == 0 else math.inf,
        "noise": simulate(old, new, times, noisy=True),
        "rounding": simulate(old, new, times, noisy=False),
    }


def main() -> None:
    parser = harness.parser(__doc__)
    harness.add_target(parser)
    parser.add_argument("--drafter", type=Path, required=True, help="artifact of stage `sft` or `opd`")
    parser.add_argument("--trajectories", type=Path, nargs="+", required=True, help="artifacts of `rollout`, greedy")
    parser.add_argument("--times", type=int, default=1000, help="simulations of each case")
    parser.add_argument("--dtype", default="bfloat16", help="of the replay")
    parser.add_argument("--other-dtype", default="float32", help="of the steps whose rounding is compared")
    options = harness.parsed(parser)
    target, other = (Target.load(options.target, dtype=dtype) for dtype in (options.dtype, options.other_dtype))
    trajectories = [t for folder in options.trajectories for t in load_trajectories(folder).trajectories]
    drafter = load_drafter(options.drafter / DRAFTER_FOLDER, target)
    towards = scrambled(drafter)
    rows = []
    for share in shares_apart(target, drafter, towards, trajectories):
        old = moved(drafter, towards, share)
        rows.append({"moved": share} | row(target, (old, drafter), trajectories, other, options.times))
    for kind in ("noise", "rounding"):
        flat = [
            {name: value for name, value in (each | each[kind]).items() if not isinstance(value, dict)} for each in rows
        ]
        harness.print_rows(f"{kind}, {len(trajectories)} answers", flat)
    harness.report("proof", {"rows": rows}, options)


if __name__ == "__main__":
    harness.run(main)
