"""Signals to a stage and to the command itself."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

from tests.faults.home import Ended
from tests.faults.scene import COMMITTING, STARTING, WORKING, Scene, Strike

_STOPPED_S = (1.0, 4.0)
_OF_THE_COMMAND = (STARTING, WORKING, COMMITTING)


def kill_stage(scene: Scene) -> Ended:
    running = scene.start()
    os.kill(scene.reach(running).pid, signal.SIGKILL)
    return scene.check_end(running.wait(), [1], "was killed (SIGKILL)")


def ask_stage_to_stop(scene: Scene, number: signal.Signals) -> Ended:
    """Ask the stage to stop: it saves and ends, or was about to end anyway."""
    running = scene.start()
    os.kill(scene.reach(running).pid, number)
    ended = running.wait()
    if ended.code == scene.undisturbed.code:
        return scene.check_end(ended, [ended.code])
    return scene.check_end(ended, [130, 1], "was asked to stop", number.name)


def stop_stage_for_good(scene: Scene) -> Ended:
    """Stop the stage for good, which only the time limit notices."""
    running = scene.start(*scene.limit())
    os.kill(scene.reach(running).pid, signal.SIGSTOP)
    return scene.check_end(running.wait(), [2], "ran past its limit")


def stop_a_while(scene: Scene, *, command: bool) -> Ended:
    """Stop the command or its stage, and let it go on."""
    running = scene.start()
    stage = scene.reach(running, _OF_THE_COMMAND) if command else scene.reach(running)
    pid = running.process.pid if command else stage.pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(scene.chance.uniform(*_STOPPED_S))
    os.kill(pid, signal.SIGCONT)
    return running.wait()


def signal_command(scene: Scene, number: signal.Signals, code: int | None, *words: str) -> Ended:
    """Send a signal to the command. code, words: of its end; None: it cannot tell."""
    running = scene.start()
    scene.reach(running, _OF_THE_COMMAND)
    # Ctrl-C reaches the whole foreground group of a terminal; stages have their own sessions
    (os.killpg if number == signal.SIGINT else os.kill)(running.process.pid, number)
    ended = running.wait()
    return ended if code is None else scene.check_end(ended, [code], *words)


FAULTS: dict[str, Strike] = {
    "SIGKILL to the stage": kill_stage,
    "SIGTERM to the stage": partial(ask_stage_to_stop, number=signal.SIGTERM),
    "SIGINT to the stage": partial(ask_stage_to_stop, number=signal.SIGINT),
    "SIGSTOP to the stage, then SIGCONT": partial(stop_a_while, command=False),
    "SIGSTOP to the stage, until its limit": stop_stage_for_good,
    "SIGKILL to the command": lambda scene: signal_command(scene, signal.SIGKILL, None),
    "SIGTERM to the command": lambda scene: signal_command(scene, signal.SIGTERM, 143, "terminated"),
    "SIGINT to the command": lambda scene: signal_command(scene, signal.SIGINT, 130, "interrupted"),
    "SIGSTOP to the command, then SIGCONT": partial(stop_a_while, command=True),
}
