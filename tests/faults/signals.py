"""Signals to a stage and to the command itself."""

from __future__ import annotations

import os
import signal
import time

from tests.faults.home import Ended, Running
from tests.faults.scene import COMMITTING, STARTING, WORKING, Scene, Strike

_STOPPED_S = (1.0, 4.0)
_OF_THE_COMMAND = (STARTING, WORKING, COMMITTING)


def kill_stage(scene: Scene) -> Ended:
    running = scene.start()
    os.kill(scene.reach(running).pid, signal.SIGKILL)
    return scene.check_end(running.wait(), [1], "was killed (SIGKILL)")


def terminate_stage(scene: Scene) -> Ended:
    return _asked_to_stop(scene, signal.SIGTERM)


def interrupt_stage(scene: Scene) -> Ended:
    return _asked_to_stop(scene, signal.SIGINT)


def _asked_to_stop(scene: Scene, number: signal.Signals) -> Ended:
    """Ask the stage to stop: it saves and ends, or was about to end anyway."""
    running = scene.start()
    os.kill(scene.reach(running).pid, number)
    ended = running.wait()
    if ended.code == scene.undisturbed.code:
        return scene.check_end(ended, [ended.code])
    return scene.check_end(ended, [130, 1], "was asked to stop", number.name)


def stop_stage_a_while(scene: Scene) -> Ended:
    running = scene.start()
    stage = scene.reach(running)
    os.kill(stage.pid, signal.SIGSTOP)
    time.sleep(scene.chance.uniform(*_STOPPED_S))
    os.kill(stage.pid, signal.SIGCONT)
    return running.wait()


def stop_stage_for_good(scene: Scene) -> Ended:
    """Stop the stage for good, which only the time limit notices."""
    running = scene.start(*scene.limit())
    os.kill(scene.reach(running).pid, signal.SIGSTOP)
    return scene.check_end(running.wait(), [2], "ran past its limit")


def _reached(scene: Scene) -> Running:
    running = scene.start()
    scene.reach(running, _OF_THE_COMMAND)
    return running


def kill_command(scene: Scene) -> Ended:
    running = _reached(scene)
    os.kill(running.process.pid, signal.SIGKILL)
    return running.wait()


def terminate_command(scene: Scene) -> Ended:
    running = _reached(scene)
    os.kill(running.process.pid, signal.SIGTERM)
    return scene.check_end(running.wait(), [143], "terminated")


def interrupt_command(scene: Scene) -> Ended:
    """Ctrl-C reaches the whole foreground group of a terminal; stages have their own sessions."""
    running = _reached(scene)
    os.killpg(running.process.pid, signal.SIGINT)
    return scene.check_end(running.wait(), [130], "interrupted")


def stop_command_a_while(scene: Scene) -> Ended:
    running = _reached(scene)
    os.kill(running.process.pid, signal.SIGSTOP)
    time.sleep(scene.chance.uniform(*_STOPPED_S))
    os.kill(running.process.pid, signal.SIGCONT)
    return running.wait()


FAULTS: dict[str, Strike] = {
    "SIGKILL to the stage": kill_stage,
    "SIGTERM to the stage": terminate_stage,
    "SIGINT to the stage": interrupt_stage,
    "SIGSTOP to the stage, then SIGCONT": stop_stage_a_while,
    "SIGSTOP to the stage, until its limit": stop_stage_for_good,
    "SIGKILL to the command": kill_command,
    "SIGTERM to the command": terminate_command,
    "SIGINT to the command": interrupt_command,
    "SIGSTOP to the command, then SIGCONT": stop_command_a_while,
}
