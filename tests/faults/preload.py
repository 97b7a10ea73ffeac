"""A clock that jumps, a stage that hangs, a stage deaf to SIGTERM: by a library that is preloaded into the command.

The library is compiled here with gcc. Everything else is the real command.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import time
from pathlib import Path

from draftsmith.flows.execution.make import GRACE_S
from tests.faults.home import Ended
from tests.faults.scene import Play, Scene, Strike, must
from tests.faults.undisturbed import MEASURES, TIMED

_LAYOUT = struct.Struct("=qii")  # as `struct switches` in preload.c
_DAY_S = 86_400


class Switches:
    """Switches of the preloaded library, which can be changed while the command runs."""

    def __init__(self, scene: Scene) -> None:
        source, library = Path(__file__).with_suffix(".c"), scene.home.folder / "preload.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source)], check=True)
        path = scene.home.folder / "switches"
        path.write_bytes(bytes(_LAYOUT.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _LAYOUT.size)
        self.variables = {"LD_PRELOAD": str(library), "FAULTS_SWITCHES": str(path)}

    def turn(self, *, clock_s: int = 0, hang: bool = False, deaf: bool = False) -> None:
        _LAYOUT.pack_into(self._memory, 0, clock_s, hang, deaf)


def _clock(scene: Scene, clock_s: int) -> None:
    switches = Switches(scene)
    running = scene.start(**switches.variables)
    scene.reach(running)
    switches.turn(clock_s=clock_s)
    ended = running.wait()
    scene.finished(ended)
    again = scene.refresh()  # by the right clock
    scene.finished(again)
    measured = (MEASURES, *TIMED) if scene.node == MEASURES else ()  # by a clock that jumped: it may decide nothing
    must(not set(again.nodes("started")) - set(measured), f"{again.nodes('started')} was made again")


def clock_forward(scene: Scene) -> None:
    _clock(scene, scene.chance.randint(1, 800) * _DAY_S)


def clock_back(scene: Scene) -> None:
    _clock(scene, -scene.chance.randint(1, 800) * _DAY_S)


def stage_hangs(scene: Scene) -> Ended:
    """Let the stage hang in a write that never returns, deaf to every signal but SIGKILL."""
    switches = Switches(scene)
    running = scene.start(*scene.limit(), **switches.variables)
    scene.reach(running)
    switches.turn(hang=True)
    return scene.check_end(running.wait(), [2], "ran past its limit")


def stage_deaf(scene: Scene) -> Ended:
    """Terminate the command while its stage ignores SIGTERM and hangs."""
    switches = Switches(scene)
    switches.turn(deaf=True)
    running = scene.start(**switches.variables)
    scene.reach(running)
    switches.turn(deaf=True, hang=True)
    started = time.monotonic()
    os.kill(running.process.pid, signal.SIGTERM)
    ended = scene.check_end(running.wait(), [143], "terminated")
    seconds = time.monotonic() - started
    must(seconds < GRACE_S + 15, f"the command took {seconds:.0f} s to end")
    return ended


STRIKES: dict[str, Strike] = {
    "stage hangs in a write": stage_hangs,
    "stage ignores SIGTERM": stage_deaf,
}
FAULTS: dict[str, Play] = {
    "clock jumps forward": clock_forward,
    "clock jumps back": clock_back,
}
