"""What an experiment found: every drafter replayed on the same held-out answers, as one table for each split."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np

from draftsmith.artifacts.store.manifest import read_manifest
from draftsmith.flows.execution.display import Display
from draftsmith.stages.data.held_out import independent_units
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import AcceptanceStats
from draftsmith.stages.runtime.statistics import jackknife, sum_by_key
from draftsmith.stages.targets.causal_lm import Target

HEAD = ("arm", "steps", "positions", "seconds", "tau", "of the seeds", "to the control", "95 %", "gain")
_TRAINING = re.compile(r"(?P<arm>.+)-(?P<steps>\d+)-s\d+")
_COSTS = ("positions", "seconds")  # block positions with a loss, and seconds of the steps, re-mining included

Group = tuple[str, int]  # an arm and its steps


def show_results(display: Display, made: Mapping[str, Path], _mlflow: str = "") -> None:
    """Print the comparison of both splits. `before` is the drafter that all arms start from."""
    target = Target.load(made["revision" if "revision" in made else "target"])
    prompts = made["fresh_prompts" if "fresh_prompts" in made else "prompts"]
    groups: dict[Group, list[Path]] = {("before", 0): [made["adoption" if "adoption" in made else "sft"]]}
    for node, folder in made.items():
        if (training := _TRAINING.fullmatch(node)) is not None:
            groups.setdefault((training["arm"], int(training["steps"])), []).append(folder)
    for split in ("validation", "heldout"):
        stored = load_trajectories(made["heldout"], [split])
        tallies: dict[Group, list[AcceptanceStats]] = {}
        for group, folders in groups.items():  # the seeds of an arm are in memory together
            drafters = {str(folder): load_drafter(folder / DRAFTER_FOLDER, target) for folder in folders}
            replayer = Replayer(target, ReplayOptions(sampling=stored.sampling, with_proposals=False))
            replayed = replayer.acceptance(drafters, stored.trajectories)
            tallies[group] = list(replayed.values())
        costs = {group: [_cost(folder) for folder in folders] for group, folders in groups.items()}
        units = independent_units(prompts, stored.prompts)
        display.table(
            HEAD,
            rows(tallies, costs, units),
            title=f"{split}: tau on {len(stored.trajectories)} answers",
            caption=f"An arm is the mean of its seeds. 95 %: single intervals over {len(set(units))} prompts.",
        )


def rows(
    tallies: Mapping[Group, Sequence[AcceptanceStats]],
    costs: Mapping[Group, Sequence[Sequence[float]]],
    units: Sequence[Hashable],
) -> list[list[str]]:
    """Return a row for every arm and number of steps: tau of each seed, and the paired difference to the control.

    tallies, costs: of each seed. units: what each trajectory is an observation of. The interval is a jackknife over
    units of the mean over seeds.
    """
    control = next((arm for arm, steps in tallies if steps), None)
    table = []
    for (arm, steps), seeds in tallies.items():
        taus, compared = [seed.tau for seed in seeds], ["", "", ""]
        others = tallies.get((control, steps), []) if control is not None and arm != control else []
        if others:
            parts = [part for seed in (*seeds, *others) for part in (seed.committed, seed.steps)]
            estimate = jackknife(mean_difference, *(sum_by_key(units, part) for part in parts))
            ends = estimate.interval()
            gain = estimate.value / float(np.mean([other.tau for other in others]))
            interval = f"[{ends[0]:+.3f}, {ends[1]:+.3f}]" if ends is not None else ""
            compared = [f"{estimate.value:+.3f}", interval, f"{gain:+.1%}"]
        spent = [f"{np.mean(each):,.0f}" for each in zip(*costs[arm, steps], strict=True)]
        of_seeds = " ".join(f"{tau:.3f}" for tau in taus)
        table.append([arm, str(steps), *spent, f"{np.mean(taus):.3f}", of_seeds, *compared])
    return table


def mean_difference(*parts: np.ndarray) -> np.ndarray:
    """Mean over seeds of the difference of two ratios of sums. parts: (committed, steps) of each seed of the arm, then
    of the control."""
    ratios = [committed / steps for committed, steps in zip(parts[::2], parts[1::2], strict=True)]
    seeds = len(ratios) // 2
    return np.asarray(np.mean(ratios[:seeds], axis=0) - np.mean(ratios[seeds:], axis=0))


def _cost(folder: Path) -> list[float]:
    metrics = read_manifest(folder).metrics
    return [float(metrics.get(name, 0.0)) for name in _COSTS]
