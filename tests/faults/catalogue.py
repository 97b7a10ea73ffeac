"""All faults, and the nodes that each of them strikes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tests.faults import configs, damage, disks, preload, races, servers, sglang, signals
from tests.faults.scene import Play, Scene, Strike

_ALL = configs.NODES[configs.PLAIN] + configs.NODES[configs.LINE]
_SOME = ("rollout", "sft", "evaluation")  # where the stage matters little and a scene takes long


@dataclass(frozen=True)
class Fault:
    """A fault: its name in the table, the function that plays it, and the nodes that it strikes."""

    name: str
    play: Play  # in its own scene
    strike: Strike | None = None  # for a fault that others may follow on the same attempt
    nodes: Collection[str] = _ALL
    kinds: Collection[str] = (configs.PLAIN, configs.LINE)


def alone(strike: Strike) -> Play:
    """Return a play of the strike, and of the same command after it."""

    def play(scene: Scene) -> None:
        ended = strike(scene)
        scene.nothing_left()
        if ended.code == scene.undisturbed.code:
            scene.finished(ended)
        else:
            scene.continues()

    return play


def faults() -> list[Fault]:
    strikes = signals.FAULTS | disks.FAULTS | preload.STRIKES
    all_faults = [Fault(name, alone(strike), strike) for name, strike in strikes.items()]
    all_faults += [Fault(name, alone(strike), strike, damage.READ_BY) for name, strike in damage.INPUTS.items()]
    all_faults += [Fault(name, play, nodes=nodes) for name, (play, nodes) in damage.ARTIFACTS.items()]
    all_faults += [Fault(name, play, nodes=damage.SAVING) for name, play in damage.WORK.items()]
    all_faults += [Fault(name, play, nodes=("prompts",)) for name, play in damage.DATABASES.items()]
    all_faults += [Fault(name, play, nodes=_SOME) for name, play in damage.NOTES.items()]
    all_faults += [
        Fault(name, play, nodes=_SOME) for module in (preload, races, servers) for name, play in module.FAULTS.items()
    ]
    all_faults += [
        Fault(name, play, nodes=("rollout",), kinds=(configs.SERVED,)) for name, play in sglang.FAULTS.items()
    ]
    return all_faults
