"""Decoding speed on servers: the arms one after the other in rounds, each of them on the same GPUs of its round.

Rounds run side by side where the servers of the config have GPUs of their own; on a CPU one server has the machine.
Arms are compared within a round, so GPUs need not be equally fast.

All servers have the same settings except for the drafter. In every round each arm's server is started, warmed up and
timed at every setting, with an empty prefix cache; the order of the arms rotates by round, so that a machine that slows
down does so for all arms. An arm's runs are stored when all settings are timed, so an interrupted evaluation
continues with the next arm; on another machine with the next round, since runs within a round are compared.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.results.evaluation import PLAIN, Parity, TargetDifference
from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TIMED_RUNS, TRACE
from draftsmith.stages.data.stored_prompts import Prompt
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter, PreparedDrafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Completion, Request, recorded_table
from draftsmith.stages.engines.config import LaunchConfig, ServerEngineConfig
from draftsmith.stages.engines.registry import open_servers
from draftsmith.stages.engines.servers.engine import ServerEngine
from draftsmith.stages.engines.servers.process import assign_gpus, usable_gpus
from draftsmith.stages.engines.servers.requirements import server_requirements
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.looks import Looks
from draftsmith.stages.evaluation.repetitions import steady
from draftsmith.stages.evaluation.speed_embedded import add_margins, compare_with_plain, exactness
from draftsmith.stages.evaluation.timed_runs import (
    LoadMeter,
    Row,
    Setting,
    SpeedMeasurement,
    TimedRun,
    candidate_sizes,
    describe_block_sizes,
    fastest,
    machine,
    requests_for,
    rounds_of,
    settings_of,
)
from draftsmith.stages.replay.near_ties import explained_by_ties
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.parity import ParityTolerance, StepComparison, check_tau
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.sampled import samples_proposals
from draftsmith.stages.replay.step_tables import steps_table
from draftsmith.stages.runtime.memory import release_memory
from draftsmith.stages.runtime.stage import StageContext, progress_callback
from draftsmith.stages.targets.causal_lm import Target

WARM_UP_TOKENS = 16  # a prefill and a few steps at every batch size
_TRIES = 3  # for a timed run without lost requests
_TURNS = "turns.parquet"
_Job = TypeVar("_Job")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class ServerSpeedTest:
    """The servers of an evaluation: their shared settings, and their timed decoding."""

    ctx: StageContext
    config: EvaluationConfig
    engine: ServerEngineConfig
    drafters: Mapping[str, Path]  # arm -> checkpoint
    trained: Mapping[str, int]  # arm -> block size that its drafter was trained with
    longest: int  # positions of the longest request
    target_dtype: str  # that servers compute in
    shares: Sequence[str | None] = (None,)  # CUDA_VISIBLE_DEVICES of each round that runs next to others

    @property
    def settings(self) -> list[Setting]:
        """Return the settings that speed is measured at."""
        return settings_of(self.config)

    @contextmanager
    def server(
        self, drafter: Path | None, block_size: int, work: Path, share: str | None = None
    ) -> Iterator[ServerEngine]:
        """Run a server of the target, alone or with a drafter. share: one of `shares`."""
        launch = self.engine.launch
        assert launch is not None
        environment = launch.environment | ({"CUDA_VISIBLE_DEVICES": share} if share is not None else {})
        config = self.engine.model_copy(
            update={
                "launch": launch.model_copy(update={"servers": 1, "environment": environment}),
                "concurrency": max(self.config.concurrency),
            }
        )
        drafting = DraftingConfig(block_size=block_size) if drafter else DraftingConfig()
        required = server_requirements(
            config, self.ctx.inputs["target"], drafter, drafting, self.longest, measure_first_token=True
        )
        with open_servers(config, required, work, self.ctx.log, self.ctx.check_interrupted) as engine:
            if engine.target_difference is not None:
                engine.target_difference.write(self.ctx.work)
            yield engine

    def warm_up(self, engine: ServerEngine, prompts: Sequence[Prompt]) -> None:
        """Make the first calls, which compile and allocate, a few per batch size, without measuring them."""
        for setting in self.settings:
            again = [prompts[i % len(prompts)] for i in range(setting.concurrency)]
            requests = requests_for(again, self.config, setting, self.ctx.seed, WARM_UP_TOKENS)
            self.decode(engine, [replace(r, request_id=f"warm-up/{i}") for i, r in enumerate(requests)], setting)

    def decode(
        self, engine: ServerEngine, requests: Sequence[Request], setting: Setting, *, trace: bool = False
    ) -> tuple[list[Completion], float, float]:
        """Return answers in the order of the requests, the wall time in seconds, and the CPU share of other programs.

        The prefix cache is empty first. If a request was lost and repeated, all are sent again, because the
        repetition took time.
        trace: ask for the verify steps, which costs a little time. Raises RetryableError if some are lost each time.
        """
        engine.set_concurrency(setting.concurrency)
        engine.records_trace = trace
        for _ in range(_TRIES):
            engine.flush_cache()
            done: dict[str, Completion] = {}
            meter, repeated, started = LoadMeter(), engine.retries, time.perf_counter()
            for completion in engine.generate(requests):
                done[completion.request.request_id] = completion
                self.ctx.check_interrupted()  # a timed run is repeated as a whole
            wall, others = time.perf_counter() - started, meter.others_share()
            if engine.was_full:
                raise DraftsmithError(
                    f"evaluation.concurrency: the server refuses {setting.concurrency} concurrent requests, so "
                    "pauses before retries would be measured. Lower it, or let the server queue more "
                    "(evaluation.engine.launch.options; max-queued-requests of SGLang)."
                )
            if engine.retries == repeated:
                return [done[request.request_id] for request in requests], wall, others
            self.ctx.log(f"requests were lost ({engine.retries - repeated}), which took time. The run is repeated.")
        raise RetryableError(
            f"evaluation: requests were lost in each of {_TRIES} attempts at one timed run. Look at the server's log."
        )


def measure_servers(
    test: ServerSpeedTest, heldout: Sequence[Prompt], validation: Sequence[Prompt], looks: Looks
) -> SpeedMeasurement:
    """Choose block sizes on validation prompts, time all arms, check parity after the look's first round.

    A further look keeps the block sizes of the first.

    Raises DraftsmithError if the served steps are not those of replay.
    """
    ctx, config = test.ctx, test.config
    sizes, candidates = looks.chosen() or _choose_block_sizes(test, validation)
    ctx.log(describe_block_sizes(sizes))
    arms = [PLAIN, *test.drafters]
    requests, runs = list(looks.requests), list(looks.runs)
    parity: dict[str, Parity] = {}
    timed, batch = itertools.count(1), list[int]()
    for look_round, most in rounds_of(ctx, config, partial(steady, runs, requests, test.settings)):
        batch.append(looks.first_round + look_round)
        if len(batch) < len(test.shares) and look_round + 1 not in (config.rounds, most):
            continue

        def time_round(round: int, share: str | None, end: threading.Event, total: int = most) -> tuple[list[Row], ...]:
            _start_round(ctx.work / f"round-{round}", arms)
            first, round_rows = round % len(arms), (list[Row](), list[Row]())
            for order, arm in enumerate(arms[first:] + arms[:first]):
                if end.is_set():  # another round failed, whose error is raised
                    break
                rows = _time_arm(test, looks, (round, order), arm, sizes.get(arm, 1), heldout, share)
                for table, new in zip(round_rows, rows, strict=True):
                    table.extend(new)
                ctx.progress(next(timed), total * len(arms), "timed runs")
                ctx.check_interrupted()
            return round_rows

        for new_requests, new_runs in _side_by_side(test, time_round, batch):
            requests += new_requests
            runs += new_runs
        # no server is running: the machine is free for replay, and a wrong drafter costs no more rounds
        if looks.first_round in batch:
            parity = _check_parity(test, sizes, heldout, batch)
        batch.clear()
    compare_with_plain(requests, sampled=False)
    _add_margins(test, requests, heldout)
    result, difference = exactness(requests, test.target_dtype), TargetDifference.read_if_there(ctx.work)
    served = _decode_heldout(test, heldout) if difference is not None else []
    name, prompts = requests[0]["engine"], len(validation)
    return SpeedMeasurement(name, requests, runs, candidates, prompts, result, parity, difference, served)


def _side_by_side(
    test: ServerSpeedTest, work: Callable[[_Job, str | None, threading.Event], _Made], jobs: Sequence[_Job]
) -> list[_Made]:
    """Do at most as many jobs as there are shares, each with one of its own; return what they made, in order.

    work: gets an event that is set when another job has failed. Raises the first error when all have ended.
    """
    end = threading.Event()

    def do(job: _Job, share: str | None) -> _Made:
        try:
            return work(job, share, end)
        except BaseException:
            end.set()
            raise

    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(do, job, share) for job, share in zip(jobs, test.shares, strict=False)]
    failed = [error for future in futures if (error := future.exception()) is not None]
    if failed:
        raise failed[0]
    return [future.result() for future in futures]


def shares_of(launch: LaunchConfig) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each round that runs next to others: as many as the config has servers, if there
    are GPUs for them."""
    gpus = [] if launch.on_cpu else usable_gpus()
    count = max(1, min(launch.servers, len(gpus) // launch.tensor_parallel))
    return assign_gpus(launch.model_copy(update={"servers": count if gpus else 1}), gpus)


def _decode_heldout(test: ServerSpeedTest, heldout: Sequence[Prompt]) -> list[Row]:
    """Return rows of table `requests`: all held-out prompts, untimed, with each drafter and its trained block size."""
    setting, rows = replace(test.settings[0], concurrency=max(test.config.concurrency)), list[Row]()
    for arm, drafter in test.drafters.items():
        table, size = test.ctx.work / "served" / f"{arm}.parquet", test.trained[arm]
        if not table.exists():
            test.ctx.log(f"{arm}: {len(heldout)} held-out prompts, for tau as served")
            with test.server(drafter, size, table.parent / arm) as engine:
                requests = requests_for(heldout, test.config, setting, test.ctx.seed)
                answers, *_ = test.decode(engine, requests, setting)
            run = TimedRun(engine.name, 0, 0, arm, size, setting)
            write_table(table, REQUESTS, [run.request_row(answer) for answer in answers])
        rows += read_table(table, REQUESTS).to_pylist()
    return rows


def _start_round(folder: Path, arms: Sequence[str]) -> None:
    """Prepare the folder of a round: a round that another machine started and did not finish is measured again."""
    if all((folder / arm / _TURNS).exists() for arm in arms):
        return
    note, here = folder / "machine.json", json.dumps(machine().to_json())
    if note.exists() and note.read_text(encoding="utf-8") != here:
        shutil.rmtree(folder)
    write_text(note, here)


def _add_margins(test: ServerSpeedTest, requests: Sequence[Row], heldout: Sequence[Prompt]) -> None:
    """Compute the target's logit margin in this process where answers with and without a drafter first differ."""
    if different := sum(row["first_difference"] >= 0 for row in requests):
        test.ctx.log(
            f"{different} answers differ between decoding with and without a drafter. Computing the target's logit "
            "margins there."
        )
        target = Target.load(test.ctx.inputs["target"], dtype=test.target_dtype)
        add_margins(target, requests, heldout, test.ctx.check_interrupted)


def _time_arm(
    test: ServerSpeedTest,
    looks: Looks,
    when: tuple[int, int],
    arm: str,
    block_size: int,
    heldout: Sequence[Prompt],
    share: str | None,
) -> tuple[list[Row], list[Row]]:
    """Time one arm at every setting, on its server; in the look's first round also decode its traced answers.

    when: the round, and the arm's order in it. Returns rows of the tables `requests` and `turns`.
    """
    round, order = when
    folder = test.ctx.work / f"round-{round}" / arm
    requests_file, runs_file = folder / "requests.parquet", folder / _TURNS
    if runs_file.exists():
        return read_table(requests_file, REQUESTS).to_pylist(), read_table(runs_file, TIMED_RUNS).to_pylist()
    test.ctx.log(f"round {round + 1}: {arm}")
    drafter = test.drafters.get(arm)
    requests: list[Row] = []
    runs: list[Row] = []
    with test.server(drafter, block_size, folder, share) as engine:
        can_trace = engine.records_trace
        test.warm_up(engine, looks.prompts)
        if drafter and round == looks.first_round:
            _trace(test, engine, arm, block_size, heldout, can_trace)
        for setting in test.settings:
            asked = requests_for(looks.prompts, test.config, setting, test.ctx.seed, round=round)
            answers, wall, others = test.decode(engine, asked, setting)
            run = TimedRun(engine.name, round, order, arm, block_size, setting)
            requests += [run.request_row(answer) for answer in answers]
            runs.append(run.row(answers, wall, others))
    write_table(requests_file, REQUESTS, requests)
    write_table(runs_file, TIMED_RUNS, runs)  # last: a folder that has it is complete
    return requests, runs


def _trace(
    test: ServerSpeedTest, engine: ServerEngine, arm: str, block_size: int, heldout: Sequence[Prompt], can_trace: bool
) -> None:
    """Decode, untimed, the answers for the parity check, with their steps if the server records them."""
    setting = test.settings[0]
    requests = requests_for(heldout[: test.config.parity_prompts], test.config, setting, test.ctx.seed)
    answers, *_ = test.decode(engine, requests, setting, trace=can_trace)
    folder = test.ctx.work / "traced"
    write_table(folder / f"{arm}-steps.parquet", TRACE, recorded_table(answers))
    whole = [answer for answer in answers if not answer.retractions]  # a retracted answer's steps are not replay's
    if len(whole) < len(answers):
        test.ctx.log(
            f"{arm}: {len(answers) - len(whole)} of {len(answers)} answers were retracted by a full server. Their "
            "steps are not compared with replay."
        )
    run = TimedRun(engine.name, 0, 0, arm, block_size, setting)
    rows = [run.request_row(answer) for answer in whole]
    write_table(folder / f"{arm}-answers.parquet", REQUESTS, rows)


def _check_parity(
    test: ServerSpeedTest, sizes: Mapping[str, int], heldout: Sequence[Prompt], rounds: Sequence[int]
) -> dict[str, Parity]:
    """Return the parity of each arm in the first round. sizes: block size of each. rounds: rounds timed so far.

    Raises DraftsmithError for a drafter that was not served as replay computes it.
    """
    config, dtype = test.config, test.target_dtype
    prompts = {prompt.prompt_id: prompt for prompt in heldout}
    target = Target.load(test.ctx.inputs["target"], dtype=dtype)
    sampling = config.sampling.params(test.settings[0].temperature)
    parity: dict[str, Parity] = {}
    drafter: dict[str, Drafter] = {}
    work = test.ctx.work
    for arm, checkpoint in test.drafters.items():
        traced = {name: work / "traced" / f"{arm}-{name}.parquet" for name in ("answers", "steps")}
        answers = read_table(traced["answers"], REQUESTS).to_pylist()
        steps = read_table(traced["steps"], TRACE)
        answers = [answer for answer in answers if answer["tokens"] >= 2]  # shorter ones have no verify step
        if not answers:
            continue
        trajectories = [
            Trajectory(prompt.prompt_id, prompt.token_ids + answer["response_ids"], len(prompt.token_ids))
            for answer in answers
            for prompt in [prompts[answer["prompt_id"]]]
        ]
        drafter = {arm: load_drafter(checkpoint, target)}
        drafting = DraftingConfig(block_size=sizes[arm])
        options = ReplayOptions(drafting, sampling, tokens_per_group=config.tokens_per_target_forward)
        replayer = Replayer(target, options, test.ctx.log)
        traces = replayer.traces(
            drafter,
            trajectories,
            progress=progress_callback(test.ctx, "trajectories"),
            cache=work / "replayed" / "parity" / arm,
        )[arm]
        gate = ParityTolerance(
            "evaluation",
            float32=dtype == "float32",
            greedy=sampling.greedy,
            allowed=config.max_parity_mismatch,
            same_target=TargetDifference.read_if_there(work) is None,
            subject=f"drafter {arm}: ",
        )
        by_id = {trajectory.trajectory_id: trajectory for trajectory in trajectories}
        comparison = StepComparison(
            gate, explained_by_ties(partial(_loaded, target, replayer, drafter[arm]), by_id.__getitem__)
        )
        try:
            # sampled steps have replay's distribution, but single steps differ
            comparable = steps.num_rows and not samples_proposals(drafter[arm], sampling)
            replayed = steps_table(TRACE, zip(trajectories, traces, strict=True))
            if comparable:
                comparison.add(steps, replayed)
            by_step = comparison.check() if comparable else {}
            counts = [
                (answer["tokens"] - 1, answer["verify_steps"], len(trace))
                for answer, trace in zip(answers, traces, strict=True)
                if answer["prompt_id"] not in comparison.tied
            ]
            by_tau = check_tau(gate, *np.array(counts).T) if counts else {}
        except DraftsmithError:  # repaired servers must be measured anew
            for stale in (*(f"round-{round}" for round in rounds), "block-sizes", "replayed/parity"):
                shutil.rmtree(work / stale, ignore_errors=True)
            raise
        parity[arm] = Parity.model_validate(by_step | by_tau)
    del target, drafter  # the servers of the next rounds need all memory
    release_memory()
    return parity


def _loaded(target: Target, replayer: Replayer, drafter: Drafter) -> tuple[Target, PreparedDrafter]:
    return target, replayer.prepare(drafter)


def _choose_block_sizes(
    test: ServerSpeedTest, validation: Sequence[Prompt]
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Return each arm's fastest candidate on validation prompts, and tokens/s of every candidate, measured once."""
    sizes: dict[str, int] = {}
    measured: dict[str, dict[str, float]] = {}
    for arm in test.drafters:
        candidates = candidate_sizes(test.config, test.trained[arm])
        sizes[arm] = candidates[0]
        if len(candidates) > 1:
            speeds = {size: _tokens_per_s(test, arm, size, validation) for size in candidates}
            sizes[arm] = fastest(speeds)
            measured[arm] = {str(size): value for size, value in speeds.items()}
    return sizes, measured


def _tokens_per_s(test: ServerSpeedTest, arm: str, size: int, validation: Sequence[Prompt]) -> float:
    """Return the speed of an arm with blocks of `size`, at the first setting."""
    folder = test.ctx.work / "block-sizes" / arm / str(size)
    table, setting = folder / _TURNS, test.settings[0]
    if not table.exists():
        test.ctx.log(f"{arm}: timing validation prompts with blocks of {size}")
        with test.server(test.drafters[arm], size, folder) as engine:
            test.warm_up(engine, validation)
            requests = requests_for(validation, test.config, setting, test.ctx.seed)
            answers, wall, others = test.decode(engine, requests, setting)
        run = TimedRun(engine.name, 0, 0, arm, size, setting)
        write_table(table, TIMED_RUNS, [run.row(answers, wall, others)])
    (row,) = read_table(table, TIMED_RUNS).to_pylist()
    return float(row["tokens"] / row["wall_seconds"])
