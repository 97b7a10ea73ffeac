"""The refresh benchmark: weeks of a target with labelled changes, and every arm refreshed over them (`bars.md`).

    python -m tests.lab.benchmark run --seeds 0 1             # trains what is not in the cache, prints the tables
    python -m tests.lab.benchmark run --season smollm2
    python -m tests.lab.benchmark run --drafter eagle3 --weeks 3 --arms sft-distribution sft-longest opd
    python -m tests.lab.benchmark make                        # answers of weeks that have none

`run` reads nothing but the season's folder, and writes `results.json` there, of another drafter `results-NAME.json`;
arms that are not run stay in it. It continues where it was interrupted: each training is a folder in the tests' cache.
An arm `A-then-B` is arm A in the first week and goes on as B.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import CHAMPION, EvaluationResult
from draftsmith.flows.refresh.drift import degraded_sets
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
from draftsmith.stages.replay.steps import AcceptanceStats
from draftsmith.stages.runtime.statistics import jackknife, ratio_gain
from draftsmith.stages.training import losses, response_loss, trainer
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.opd import anchor_sources, step
from draftsmith.stages.training.opd import body as opd_trainer
from draftsmith.stages.training.sft import body as sft_trainer
from tests.lab import rivals
from tests.lab.results import mean_difference
from tests.lab.seasons import PROCEDURAL, SEASONS, SMOLLM2, Season
from tests.testbed import cache as folders
from tests.testbed.context import RecordingContext
from tests.testbed.procedural.training import MASK

TALLIES, COSTS = "tallies.json", "costs.json"
FROZEN, CONTROL, LONGEST, OPD = "frozen", "sft-distribution", "sft-longest", "opd"
SEASON_ARMS = ("sft", CONTROL, "sft-longer", LONGEST, "auf", "d-pace", "visible-prefix", OPD, "paper")
THEN = "-then-"
Arm = tuple[str, dict[str, Any]]  # a stage, or a trainer of `rivals`, and its config
CODE = (losses, response_loss, trainer, sft_trainer, opd_trainer, step, anchor_sources, rivals)

DFLASH = "dflash"
_SHAPE = {"num_layers": 1, "block_size": 8, "target_layer_ids": [0, 1, 2], "mask_token": MASK}
# drafters of the procedural season, with the loss of the first champion's SFT and that of the control
DRAFTERS: dict[str, tuple[dict[str, Any], str, str]] = {
    DFLASH: (_SHAPE, "cross_entropy", "forward_kl"),
    "dflash2": ({**_SHAPE, "kind": "dflash2"}, "auto", "ce_l1"),
    "dspark": ({**_SHAPE, "kind": "dspark"}, "auto", "ce_l1"),
    "eagle3": ({"kind": "eagle3", "block_size": 8, "target_layer_ids": [0, 1, 2]}, "auto", "forward_kl"),
    "two-layers": ({**_SHAPE, "num_layers": 2}, "cross_entropy", "forward_kl"),
}
# steps of the first champion, of a week, and of a week of `sft-longest`: for equal seconds, as `bars.md` says
STEPS = {
    DFLASH: (600, 150, 245), "dflash2": (600, 150, 275), "dspark": (600, 150, 265), "eagle3": (600, 150, 225),
    "two-layers": (355, 75, 155),
}  # fmt: skip


def arms_of(
    first: SftConfig, refresh: Mapping[str, Any], control_loss: str = "forward_kl", longest: int = 0
) -> dict[str, Arm]:
    """Return every trained arm. refresh: the fields that all of them share."""
    sft = first.model_copy(update=dict(refresh))
    steps = sft.steps
    control = sft.model_copy(update={"loss": control_loss})

    def changed(config: SftConfig, **fields: Any) -> dict[str, Any]:
        return config.model_copy(update=fields).model_dump()

    def opd(anchors: str, **response: Any) -> dict[str, Any]:
        return {**refresh, "anchors": anchors, "loss": {"response": response}}

    block = {"loss": "forward_kl", "scope": "block", "positions": {"kind": "exponential", "gamma": 4.0}}
    committed = {"loss": "forward_kl", "scope": "committed", "beyond": 1.0}
    up_to_failure = opd("random", loss="cross_entropy", scope="committed", beyond=0)
    d_pace = sft.model_copy(update={"gamma": None, "weights": "d_pace"})
    paper = {**refresh, "anchors": "errors", "loss": "paper"}
    return {
        "sft": ("sft", sft.model_dump()),
        CONTROL: ("sft", control.model_dump()),
        "sft-longer": ("sft", changed(control, steps=steps * 13 // 10)),
        LONGEST: ("sft", changed(control, steps=longest or steps * 49 // 30)),
        "auf": ("opd", up_to_failure),
        "d-pace": ("sft", d_pace.model_dump()),
        "visible-prefix": ("visible-prefix", sft.model_dump()),
        OPD: ("opd", dict(refresh)),
        "paper": ("opd", paper),
        # at OPD's seconds
        "auf-longest": ("opd", {**up_to_failure, "steps": steps * 19 // 15}),
        "d-pace-longest": ("sft", changed(d_pace, steps=steps * 27 // 15)),
        "visible-prefix-longest": ("visible-prefix", changed(sft, steps=steps * 29 // 15)),
        "paper-shortest": ("opd", {**paper, "steps": steps * 6 // 15}),
        # OPD by its ingredients
        "block": ("opd", opd("random", **block)),
        "anchors": ("opd", opd("successors", **block)),
        "scope": ("opd", opd("random", **committed)),
        "both": ("opd", opd("successors", **committed)),
        "shuffled": ("shuffled", opd("random", **committed)),
        "plateau": ("sft", changed(control, steps=steps * 4)),
    }


def run_stage(name: str, config: Mapping[str, Any], out: Path, inputs: Mapping[str, Path], seed: int = 0) -> None:
    """Run a stage's body, or a trainer of `rivals`, in this process."""
    ctx = RecordingContext(out, out.with_name(f"{out.name}.work"), inputs, seed)
    if name in STAGES:
        declared = importlib.import_module(STAGES[name]).STAGE
        declared.run(ctx, declared.config.model_validate(config))
    else:
        rivals.run(ctx, name, config)
    shutil.rmtree(ctx.work)


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A season, and a drafter that is refreshed over it in several ways."""

    season: Season
    prefix: str  # of folders in the cache
    results: Path
    first: SftConfig  # training of the first champion
    arms: Mapping[str, Arm]
    drafting: DraftingConfig

    @classmethod
    def of_procedural(cls, drafter: str = DFLASH) -> Benchmark:
        """Return the benchmark of the procedural season with one of `DRAFTERS`."""
        shared = {
            "learning_rate": 3e-3, "sequences_per_step": 8, "anchors_per_sequence": 16, "compute_dtype": "float32",
        }  # fmt: skip
        shape, loss, control = DRAFTERS[drafter]
        steps, weekly, longest = STEPS[drafter]
        first = SftConfig.model_validate({**shared, "steps": steps, "gamma": 4.0, "loss": loss, "drafter": shape})
        arms = arms_of(first, {**shared, "steps": weekly}, control, longest)
        name = "" if drafter == DFLASH else f"-{drafter}"
        results = PROCEDURAL.folder / f"results{name}.json"
        return cls(PROCEDURAL, f"season{name}", results, first, arms, DraftingConfig())

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
        results = SMOLLM2.folder / "results.json"
        return cls(SMOLLM2, "season-smollm2", results, first, arms, DraftingConfig(head_tokens=4096))

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
        if number == 0:
            return self.first_champion()
        before = self.refreshed(arm, number - 1, seed)
        if THEN in arm and number == 1:
            return self.refreshed(arm_in(arm, 1), 1, seed)
        if arm_in(arm, number) == FROZEN:
            return before
        stage, config = self.arms[arm_in(arm, number)]
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
            if stage in ("opd", "shuffled"):
                table = "scored" if config.get("loss") == "paper" else "sample"
                mining = {"table": table, "drafting": self.drafting.model_dump()}
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
            kept[str(number)] = [each.tolist() for each in (found.committed, found.steps, found.accepted_at.sum(1))]
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

    @cache  # noqa: B019
    def ceiling(self, number: int) -> float:
        """Return the tau of a drafter that always proposes the target's most probable token."""
        target, committed, steps = self.season.target(number), 0, 0
        block = self.first.drafter.block_size
        for answer in load_trajectories(self.season.answers(number) / "heldout").trajectories:
            tokens = torch.from_numpy(np.asarray(answer.tokens))
            best = target.logits(target.read(tokens[None]).hidden[0]).argmax(-1)
            right, anchor = (best[:-1] == tokens[1:]).tolist(), answer.first_anchor
            while anchor <= answer.last_anchor:
                taken = list(itertools.takewhile(bool, right[anchor : anchor + block - 1]))
                advance = min(len(taken), answer.last_anchor - anchor) + 1
                committed, steps, anchor = committed + advance, steps + 1, anchor + advance
        return committed / steps


def arm_in(arm: str, number: int) -> str:
    """Return what an arm is in a week: A in the first, then B, of `A-then-B`."""
    return arm.split(THEN)[:number][-1]


# -- decisions and scores ----------------------------------------------------------------------------------------------


def stats_of(committed: np.ndarray, steps: np.ndarray, accepted: np.ndarray | None = None) -> AcceptanceStats:
    """Return committed tokens, verify steps and histograms of accepted proposals of answers as what replay returns."""
    stats = AcceptanceStats(len(steps))
    stats.committed, stats.steps = committed, steps
    stats.committed_at[:, 0], stats.steps_at[:, 0] = stats.committed, stats.steps  # all below a depth of 1k
    if accepted is not None:
        stats.accepted_at = accepted[:, None]
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


Tallies = Sequence[AcceptanceStats]  # of each seed


def compare(arm: Tallies, other: Tallies) -> dict[str, Any]:
    """Return gain, interval and verdict of an arm over another one, as `bars.md` defines them."""
    found = _compare_ratio(arm, other, lambda stats: (stats.committed, stats.steps))
    low, high, gain = (found[name] for name in ("low", "high", "gain"))
    verdict = "wins" if low > 0 and gain >= 0.01 else "loses" if high < 0 and gain <= -0.01 else "ties"
    return found | {"verdict": verdict}


def compare_offsets(arm: Tallies, other: Tallies) -> dict[str, Any]:
    """Compare the share of steps whose first proposal is accepted, and the tokens accepted in such a step."""

    def by_accepted(stats: AcceptanceStats) -> np.ndarray:
        return np.asarray(stats.accepted_at.sum(1))  # [N, K + 1] steps by the number of accepted proposals

    def first(stats: AcceptanceStats) -> np.ndarray:
        return np.asarray(by_accepted(stats)[:, 1:].sum(1))

    def tokens(stats: AcceptanceStats) -> np.ndarray:
        steps = by_accepted(stats)
        return np.asarray(steps @ np.arange(steps.shape[1]))

    return {
        "first": _compare_ratio(arm, other, lambda stats: (first(stats), by_accepted(stats).sum(1))),
        "accepted_then": _compare_ratio(arm, other, lambda stats: (tokens(stats), first(stats))),
    }


def _compare_ratio(
    arm: Tallies, other: Tallies, of: Callable[[AcceptanceStats], tuple[np.ndarray, ...]]
) -> dict[str, float]:
    """Return the difference of a ratio of sums, the mean over seeds, paired over answers."""
    ratios = [of(stats) for stats in (*arm, *other)]
    estimate = jackknife(mean_difference, *(part for ratio in ratios for part in ratio))
    base = float(np.mean([above.sum() / below.sum() for above, below in ratios[len(arm) :]]))
    low, high = estimate.interval() or (float("nan"), float("nan"))
    return {"difference": estimate.value, "low": low, "high": high, "gain": estimate.value / base}


def decisions(bench: Benchmark, arm: str, number: int, seed: int) -> dict[str, Any]:
    """Return what drift check and gate do with an arm's line in a week, and whether they were right."""
    line, after = (bench.refreshed(arm, n, seed) for n in (number - 1, number))
    found: dict[str, Any] = {"drift": bench.fallen(line, number)}
    if arm_in(arm, number) == FROZEN:
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
    """Train what is missing up to a week, and return every score."""
    weeks = range(1, last + 1)
    for number in weeks:
        for seed in seeds:
            for arm in arms:
                tau = bench.tally(bench.refreshed(arm, number, seed), number).tau
                print(f"seed {seed} {arm} week {number}: tau {tau:.3f}", flush=True)
    verify = step_seconds(bench)
    by_week: dict[str, Any] = {}
    for number in weeks:

        def tallies_of(of: Benchmark, arm: str, number: int = number) -> list[AcceptanceStats]:
            return [of.tally(of.refreshed(arm, number, seed), number) for seed in seeds]

        stats = {arm: tallies_of(bench, arm) for arm in (FROZEN, *arms)}
        table: dict[str, Any] = {}
        for arm, tallies in stats.items():
            lead, now = arm[: arm.find(THEN) + len(THEN)] if THEN in arm else "", arm_in(arm, number)
            row: dict[str, Any] = {"tau": float(np.mean([each.tau for each in tallies]))}
            row["taus"] = [each.tau for each in tallies]
            for other in COMPARED:
                if lead + other in stats:
                    row[f"to_{other}"] = compare(tallies, stats[lead + other])
                    if other in (CONTROL, "block"):
                        row[f"offsets_to_{other}"] = compare_offsets(tallies, stats[lead + other])
            if bench.season is PROCEDURAL and arm in (LONGEST, OPD):
                row[f"to_{DFLASH}"] = compare(tallies, tallies_of(Benchmark.of_procedural(), arm))
            row["decisions"] = {str(seed): decisions(bench, arm, number, seed) for seed in seeds}
            if now != FROZEN:
                saved = 1 / stats[FROZEN][0].tau - 1 / row["tau"]  # verify steps of a token
                row["cpu_seconds"] = float(np.mean([bench.cpu_seconds(arm, number, seed) for seed in seeds]))
                row["saved_per_1000_tokens_and_second"] = 1000 * saved / row["cpu_seconds"]
                row["break_even_tokens"] = row["cpu_seconds"] / (saved * verify) if saved > 0 else None
            table[arm] = row
        change, ceiling = bench.season.weeks[number].change, bench.ceiling(number)
        by_week[str(number)] = {"change": change, "ceiling": ceiling, "arms": table}
    first = {str(n): bench.tally(bench.first_champion(), n).tau for n in range(last + 1)}
    return {
        "seeds": list(seeds), "threads": torch.get_num_threads(), "verify_step_cpu_seconds": verify,
        "first_champion": first, "weeks": by_week,
    }  # fmt: skip


COMPARED = (CONTROL, LONGEST, "sft", OPD, FROZEN, "block", "scope")


def write_results(path: Path, found: Mapping[str, Any]) -> None:
    """Write results. Weeks and arms that were run before stay, and so do rows of more seeds."""
    old = json.loads(path.read_text()) if path.exists() else {"seeds": [], "weeks": {}}
    weeks = old["weeks"]
    for number, week in found["weeks"].items():
        rows = weeks.get(number, {}).get("arms", {})
        rows |= {a: row for a, row in week["arms"].items() if len(row["taus"]) >= len(rows.get(a, row)["taus"])}
        weeks[number] = week | {"arms": rows}
    about = old if len(old["seeds"]) > len(found["seeds"]) else found
    path.write_text(json.dumps({**about, "weeks": weeks}) + "\n")


def show(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables in Markdown."""
    for number, week in found["weeks"].items():
        yield f"\nWeek {number}, {week['change']}; ceiling {week['ceiling']:.3f}\n"
        others = [name for name in (*COMPARED, DFLASH) if any(f"to_{name}" in row for row in week["arms"].values())]
        columns = ["arm", "tau", *(f"to `{other}`" for other in others), "CPU s", "break-even", "drift", "promoted"]
        yield f"| {' | '.join([*columns, 'wrong'])} |"
        yield f"|{'---|' * (len(columns) + 1)}"
        for arm, row in week["arms"].items():
            decided = list(row["decisions"].values())
            wrong = sum(bool(each.get(k)) for each in decided for k in _WRONG)
            cells = [f"`{arm}`", f"{row['tau']:.3f}", *(_compared(row.get(f"to_{other}")) for other in others)]
            cells += [f"{row['cpu_seconds']:.1f}" if "cpu_seconds" in row else ""]
            cells += [f"{row['break_even_tokens']:,.0f}" if row.get("break_even_tokens") else ""]
            cells += [f"{sum(bool(each['drift']) for each in decided)} of {len(decided)}"]
            cells += [
                f"{sum(each['promoted'] for each in decided)} of {len(decided)}" if "cpu_seconds" in row else "",
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
    parser.add_argument("--drafter", choices=list(DRAFTERS), default=DFLASH, help="of the procedural season")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weeks", type=int, help="the last one (default: all)")
    parser.add_argument("--arms", nargs="+", help="default: those of `bars.md`, of the first season")
    options = parser.parse_args()
    torch.set_num_threads(1)
    season = SEASONS[options.season]
    if options.action == "make":
        season.make()
        return
    bench = Benchmark.of_procedural(options.drafter) if season is PROCEDURAL else Benchmark.of_smollm2()
    for last in range(1, (options.weeks or len(season.weeks) - 1) + 1):  # an interrupted run has whole weeks
        found = results(bench, options.arms or SEASON_ARMS, options.seeds, last)
        write_results(bench.results, found)
    print("\n".join(show(found)))


if __name__ == "__main__":
    main()
