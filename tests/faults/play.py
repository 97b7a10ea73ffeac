"""Playing faults: each in a scene of its own, or one after the other on one node, as a bad night would have it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.faults.catalogue import Fault
from tests.faults.scene import Broken, Scene, TooLate
from tests.faults.table import Row
from tests.faults.undisturbed import Undisturbed
from tests.flows.processes import ROOT

_TRIES = 5  # of a fault whose stage had ended before its moment came


@dataclass(frozen=True)
class Case:
    """A fault at a node. number: how often it was played before, at other moments."""

    fault: Fault
    kind: str
    node: str
    number: int = 0

    @property
    def name(self) -> tuple[str, str, int]:
        return self.fault.name, self.node, self.number


def play(case: Case, seed: int, calm: Undisturbed) -> Row:
    """One case to its end, in a scene of its own."""
    begun = time.monotonic()
    for attempt in range(_TRIES):
        scene = _scene(case, seed, calm, attempt)
        try:
            with _ended(scene):
                case.fault.play(scene)
            return _row(case, scene, seed, begun)
        except TooLate:
            continue
        except Broken as broken:
            return _row(case, scene, seed, begun, str(broken))
    return _row(case, scene, seed, begun, "not played: the stage had always ended before the fault came")


def play_in_turn(cases: Sequence[Case], seed: int, calm: Undisturbed) -> Iterator[Row]:
    """Strikes at one node, each at the attempt that the one before has left. The run that finishes it settles them all;
    if that was not well, and where a strike was not, each is played alone, which tells what it was."""
    calm.without(cases[0].node)
    unsettled: list[tuple[Case, Row]] = []
    waiting = deque((case, 0) for case in cases)
    while waiting:
        case, attempt = waiting.popleft()
        begun, scene = time.monotonic(), _scene(case, seed, calm, attempt, afresh=False)
        try:
            with _ended(scene):
                finished = _strike(case, scene)
        except (TooLate, Broken) as error:
            yield from _settled(unsettled, seed, calm)
            unsettled = []
            if isinstance(error, Broken) or attempt + 1 == _TRIES:
                yield play(case, seed, calm)
            else:
                waiting.appendleft((case, attempt + 1))
            calm.without(case.node)
            continue
        unsettled.append((case, _row(case, scene, seed, begun)))
        if finished:
            yield from (row for _, row in unsettled)
            unsettled = []
            calm.without(case.node)
    yield from _settled(unsettled, seed, calm)


def _settled(unsettled: Sequence[tuple[Case, Row]], seed: int, calm: Undisturbed) -> Iterator[Row]:
    """The run that goes on from what they have left."""
    if not unsettled:
        return
    scene = _scene(unsettled[-1][0], seed, calm, afresh=False)
    try:
        with _ended(scene):
            scene.continues()
    except Broken:
        yield from (play(case, seed, calm) for case, _ in unsettled)
        return
    yield from (row for _, row in unsettled)


def _strike(case: Case, scene: Scene) -> bool:
    """Whether the command ended well all the same."""
    assert case.fault.strike is not None
    saved = scene.saved()
    ended = case.fault.strike(scene)
    scene.kept(ended, saved)
    scene.nothing_left()
    if ended.code != scene.undisturbed.code:
        return False
    scene.finished(ended)
    return True


def _scene(case: Case, seed: int, calm: Undisturbed, attempt: int = 0, *, afresh: bool = True) -> Scene:
    chance = random.Random(f"{seed}/{case.name}/{attempt}")
    return Scene(calm, case.node, chance, earlier=0.6**attempt, afresh=afresh)


@contextlib.contextmanager
def _ended(scene: Scene) -> Iterator[None]:
    """No process of the scene outlives the block. What did not end is broken."""
    try:
        yield
    except (subprocess.TimeoutExpired, TimeoutError) as error:
        raise Broken(f"no end: {error}") from error
    finally:
        for pid in scene.home.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _row(case: Case, scene: Scene, seed: int, begun: float, outcome: str = "") -> Row:
    said = "; ".join(filter(None, [outcome, *scene.complaints]))
    return Row(
        fault=case.fault.name,
        node=case.node,
        number=case.number,
        seed=seed,
        point=scene.point,
        outcome=" ".join(said.split()) or "ok",
        message=" | ".join(filter(None, scene.messages)),
        seconds=round(time.monotonic() - begun, 1),
        commit=_commit(),
        at=time.strftime("%Y-%m-%d %H:%M"),
    )


def _commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return asked.stdout.strip()
