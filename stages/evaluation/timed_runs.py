"""Timed runs: settings, requests, rows of tables `turns` (timed runs) and `requests`, and the load of the machine."""

from __future__ import annotations

import itertools
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from draftsmith.artifacts.host import all_gpus
from draftsmith.artifacts.results.evaluation import Exactness, Machine, Parity, TargetDifference
from draftsmith.stages.data.stored_prompts import Prompt
from draftsmith.stages.data.trajectories import request_seed
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.runtime.stage import StageContext

if TYPE_CHECKING:  # imports torch, and planning must not
    from draftsmith.stages.targets.causal_lm import Target

Row = dict[str, Any]  # of the table `requests` or `turns`


@dataclass(frozen=True)
class Setting:
    """One point at which all arms are measured."""

    temperature: float  # 0 = greedy
    concurrency: int  # requests in flight


@dataclass(frozen=True)
class SpeedMeasurement:
    """Results of decoding with every arm."""

    engine: str  # with its version where it has one
    requests: list[Row]
    runs: list[Row]
    candidates: dict[str, dict[str, float]]  # arm -> block size -> tokens/s; without the arms that had no choice
    validation_prompts: int  # validation prompts decoded once per candidate
    exactness: Exactness
    parity: dict[str, Parity] | None = None  # by arm; None: nothing was served
    target_difference: TargetDifference | None = None  # the servers' target against transformers'
    heldout: Sequence[Row] = ()  # if the served target differs: all held-out prompts with every drafter, untimed


@dataclass(frozen=True)
class TimedRun:
    """One arm decoding the prompts once, at one setting."""

    engine: str
    round: int
    order: int  # the arm's position in the round
    arm: str
    block_size: int
    setting: Setting

    def row(self, answers: Sequence[Completion], wall_seconds: float, others_share: float, batches: int = 1) -> Row:
        """Return the row of table `turns`.

        wall_seconds: the time of all answers. others_share: the CPU share of other programs (`LoadMeter`). batches: the
        number of parts that the prompts were split into; the arms took turns after each part.
        """
        return {
            "round": self.round,
            "order": self.order,
            "arm": self.arm,
            "engine": self.engine,
            "block_size": self.block_size,
            "temperature": self.setting.temperature,
            "concurrency": self.setting.concurrency,
            "prompts": len(answers),
            "batches": batches,
            "tokens": sum(len(answer.response_ids) for answer in answers),
            "wall_seconds": wall_seconds,
            "draft_seconds": sum(answer.draft_seconds for answer in answers),
            "verify_seconds": sum(answer.verify_seconds for answer in answers),
            "verify_steps": sum(answer.verify_steps for answer in answers),
            "others_share": None if np.isnan(others_share) else others_share,
        }

    def request_row(self, answer: Completion) -> Row:
        """Return the row of table `requests`, not yet compared with decoding without a drafter."""
        prompt_id = answer.request.request_id
        return {
            "round": self.round,
            "request_id": f"{prompt_id}/{self.arm}",
            "prompt_id": prompt_id,
            "arm": self.arm,
            "engine": self.engine,
            "block_size": self.block_size,
            "temperature": self.setting.temperature,
            "concurrency": self.setting.concurrency,
            "tokens": len(answer.response_ids),
            "response_ids": answer.response_ids,
            "verify_steps": answer.verify_steps,
            "accepted": accepted_lengths(answer) or None,
            "latency_seconds": answer.seconds,
            "first_token_seconds": answer.first_token_seconds,
            "draft_seconds": answer.draft_seconds,
            "verify_seconds": answer.verify_seconds,
            "identical": None,
            "first_difference": -1,
            "margin": float("nan"),
        }


def settings_of(config: EvaluationConfig) -> list[Setting]:
    """Return every temperature at every concurrency, in the order of the config. The first is the headline's."""
    temperatures = config.temperatures or (config.sampling.temperature,)
    return [Setting(temperature, concurrency) for temperature in temperatures for concurrency in config.concurrency]


def rounds_of(ctx: StageContext, config: EvaluationConfig, is_steady: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    """Yield every round of a look with the number of rounds, which doubles if repetitions disagree."""
    most = config.rounds
    for round in itertools.count():
        if round == config.rounds and not is_steady():
            most *= 2
            ctx.log("Repetitions differ much, as on a busy machine. As many rounds again are measured.")
        if round == most:
            return
        yield round, most


def requests_for(
    prompts: Sequence[Prompt],
    config: EvaluationConfig,
    setting: Setting,
    seed: int,
    max_new: int | None = None,
    round: int = 0,
) -> list[Request]:
    """Return one request per prompt, the same for every arm.

    Each round has its own random numbers: arms that sample differ by luck, and with the same numbers in every round
    that difference would be in no error estimate.
    """
    limit = config.sampling.max_new_tokens
    most, sampling = min(max_new or limit, limit), config.sampling.params(setting.temperature)
    return [Request(p.prompt_id, p.token_ids, most, sampling, request_seed(seed, p.prompt_id, round)) for p in prompts]


def accepted_lengths(answer: Completion) -> list[int]:
    """Return the proposals accepted by each verify step; in ascending order if the engine only counted them.

    Such a count ignores the answer's end: a last step beyond it counts in full.
    """
    if answer.steps:
        return answer.steps.accepted.tolist()
    return [accepted for accepted, count in enumerate(answer.accepted_counts) for _ in range(count)]


@contextmanager
def one_thread(target: Target) -> Iterator[None]:
    """Compute with one thread while the block runs, if the target is on a CPU.

    Two threads share cores with other programs so unevenly that ratios of speeds differ by half.
    """
    import torch  # planning must not import it

    before = torch.get_num_threads()
    if target.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def candidate_sizes(config: EvaluationConfig, trained: int) -> list[int]:
    """Return the block sizes to choose from, at most the trained one."""
    return sorted({min(size, trained) for size in config.block_sizes or (trained,)})


def describe_block_sizes(sizes: Mapping[str, int]) -> str:
    """Return a log line on the block size of each drafter."""
    return "decoding with blocks of " + ", ".join(f"{size} ({arm})" for arm, size in sizes.items())


def fastest(speeds: Mapping[int, float]) -> int:
    """Return the block size with the most tokens/s; the smaller if two are equal."""
    return max(speeds, key=speeds.__getitem__)


SHORTEST_S = 0.5  # CPU time is counted in hundredths of a second: shares of shorter spans mean nothing


class LoadMeter:
    """Measures CPU time from its creation on."""

    def __init__(self) -> None:
        self._began, self._machine, self._process = time.perf_counter(), psutil.cpu_times(), own_seconds()

    def others_share(self) -> float:
        """Return the share of all cores' CPU time that other processes and other guests of the host have taken since.

        NaN if too little time has passed.
        """
        machine, process = psutil.cpu_times(), own_seconds()
        passed = {name: now - before for name, now, before in zip(machine._fields, machine, self._machine, strict=True)}
        # guests are counted as user time too; iowait is idle
        total = sum(seconds for name, seconds in passed.items() if not name.startswith("guest"))
        if time.perf_counter() - self._began < SHORTEST_S or total <= 0:
            return math.nan
        busy = total - passed["idle"] - passed.get("iowait", 0.0)
        return max(0.0, busy - (process - self._process)) / total


def machine() -> Machine:
    """Return a description of this machine."""
    return Machine(
        cpu=_cpu_name(),
        cores=psutil.cpu_count(),
        memory_gb=round(psutil.virtual_memory().total / 1e9),
        gpus=[gpu.model for gpu in all_gpus()],
    )


def _cpu_name() -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def own_seconds() -> float:
    """Return the CPU time of this process and its descendants (servers that it launched), also of ended ones."""
    this = psutil.Process()
    seconds = 0.0
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            seconds += times.user + times.system + times.children_user + times.children_system
    return seconds
