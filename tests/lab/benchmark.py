"""The refresh benchmark: weeks of a target with labelled changes, and every arm refreshed over them (`bars.md`).

    python -m tests.lab.benchmark rates --steps 300          # each arm's learning rate, on validation answers
    python -m tests.lab.benchmark run --steps 300 --weeks 3  # trains what has no row, for at most --minutes
    python -m tests.lab.benchmark show                       # the tables in Markdown
    python -m tests.lab.benchmark make                       # answers of weeks that have none

Each training is a row of `rows.jsonl` in the season's folder as soon as it is measured, and each try of a rate one of
`rates.jsonl`. A run continues after the last row; drafters are kept in the tests' cache, and trained again if they are
not there. `--drafter` and `--arms` choose what is trained.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.runtime.statistics import jackknife
from draftsmith.stages.training import losses, response_loss, trainer
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.opd import anchor_sources, step
from draftsmith.stages.training.opd import body as opd_trainer
from draftsmith.stages.training.sft import body as sft_trainer
from tests.lab import rivals
from tests.lab.results import mean_difference
from tests.lab.seasons import PROCEDURAL, SMOLLM2, Season
from tests.stages.kernel_flops import KERNEL_FLOPS
from tests.testbed import cache as folders
from tests.testbed.context import RecordingContext
from tests.testbed.procedural.training import MASK

CONTROL, MAIN = "sft", ("sft", "d-pace", "successors", "chains")
CHAMPIONS, SEEDS, TRIES_SEED = (0, 1), (0, 1, 2), 100
TRIES = (0.5, 1.0, 2.0)  # times the lab's learning rate
CODE = (losses, response_loss, trainer, sft_trainer, opd_trainer, step, anchor_sources, rivals)
Arm = tuple[str, dict[str, Any]]  # a stage, or a trainer of `rivals`, and its config
Row = dict[str, Any]


@dataclass(frozen=True)
class Lab:
    """A drafter over a season: its shape, the settings that all arms share, and the loss of SFT on the distribution."""

    season: Season
    shape: Mapping[str, Any]
    first_steps: int = 600
    learning_rate: float = 4e-3
    distribution: str = "forward_kl"
    shared: Mapping[str, Any] | None = None

    @property
    def drafting(self) -> DraftingConfig:
        """Return how the drafter is served."""
        return DraftingConfig(head_tokens=(self.shared or {}).get("head_tokens"))

    def sft(self, steps: int, rate: float = 1.0, **fields: Any) -> dict[str, Any]:
        """Return a config of SFT. rate: times the lab's."""
        return {**self._training(steps, rate), "gamma": 4.0, "drafter": dict(self.shape), **fields}

    def arms(self, steps: int, rate: float = 1.0) -> dict[str, Arm]:
        """Return every arm. rate: times the lab's."""
        training = self._training(steps, rate)

        def sft(**fields: Any) -> Arm:
            config = SftConfig.model_validate(self.sft(steps, rate, **fields))
            return "sft", config.model_dump()

        def opd(**fields: Any) -> Arm:
            return "opd", {**training, **fields}

        weights = {"loss": self.distribution, "scope": "committed", "beyond": 7.0}
        return {
            CONTROL: sft(loss=self.distribution),
            "d-pace": sft(loss=self.distribution, gamma=None, weights="d_pace"),
            "successors": opd(anchors="successors"),
            "chains": opd(anchors="chains"),
            "chosen": ("chosen", {**training, "anchors": "chains"}),
            "paper": opd(anchors="errors", loss={"preset": "paper", "pooled": False}),
            "paper-authors": opd(anchors="visited", loss="paper", remine_every=1),
            "sft-tokens": sft(loss="cross_entropy"),
            "d-pace-tokens": sft(loss="cross_entropy", gamma=None, weights="d_pace"),
            "vat": opd(anchors="random", loss={"response": weights}),
        }

    def _training(self, steps: int, rate: float) -> dict[str, Any]:
        settings = {"sequences_per_step": 8, "anchors_per_sequence": 16, "compute_dtype": "float32"}
        return {**settings, **(self.shared or {}), "steps": steps, "learning_rate": rate * self.learning_rate}


_ONE_LAYER = {"num_layers": 1, "block_size": 8, "target_layer_ids": [0, 1, 2], "mask_token": MASK}
LABS = {
    "dflash": Lab(PROCEDURAL, _ONE_LAYER),
    "dflash2": Lab(PROCEDURAL, {**_ONE_LAYER, "kind": "dflash2"}, distribution="ce_l1"),
    "dspark": Lab(PROCEDURAL, {**_ONE_LAYER, "kind": "dspark"}, distribution="ce_l1"),
    "eagle3": Lab(PROCEDURAL, {"kind": "eagle3", "block_size": 8, "target_layer_ids": [0, 1, 2]}),
    "smollm2": Lab(
        SMOLLM2,
        {"num_layers": 2, "block_size": 8, "num_target_features": 5, "mask_token": "<empty_output>"},
        first_steps=400,
        learning_rate=1e-3,
        shared={"compute_dtype": "bfloat16", "head_tokens": 4096},
    ),
}


def run_stage(name: str, config: Mapping[str, Any], out: Path, inputs: Mapping[str, Path], seed: int = 0) -> float:
    """Run a stage's body, or a trainer of `rivals`, in this process. Return its CPU seconds."""
    started = time.process_time()
    ctx = RecordingContext(out, out.with_name(f"{out.name}.work"), inputs, seed)
    if name in STAGES:
        declared = importlib.import_module(STAGES[name]).STAGE
        declared.run(ctx, declared.config.model_validate(config))
    else:
        rivals.run(ctx, name, config)
    shutil.rmtree(ctx.work)
    return time.process_time() - started


@dataclass(frozen=True)
class Line:
    """A drafter that is refreshed week after week in one way."""

    lab: str
    champion: int  # seed of the first champion's training
    seed: int
    arm: str
    steps: int  # a week
    rate: float = 1.0

    @property
    def of(self) -> Lab:
        return LABS[self.lab]

    def first(self) -> Path:
        """Return the first champion: SFT on tokens."""
        season = self.of.season

        def build(folder: Path) -> None:
            inputs = {"target": season.target_artifact(0), "trajectories": season.answers(0) / "train"}
            run_stage("sft", config, folder, inputs, self.champion)

        config = self.of.sft(self.of.first_steps, loss="auto" if "kind" in self.of.shape else "cross_entropy")
        extra = f"{config} {season.answers(0).name}"
        return folders.cached(f"{self.lab}-first-{self.champion}", build, code=CODE, extra=extra)

    def refreshed(self, week: int) -> Path:
        """Return the drafter at the end of a week; `costs.json` beside it has the CPU seconds that it took."""
        if week == 0:
            return self.first()
        before = self.refreshed(week - 1)
        stage, config = self.of.arms(self.steps, self.rate)[self.arm]

        def build(folder: Path) -> None:
            inputs = self._inputs(week, before, folder)
            costs = {"mining": mine(self.of, config, folder / "mined", inputs)} if reads_table(stage, config) else {}
            costs["training"] = run_stage(stage, config, folder, inputs, self.seed)
            (folder / "costs.json").write_text(json.dumps(costs))
            for name in ("adopted", "mined"):
                shutil.rmtree(folder / name, ignore_errors=True)

        extra = f"{stage} {config} {self.seed} {before.name} {self.of.season.answers(week).name}"
        name = f"{self.lab}-{self.arm}-{self.steps}-c{self.champion}-s{self.seed}-w{week}"
        return folders.cached(name, build, code=CODE, extra=extra)

    def seconds_again(self, week: int) -> float:
        """Return the CPU seconds of a week's training, which runs again for nothing else."""
        stage, config = self.of.arms(self.steps, self.rate)[self.arm]
        folder = folders.root() / f".again-{self.arm}"
        shutil.rmtree(folder, ignore_errors=True)
        return run_stage(stage, config, folder, self._inputs(week, self.refreshed(week - 1), folder), self.seed)

    def operations(self, week: int = 1) -> float:
        """Return the operations of a week's training in matrix products, mining included, as torch counts them."""
        counted = []
        for steps in (8, 16):
            stage, config = self.of.arms(steps)[self.arm]
            folder = folders.root() / f".counted-{self.arm}"
            shutil.rmtree(folder, ignore_errors=True)
            inputs = self._inputs(week, self.first(), folder)
            with FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS) as counter:
                if reads_table(stage, config):
                    mine(self.of, config, folder / "mined", inputs)
                run_stage(stage, config, folder, inputs, self.seed)
            counted.append(counter.get_total_flops())
        few, many = counted
        return float(few + (self.steps - 8) * (many - few) / 8)

    def measured(self, drafter: Path, week: int, split: str = "heldout") -> tuple[list[float], list[float]]:
        """Return the tokens committed in each answer of a split, and its verify steps."""
        season = self.of.season
        target, stored = season.target(week), load_trajectories(season.answers(week) / split)
        options = ReplayOptions(
            sampling=stored.sampling, drafting=self.of.drafting, with_proposals=False, tokens_per_group=1 << 15
        )
        loaded = {"it": load_drafter(drafter / DRAFTER_FOLDER, target, any_target=True)}
        found = Replayer(target, options).acceptance(loaded, stored.trajectories)["it"]
        return [round(float(each), 2) for each in found.committed], found.steps.astype(int).tolist()

    def _inputs(self, week: int, before: Path, folder: Path) -> dict[str, Path]:
        """Return the inputs of a week's training; a drafter of another target is adopted first."""
        season = self.of.season
        target, answers = season.target_artifact(week), season.answers(week) / "train"
        inputs = {"target": target, "trajectories": answers, "drafter": before}
        if season.weeks[week].target != season.weeks[week - 1].target:
            run_stage("sft", SftConfig(steps=0, adopt=True).model_dump(), folder / "adopted", inputs)
            inputs["drafter"] = folder / "adopted"
        return inputs


def reads_table(stage: str, config: Mapping[str, Any]) -> bool:
    """Return whether an arm reads the mined table."""
    return stage == "chosen" or config.get("anchors") == "errors"


def mine(lab: Lab, config: Mapping[str, Any], out: Path, inputs: dict[str, Path]) -> float:
    """Mine what an arm reads, add it to the inputs, and return the CPU seconds."""
    table = "scored" if "paper" in str(config.get("loss")) else "full"
    seconds = run_stage("mining", {"table": table, "drafting": lab.drafting.model_dump()}, out, inputs)
    inputs["mined"] = out
    return seconds


# -- rows --------------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, which may not be there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row, separators=(",", ":")) + "\n")


def tau(row: Row) -> float:
    """Return the tokens committed in a verify step."""
    return float(sum(row["committed"]) / sum(row["verify_steps"]))


def choose_rates(name: str, steps: int, arms: Sequence[str]) -> None:
    """Try every rate that has no row, in week 1 from both champions, and measure it on validation answers."""
    path = LABS[name].season.folder / "rates.jsonl"
    done = {(r["lab"], r["steps"], r["arm"], r["rate"], r["champion"]) for r in read_rows(path)}
    for champion, arm, rate in itertools.product(CHAMPIONS, arms, TRIES):
        if (name, steps, arm, rate, champion) not in done:
            line = Line(name, champion, TRIES_SEED, arm, steps, rate)
            committed, verified = line.measured(line.refreshed(1), 1, "validation")
            row = {"lab": name, "steps": steps, "arm": arm, "rate": rate, "champion": champion}
            row |= {"tau": round(sum(committed) / sum(verified), 4)}
            append(path, row)
            print(row, flush=True)


def chosen_rate(rows: Iterable[Row], name: str, arm: str) -> float:
    """Return the rate with the highest mean of tau over the champions."""
    taus: dict[float, list[float]] = {}
    for row in rows:
        if (row["lab"], row["arm"]) == (name, arm):
            taus.setdefault(row["rate"], []).append(row["tau"])
    if not taus:
        raise SystemExit(f"{arm} of {name} has no learning rate yet. Run `rates` for it.")
    return max(taus, key=lambda rate: float(np.mean(taus[rate])))


def train_rows(name: str, steps: int, arms: Sequence[str], last: int, minutes: float) -> None:
    """Append a row for every training that has none, week by week, all arms of a champion and seed in one piece.

    Seconds are divided by those of the piece's SFT, which is trained once more where it has its row from another run.
    """
    season, ends = LABS[name].season, time.monotonic() + 60 * minutes
    path, tried = season.folder / "rows.jsonl", read_rows(season.folder / "rates.jsonl")
    rates = {arm: chosen_rate(tried, name, arm) for arm in dict.fromkeys((CONTROL, *arms))}
    rows = [row for row in read_rows(path) if (row["lab"], row["steps"]) == (name, steps)]
    done = {(row["week"], row["champion"], row["seed"], row["arm"]) for row in rows}
    operations: dict[str, float] = {row["arm"]: row["tflop"] for row in rows}
    for turn, (week, seed, champion) in enumerate(itertools.product(range(1, last + 1), SEEDS, CHAMPIONS)):
        missing = [arm for arm in arms if (week, champion, seed, arm) not in done]
        lines = {arm: Line(name, champion, seed, arm, steps, rates[arm]) for arm in (CONTROL, *missing)}
        if missing and CONTROL not in missing:
            control: float | None = lines[CONTROL].seconds_again(week) if week == 1 else None
        order = sorted(missing, key=lambda arm: (arm != CONTROL, (missing.index(arm) + turn) % len(missing)))
        for arm in order:
            if time.monotonic() > ends:
                return
            line = lines[arm]
            drafter = line.refreshed(week)
            costs = json.loads((drafter / "costs.json").read_text())
            control = costs["training"] if arm == CONTROL else control
            if arm not in operations:
                operations[arm] = round(line.operations() / 1e12, 4)
            committed, verified = line.measured(drafter, week)
            row = {"lab": name, "steps": steps, "week": week, "champion": champion, "seed": seed, "arm": arm}
            row |= {"rate": rates[arm], "cpu_seconds": {part: round(spent, 2) for part, spent in costs.items()}}
            row |= {"times_sft": control and round(costs["training"] / control, 4), "tflop": operations[arm]}
            row |= {"committed": committed, "verify_steps": verified}
            append(path, row)
            print(f"week {week} champion {champion} seed {seed} {arm}: tau {tau(row):.3f}, {costs}", flush=True)


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """A difference in tau over lines, with its error from answers and from lines."""

    base: float
    difference: float
    of_answers: float  # standard error
    of_lines: float  # the same over champions and seeds
    lines: int

    def margin(self, level: float) -> float:
        """Return how far the end of a one-sided interval is away."""
        of_lines = float(stdtrit(self.lines - 1, level)) * self.of_lines
        return float(np.hypot(float(stdtrit(np.inf, level)) * self.of_answers, of_lines))

    @property
    def interval(self) -> tuple[float, float]:
        """Return the two-sided interval of 95 % as shares of the base."""
        margin = self.margin(0.975)
        return (self.difference - margin) / self.base, (self.difference + margin) / self.base

    @property
    def most_lost(self) -> float:
        """Return the one-sided 95 % bound of the loss as a share of the base."""
        return (self.margin(0.95) - self.difference) / self.base

    @property
    def verdict(self) -> str:
        low, high = self.interval
        gain = self.difference / self.base
        return "wins" if low > 0 and gain >= 0.01 else "loses" if high < 0 and gain <= -0.01 else "ties"


LineKey = tuple[int, int]  # champion and seed


def compare(arm: Mapping[LineKey, Sequence[Row]], other: Mapping[LineKey, Sequence[Row]]) -> Gain:
    """Compare two arms over the lines that both have, paired over answers; a line's rows are its weeks, in order.

    The error over answers is a jackknife in each week. That over lines is the larger of two: of all lines as
    independent ones, and of the champions' means where there are several.
    """
    keys = sorted(arm.keys() & other.keys())
    weeks = range(len(arm[keys[0]]))
    of_weeks = []
    for week in weeks:
        chosen = [lines[key][week] for lines in (arm, other) for key in keys]
        parts = [np.array(row[name], dtype=float) for row in chosen for name in ("committed", "verify_steps")]
        of_weeks.append(jackknife(mean_difference, *parts))
    of_lines = np.array([np.mean([tau(arm[key][w]) - tau(other[key][w]) for w in weeks]) for key in keys])
    by_champion = [of_lines[[key[0] == c for key in keys]].mean() for c in sorted({key[0] for key in keys})]
    errors = [float(np.std(x, ddof=1) / np.sqrt(len(x))) for x in (of_lines, by_champion) if len(x) > 1]
    base = float(np.mean([tau(other[key][w]) for key in keys for w in weeks]))
    difference = float(np.mean([each.value for each in of_weeks]))
    of_answers = float(np.sqrt(np.sum([each.error**2 for each in of_weeks])) / len(of_weeks))
    return Gain(base, difference, of_answers, max(errors, default=np.inf), len(keys))


def lines_of(rows: Iterable[Row], weeks: Sequence[int]) -> dict[tuple[str, int], dict[str, dict[LineKey, list[Row]]]]:
    """Return the lines by drafter and steps, and by arm, that have all these weeks."""
    found: dict[tuple[str, int], dict[str, dict[LineKey, dict[int, Row]]]] = {}
    for row in rows:
        arms = found.setdefault((row["lab"], row["steps"]), {})
        arms.setdefault(row["arm"], {}).setdefault((row["champion"], row["seed"]), {})[row["week"]] = row
    return {
        group: {
            arm: {key: [of[w] for w in weeks] for key, of in lines.items() if all(w in of for w in weeks)}
            for arm, lines in arms.items()
        }
        for group, arms in found.items()
    }


COLUMNS = (
    "arm", "lines", "tau", "by champion", "to `sft`", "", "to `d-pace`", "", "to `successors`", "most lost",
    "CPU s, times `sft`", "TFLOP",
)  # fmt: skip


def show(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table for each drafter and number of steps, of each week and of all that have the control's lines."""
    weeks = sorted({row["week"] for row in rows})
    for span in ([[w] for w in weeks] + [weeks[:3], weeks[3:]]) if len(weeks) > 1 else [weeks]:
        if not span:
            continue
        for (name, steps), arms in lines_of(rows, span).items():
            if not arms.get(CONTROL):
                continue
            yield f"\n{name}, {steps} steps a week; week {', '.join(map(str, span))}\n"
            yield f"| {' | '.join(COLUMNS)} |"
            yield "|---" * len(COLUMNS) + "|"
            for arm, lines in arms.items():
                if lines:
                    yield _shown(arm, lines, arms)


def _shown(arm: str, lines: Mapping[LineKey, Sequence[Row]], arms: Mapping[str, Mapping[LineKey, list[Row]]]) -> str:
    rows = [row for of_line in lines.values() for row in of_line]
    by_champion = [
        f"{np.mean([tau(row) for row in rows if row['champion'] == champion]):.3f}"
        for champion in sorted({row["champion"] for row in rows})
    ]
    cells = [f"`{arm}`", str(len(lines)), f"{np.mean([tau(row) for row in rows]):.3f}", ", ".join(by_champion)]
    for other in (CONTROL, "d-pace", "successors"):
        if arm == other or not arms.get(other, {}).keys() & lines.keys():
            cells += ["", ""]
            continue
        found = compare(lines, arms[other])
        low, high = found.interval
        shown = f"{found.difference / found.base:+.1%} [{low:+.1%}, {high:+.1%}]"
        cells += [shown, f"{found.most_lost:.1%}" if other == "successors" else found.verdict]
    ratios = [row["times_sft"] for row in rows if row["times_sft"] is not None]
    seconds = np.median([row["cpu_seconds"]["training"] for row in rows])
    cells.append(f"{seconds:.1f}, {np.median(ratios):.2f}" if ratios else f"{seconds:.1f}")
    cells.append(f"{rows[0]['tflop']:.2f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "rates", "run", "show"])
    parser.add_argument("--drafter", choices=list(LABS), default="dflash")
    parser.add_argument("--steps", type=int, default=300, help="a week")
    parser.add_argument("--weeks", type=int, default=3, help="the last one")
    parser.add_argument("--arms", nargs="+", default=MAIN)
    parser.add_argument("--minutes", type=float, default=120)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = LABS[options.drafter].season.folder
    actions: dict[str, Callable[[], None]] = {
        "make": LABS[options.drafter].season.make,
        "rates": lambda: choose_rates(options.drafter, options.steps, options.arms),
        "run": lambda: train_rows(options.drafter, options.steps, options.arms, options.weeks, options.minutes),
        "show": lambda: print("\n".join(show(read_rows(folder / "rows.jsonl")))),
    }
    actions[options.action]()


if __name__ == "__main__":
    main()
