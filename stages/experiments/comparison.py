"""Stage `comparison`: many drafters on identical held-out trajectories, over seeds: what an experiment concludes from.

Inputs named `drafter:ARM:STEPS:SEED` are drafters; that of the arm `base`, with 0 steps, is what every arm began with.
Of steps trained in iterations, `earlier:ARM:STEPS:SEED:I` are the drafters before the last one, for their costs.
Acceptance is measured by replay, so every drafter meets the same trajectories and differences are paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from draftsmith.stages.contract import Compute, Config, Stage, StageContext, follow
from draftsmith.stages.replay.portions import TokensPerForward

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from draftsmith.stages.replay.tally import Tally

PREFIX, EARLIER, BASE = "drafter:", "earlier:", "base"
COSTS = ("positions", "blocks", "seconds")
_RESIDENT_BYTES = 4 * 2**30  # of drafters that are replayed together


class ComparisonConfig(Config):
    """How drafters are compared."""

    control: Annotated[str, Field(description="the arm that the others are compared with, at equal steps and seed")]
    splits: Annotated[tuple[str, ...], Field(min_length=1)] = ("validation", "heldout")
    tokens_per_target_forward: TokensPerForward = 4096


@dataclass(frozen=True)
class Entry:
    """One trained drafter of an experiment."""

    arm: str
    steps: int
    seed: int
    folder: Path  # its artifact
    earlier: tuple[Path, ...] = ()  # the artifacts of the iterations before

    @classmethod
    def of_input(cls, name: str, inputs: Mapping[str, Path]) -> Entry:
        """From the name of one of the stage's inputs."""
        identity = name.removeprefix(PREFIX)
        arm, steps, seed = identity.split(":")
        earlier = tuple(at for other, at in inputs.items() if other.startswith(f"{EARLIER}{identity}:"))
        return cls(arm, int(steps), int(seed), inputs[name], earlier)

    def __str__(self) -> str:
        return f"{self.arm}, {self.steps} steps, seed {self.seed}"

    def rows(self, split: str, trajectory_ids: pa.Array, tally: Tally) -> pa.Table:
        """Of the table ACCEPTANCE, one a trajectory."""
        import numpy as np
        import pyarrow as pa

        from draftsmith.artifacts.schemas import ACCEPTANCE

        count = len(trajectory_ids)
        same = {name: pa.repeat(value, count) for name, value in (("arm", self.arm), ("split", split))}
        same |= {name: pa.repeat(value, count) for name, value in (("steps", self.steps), ("seed", self.seed))}
        columns = {"committed": tally.committed, "verify_steps": tally.steps.astype(np.int64)}
        return pa.table(same | {"trajectory_id": trajectory_ids} | columns).select(ACCEPTANCE.columns.names)

    def cost(self) -> dict[str, float]:
        """What its training took, from the manifests: block positions with a loss, and seconds of the steps."""
        from draftsmith.artifacts.manifest import read_manifest

        metrics = [read_manifest(folder).metrics for folder in (*self.earlier, self.folder)]
        return {name: sum(float(each.get(name, 0.0)) for each in metrics) for name in COSTS}


def run(ctx: StageContext, config: ComparisonConfig) -> None:
    """Replay every drafter; write `results.json` and, for each trajectory, `acceptance.parquet`."""

    from draftsmith.artifacts.atomic import write_text
    from draftsmith.artifacts.parquet import TableWriter
    from draftsmith.artifacts.schemas import ACCEPTANCE
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.measure.acceptance import ceiling_of
    from draftsmith.stages.prompting.held_out import units_of
    from draftsmith.stages.replay.corpus import draws
    from draftsmith.stages.replay.tally import tally_all
    from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories
    from draftsmith.stages.targets.causal_lm import Target

    target = Target.load(ctx.inputs["target"])
    entries = {name: Entry.of_input(name, ctx.inputs) for name in ctx.inputs if name.startswith(PREFIX)}
    costs = {name: entry.cost() for name, entry in entries.items()}
    results: dict[str, Any] = {}
    rows: list[pa.Table] = []
    for split in config.splits:
        stored = load_trajectories(ctx.inputs["trajectories"], [split])
        units = units_of(ctx.inputs["prompts"], stored.prompts)
        sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        longest_block, drawn = 0, False
        kept = ctx.work / "replayed" / split
        for turn, together in enumerate(in_memory(entries)):  # the target reads the trajectories once for all of them
            drafters = {name: load_drafter(entries[name].folder / DRAFTER_FOLDER, target) for name in together}
            longest_block = max(longest_block, *(drafter.block_size for drafter in drafters.values()))
            drawn = drawn or any(draws(drafter, stored.law) for drafter in drafters.values())
            found = tally_all(
                target,
                drafters,
                stored.trajectories,
                law=stored.law,
                with_proposals=False,
                tokens_per_group=config.tokens_per_target_forward,
                progress=follow(ctx, "trajectories"),
                kept=kept / str(turn),
                log=ctx.log,
            )
            for name, tally in found.items():
                sums[name] = tally.committed, tally.steps
                rows.append(entries[name].rows(split, stored.trajectories.ids, tally))
                ctx.log(f"{split}: {entries[name]}: tau {tally.tau:.3f}")
            del drafters, found, tally  # before the next ones are loaded
        ceiling = ceiling_of(
            target,
            stored.trajectories,
            longest_block,
            drawn=drawn,
            progress=follow(ctx, "ceilings"),
            kept=kept / "ceiling",
        )
        results[split] = {
            "trajectories": len(stored.trajectories),
            "prompts": len(set(units)),
            "ceiling": ceiling.tau,
            "arms": arm_table(entries, sums, units, costs, config.control),
        }
    for name, svg in figures(results[config.splits[-1]]["arms"], config.control).items():
        write_text(ctx.out / name, svg)
    with TableWriter(ctx.out / "acceptance.parquet", ACCEPTANCE) as table:
        for part in rows:
            table.append(part)
    (ctx.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    last = results[config.splits[-1]]["arms"]
    ctx.summary(**{f"tau_{row['arm']}_{row['steps']}": row["tau"] for row in last})


def in_memory(entries: Mapping[str, Entry]) -> Iterator[list[str]]:
    """The drafters in turns, of as many as hold within `_RESIDENT_BYTES` of weights (at least one)."""
    from draftsmith.stages.drafters.layout import WEIGHTS_FILE
    from draftsmith.stages.stored import DRAFTER_FOLDER

    turn: list[str] = []
    held = 0
    for name, entry in entries.items():
        size = (entry.folder / DRAFTER_FOLDER / WEIGHTS_FILE).stat().st_size
        if turn and held + size > _RESIDENT_BYTES:
            yield turn
            turn, held = [], 0
        turn.append(name)
        held += size
    if turn:
        yield turn


def figures(table: Sequence[Mapping[str, Any]], control: str) -> dict[str, str]:
    """The split's table as figures: curves over the budgets, and for each budget the differences to the control."""
    from draftsmith.stages.reporting.plots import differences, standalone, tau_over_cost

    arms: dict[str, list[Mapping[str, Any]]] = {}
    for row in table:
        if row["arm"] != BASE:
            arms.setdefault(row["arm"], []).append(row)
    found = {}
    if any(len(rows) > 1 for rows in arms.values()):
        untrained = next((row["tau"] for row in table if row["arm"] == BASE), None)
        found["tau.svg"] = standalone(tau_over_cost(arms, {} if untrained is None else {"before training": untrained}))
    for steps in sorted({row["steps"] for row in table}):
        # a single prompt has no interval to draw
        compared = [row for row in table if row["steps"] == steps and row.get("difference_low") is not None]
        if compared:
            found[f"differences-{steps}.svg"] = standalone(differences(compared, control))
    return found


def arm_table(
    entries: Mapping[str, Entry],
    sums: Mapping[str, tuple[np.ndarray, np.ndarray]],
    units: Sequence[str],
    costs: Mapping[str, Mapping[str, float]],
    control: str,
) -> list[dict[str, Any]]:
    """A row for every (arm, steps): tau of each seed and in the mean, and the paired difference to the control.

    sums: committed tokens and verify steps of each trajectory; costs: of the training; both by drafter. units: what
    each trajectory is an observation of, as of `units_of`. The 95 % interval of the difference is a jackknife over them
    of the mean over seeds (a single one has none); it is of these trainings, and the single seeds' differences stand
    beside.
    """
    import numpy as np

    from draftsmith.stages.statistics import jackknife, sums_of

    def stacked(names: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """[seeds, trajectories] each."""
        return np.stack([sums[n][0] for n in names]), np.stack([sums[n][1] for n in names])

    groups: dict[tuple[str, int], list[str]] = {}
    for name, entry in sorted(
        entries.items(), key=lambda item: (item[1].arm != BASE, item[1].arm, item[1].steps, item[1].seed)
    ):
        groups.setdefault((entry.arm, entry.steps), []).append(name)
    table = []
    for (arm, steps), names in groups.items():
        committed, verified = stacked(names)
        taus = committed.sum(1) / verified.sum(1)
        row: dict[str, Any] = {
            "arm": arm,
            "steps": steps,
            "seeds": [entries[name].seed for name in names],
            "tau": float(taus.mean()),
            "tau_of_seeds": taus.tolist(),
            **{cost: float(np.mean([costs[name][cost] for name in names])) for cost in COSTS},
            **{f"{cost}_of_seeds": [costs[name][cost] for name in names] for cost in COSTS},
        }
        others = groups.get((control, steps), [])
        if arm not in (BASE, control) and len(others) == len(names):
            other_committed, other_verified = stacked(others)
            differences = taus - other_committed.sum(1) / other_verified.sum(1)
            parts = (part for group in (committed, verified, other_committed, other_verified) for part in group)
            estimate = jackknife(_mean_difference, *(sums_of(units, part) for part in parts))
            low, high = estimate.interval() or (None, None)
            row |= {
                "difference": float(differences.mean()),
                "difference_of_seeds": differences.tolist(),
                "difference_low": low,
                "difference_high": high,
                "gain": float(differences.mean() / (taus - differences).mean()),
            }
        table.append(row)
    return table


@dataclass(frozen=True)
class Spent:
    """What a training had cost when it came to some level."""

    cost: float
    at_most: bool = False  # the smallest budget was more than enough


def cost_to_reach(rows: Sequence[Mapping[str, Any]], level: float, cost: str) -> list[Spent | None]:
    """What each seed of an arm had spent when its tau passed `level`, read off the line between two budgets.

    rows: the arm's rows of `arm_table`, one a budget; every budget is a training of its own. None where the largest is
    not enough.
    """
    ordered = sorted(rows, key=lambda row: row[cost])
    found: list[Spent | None] = []
    for seed in range(len(ordered[0]["tau_of_seeds"])):
        points = [(row[f"{cost}_of_seeds"][seed], row["tau_of_seeds"][seed]) for row in ordered]
        above = next((i for i, (_, tau) in enumerate(points) if tau >= level), None)
        if above is None:
            found.append(None)
        elif above == 0:
            found.append(Spent(points[0][0], at_most=points[0][1] > level))
        else:
            (spent, tau), (more, higher) = points[above - 1], points[above]
            found.append(Spent(spent + (level - tau) / (higher - tau) * (more - spent)))
    return found


def _mean_difference(*parts: np.ndarray) -> np.ndarray:
    """Mean over seeds of the difference of two ratios of sums.

    parts: 4 × seeds sums: committed and verified of the arm, committed and verified of the control.
    """
    import numpy as np

    seeds = len(parts) // 4
    committed, verified, other_committed, other_verified = (parts[i * seeds : (i + 1) * seeds] for i in range(4))
    each = [a / b - c / d for a, b, c, d in zip(committed, verified, other_committed, other_verified, strict=True)]
    return np.asarray(np.mean(each, axis=0))


STAGE = Stage(
    name="comparison",
    config=ComparisonConfig,
    inputs=("target", "prompts", "trajectories", f"{PREFIX}*", f"{EARLIER}*"),
    run=run,
    compute=Compute.HEAVY,
)
