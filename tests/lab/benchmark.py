"""The refresh benchmark: weeks of a target with labelled changes, and every arm refreshed over them (`bars.md`).

    python -m tests.lab.benchmark run --seeds 0 1             # trains what is not in the cache, prints the tables
    python -m tests.lab.benchmark run --season smollm2
    python -m tests.lab.benchmark make                        # answers of weeks that have none

`run` reads nothing but the season's folder, and writes `results.json` there. It continues where it was interrupted:
each training is a folder in the tests' cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import CHAMPION, EvaluationResult
from draftsmith.flows.refresh.decisions import degraded_sets
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.evaluation.acceptance import acceptance_table, tau_by_slice, tau_comparisons
from draftsmith.stages.evaluation.drift import DriftConfig
from draftsmith.stages.evaluation.gate import GateConfig, decide
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.trace import AcceptanceStats
from draftsmith.stages.runtime.statistics import Estimate, jackknife, ratio_gain
from draftsmith.stages.training import losses, response_loss, trainer
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.opd import anchor_sources, step
from draftsmith.stages.training.opd import trainer as opd_trainer
from draftsmith.stages.training.sft import trainer as sft_trainer
from tests.lab import rivals
from tests.lab.results import mean_difference
from tests.lab.seasons import PROCEDURAL, SEASONS, SMOLLM2, Season
from tests.testbed import cache as folders
from tests.testbed.context import RecordingContext
from tests.testbed.procedural.training import MASK

RESULTS, TALLIES, COSTS = "results.json", "tallies.json", "costs.json"
FROZEN, CONTROL, LONGEST, OPD = "frozen", "sft-distribution", "sft-longest", "opd"
Arm = tuple[str, dict[str, Any]]  # a stage, or the trainer of `rivals`, and its config
CODE = (losses, response_loss, trainer, sft_trainer, opd_trainer, step, anchor_sources, rivals)


def arms_of(first: SftConfig, refresh: Mapping[str, Any]) -> dict[str, Arm]:
    """Return every trained arm. refresh: the fields that all of them share."""
    sft = first.model_copy(update=dict(refresh))
    control = sft.model_copy(update={"loss": "forward_kl"})
    up_to_failure = {"response": {"loss": "cross_entropy", "scope": "committed", "beyond": 0}}
    return {
        "sft": ("sft", sft.model_dump()),
        CONTROL: ("sft", control.model_dump()),
        "sft-longer": ("sft", control.model_copy(update={"steps": sft.steps * 13 // 10}).model_dump()),
        LONGEST: ("sft", control.model_copy(update={"steps": sft.steps * 49 // 30}).model_dump()),
        "auf": ("opd", {**refresh, "anchors": "random", "loss": up_to_failure}),
        "d-pace": ("sft", sft.model_copy(update={"gamma": None, "weights": "d_pace"}).model_dump()),
        "visible-prefix": ("visible-prefix", sft.model_dump()),
        OPD: ("opd", dict(refresh)),
        "paper": ("opd", {**refresh, "anchors": "errors", "loss": "paper"}),
    }


def run_stage(name: str, config: Mapping[str, Any], out: Path, inputs: Mapping[str, Path], seed: int = 0) -> None:
    """Run a stage's body, or the trainer of `rivals`, in this process."""
    ctx = RecordingContext(out, out.with_name(f"{out.name}.work"), inputs, seed)
    if name in STAGES:
        declared = importlib.import_module(STAGES[name]).STAGE
        declared.run(ctx, declared.config.model_validate(config))
    else:
        rivals.run(ctx, SftConfig.model_validate(config))
    shutil.rmtree(ctx.work)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A season, and the drafters that are refreshed over it."""

    season: Season
    prefix: str  # of folders in the cache
    first: SftConfig  # training of the first champion
    arms: Mapping[str, Arm]
    drafting: DraftingConfig

    @classmethod
    def of_procedural(cls) -> Benchmark:
        """Return the benchmark of the procedural season."""
        shared = {
            "learning_rate": 3e-3, "sequences_per_step": 8, "anchors_per_sequence": 16, "compute_dtype": "float32",
        }  # fmt: skip
        drafter = {"num_layers": 1, "block_size": 8, "target_layer_ids": [0, 1, 2], "mask_token": MASK}
        training = {**shared, "steps": 600, "gamma": 4.0, "loss": "cross_entropy"}
        first = SftConfig.model_validate({**training, "drafter": drafter})
        return cls(PROCEDURAL, "season", first, arms_of(first, {**shared, "steps": 150}), DraftingConfig())

    @classmethod
    def of_smollm2(cls) -> Benchmark:
        """Return the benchmark of SmolLM2's season; its settings are the quickstart's, with more blocks and steps."""
        shared = {"sequences_per_step": 8, "anchors_per_sequence": 16, "head_tokens": 4096}
        drafter = {"num_layers": 2, "block_size": 8, "num_target_features": 5, "mask_token": "<empty_output>"}
        fields = {
            **shared,
            "learning_rate": 1e-3,
            "steps": 400,
            "gamma": 4.0,
            "loss": "cross_entropy",
            "drafter": drafter,
        }
        first = SftConfig.model_validate(fields)
        arms = arms_of(first, {**shared, "learning_rate": 3e-4, "steps": 100})
        return cls(SMOLLM2, "season-smollm2", first, arms, DraftingConfig(head_tokens=4096))

    @cache  # noqa: B019  (benchmarks live as long as the process)
    def first_champion(self) -> Path:
        """Return the drafter that every arm starts from."""

        def build(folder: Path) -> None:
            inputs = {"target": self.season.target_artifact(0), "trajectories": self.season.answers(0) / "train"}
            run_stage("sft", self.first.model_dump(), folder, inputs)

        extra = f"{self.first} {self.season.answers(0).name}"
        return folders.cached(f"{self.prefix}-first", build, code=CODE, extra=extra)

    @cache  # noqa: B019
    def refreshed(self, arm: str, number: int, seed: int) -> Path:
        """Return an arm's drafter at the end of a week, with its costs."""
        if number == 0 or arm == FROZEN:
            return self.first_champion()
        before, (stage, config) = self.refreshed(arm, number - 1, seed), self.arms[arm]
        weeks, target, data = (
            self.season.weeks,
            self.season.target_artifact(number),
            self.season.answers(number) / "train",
        )

        def build(folder: Path) -> None:
            inputs = {"target": target, "trajectories": data, "drafter": before}
            if weeks[number].target != weeks[number - 1].target:
                adopted = SftConfig(steps=0, adopt=True).model_dump()
                run_stage("sft", adopted, folder / "adopted", inputs)
                inputs["drafter"] = folder / "adopted"
            started = time.process_time()
            if stage == "opd":
                mining = {"table": "scored" if arm == "paper" else "sample", "drafting": self.drafting.model_dump()}
                run_stage("mining", mining, folder / "mined", inputs)
                inputs["mined"] = folder / "mined"
            run_stage(stage, config, folder, inputs, seed)
            (folder / COSTS).write_text(json.dumps({"cpu_seconds": time.process_time() - started}))
            for name in ("adopted", "mined"):
                shutil.rmtree(folder / name, ignore_errors=True)

        extra = f"{stage} {config} {seed} {before.name} {target.parent.name} {data.parent.name}"
        return folders.cached(f"{self.prefix}-{arm}-{number}-s{seed}", build, code=CODE, extra=extra)

    def cpu_seconds(self, arm: str, number: int, seed: int) -> float:
        """Return what a week's training took, mining included."""
        return float(json.loads((self.refreshed(arm, number, seed) / COSTS).read_text())["cpu_seconds"])

    def tally(self, drafter: Path, number: int) -> AcceptanceStats:
        """Return a drafter's acceptance on the measured answers of a week, which is kept beside it."""
        path = drafter / TALLIES
        kept = json.loads(path.read_text()) if path.exists() else {}
        if str(number) not in kept:
            target, stored = self.season.target(number), load_trajectories(self.season.answers(number) / "heldout")
            options = ReplayOptions(
                sampling=stored.sampling, drafting=self.drafting, with_proposals=False, tokens_per_group=1 << 15
            )
            loaded = {"it": load_drafter(drafter / DRAFTER_FOLDER, target, any_target=True)}
            found = Replayer(target, options).acceptance(loaded, stored.trajectories)["it"]
            kept[str(number)] = [found.committed.tolist(), found.steps.tolist()]
            path.write_text(json.dumps(kept))
        return stats_of(*map(np.array, kept[str(number)]))

    def fallen(self, drafter: Path, number: int) -> list[str]:
        """Return the slices in which the drift check finds that a drafter has lost tau since the week before."""
        now, then = (self._by_slice(drafter, each) for each in (number, number - 1))
        return degraded_sets(now, then, DriftConfig().threshold)

    def _by_slice(self, drafter: Path, number: int) -> dict[str, SetMetrics]:
        families = self.season.families(number)
        units = [str(i) for i in range(len(families))]
        by_slice = tau_by_slice({"it": self.tally(drafter, number)}, units, families)
        return {name: arms["it"] for name, arms in by_slice.items()}


# -- decisions and scores ----------------------------------------------------------------------------------------------


def stats_of(committed: np.ndarray, steps: np.ndarray) -> AcceptanceStats:
    """Return committed tokens and verify steps of answers as what replay returns."""
    stats = AcceptanceStats(len(steps))
    stats.committed, stats.steps = committed, steps
    stats.committed_at[:, 0], stats.steps_at[:, 0] = stats.committed, stats.steps  # all below a depth of 1k
    return stats


def half(families: Sequence[tuple[str]], which: int) -> list[int]:
    """Return the indices of every second answer of each family: of half 0, which the gate sees, or of half 1."""
    return [i for i, family in enumerate(families) if families[:i].count(family) % 2 == which]


def promotes(challenger: AcceptanceStats, champion: AcceptanceStats, families: Sequence[tuple[str]]) -> bool:
    """Return whether the gate promotes, by tau alone."""
    tallies, units = {CHAMPION: champion, "opd": challenger}, [str(i) for i in range(len(families))]
    evaluation = EvaluationResult(
        temperature=1.0,
        drafters=acceptance_table(tallies, units, [False] * len(units)),
        comparisons=tau_comparisons(tallies, units, families),
    )
    return decide(evaluation, GateConfig(judge_speed=False)).promote


def difference(arm: Sequence[AcceptanceStats], other: Sequence[AcceptanceStats]) -> Estimate:
    """Return the difference of tau, the mean over seeds, paired over answers."""
    return jackknife(mean_difference, *(part for stats in (*arm, *other) for part in (stats.committed, stats.steps)))


def compare(arm: Sequence[AcceptanceStats], other: Sequence[AcceptanceStats]) -> dict[str, Any]:
    """Return gain, interval and verdict of an arm over another one, as `bars.md` defines them."""
    estimate, base = difference(arm, other), float(np.mean([stats.tau for stats in other]))
    low, high = estimate.interval() or (float("nan"), float("nan"))
    gain = estimate.value / base
    verdict = "wins" if low > 0 and gain >= 0.01 else "loses" if high < 0 and gain <= -0.01 else "ties"
    return {"difference": estimate.value, "low": low, "high": high, "gain": gain, "verdict": verdict}


def decisions(bench: Benchmark, arm: str, number: int, seed: int) -> dict[str, Any]:
    """Return what drift check and gate do with an arm's line in a week, and whether they were right."""
    line, after = (bench.refreshed(arm, n, seed) for n in (number - 1, number))
    found: dict[str, Any] = {"drift": bench.fallen(line, number)}
    if arm == FROZEN:
        return found
    old, new, families = bench.tally(line, number), bench.tally(after, number), bench.season.families(number)
    first, second = half(families, 0), half(families, 1)
    of_first = [families[i] for i in first]
    challenger, champion = (stats_of(each.committed[first], each.steps[first]) for each in (new, old))
    promoted = promotes(challenger, champion, of_first)
    gain = jackknife(ratio_gain, *(part[second] for each in (new, old) for part in (each.committed, each.steps)))
    interval = gain.interval()
    clear = gain.value >= 0.05 and interval is not None and interval[0] > 0
    return found | {
        "promoted": promoted,
        "gain_of_other_half": gain.value,
        "false_promotion": promoted and gain.value <= 0,
        "missed_promotion": clear and not promoted,
        "copy_promoted": promotes(champion, champion, of_first),
    }


@cache
def step_seconds(bench: Benchmark) -> float:
    """Return the CPU seconds of a verify step with the first champion, drafting included."""
    target, drafter = (
        bench.season.target(0),
        load_drafter(bench.first_champion() / DRAFTER_FOLDER, bench.season.target(0)),
    )
    stored, most = load_trajectories(bench.season.answers(0) / "heldout"), bench.season.weeks[0].max_new_tokens
    engine = EmbeddedEngine(target, drafter, slots=1, capacity=512, drafting=bench.drafting)
    requests = [Request(t.trajectory_id, t.tokens[: t.prompt_length], most) for t in list(stored.trajectories)[:8]]
    started = time.process_time()
    steps = sum(completion.verify_steps for completion in engine.generate(requests))
    return (time.process_time() - started) / steps


def results(bench: Benchmark, arms: Sequence[str], seeds: Sequence[int], last: int) -> dict[str, Any]:
    """Train what is missing up to a week, and return every score. The control and `opd` are among the arms."""
    weeks = range(1, last + 1)
    for number in weeks:
        for seed in seeds:
            for arm in arms:
                tau = bench.tally(bench.refreshed(arm, number, seed), number).tau
                print(f"seed {seed} {arm} week {number}: tau {tau:.3f}", flush=True)
    verify = step_seconds(bench)
    by_week: dict[str, Any] = {}
    for number in weeks:
        stats = {
            arm: [bench.tally(bench.refreshed(arm, number, seed), number) for seed in seeds] for arm in (FROZEN, *arms)
        }
        table: dict[str, Any] = {}
        for arm, tallies in stats.items():
            taus = [each.tau for each in tallies]
            row: dict[str, Any] = {"tau": float(np.mean(taus)), "taus": taus}
            row |= {f"to_{other}": compare(tallies, stats[other]) for other in COMPARED if other in stats}
            row["decisions"] = {str(seed): decisions(bench, arm, number, seed) for seed in seeds}
            if arm != FROZEN:
                saved = 1 / stats[FROZEN][0].tau - 1 / row["tau"]  # verify steps of a token
                row["cpu_seconds"] = float(np.mean([bench.cpu_seconds(arm, number, seed) for seed in seeds]))
                row["saved_per_1000_tokens_and_second"] = 1000 * saved / row["cpu_seconds"]
                row["break_even_tokens"] = row["cpu_seconds"] / (saved * verify) if saved > 0 else None
            table[arm] = row
        by_week[str(number)] = {"change": bench.season.weeks[number].change, "arms": table}
    first = {str(n): bench.tally(bench.first_champion(), n).tau for n in range(last + 1)}
    return {
        "seeds": list(seeds), "threads": torch.get_num_threads(), "verify_step_cpu_seconds": verify,
        "first_champion": first, "weeks": by_week,
    }  # fmt: skip


COMPARED = (CONTROL, LONGEST, "sft", OPD)


def show(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables in Markdown."""
    for number, week in found["weeks"].items():
        yield f"\nWeek {number}, {week['change']}\n"
        columns = ["arm", "tau", *(f"to `{other}`" for other in COMPARED), "CPU s", "break-even", "drift", "promoted"]
        yield f"| {' | '.join([*columns, 'wrong'])} |"
        yield f"|{'---|' * (len(columns) + 1)}"
        for arm, row in week["arms"].items():
            decided = list(row["decisions"].values())
            wrong = sum(bool(each.get(k)) for each in decided for k in _WRONG)
            cells = [f"`{arm}`", f"{row['tau']:.3f}", *(_compared(row.get(f"to_{other}")) for other in COMPARED)]
            cells += [f"{row['cpu_seconds']:.1f}" if "cpu_seconds" in row else ""]
            cells += [f"{row['break_even_tokens']:,.0f}" if row.get("break_even_tokens") else ""]
            cells += [f"{sum(bool(each['drift']) for each in decided)} of {len(decided)}"]
            cells += [
                f"{sum(each['promoted'] for each in decided)} of {len(decided)}" if arm != FROZEN else "",
                str(wrong),
            ]
            yield f"| {' | '.join(cells)} |"
    arms = next(iter(found["weeks"].values()))["arms"]
    areas = {arm: np.mean([week["arms"][arm]["tau"] for week in found["weeks"].values()]) for arm in arms}
    yield "\nArea under tau: " + ", ".join(f"`{arm}` {area:.3f}" for arm, area in areas.items())


_WRONG = ("false_promotion", "missed_promotion", "copy_promoted")


def _compared(each: Mapping[str, Any] | None) -> str:
    if each is None or each["difference"] == 0:
        return ""
    return f"{each['gain']:+.1%} [{each['low']:+.3f}, {each['high']:+.3f}] {each['verdict']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "run"])
    parser.add_argument("--season", choices=list(SEASONS), default=PROCEDURAL.name)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weeks", type=int, help="the last one (default: all)")
    parser.add_argument("--arms", nargs="+", help="default: all that are trained")
    options = parser.parse_args()
    torch.set_num_threads(1)
    season = SEASONS[options.season]
    if options.action == "make":
        season.make()
        return
    bench = Benchmark.of_procedural() if season is PROCEDURAL else Benchmark.of_smollm2()
    for last in range(1, (options.weeks or len(season.weeks) - 1) + 1):  # an interrupted run has whole weeks
        found = results(bench, options.arms or list(bench.arms), options.seeds, last)
        (season.folder / RESULTS).write_text(json.dumps(found) + "\n")
    print("\n".join(show(found)))


if __name__ == "__main__":
    main()
