"""All faults, and which nodes each meets."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tests.faults import configs, damage, disks, inputs, preload, races, servers, sglang, signals
from tests.faults.scene import Play, Scene, Strike

_ALL = configs.NODES[configs.PLAIN] + configs.NODES[configs.LINE]
_SOME = ("rollout", "sft", "evaluation")  # where the stage matters little, and a scene takes long


@dataclass(frozen=True)
class Fault:
    """A name for the table, what plays it, and which nodes it meets."""

    name: str
    play: Play  # in a scene of its own
    strike: Strike | None = None  # of a fault that others may follow on the same attempt
    nodes: Collection[str] = _ALL
    kinds: Collection[str] = (configs.PLAIN, configs.LINE)


def alone(strike: Strike) -> Play:
    """The strike, and the same command after it."""

    def play(scene: Scene) -> None:
        ended = strike(scene)
        scene.nothing_left()
        if ended.code == scene.undisturbed.code:
            scene.finished(ended)
        else:
            scene.continues()

    return play


def faults() -> list[Fault]:
    strikes = signals.FAULTS | disks.FAULTS | preload.STRIKES | inputs.FAULTS
    made = [Fault(name, alone(strike), strike, inputs.NODES.get(name, _ALL)) for name, strike in strikes.items()]
    made += [Fault(name, play, nodes=nodes) for name, (play, nodes) in damage.ARTIFACTS.items()]
    made += [Fault(name, play, nodes=damage.SAVING) for name, play in damage.WORK.items()]
    made += [Fault(name, play, nodes=("prompts",)) for name, play in damage.DATABASES.items()]
    made += [Fault(name, play, nodes=_SOME) for name, play in damage.NOTES.items()]
    made += [Fault(name, play, nodes=_SOME) for room in (preload, races, servers) for name, play in room.FAULTS.items()]
    made += [Fault(name, play, nodes=("rollout",), kinds=(configs.SERVED,)) for name, play in sglang.FAULTS.items()]
    return made
