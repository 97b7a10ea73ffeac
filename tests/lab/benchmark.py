"""The refresh benchmark: weeks of a target with labelled changes, and every arm refreshed over them (`bars.md`).

    python -m tests.lab.benchmark make              # writes season/: targets, answers as tokens, their checksums
    python -m tests.lab.benchmark run --seeds 0 1   # trains what is not in the cache, writes results.json, prints it

`run` reads nothing but season/. It continues where it was interrupted: each training is a folder in the tests' cache.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import CHAMPION, EvaluationResult
from draftsmith.artifacts.tables.parquet import write_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.flows.refresh.decisions import degraded_sets
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.chat_template import token_ids
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories, request_seed
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.evaluation.acceptance import acceptance_table, tau_by_slice, tau_comparisons
from draftsmith.stages.evaluation.drift import DriftConfig
from draftsmith.stages.evaluation.gate import GateConfig, decide
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.trace import DEPTHS, AcceptanceStats
from draftsmith.stages.runtime.statistics import Estimate, jackknife, ratio_gain
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import SamplingParams
from draftsmith.stages.target.source import TOKENIZER_PARTS
from draftsmith.stages.training import losses, response_loss, trainer
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.opd import anchor_sources, step
from draftsmith.stages.training.opd import trainer as opd_trainer
from draftsmith.stages.training.sft import trainer as sft_trainer
from tests.lab import rivals
from tests.lab.results import mean_difference
from tests.testbed import cache as folders
from tests.testbed.context import RecordingContext
from tests.testbed.procedural.text import examples
from tests.testbed.procedural.training import MASK, training_examples
from tests.testbed.target import TAUGHT, target_folder

SEASON = Path(__file__).parent / "season"
INDEX, RESULTS = "season.json", "results.json"
FINE_TUNING = TAUGHT.model_copy(update={"steps": 150, "revision_2": 0.7, "learning_rate": 2e-3, "seed": 1})
ANSWERS = SamplingParams(temperature=1.0)
MAX_NEW_TOKENS, HELD_OUT = 96, 160
FIRST_MONDAY = datetime(2026, 1, 5, tzinfo=UTC)


@dataclass(frozen=True)
class Week:
    """What the target is asked in a week; its change came at the beginning."""

    change: str
    target: str
    families: tuple[str, ...]  # in turn
    trained: int = 240  # answers of the first six days


OLD_TRAFFIC = ("record", "dialogue")
WEEKS = (
    Week("first", "target-0", OLD_TRAFFIC, trained=480),
    Week("fine-tuned target", "target-1", OLD_TRAFFIC),
    Week("nothing", "target-1", OLD_TRAFFIC),
    Week("traffic", "target-1", ("story", "record", "story", "dialogue")),
)


def make(folder: Path) -> None:
    """Write the targets in bfloat16, the answers of every week as tokens, and `season.json` with their checksums."""
    first = target_folder()
    sources = {"target-0": first, "target-1": target_folder("target-season", FINE_TUNING, parent=first)}
    index: dict[str, Any] = {"torch": torch.__version__, "files": {}}
    for name, source in sources.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.name == "tokenizer.json":  # in one line
                (folder / name / path.name).write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False))
            elif path.name in (*TOKENIZER_PARTS, "config.json", "generation_config.json"):
                shutil.copyfile(path, folder / name / path.name)
        weights = {n: w.to(torch.bfloat16) for n, w in load_file(source / "model.safetensors").items()}
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    seen = frozenset(example.prompt for taught in (TAUGHT, FINE_TUNING) for example in training_examples(taught))
    for number, week in enumerate(WEEKS):
        asked = list(examples(2000 + number, week.trained + HELD_OUT, exclude=seen, families=week.families))
        seen |= {example.prompt for example in asked}
        target = loaded_target(folder / week.target)
        rows = list(_answered(target, number, [(example.family, example.prompt) for example in asked]))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"week-{number}.parquet", compression="zstd")
        index["files"][f"week-{number}.parquet"] = {
            "change": week.change,
            "answers": len(rows),
            "tokens": sum(len(row["completion_token_ids"]) for row in rows),
        }
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".parquet", ".safetensors"):
            name = str(path.relative_to(folder))
            index["files"].setdefault(name, {})["sha256"] = checksum(path)
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def checksum(path: Path) -> str:
    """Return the sha256 of a file: the content id of what is shipped."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _answered(target: Target, number: int, asked: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield the target's answers in the order of their times, as rows of a log."""
    week = WEEKS[number]
    rows: list[dict[str, Any]] = []
    for i, (family, prompt) in enumerate(asked):
        part, index, count = ("train", i, week.trained) if i < week.trained else ("heldout", i - week.trained, HELD_OUT)
        day = timedelta(days=6 * index / count) if part == "train" else timedelta(days=6 + index / count)
        messages = [{"role": "user", "content": prompt}]
        rows.append({
            "id": f"w{number}-{i:03}", "timestamp": (FIRST_MONDAY + timedelta(weeks=number) + day).isoformat(),
            "week": number, "change": week.change, "split": part, "family": family, "messages": messages,
            "prompt_token_ids": token_ids(target.tokenizer, messages, "", {}), "temperature": ANSWERS.temperature,
        })  # fmt: skip
    requests = [
        Request(row["id"], row["prompt_token_ids"], MAX_NEW_TOKENS, ANSWERS, request_seed(0, row["id"], 0))
        for row in rows
    ]
    longest = max(len(request.prompt_ids) for request in requests) + MAX_NEW_TOKENS + 1
    engine = EmbeddedEngine(target, slots=64, capacity=longest)
    answers = {each.request.request_id: each for each in engine.generate(requests)}
    for row in rows:
        answer = answers[row["id"]]
        assert len(answer.response_ids) >= 2
        yield row | {"completion_token_ids": answer.response_ids, "finish_reason": answer.finish_reason}


# -- arms --------------------------------------------------------------------------------------------------------------

SHARED = {
    "learning_rate": 3e-3, "sequences_per_step": 8, "anchors_per_sequence": 16, "compute_dtype": "float32",
}  # fmt: skip
FIRST = SftConfig.model_validate(
    {
        **SHARED, "steps": 600, "gamma": 4.0, "loss": "cross_entropy",
        "drafter": {"num_layers": 1, "block_size": 8, "target_layer_ids": [0, 1, 2], "mask_token": MASK},
    }
)  # fmt: skip
REFRESH = {**SHARED, "steps": 150}
SFT = FIRST.model_copy(update=REFRESH)
UP_TO_FAILURE = {"response": {"loss": "cross_entropy", "scope": "committed", "beyond": 0}}
CONTROL_CONFIG = SFT.model_copy(update={"loss": "forward_kl"})
FROZEN, CONTROL, OPD = "frozen", "sft-distribution", "opd"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # a stage, or the trainer of `rivals`, and its config
    "sft": ("sft", SFT.model_dump()),
    CONTROL: ("sft", CONTROL_CONFIG.model_dump()),
    "sft-longer": ("sft", CONTROL_CONFIG.model_copy(update={"steps": 195}).model_dump()),
    "auf": ("opd", {**REFRESH, "anchors": "random", "loss": UP_TO_FAILURE}),
    "d-pace": ("sft", SFT.model_copy(update={"gamma": None, "weights": "d_pace"}).model_dump()),
    "visible-prefix": ("visible-prefix", SFT.model_dump()),
    OPD: ("opd", REFRESH),
    "paper": ("opd", {**REFRESH, "anchors": "errors", "loss": "paper"}),
}
CODE = (losses, response_loss, trainer, sft_trainer, opd_trainer, step, anchor_sources, rivals)
TALLIES, COSTS = "tallies.json", "costs.json"


def run_stage(name: str, config: Mapping[str, Any], out: Path, inputs: Mapping[str, Path], seed: int = 0) -> None:
    """Run a stage's body, or the trainer of `rivals`, in this process."""
    ctx = RecordingContext(out, out.with_name(f"{out.name}.work"), inputs, seed)
    if name in STAGES:
        declared = importlib.import_module(STAGES[name]).STAGE
        declared.run(ctx, declared.config.model_validate(config))
    else:
        rivals.run(ctx, SftConfig.model_validate(config))
    shutil.rmtree(ctx.work)


@cache
def target_artifact(source: Path) -> Path:
    """Return the artifact of a shipped target."""

    def build(folder: Path) -> None:
        run_stage("target", {"source": str(source), "dtype": "float32"}, folder / "target", {})

    return folders.cached("season-target", build, extra=f"{source} {checksum(source / 'model.safetensors')}") / "target"


@cache
def loaded_target(source: Path) -> Target:
    """Return a shipped target."""
    return Target.load(target_artifact(source))


@cache
def answers(number: int) -> Path:
    """Return the folder of a week's answers as stages read them."""
    path = SEASON / f"week-{number}.parquet"

    def build(folder: Path) -> None:
        rows = [
            {
                "trajectory_id": f"{row['id']}/0", "prompt_id": row["id"], "split": row["split"], "sample": 0,
                "prompt_ids": row["prompt_token_ids"], "response_ids": row["completion_token_ids"],
                "finish_reason": row["finish_reason"], "temperature": row["temperature"], "top_p": 1.0, "top_k": 0,
                "seed": 0, "engine": "season",
            }
            for row in pq.read_table(path).to_pylist()
        ]  # fmt: skip
        for split in ("train", "heldout"):
            (folder / split).mkdir()
            write_table(folder / split / "trajectories.parquet", TRAJECTORIES, [r for r in rows if r["split"] == split])

    return folders.cached("season-answers", build, extra=checksum(path))


def replay(drafter: Path, weeks: Sequence[int]) -> dict[str, list[list[float]]]:
    """Return committed tokens and verify steps of each measured answer of some weeks, of that week's target."""
    tallies = {}
    for number in weeks:
        target = loaded_target(SEASON / WEEKS[number].target)
        stored = load_trajectories(answers(number) / "heldout")
        options = ReplayOptions(sampling=stored.sampling, with_proposals=False, tokens_per_group=1 << 15)
        replayer = Replayer(target, options)
        loaded = {"it": load_drafter(drafter / DRAFTER_FOLDER, target, any_target=True)}
        stats = replayer.acceptance(loaded, stored.trajectories)["it"]
        tallies[str(number)] = [stats.committed.tolist(), stats.steps.tolist()]
    return tallies


def first_champion() -> Path:
    """Return the drafter that every arm starts from, with its tallies of all weeks."""

    def build(folder: Path) -> None:
        inputs = {"target": target_artifact(SEASON / WEEKS[0].target), "trajectories": answers(0) / "train"}
        run_stage("sft", FIRST.model_dump(), folder, inputs)
        (folder / TALLIES).write_text(json.dumps(replay(folder, range(len(WEEKS)))))

    return folders.cached("season-first", build, code=CODE, extra=f"{FIRST} {answers(0).name}")


def refreshed(arm: str, number: int, seed: int) -> Path:
    """Return an arm's drafter at the end of a week, with its tallies of this week and the next, and its costs."""
    before = first_champion() if number == 1 else refreshed(arm, number - 1, seed)
    stage, config = ARMS[arm]
    target, data = target_artifact(SEASON / WEEKS[number].target), answers(number) / "train"

    def build(folder: Path) -> None:
        inputs = {"target": target, "trajectories": data, "drafter": before}
        if WEEKS[number].target != WEEKS[number - 1].target:
            adopted = SftConfig(steps=0, adopt=True).model_dump()
            run_stage("sft", adopted, folder / "adopted", inputs)
            inputs["drafter"] = folder / "adopted"
        started = time.process_time()
        if stage == "opd":
            table = "scored" if arm == "paper" else "sample"
            run_stage("mining", {"table": table}, folder / "mined", inputs)
            inputs["mined"] = folder / "mined"
        run_stage(stage, config, folder, inputs, seed)
        (folder / COSTS).write_text(json.dumps({"cpu_seconds": time.process_time() - started}))
        (folder / TALLIES).write_text(json.dumps(replay(folder, range(number, min(number + 2, len(WEEKS))))))
        for name in ("adopted", "mined"):
            shutil.rmtree(folder / name, ignore_errors=True)

    extra = f"{stage} {config} {seed} {before.name} {target.parent.name} {data.parent.name}"
    return folders.cached(f"season-{arm}-{number}-s{seed}", build, code=CODE, extra=extra)


# -- decisions and scores ----------------------------------------------------------------------------------------------


def tally(drafter: Path, number: int) -> AcceptanceStats:
    """Return a drafter's acceptance on the measured answers of a week."""
    committed, steps = json.loads((drafter / TALLIES).read_text())[str(number)]
    stats = AcceptanceStats(len(steps))
    stats.committed, stats.steps = np.array(committed), np.array(steps)
    stats.committed_at[:, 0], stats.steps_at[:, 0] = stats.committed, stats.steps  # all below a depth of 1k
    stats.accepted = stats.judged = np.zeros(len(DEPTHS), dtype=np.int64)
    return stats


def half(stats: AcceptanceStats, which: int) -> AcceptanceStats:
    """Return every second answer: of half 0, which the gate sees, or of half 1."""
    part = AcceptanceStats(len(stats.steps[which::2]))
    for name in ("committed", "steps", "committed_at", "steps_at"):
        setattr(part, name, getattr(stats, name)[which::2])
    part.accepted, part.judged = stats.accepted, stats.judged
    return part


def labels(number: int) -> list[tuple[str]]:
    """Return the family of each measured answer."""
    rows = pq.read_table(SEASON / f"week-{number}.parquet", columns=["split", "family"]).to_pylist()
    return [(row["family"],) for row in rows if row["split"] == "heldout"]


def promotes(challenger: AcceptanceStats, champion: AcceptanceStats, families: Sequence[tuple[str]]) -> bool:
    """Return whether the gate promotes, by tau alone."""
    tallies, units = {CHAMPION: champion, "opd": challenger}, [str(i) for i in range(len(families))]
    evaluation = EvaluationResult(
        temperature=ANSWERS.temperature,
        drafters=acceptance_table(tallies, units, [False] * len(units)),
        comparisons=tau_comparisons(tallies, units, families),
    )
    return decide(evaluation, GateConfig(judge_speed=False)).promote


def fallen(drafter: Path, number: int) -> list[str]:
    """Return the slices in which the drift check finds that a drafter has lost tau since the week before."""
    now, then = (_by_slice(drafter, each) for each in (number, number - 1))
    return degraded_sets(now, then, DriftConfig().threshold)


def _by_slice(drafter: Path, number: int) -> dict[str, SetMetrics]:
    families = labels(number)
    units = [str(i) for i in range(len(families))]
    return {name: arms["it"] for name, arms in tau_by_slice({"it": tally(drafter, number)}, units, families).items()}


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


def decisions(arm: str, number: int, seed: int) -> dict[str, Any]:
    """Return what drift check and gate do with an arm's line in a week, and whether they were right."""
    line = first_champion() if number == 1 or arm == FROZEN else refreshed(arm, number - 1, seed)
    found = {"drift": fallen(line, number)}
    if arm == FROZEN:
        return found
    before, after, families = tally(line, number), tally(refreshed(arm, number, seed), number), labels(number)
    promoted = promotes(half(after, 0), half(before, 0), families[::2])
    other, base = half(after, 1), half(before, 1)
    gain = jackknife(ratio_gain, other.committed, other.steps, base.committed, base.steps)
    interval = gain.interval()
    clear = gain.value >= 0.05 and interval is not None and interval[0] > 0
    return found | {
        "promoted": promoted,
        "gain_of_other_half": gain.value,
        "false_promotion": promoted and gain.value <= 0,
        "missed_promotion": clear and not promoted,
        "copy_promoted": promotes(half(before, 0), half(before, 0), families[::2]),
    }


@cache
def step_seconds() -> float:
    """Return the CPU seconds of a verify step with the first champion, drafting included."""
    target, drafter = loaded_target(SEASON / WEEKS[0].target), first_champion() / DRAFTER_FOLDER
    stored = load_trajectories(answers(0) / "heldout")
    engine = EmbeddedEngine(target, load_drafter(drafter, target), slots=1, capacity=512)
    requests = [
        Request(t.trajectory_id, t.tokens[: t.prompt_length], MAX_NEW_TOKENS) for t in list(stored.trajectories)[:8]
    ]
    started = time.process_time()
    steps = sum(completion.verify_steps for completion in engine.generate(requests))
    return (time.process_time() - started) / steps


def results(arms: Sequence[str], seeds: Sequence[int], last: int) -> dict[str, Any]:
    """Train what is missing up to a week, and return every score. The control and `opd` are among the arms."""
    weeks = range(1, last + 1)
    for number in weeks:
        for seed in seeds:
            for arm in arms:
                folder = refreshed(arm, number, seed)
                print(f"seed {seed} {arm} week {number}: tau {tally(folder, number).tau:.3f}", flush=True)
    verify = step_seconds()
    by_week: dict[str, Any] = {}
    for number in weeks:
        frozen = [tally(first_champion(), number)] * len(seeds)
        stats = {FROZEN: frozen} | {arm: [tally(refreshed(arm, number, s), number) for s in seeds] for arm in arms}
        table: dict[str, Any] = {}
        for arm, tallies in stats.items():
            taus = [each.tau for each in tallies]
            row: dict[str, Any] = {"tau": float(np.mean(taus)), "taus": taus, "to_opd": compare(tallies, stats[OPD])}
            row |= {f"to_{other}": compare(tallies, stats[other]) for other in (CONTROL, "sft") if other in stats}
            row["decisions"] = {str(seed): decisions(arm, number, seed) for seed in seeds}
            if arm != FROZEN:
                costs = [json.loads((refreshed(arm, number, s) / COSTS).read_text())["cpu_seconds"] for s in seeds]
                saved = 1 / float(np.mean([each.tau for each in frozen])) - 1 / row["tau"]  # verify steps of a token
                row["cpu_seconds"] = float(np.mean(costs))
                row["saved_per_1000_tokens_and_second"] = 1000 * saved / row["cpu_seconds"]
                row["break_even_tokens"] = row["cpu_seconds"] / (saved * verify) if saved > 0 else None
            table[arm] = row
        by_week[str(number)] = {"change": WEEKS[number].change, "arms": table}
    return {
        "seeds": list(seeds), "threads": torch.get_num_threads(), "verify_step_cpu_seconds": verify,
        "first_champion": {str(n): tally(first_champion(), n).tau for n in range(len(WEEKS))}, "weeks": by_week,
    }  # fmt: skip


def show(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tables in Markdown."""
    for number, week in found["weeks"].items():
        yield f"\nWeek {number}, {week['change']}\n"
        yield "| arm | tau | to the control | to `sft` | to `opd` | CPU s | break-even | drift | promoted | wrong |"
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for arm, row in week["arms"].items():
            decided = list(row["decisions"].values())
            wrong = sum(bool(each.get(k)) for each in decided for k in _WRONG)
            cells = [f"`{arm}`", f"{row['tau']:.3f}", *(_compared(row.get(f"to_{o}")) for o in (CONTROL, "sft", OPD))]
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
    parser.add_argument("--folder", type=Path, default=SEASON, help="of `make`: where the season is written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.action == "make":
        make(options.folder)
        return
    for last in range(1, len(WEEKS)):  # an interrupted run has whole weeks
        found = results(options.arms, options.seeds, last)
        (SEASON / RESULTS).write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(show(found)))


if __name__ == "__main__":
    main()
