"""Stretches of held-out answers as text: where a drafter's proposals were accepted least, and where as usual."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from draftsmith.artifacts.results.evaluation import AnswerContext, ContextStep
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.replay.trace import Trace

STEPS = 6  # verify steps of a stretch
BEFORE, AFTER = 80, 16  # tokens around it
TYPICAL, OF_ANSWERS = 2, 64  # typical stretches that are shown, from so many answers
Decode = Callable[[list[int]], str]
_Stretch = tuple[float, int, int, int, Trace]  # tau, index of the answer, first step, steps


class ContextCollector:
    """Collects the stretches with the fewest committed tokens a step, one an answer, and typical ones.

    Traces may come in any order.
    """

    def __init__(self, count: int = 10):
        self.count = count
        self._worst: list[_Stretch] = []
        self._middle: list[_Stretch] = []  # of each answer, its stretch of median tau

    def add(self, indices: Sequence[int], traces: Sequence[Trace]) -> None:
        """Add the traces of the answers at `indices`.

        Of equally bad answers the first ones are kept, of an answer the first such stretch. An answer of fewer steps
        is taken as a whole, unless it has none.
        """
        for index, trace in zip(indices, traces, strict=True):
            steps = min(STEPS, len(trace.anchors))
            if steps:
                sums = np.convolve(trace.committed, np.ones(steps, dtype=np.int64), mode="valid")
                first = int(sums.argmin())
                self._worst.append((int(sums[first]) / steps, index, first, steps, trace))
                middle = int(np.argsort(sums, kind="stable")[len(sums) // 2])
                self._middle.append((int(sums[middle]) / steps, index, middle, steps, trace))
        self._worst = sorted(self._worst, key=lambda stretch: stretch[:4])[: self.count]
        self._middle = sorted(self._middle, key=lambda stretch: stretch[1])[:OF_ANSWERS]

    def contexts(self, trajectories: Sequence[Trajectory], sets: Sequence[str], decode: Decode) -> list[AnswerContext]:
        """Return the worst stretches first, then those of median tau. sets: the prompt set of each answer."""
        ordered = sorted(self._middle, key=lambda stretch: stretch[:4])
        start = max(0, (len(ordered) - TYPICAL) // 2)
        return [
            _context(kind, stretch, trajectories[stretch[1]], sets[stretch[1]], decode)
            for kind, stretches in (("worst", self._worst), ("typical", ordered[start : start + TYPICAL]))
            for stretch in stretches
        ]


def _context(kind: str, stretch: _Stretch, trajectory: Trajectory, prompt_set: str, decode: Decode) -> AnswerContext:
    """Return the text before a stretch, every verify step in it, and the text after it."""
    tau, _, first, count, trace = stretch
    tokens, start = trajectory.tokens, int(trace.anchors[first]) + 1
    steps = []
    for step in range(first, first + count):
        anchor, accepted = int(trace.anchors[step]), int(trace.accepted[step])
        verified, end = int(trace.judged[step]), anchor + 1 + int(trace.committed[step])
        rejected = [int(token) for token in trace.proposed[step, accepted:verified]]
        steps.append(
            ContextStep(
                accepted=decode(tokens[anchor + 1 : anchor + 1 + accepted]),
                rejected=decode(rejected[:1]),
                dropped=decode(rejected[1:]),
                chosen=decode(tokens[anchor + 1 + accepted : end]),
            )
        )
    after = int(trace.anchors[first + count - 1]) + 1 + int(trace.committed[first + count - 1])
    return AnswerContext(
        kind=kind,
        tau=tau,
        set=prompt_set,
        trajectory_id=trajectory.trajectory_id,
        position=start - trajectory.prompt_length,
        before=decode(tokens[max(0, start - BEFORE) : start]),
        steps=steps,
        after=decode(tokens[after : after + AFTER]),
    )
