"""Decoding speed in this process: on one loaded target, all arms decode a prompt before the next one comes.

What else the machine does then meets all arms alike, and their ratios hold on a busy machine. On a CPU one thread
decodes: two share cores with other programs so unevenly that ratios differ by half.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TURNS
from draftsmith.stages.data.load import Prompt
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.base import Completion
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.evaluation.exactness import add_margins
from draftsmith.stages.evaluation.machine_load import LoadMeter
from draftsmith.stages.evaluation.timed_runs import (
    PLAIN,
    Measured,
    Row,
    Setting,
    candidate_sizes,
    compare_with_plain,
    equality,
    fastest,
    requests_for,
    rounds_of,
    row_of,
    settings_of,
    told,
    turn_of,
)
from draftsmith.stages.evaluation.validity import steady
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.target.causal_lm import Target

if TYPE_CHECKING:
    from draftsmith.stages.evaluation.config import EvaluationConfig


ENGINE = "embedded"


def measure_embedded(
    ctx: StageContext,
    config: EvaluationConfig,
    target: Target,
    folders: Mapping[str, Path],
    drafters: Mapping[str, Drafter],
    heldout: Sequence[Prompt],
    validation: Sequence[Prompt],
) -> Measured:
    """Choose each drafter's block size on validation prompts, decode held-out ones in turns, compare the outputs.

    folders: the drafters' checkpoints.
    """
    test = SpeedTest(ctx, target, config, ctx.seed)
    settings = settings_of(config)
    with one_thread(target):
        sizes, candidates = choose_block_sizes(test, drafters, validation, settings[0])
        ctx.log(told(sizes))
        rows, turns = test.take_turns(drafters, sizes, heldout[: config.speed_prompts], settings)
    drawn = any(
        drafter.samples_proposals for drafter in drafters.values()
    )  # then sampled answers are plain decoding's in distribution alone
    compare_with_plain(rows, sampled=not drawn)
    add_margins(target, rows, heldout)
    exactness = {"serving_dtype": target.info.dtype, **equality(rows)}
    first_of_kind: dict[str, str] = {}
    for name, drafter in drafters.items():
        first_of_kind.setdefault(drafter.kind, name)
    checkpoints = [(folders[name], sizes[name]) for name in first_of_kind.values()]
    compared = replace(settings[0], temperature=0.0) if drawn else settings[0]
    exactness |= exactness_in_fp32(test, ctx.inputs["target"], checkpoints, heldout, compared)
    return Measured(ENGINE, rows, turns, candidates, len(validation), exactness)


@contextmanager
def one_thread(target: Target) -> Iterator[None]:
    """Compute with one thread while the block runs, if the target is on a CPU."""
    before = torch.get_num_threads()
    if target.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SpeedTest:
    """Runs prompts through one engine a measured arm; every arm sees the same prompts, settings and seeds."""

    def __init__(self, ctx: StageContext, target: Target, config: EvaluationConfig, seed: int):
        self.ctx, self.target, self.config, self.seed = ctx, target, config, seed

    def decode(
        self,
        target: Target,
        drafter: Drafter | None,
        block_size: int,
        prompts: Sequence[Prompt],
        setting: Setting,
        max_new: int | None = None,
        round: int = 0,
    ) -> tuple[list[Completion], float]:
        """Return answers in the order of the prompts, and the wall time in seconds."""
        capacity = max(len(p.token_ids) for p in prompts) + self.config.sampling.max_new_tokens + block_size
        drafting = self.config.drafted(block_size) if drafter else None
        engine = EmbeddedEngine(target, drafter, slots=setting.concurrency, capacity=capacity, drafting=drafting)
        requests = requests_for(prompts, self.config, setting, self.seed, max_new, round)
        started = time.perf_counter()
        done = {c.request.request_id: c for c in engine.generate(requests)}
        return [done[p.prompt_id] for p in prompts], time.perf_counter() - started

    def warm_up(self, drafter: Drafter | None, block_size: int, prompts: Sequence[Prompt], setting: Setting) -> None:
        """First calls allocate and pick kernels; they are not measured."""
        self.decode(self.target, drafter, block_size, prompts[: setting.concurrency], setting, max_new=4)

    def take_turns(
        self,
        drafters: Mapping[str, Drafter],
        sizes: Mapping[str, int],
        prompts: Sequence[Prompt],
        settings: Sequence[Setting],
    ) -> tuple[list[Row], list[Row]]:
        """Return rows of the tables `requests` and `turns`. sizes: the block of each drafter.

        `rounds` are given, and as many again while repetitions disagree. A round at one setting is kept when all arms
        had their turn in it: an interrupted evaluation goes on with the next one.
        """
        rows: list[Row] = []
        turns: list[Row] = []
        warm: set[Setting] = set()
        answers_a_round = len(settings) * (1 + len(drafters)) * len(prompts)
        for round, most in rounds_of(self.ctx, self.config, partial(steady, turns, rows, settings)):
            for place, setting in enumerate(settings):
                folder = self.ctx.work / "rounds" / f"{round}-{place}"
                if not (folder / "turns.parquet").exists():
                    if setting not in warm:
                        for drafter, size in [(None, 1), *((drafters[arm], sizes[arm]) for arm in drafters)]:
                            self.warm_up(drafter, size, prompts, setting)
                        warm.add(setting)
                    before = (len(rows), most * answers_a_round)
                    answered, timed = self._round(round, drafters, sizes, prompts, setting, before)
                    write_table(folder / "requests.parquet", REQUESTS, answered)
                    write_table(folder / "turns.parquet", TURNS, timed)  # the last: a folder that has it is complete
                rows += read_table(folder / "requests.parquet", REQUESTS).to_pylist()
                turns += read_table(folder / "turns.parquet", TURNS).to_pylist()
                self.ctx.progress(len(rows), most * answers_a_round, "answers")
                self.ctx.check_interrupted()
        return rows, turns

    def _round(
        self,
        round: int,
        drafters: Mapping[str, Drafter],
        sizes: Mapping[str, int],
        prompts: Sequence[Prompt],
        setting: Setting,
        before: tuple[int, int],
    ) -> tuple[list[Row], list[Row]]:
        """Decode all prompts with every arm, which alternate by small batches in an order that changes.

        before: answers so far, and in all, for the progress.
        """
        arms: list[tuple[str, Drafter | None]] = [(PLAIN, None), *drafters.items()]
        batches = _batches(prompts, setting)
        answers: dict[str, list[Completion]] = {arm: [] for arm, _ in arms}
        seconds = dict.fromkeys(answers, 0.0)
        meter, done = LoadMeter(), before[0]
        for place, batch in enumerate(batches):
            first = place % len(arms)
            # the other way round every second time: an arm is faster or slower by what was decoded before it
            for arm, drafter in (arms[first:] + arms[:first])[:: -1 if round % 2 else 1]:
                answered, wall = self.decode(self.target, drafter, sizes.get(arm, 1), batch, setting, round=round)
                answers[arm] += answered
                seconds[arm] += wall
                done += len(answered)
            self.ctx.progress(done, before[1], "answers")
            self.ctx.check_interrupted()
        share = meter.others_share()
        rows: list[Row] = []
        turns: list[Row] = []
        for order, (arm, _) in enumerate(arms):
            size, own = sizes.get(arm, 1), answers[arm]
            turns.append(turn_of(ENGINE, round, order, arm, size, setting, own, seconds[arm], share, len(batches)))
            rows += [row_of(ENGINE, round, arm, size, setting, answer) for answer in own]
        return rows, turns


def _batches(prompts: Sequence[Prompt], setting: Setting) -> list[Sequence[Prompt]]:
    """Single prompts; with several in flight twice as many, since a batch ends with its slowest."""
    size = 1 if setting.concurrency == 1 else 2 * setting.concurrency
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def choose_block_sizes(
    test: SpeedTest, drafters: Mapping[str, Drafter], prompts: Sequence[Prompt], setting: Setting
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Return each drafter's fastest candidate on validation prompts, and tokens/s of every candidate, measured once.

    The candidates of an arm alternate by small batches. What was measured is kept: an evaluation that goes on must not
    choose anew.
    """
    path = test.ctx.work / "block_sizes.json"
    measured: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    sizes = {}
    for arm, drafter in drafters.items():
        candidates = candidate_sizes(test.config, drafter.block_size)
        if len(candidates) > 1 and arm not in measured:
            tokens, seconds = dict.fromkeys(candidates, 0), dict.fromkeys(candidates, 0.0)
            for size in candidates:
                test.warm_up(drafter, size, prompts, setting)
            for place, batch in enumerate(_batches(prompts, setting)):
                for size in candidates[:: -1 if place % 2 else 1]:
                    answers, wall = test.decode(test.target, drafter, size, batch, setting)
                    tokens[size] += sum(len(answer.response_ids) for answer in answers)
                    seconds[size] += wall
                test.ctx.check_interrupted()
            measured[arm] = {str(size): tokens[size] / seconds[size] for size in candidates}
            write_text(path, json.dumps(measured))
        speeds = measured.get(arm)
        sizes[arm] = fastest({size: speeds[str(size)] for size in candidates}) if speeds else candidates[0]
    return sizes, measured


def exactness_in_fp32(
    test: SpeedTest,
    target_folder: Path,
    checkpoints: Iterable[tuple[Path, int]],
    prompts: Sequence[Prompt],
    setting: Setting,
) -> dict[str, int]:
    """Compare plain and speculative decoding in float32, token for token, all prompts at once.

    Returns how many prompts, and how many came out equal with every checkpoint. checkpoints: with the block size that
    each decodes with.
    """
    if not test.config.exactness_prompts:
        return {"fp32_prompts": 0, "fp32_identical": 0}
    chosen = prompts[: test.config.exactness_prompts]
    setting = replace(setting, concurrency=len(chosen))
    path = test.ctx.work / "exactness.json"
    kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    arms = list(checkpoints)
    target: Target | None = None
    for place, (folder, block_size) in enumerate([(None, 1), *arms]):
        if (name := str(place)) in kept:
            continue
        target = target or Target.load(target_folder, dtype="float32")
        drafter = load_drafter(folder, target) if folder else None
        answers, _ = test.decode(target, drafter, block_size, chosen, setting)
        kept[name] = [answer.response_ids for answer in answers]
        write_text(path, json.dumps(kept))
        test.ctx.check_interrupted()
    plain, *speculative = (kept[str(place)] for place in range(1 + len(arms)))
    identical = [all(answers[i] == expected for answers in speculative) for i, expected in enumerate(plain)]
    return {"fp32_prompts": len(chosen), "fp32_identical": sum(identical)}
