"""Where a drafter is worst: the stretches of held-out answers in which its proposals were kept least, as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from draftsmith.stages.replay.trace import Trace, Trajectory

STEPS = 6  # verify steps of a stretch
BEFORE, AFTER = 80, 16  # tokens around it
Decode = Callable[[list[int]], str]


class WorstContexts:
    """The stretches with the fewest committed tokens a step, one an answer. Traces may come in any order."""

    def __init__(self, count: int = 10):
        self.count = count
        self._found: list[tuple[float, int, int, int, Trace]] = []  # tau, trajectory, first step, steps

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
        self._found = sorted(self._found, key=lambda each: each[:4])[: self.count]

    def told(self, trajectories: Sequence[Trajectory], sets: Sequence[str], decode: Decode) -> list[dict[str, Any]]:
        """The worst first, ready for JSON. sets: the prompt set of each trajectory."""
        return [
            {"tau": tau, "set": sets[index], **_context(trajectories[index], trace, first, steps, decode)}
            for tau, index, first, steps, trace in self._found
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
