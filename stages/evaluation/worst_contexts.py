"""Stretches of held-out answers as text: where a drafter's proposals were kept least, and where it is as usual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.replay.trace import Trace

STEPS = 6  # verify steps of a stretch
BEFORE, AFTER = 80, 16  # tokens around it
TYPICAL, OF_ANSWERS = 2, 64  # how many typical stretches are shown, of so many answers
Decode = Callable[[list[int]], str]


class Contexts:
    """The stretches with the fewest committed tokens a step, one an answer, and typical ones. Traces may come in any
    order."""

    def __init__(self, count: int = 10):
        self.count = count
        self._found: list[tuple[float, int, int, int, Trace]] = []  # tau, trajectory, first step, steps
        self._usual: list[tuple[float, int, int, int, Trace]] = []  # the same, of each answer its middle stretch

    def add(self, places: Sequence[int], traces: Sequence[Trace]) -> None:
        """Of the trajectories at `places`; as many as are asked for are kept.

        Of answers that are equally bad the first ones are taken, of an answer the first such stretch. An answer of
        fewer steps is taken as a whole, unless it has none.
        """
        for index, trace in zip(places, traces, strict=True):
            steps = min(STEPS, len(trace.anchors))
            if steps:
                sums = np.convolve(trace.committed, np.ones(steps, dtype=np.int64), mode="valid")
                first = int(sums.argmin())
                self._found.append((int(sums[first]) / steps, index, first, steps, trace))
                middle = int(np.argsort(sums, kind="stable")[len(sums) // 2])
                self._usual.append((int(sums[middle]) / steps, index, middle, steps, trace))
        self._found = sorted(self._found, key=lambda each: each[:4])[: self.count]
        self._usual = sorted(self._usual, key=lambda each: each[1])[:OF_ANSWERS]

    def told(self, trajectories: Sequence[Trajectory], sets: Sequence[str], decode: Decode) -> list[dict[str, Any]]:
        """The worst first, then those of the usual acceptance length, ready for JSON. sets: the prompt set of each
        trajectory."""
        usual = sorted(self._usual, key=lambda each: each[:4])
        middle = max(0, (len(usual) - TYPICAL) // 2)
        return [
            {"kind": kind, "tau": tau, "set": sets[at], **_context(trajectories[at], trace, first, steps, decode)}
            for kind, found in (("worst", self._found), ("typical", usual[middle : middle + TYPICAL]))
            for tau, at, first, steps, trace in found
        ]


def _context(trajectory: Trajectory, trace: Trace, first: int, steps: int, decode: Decode) -> dict[str, Any]:
    """The text before, every step with what was kept, rejected and chosen, and the text behind."""
    tokens, start = trajectory.tokens, int(trace.anchors[first]) + 1
    told = []
    for step in range(first, first + steps):
        anchor, kept = int(trace.anchors[step]), int(trace.accepted[step])
        judged, end = int(trace.judged[step]), anchor + 1 + int(trace.committed[step])
        rejected = [int(token) for token in trace.proposed[step, kept:judged]]
        told.append(
            {
                "kept": decode(tokens[anchor + 1 : anchor + 1 + kept]),
                "rejected": decode(rejected[:1]),  # the proposal that the target did not choose
                "dropped": decode(rejected[1:]),  # what was proposed behind it
                "chosen": decode(tokens[anchor + 1 + kept : end]),  # by the target; empty where the answer ends
            }
        )
    behind = int(trace.anchors[first + steps - 1]) + 1 + int(trace.committed[first + steps - 1])
    return {
        "trajectory_id": trajectory.trajectory_id,
        "position": start - trajectory.prompt_length,  # of the first token of the stretch, in the answer
        "before": decode(tokens[max(0, start - BEFORE) : start]),
        "steps": told,
        "after": decode(tokens[behind : behind + AFTER]),
    }
