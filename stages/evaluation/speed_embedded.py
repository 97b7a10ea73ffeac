"""Decoding speed in this process: on one loaded target, all arms decode a prompt before the next one comes. Exactness.

Other load on the machine then slows all arms alike, so their ratios hold on a busy machine.

Exactness compares outputs with and without a drafter, and reports how sure the target was where they differ.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.results.evaluation import PLAIN, Exactness
from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TIMED_RUNS
from draftsmith.stages.data.stored_prompts import Prompt
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.base import Completion
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.looks import Looks
from draftsmith.stages.evaluation.repetitions import steady
from draftsmith.stages.evaluation.timed_runs import (
    LoadMeter,
    Row,
    Setting,
    SpeedMeasurement,
    TimedRun,
    candidate_sizes,
    describe_block_sizes,
    fastest,
    one_thread,
    requests_for,
    rounds_of,
    settings_of,
)
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.targets.causal_lm import Target

ENGINE = "embedded"


@dataclass(frozen=True)
class Decoder:
    """The drafter, if any, and the settings that an arm decodes with."""

    drafter: Drafter | None = None
    block_size: int = 1


def measure_embedded(
    test: EmbeddedSpeedTest,
    folders: Mapping[str, Path],
    drafters: Mapping[str, Drafter],
    heldout: Sequence[Prompt],
    validation: Sequence[Prompt],
    looks: Looks,
) -> SpeedMeasurement:
    """Choose each drafter's block size on validation prompts, time all arms on held-out ones, compare the outputs.

    folders: the drafters' checkpoints. A further look keeps the block sizes of the first.
    """
    ctx, config, target = test.ctx, test.config, test.target
    settings = settings_of(config)
    with one_thread(target):
        sizes, candidates = looks.chosen() or choose_block_sizes(test, drafters, validation, settings[0])
        ctx.log(describe_block_sizes(sizes))
        arms = {PLAIN: Decoder()} | {arm: Decoder(drafter, sizes[arm]) for arm, drafter in drafters.items()}
        requests, runs = test.time_arms(arms, looks, settings)
    # with a drafter that samples its proposals, sampled answers have the same distribution, not the same tokens
    sampled = any(drafter.samples_proposals for drafter in drafters.values())
    compare_with_plain(requests, sampled=not sampled)
    add_margins(target, requests, heldout)
    first_of_kind: dict[str, str] = {}
    for arm, drafter in drafters.items():
        first_of_kind.setdefault(drafter.kind, arm)
    checkpoints = [(folders[arm], sizes[arm]) for arm in first_of_kind.values()]
    setting = replace(settings[0], temperature=0.0) if sampled else settings[0]
    in_fp32 = exactness_in_fp32(test, checkpoints, heldout, setting)
    result = exactness(requests, target.info.dtype).model_copy(update=in_fp32)
    return SpeedMeasurement(ENGINE, requests, runs, candidates, len(validation), result)


class EmbeddedSpeedTest:
    """Decodes prompts with every arm in this process; all arms have the same prompts, settings and seeds."""

    def __init__(self, ctx: StageContext, target: Target, config: EvaluationConfig, seed: int):
        self.ctx, self.target, self.config, self.seed = ctx, target, config, seed

    def engine(self, target: Target, decoder: Decoder, slots: int, longest: int) -> EmbeddedEngine:
        """Return an engine for one arm. longest: prompt and answer in tokens."""
        return EmbeddedEngine(
            target,
            decoder.drafter,
            slots=slots,
            capacity=longest + decoder.block_size,
            drafting=self.config.drafted(decoder.block_size) if decoder.drafter else None,
        )

    def decode(
        self,
        target: Target,
        decoder: Decoder,
        prompts: Sequence[Prompt],
        setting: Setting,
        max_new: int | None = None,
        round: int = 0,
    ) -> tuple[list[Completion], float]:
        """Return answers in the order of the prompts, and the wall time in seconds."""
        longest = max(len(p.token_ids) for p in prompts) + self.config.sampling.max_new_tokens
        engine = self.engine(target, decoder, setting.concurrency, longest)
        requests = requests_for(prompts, self.config, setting, self.seed, max_new, round)
        started = time.perf_counter()
        done = {c.request.request_id: c for c in engine.generate(requests)}
        return [done[p.prompt_id] for p in prompts], time.perf_counter() - started

    def warm_up(self, decoder: Decoder, prompts: Sequence[Prompt], setting: Setting) -> None:
        """Make the first calls, which allocate and choose kernels, without measuring them."""
        self.decode(self.target, decoder, prompts[: setting.concurrency], setting, max_new=4)

    def time_arms(
        self, arms: Mapping[str, Decoder], looks: Looks, settings: Sequence[Setting]
    ) -> tuple[list[Row], list[Row]]:
        """Return rows of `requests` and `turns` of all looks; this one has `rounds` rounds.

        If repetitions disagree it has twice as many. A round at one setting is stored when all arms are timed: an
        interrupted evaluation continues with the next one.
        """
        requests, runs, prompts = list(looks.requests), list(looks.runs), looks.prompts
        warm: set[Setting] = set()
        answers_a_round = len(settings) * len(arms) * len(prompts)
        for look_round, most in rounds_of(self.ctx, self.config, partial(steady, runs, requests, settings)):
            round = looks.first_round + look_round
            for index, setting in enumerate(settings):
                folder = self.ctx.work / "rounds" / f"{round}-{index}"
                if not (folder / "turns.parquet").exists():
                    if setting not in warm:
                        for decoder in arms.values():
                            self.warm_up(decoder, prompts, setting)
                        warm.add(setting)
                    before = (len(requests) - len(looks.requests), most * answers_a_round)
                    new_requests, new_runs = self._round(round, arms, prompts, setting, before)
                    write_table(folder / "requests.parquet", REQUESTS, new_requests)
                    write_table(
                        folder / "turns.parquet", TIMED_RUNS, new_runs
                    )  # last: a folder that has it is complete
                requests += read_table(folder / "requests.parquet", REQUESTS).to_pylist()
                runs += read_table(folder / "turns.parquet", TIMED_RUNS).to_pylist()
                self.ctx.progress(len(requests) - len(looks.requests), most * answers_a_round, "answers")
                self.ctx.check_interrupted()
        return requests, runs

    def _round(
        self,
        round: int,
        arms: Mapping[str, Decoder],
        prompts: Sequence[Prompt],
        setting: Setting,
        before: tuple[int, int],
    ) -> tuple[list[Row], list[Row]]:
        """Decode all prompts with every arm; the arms alternate by small batches in an order that changes.

        before: numbers of answers so far and in all, for the progress.
        """
        names, batches = list(arms), _batches(prompts, setting)
        answers: dict[str, list[Completion]] = {arm: [] for arm in arms}
        seconds = dict.fromkeys(arms, 0.0)
        meter, done = LoadMeter(), before[0]
        for index, batch in enumerate(batches):
            # in a fixed order, time slices of other programs may hit the same arm again and again; every second round
            # is reversed, since the arm before it makes an arm faster or slower
            order = random.Random(f"{self.seed} {round // 2} {index}").sample(names, len(names))
            for arm in order[:: -1 if round % 2 else 1]:
                answered, wall = self.decode(self.target, arms[arm], batch, setting, round=round)
                answers[arm] += answered
                seconds[arm] += wall
                done += len(answered)
            self.ctx.progress(done, before[1], "answers")
            self.ctx.check_interrupted()
        share = meter.others_share()
        requests: list[Row] = []
        runs: list[Row] = []
        for number, (arm, decoder) in enumerate(arms.items()):
            run = TimedRun(ENGINE, round, number, arm, decoder.block_size, setting)
            runs.append(run.row(answers[arm], seconds[arm], share, len(batches)))
            requests += [run.request_row(answer) for answer in answers[arm]]
        return requests, runs


def _batches(prompts: Sequence[Prompt], setting: Setting) -> list[Sequence[Prompt]]:
    """Return single prompts; with several in flight twice as many, since a batch ends with its slowest."""
    size = 1 if setting.concurrency == 1 else 2 * setting.concurrency
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]


def choose_block_sizes(
    test: EmbeddedSpeedTest, drafters: Mapping[str, Drafter], prompts: Sequence[Prompt], setting: Setting
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Return each drafter's fastest candidate on validation prompts, and tokens/s of every candidate, measured once.

    The candidates of an arm alternate by small batches. Measurements are stored: a resumed evaluation must not
    choose again.
    """
    path = test.ctx.work / "block_sizes.json"
    measured: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
    sizes = {}
    for arm, drafter in drafters.items():
        candidates = candidate_sizes(test.config, drafter.block_size)
        if len(candidates) > 1 and arm not in measured:
            tokens, seconds = dict.fromkeys(candidates, 0), dict.fromkeys(candidates, 0.0)
            for size in candidates:
                test.warm_up(Decoder(drafter, size), prompts, setting)
            for index, batch in enumerate(_batches(prompts, setting)):
                for size in candidates[:: -1 if index % 2 else 1]:
                    answers, wall = test.decode(test.target, Decoder(drafter, size), batch, setting)
                    tokens[size] += sum(len(answer.response_ids) for answer in answers)
                    seconds[size] += wall
                test.ctx.check_interrupted()
            measured[arm] = {str(size): tokens[size] / seconds[size] for size in candidates}
            write_text(path, json.dumps(measured))
        speeds = measured.get(arm)
        sizes[arm] = fastest({size: speeds[str(size)] for size in candidates}) if speeds else candidates[0]
    return sizes, measured


def exactness_in_fp32(
    test: EmbeddedSpeedTest, checkpoints: Iterable[tuple[Path, int]], prompts: Sequence[Prompt], setting: Setting
) -> dict[str, int]:
    """Compare decoding with and without a drafter in float32, token for token, all prompts in one batch.

    Returns the number of prompts, and of prompts with equal outputs for every checkpoint. checkpoints: with the block
    size that each decodes with.
    """
    if not test.config.exactness_prompts:
        return {"fp32_prompts": 0, "fp32_identical": 0}
    chosen = prompts[: test.config.exactness_prompts]
    setting = replace(setting, concurrency=len(chosen))
    path = test.ctx.work / "exactness.json"
    decoded: dict[str, list[list[int]]] = json.loads(path.read_text()) if path.exists() else {}
    arms = list(checkpoints)
    target: Target | None = None
    for index, (folder, block_size) in enumerate([(None, 1), *arms]):
        if (name := str(index)) in decoded:
            continue
        target = target or Target.load(test.ctx.inputs["target"], dtype="float32")
        decoder = Decoder(load_drafter(folder, target), block_size) if folder else Decoder()
        answers, _ = test.decode(target, decoder, chosen, setting)
        decoded[name] = [answer.response_ids for answer in answers]
        write_text(path, json.dumps(decoded))
        test.ctx.check_interrupted()
    plain, *speculative = (decoded[str(index)] for index in range(1 + len(arms)))
    identical = [all(answers[i] == expected for answers in speculative) for i, expected in enumerate(plain)]
    return {"fp32_prompts": len(chosen), "fp32_identical": sum(identical)}


def compare_with_plain(requests: Sequence[Row], sampled: bool) -> None:
    """Fill `identical` and `first_difference` of requests with a drafter.

    sampled: compare sampled answers too. All engines sample them from the same distribution, but only the embedded one
    uses the same random numbers with and without a drafter.
    """
    plain = {pair_key(row): row for row in requests if row["arm"] == PLAIN}
    for row in requests:
        if row["arm"] != PLAIN and (sampled or row["temperature"] == 0):
            difference = first_difference(row["response_ids"], plain[pair_key(row)]["response_ids"])
            row["identical"], row["first_difference"] = difference < 0, difference


def pair_key(row: Row) -> tuple[int, float, int, str]:
    """Return the key that an answer shares with its counterpart without a drafter."""
    return row["round"], row["temperature"], row["concurrency"], row["prompt_id"]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the index of the first differing token, -1 if equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return -1 if len(a) == len(b) else min(len(a), len(b))


def add_margins(
    target: Target, requests: Sequence[Row], prompts: Sequence[Prompt], check: Callable[[], None] | None = None
) -> None:
    """Fill `margin` of greedy answers that differ from those without a drafter.

    The margin is the number of logits by which the worse of the two tokens lies below the target's best; a small margin
    is a near-tie of the dtype. requests: those with and without a drafter. check: a function called between forwards.
    """
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    plain = {pair_key(row): row for row in requests if row["arm"] == PLAIN}
    known: dict[tuple[tuple[int, ...], frozenset[int]], float] = {}  # rounds differ at the same positions
    for row in requests:
        difference = row["first_difference"]
        if row["temperature"] == 0 and difference >= 0:
            tokens = (*by_id[row["prompt_id"]].token_ids, *row["response_ids"][:difference])
            other = plain[pair_key(row)]["response_ids"][difference : difference + 1]  # empty if it ends here
            chosen = frozenset([*row["response_ids"][difference : difference + 1], *other])
            if (tokens, chosen) not in known:
                out = target.read(torch.tensor([tokens], device=target.device))
                logits = target.logits(out.hidden[0, -1]).float()
                known[tokens, chosen] = float(logits.max() - logits[list(chosen)].min())
                if check is not None:
                    check()
            row["margin"] = known[tokens, chosen]


def exactness(requests: Sequence[Row], serving_dtype: str) -> Exactness:
    """Return the share of compared outputs that are identical in the serving dtype, and the known margins."""
    compared = [row for row in requests if row["identical"] is not None]
    margins = [row["margin"] for row in compared if row["first_difference"] >= 0 and not np.isnan(row["margin"])]
    return Exactness(
        serving_dtype=serving_dtype,
        identical_share=sum(row["identical"] for row in compared) / len(compared) if compared else None,
        compared_outputs=len(compared),
        median_margin=float(np.median(margins)) if margins else None,
        largest_margin=max(margins) if margins else None,
    )
