"""Decoding speed on SGLang: one server at a time with the whole machine, the arms taking turns in rounds.

All servers have the same settings except for the drafter. In every round each arm's server is started, warmed up and
measured at every setting, with an empty prefix cache; the order of the arms rotates by round, so that a machine that
slows down does so for all. What a turn measured is kept, so an interrupted evaluation goes on with the next turn; on
another machine with the round, whose turns are compared with each other.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.tables.parquet import read_table, to_table, write_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TRACE, TURNS
from draftsmith.stages.data.load import Prompt
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.config import SGLangEngineConfig, served_dtype
from draftsmith.stages.evaluation.machine_load import LoadMeter, machine
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
from draftsmith.stages.replay.parity import ParityTolerance, check_steps, check_tau, trace_rows
from draftsmith.stages.runtime.memory import release_memory
from draftsmith.stages.runtime.stage import StageContext, progress_callback

if TYPE_CHECKING:
    from draftsmith.stages.drafters.base import Drafter
    from draftsmith.stages.engines.sglang.engine import SGLangEngine
    from draftsmith.stages.evaluation.config import EvaluationConfig

WARM_UP_TOKENS = 16  # a prefill and some steps at every batch size
_TRIES = 3  # at a turn in which no request is lost
_TURNS = "turns.parquet"


@dataclass(frozen=True)
class Served:
    """What the servers of an evaluation have in common."""

    ctx: StageContext
    config: EvaluationConfig
    engine: SGLangEngineConfig
    drafters: Mapping[str, Path]  # arm -> checkpoint
    trained: Mapping[str, int]  # arm -> block size that its drafter was trained on
    longest: int  # positions of the longest request
    target_dtype: str

    @property
    def settings(self) -> list[Setting]:
        return settings_of(self.config)

    @contextmanager
    def server(self, drafter: Path | None, block_size: int, work: Path) -> Iterator[SGLangEngine]:
        """A server of the target, alone or with a drafter."""
        from draftsmith.stages.engines.sglang.engine import open_sglang
        from draftsmith.stages.engines.sglang.requirements import server_requirements

        assert self.engine.launch is not None
        config = self.engine.model_copy(
            update={
                "launch": self.engine.launch.model_copy(update={"servers": 1}),
                "concurrency": max(self.config.concurrency),
            }
        )
        drafting = DraftingConfig(block_size=block_size) if drafter else DraftingConfig()
        required = server_requirements(
            config, self.ctx.inputs["target"], drafter, drafting, self.longest, measure_first_token=True
        )
        with open_sglang(config, required, work, self.ctx.log, self.ctx.check_interrupted) as engine:
            yield engine

    def warm_up(self, engine: SGLangEngine, prompts: Sequence[Prompt]) -> None:
        """First calls compile and allocate, some of it batch size by batch size; they are not measured."""
        for setting in self.settings:
            again = [prompts[i % len(prompts)] for i in range(setting.concurrency)]
            requests = requests_for(again, self.config, setting, self.ctx.seed, WARM_UP_TOKENS)
            self.decode(engine, [replace(r, request_id=f"warm-up/{i}") for i, r in enumerate(requests)], setting)

    def decode(
        self, engine: SGLangEngine, requests: Sequence[Request], setting: Setting, *, trace: bool = False
    ) -> tuple[list[Completion], float, float]:
        """Return answers in the order of the requests, the wall time in seconds, and the share of the CPU that others
        took; nothing is cached before. All are asked again if a request was lost and repeated, which took time.

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
                self.ctx.check_interrupted()  # a turn is repeated as a whole
            wall, others = time.perf_counter() - started, meter.others_share()
            if engine.was_full:
                raise DraftsmithError(
                    f"evaluation.concurrency: the server does not take {setting.concurrency} requests at once, so that "
                    "the pauses before it is asked again would be measured: lower it, or raise the server's limit "
                    "(max-queued-requests in evaluation.engine.launch.options)"
                )
            if engine.retries == repeated:
                return [done[request.request_id] for request in requests], wall, others
            self.ctx.log(f"requests were lost ({engine.retries - repeated}), which took time: the turn is given again")
        raise RetryableError(
            f"evaluation: requests were lost in each of {_TRIES} attempts at one turn, so that no speed is measured: "
            "look at the server's log"
        )


def measure_served(served: Served, heldout: Sequence[Prompt], validation: Sequence[Prompt]) -> Measured:
    """Choose each arm's block size on validation prompts, give all their turns, check parity after the first round.

    Raises DraftsmithError if what was served is not what replay says.
    """
    ctx, config = served.ctx, served.config
    sizes, candidates = _choose_block_sizes(served, validation)
    ctx.log(told(sizes))
    arms = [PLAIN, *served.drafters]
    rows: list[Row] = []
    turns: list[Row] = []
    parity: dict[str, dict[str, Any]] = {}
    for round, most in rounds_of(ctx, config, partial(steady, turns, rows, served.settings)):
        _begin(ctx.work / f"round-{round}", arms)
        first = round % len(arms)
        for order, arm in enumerate(arms[first:] + arms[:first]):
            answered, timed = _turn(served, round, order, arm, sizes.get(arm, 1), heldout)
            rows += answered
            turns += timed
            ctx.progress(round * len(arms) + order + 1, most * len(arms), "turns of servers")
            ctx.check_interrupted()
        # no server is running: the machine is free for replay, and a wrong drafter costs no more rounds
        if round == 0:
            parity = _check_parity(served, sizes, heldout)
    compare_with_plain(rows, sampled=False)
    _add_margins(served, rows, heldout)
    exactness = {"serving_dtype": served_dtype(served.engine, served.target_dtype), **equality(rows)}
    return Measured(rows[0]["engine"], rows, turns, candidates, len(validation), exactness, parity)


def _begin(folder: Path, arms: Sequence[str]) -> None:
    """A round, in its folder: one that another machine has begun, and not finished, is measured anew."""
    if all((folder / arm / _TURNS).exists() for arm in arms):
        return
    note, here = folder / "machine.json", json.dumps(machine())
    if note.exists() and note.read_text(encoding="utf-8") != here:
        shutil.rmtree(folder)
    write_text(note, here)


def _add_margins(served: Served, rows: Sequence[Row], heldout: Sequence[Prompt]) -> None:
    """What servers said otherwise with a drafter than without is held against the target in this process."""
    from draftsmith.stages.evaluation.exactness import add_margins
    from draftsmith.stages.target.causal_lm import Target

    if parting := sum(row["first_difference"] >= 0 for row in rows):
        served.ctx.log(f"{parting} answers part from plain decoding's: was the target sure there?")
        target = Target.load(served.ctx.inputs["target"], dtype=served_dtype(served.engine, served.target_dtype))
        add_margins(target, rows, heldout, served.ctx.check_interrupted)


def _turn(
    served: Served, round: int, order: int, arm: str, block_size: int, heldout: Sequence[Prompt]
) -> tuple[list[Row], list[Row]]:
    """Measure one arm at every setting, with a server of its own; in the first round also decode its traced answers.

    Returns rows of the tables `requests` and `turns`.
    """
    folder = served.ctx.work / f"round-{round}" / arm
    requests_file, turns_file = folder / "requests.parquet", folder / _TURNS
    if turns_file.exists():
        return read_table(requests_file, REQUESTS).to_pylist(), read_table(turns_file, TURNS).to_pylist()
    served.ctx.log(f"round {round + 1}: {arm}")
    drafter = served.drafters.get(arm)
    prompts = heldout[: served.config.speed_prompts]
    rows: list[Row] = []
    turns: list[Row] = []
    with served.server(drafter, block_size, folder) as engine:
        can_trace = engine.records_trace
        served.warm_up(engine, prompts)
        if drafter and round == 0:
            _trace(served, engine, arm, block_size, heldout, can_trace)
        for setting in served.settings:
            requests = requests_for(prompts, served.config, setting, served.ctx.seed, round=round)
            answers, wall, others = served.decode(engine, requests, setting)
            rows += [row_of(engine.name, round, arm, block_size, setting, answer) for answer in answers]
            turns.append(turn_of(engine.name, round, order, arm, block_size, setting, answers, wall, others))
    write_table(requests_file, REQUESTS, rows)
    write_table(turns_file, TURNS, turns)  # the last: a folder that has it is complete
    return rows, turns


def _trace(
    served: Served, engine: SGLangEngine, arm: str, block_size: int, heldout: Sequence[Prompt], can_trace: bool
) -> None:
    """Decode, not timed, the answers that parity is checked on, with their steps where the server records them."""
    setting = served.settings[0]
    requests = requests_for(heldout[: served.config.parity_prompts], served.config, setting, served.ctx.seed)
    answers, *_ = served.decode(engine, requests, setting, trace=can_trace)
    folder = served.ctx.work / "traced"
    steps = [row for answer in answers for row in answer.trace_rows()]
    write_table(folder / f"{arm}-steps.parquet", TRACE, steps)
    whole = [answer for answer in answers if not answer.retractions]  # the others' steps are not replay's
    if len(whole) < len(answers):
        served.ctx.log(
            f"{arm}: {len(answers) - len(whole)} of {len(answers)} answers were retracted by a full server: their "
            "steps are not compared with replay's"
        )
    rows = [row_of(engine.name, 0, arm, block_size, setting, answer) for answer in whole]
    write_table(folder / f"{arm}-answers.parquet", REQUESTS, rows)


def _check_parity(served: Served, sizes: Mapping[str, int], heldout: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """Figures of the gate, by arm. sizes: the block of each.

    Raises DraftsmithError for a drafter that was not served as replay computes it.
    """
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.replay.options import ReplayOptions
    from draftsmith.stages.replay.replayer import Replayer, samples_proposals
    from draftsmith.stages.target.causal_lm import Target

    config, dtype = served.config, served_dtype(served.engine, served.target_dtype)
    prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in heldout}
    target = Target.load(served.ctx.inputs["target"], dtype=dtype)
    sampling = config.sampling.params(served.settings[0].temperature)
    parity: dict[str, dict[str, Any]] = {}
    drafter: dict[str, Drafter] = {}
    work = served.ctx.work
    for arm, checkpoint in served.drafters.items():
        traced = {name: work / "traced" / f"{arm}-{name}.parquet" for name in ("answers", "steps")}
        answers = read_table(traced["answers"], REQUESTS).to_pylist()
        steps = read_table(traced["steps"], TRACE)
        answers = [answer for answer in answers if answer["tokens"] >= 2]  # in shorter ones nothing is drafted
        if not answers:
            continue
        trajectories = [
            Trajectory(a["prompt_id"], prompt_ids[a["prompt_id"]] + a["response_ids"], len(prompt_ids[a["prompt_id"]]))
            for a in answers
        ]
        drafter = {arm: load_drafter(checkpoint, target)}
        drafting = DraftingConfig(block_size=sizes[arm])
        options = ReplayOptions(drafting, sampling, tokens_per_group=config.tokens_per_target_forward)
        found = Replayer(target, options, served.ctx.log).traces(
            drafter,
            trajectories,
            progress=progress_callback(served.ctx, "trajectories"),
            cache=work / "replayed" / "parity" / arm,
        )[arm]
        replayed = trace_rows(trajectories, found)
        gate = ParityTolerance(
            "evaluation",
            float32=dtype == "float32",
            greedy=sampling.greedy,
            allowed=config.max_parity_mismatch,
            subject=f"drafter {arm}: ",
        )
        parity[arm] = {}
        try:
            if steps.num_rows and not samples_proposals(
                drafter[arm], sampling
            ):  # drawn steps are replay's in distribution, not one by one
                parity[arm] = check_steps(gate, steps, to_table(TRACE, replayed))
            parity[arm] |= check_tau(
                gate,
                np.array([answer["tokens"] - 1 for answer in answers]),
                np.array([answer["verify_steps"] for answer in answers]),
                np.array([len(trace.anchors) for trace in found]),
            )
        except DraftsmithError:  # servers that were put right are asked anew
            for stale in ("round-0", "block-sizes", "replayed/parity"):
                shutil.rmtree(work / stale, ignore_errors=True)
            raise
    del target, drafter  # the servers of the next rounds get all memory, as those of the first one had it
    release_memory()
    return parity


def _choose_block_sizes(
    served: Served, validation: Sequence[Prompt]
) -> tuple[dict[str, int], dict[str, dict[str, float]]]:
    """Each arm's fastest candidate on validation prompts, and tokens/s of every candidate, measured once."""
    sizes: dict[str, int] = {}
    measured: dict[str, dict[str, float]] = {}
    for arm in served.drafters:
        candidates = candidate_sizes(served.config, served.trained[arm])
        sizes[arm] = candidates[0]
        if len(candidates) > 1:
            speeds = {size: _tokens_per_s(served, arm, size, validation) for size in candidates}
            sizes[arm] = fastest(speeds)
            measured[arm] = {str(size): value for size, value in speeds.items()}
    return sizes, measured


def _tokens_per_s(served: Served, arm: str, size: int, validation: Sequence[Prompt]) -> float:
    """Of an arm with blocks of `size`, at the first setting."""
    folder = served.ctx.work / "block-sizes" / arm / str(size)
    table, setting = folder / _TURNS, served.settings[0]
    if not table.exists():
        served.ctx.log(f"{arm}: validation prompts with blocks of {size}")
        with served.server(served.drafters[arm], size, folder) as engine:
            served.warm_up(engine, validation)
            requests = requests_for(validation, served.config, setting, served.ctx.seed)
            answers, wall, others = served.decode(engine, requests, setting)
        write_table(table, TURNS, [turn_of(engine.name, 0, 0, arm, size, setting, answers, wall, others)])
    (turn,) = read_table(table, TURNS).to_pylist()
    return float(turn["tokens"] / turn["wall_seconds"])
