"""Plays faults: each in its own scene, or one after the other on one node, as in a bad night."""

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
from tests.faults.undisturbed import Undisturbed
from tests.flows.processes import ROOT

_TRIES = 5  # for a fault whose stage ended before its moment


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


@dataclass(frozen=True)
class Row:
    """The result of one fault."""

    fault: str
    node: str
    number: int
    seed: int
    point: str  # phase of the stage, and share of the undisturbed duration of that phase
    outcome: str  # "ok", or the defect
    message: str  # what the command reported about the fault
    seconds: float
    commit: str
    at: str


def play(case: Case, seed: int, calm: Undisturbed) -> Row:
    """Play one case in its own scene, and return its row."""
    started = time.monotonic()
    for attempt in range(_TRIES):
        scene = _scene(case, seed, calm, attempt)
        try:
            with _ended(scene):
                case.fault.play(scene)
            return _row(case, scene, seed, started)
        except TooLate:
            continue
        except Broken as broken:
            return _row(case, scene, seed, started, str(broken))
    return _row(case, scene, seed, started, "not played: the stage always ended before the fault")


def play_in_turn(cases: Sequence[Case], seed: int, calm: Undisturbed) -> Iterator[Row]:
    """Play strikes at one node, each on the attempt that the one before left.

    The run that finishes the attempt settles them all. If it fails, or a strike does, each is played alone to find the
    cause.
    """
    calm.without(cases[0].node)
    unsettled: list[tuple[Case, Row]] = []
    waiting = deque((case, 0) for case in cases)
    while waiting:
        case, attempt = waiting.popleft()
        started, scene = time.monotonic(), _scene(case, seed, calm, attempt, afresh=False)
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
        unsettled.append((case, _row(case, scene, seed, started)))
        if finished:
            yield from (row for _, row in unsettled)
            unsettled = []
            calm.without(case.node)
    yield from _settled(unsettled, seed, calm)


def _settled(unsettled: Sequence[tuple[Case, Row]], seed: int, calm: Undisturbed) -> Iterator[Row]:
    """Run the command that continues the attempt, and yield the rows of its strikes."""
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
    """Inject the fault; return whether the command ended well nevertheless."""
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
    """Kill what is left of the scene after the block. Raise Broken for a command that did not end."""
    try:
        yield
    except (subprocess.TimeoutExpired, TimeoutError) as error:
        raise Broken(f"no end: {error}") from error
    finally:
        for pid in scene.home.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _row(case: Case, scene: Scene, seed: int, started: float, outcome: str = "") -> Row:
    text = "; ".join(filter(None, [outcome, *scene.complaints]))
    return Row(
        fault=case.fault.name,
        node=case.node,
        number=case.number,
        seed=seed,
        point=scene.point,
        outcome=" ".join(text.split()) or "ok",
        message=" | ".join(filter(None, scene.messages)),
        seconds=round(time.monotonic() - started, 1),
        commit=_commit(),
        at=time.strftime("%Y-%m-%d %H:%M"),
    )


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
