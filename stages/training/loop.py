"""The optimiser loop: AdamW, cosine schedule with warm-up, clipping, checkpoints; resumes bit for bit on a CPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, StageInterrupted
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.runtime.checkpoint import load_checkpoint, save_checkpoint
from draftsmith.stages.runtime.memory import out_of_memory, release_memory
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.training.blocks import LossReport, Share
from draftsmith.stages.training.config import OptimiserConfig


def cosine(step: int, config: OptimiserConfig) -> float:
    """Factor of the learning rate at `step` (0-based): linear warm-up, then cosine to zero."""
    warmup = max(1, round(config.steps * config.warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


_FITTING = "micro_batch_tokens"  # file in `work`


class Resumable(Protocol):
    """What a training remembers between steps besides weights: tensors and plain values under string keys."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MicroBatches:
    """The parts of a step, of as many tokens as the memory has held so far."""

    def __init__(
        self,
        make: Callable[[int, int], Iterable[LossReport]],
        limit: int,
        least: int,
        log: Callable[[str], None],
        work: Path,
    ):
        """make: of a step and a limit, its parts of at most so many tokens, or of one row. limit: to begin with, no
        more than a whole step has. least: tokens of any row are more. work: of the stage, where an attempt that ended
        for want of memory left what fits."""
        self._make, self._least, self._log, self._noted = make, least, log, work / _FITTING
        self.limit = limit
        noted = self._noted.read_text("utf-8", "replace") if self._noted.exists() else ""
        if noted.isdecimal() and 0 < (fitting := int(noted)) < limit:  # what is damaged is found out once more
            log(f"micro-batches of {fitting} tokens: an attempt before had no memory for those of {2 * fitting}")
            self.limit = fitting

    def __call__(self, step: int) -> Iterable[LossReport]:
        return self._make(step, self.limit)

    def halve(self) -> bool:
        """Smaller parts from here on. False: every part is one row already."""
        if self.limit <= self._least:
            return False
        self._log(f"out of memory with micro-batches of {self.limit} tokens: once more with {self.limit // 2}")
        self.limit //= 2
        return True

    def halve_for_all(self, ranks: Ranks) -> None:
        """End the training of several ranks, which cannot know that one begins its step anew, so that another attempt
        goes on in smaller parts. Returns if every part is one row already. Raises RetryableError."""
        if self.limit <= self._least:
            return
        self._noted.write_text(str(self.limit // 2), "utf-8")
        raise RetryableError(
            f"rank {ranks.rank} of {ranks.world}: out of memory with micro-batches of {self.limit} tokens: the same "
            f"command continues from the checkpoint with {self.limit // 2}"
        )


def train(
    ctx: StageContext,
    drafter: Drafter,
    config: OptimiserConfig,
    micro_batches: Callable[[int], Iterable[LossReport]],
    memory: Resumable | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Run or continue `config.steps` steps on float32 weights in place. Returns additive totals.

    `micro_batches(step)` are the parts of a step, each with its graph, made one after the other. They must depend on
    nothing but the step, the weights and `memory`, which only they may change. Of several ranks each has its own parts,
    and all have the same weights and memory after a step; the first rank's checkpoint is that of all, and of any
    number of ranks. A step of `MicroBatches` that the memory does not hold is made again in parts of half the size: at
    once by a process that trains alone, by the next attempt of several ranks.
    Checkpoints, the memory in them, go to `ctx.work`. Raises DraftsmithError if the loss or its gradient is not finite,
    RetryableError where the next attempt needs less memory.
    """
    optimiser = make_optimiser(drafter.parameters(), config, ranks)
    first, totals = _restore(ctx, drafter, optimiser, memory, ranks)
    if first:
        ctx.log(f"continuing from the checkpoint at step {first} of {config.steps}")
    ctx.rewind_metrics(first)  # an attempt that was killed wrote beyond its checkpoint, or never reached one
    drafter.train()
    device_type = next(drafter.parameters()).device.type
    kept = time.monotonic()
    for step in range(first, config.steps):
        started = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = config.learning_rate * cosine(step, config)
        while True:
            try:
                accumulation, backward_s = _accumulated(micro_batches, step, device_type, config)
                break
            except Exception as error:
                if not (isinstance(micro_batches, MicroBatches) and out_of_memory(error)):
                    raise
                if ranks.world > 1:
                    micro_batches.halve_for_all(ranks)
                if ranks.world > 1 or not micro_batches.halve():
                    raise
            optimiser.zero_grad(set_to_none=True)  # what the parts before it gave
            release_memory()  # not above: the error's frames hold what is to be given back
        before_update = time.perf_counter()
        report = accumulation.finish(drafter.parameters(), ranks)
        loss = float(report.loss)
        norm = float(torch.nn.utils.clip_grad_norm_(drafter.parameters(), config.clip_norm))
        _must_be_finite("gradient's norm", norm, step)  # before it reaches weights and checkpoint
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        done = time.perf_counter()
        _add(totals, blocks=report.blocks, positions=report.positions, seconds=done - started)
        _add(totals, tflop=report.operations / 1e12)
        _add(totals, **{f"{name}_s": value for name, value in report.seconds.items()})
        _add(totals, backward_and_update_s=backward_s + done - before_update)
        ctx.metrics(
            step, loss=loss, grad_norm=norm, learning_rate=optimiser.param_groups[0]["lr"], **report.figures,
            trained_positions=totals["positions"],
        )  # fmt: skip
        ctx.progress(step + 1, config.steps, "steps", loss=loss)
        due = (step + 1) % config.checkpoint_every == 0 or time.monotonic() - kept >= 60 * config.checkpoint_minutes
        dues, stops = zip(*ranks.gather((due, ctx.interrupted)), strict=True)  # clocks differ, and so do signals
        if any(dues) or any(stops) or step + 1 == config.steps:
            _save(ctx, step + 1, totals, drafter, optimiser, memory, ranks)
            kept = time.monotonic()
            if any(stops):  # all end, or none
                ctx.check_interrupted()
                raise StageInterrupted("another process of the training was asked to stop")
    drafter.eval()
    return totals


def _accumulated(
    micro_batches: Callable[[int], Iterable[LossReport]], step: int, device_type: str, config: OptimiserConfig
) -> tuple[Accumulation, float]:
    """The gradient of a step's parts, and the seconds of their backward passes."""
    accumulation, parts, backward_s = Accumulation(), iter(micro_batches(step)), 0.0
    while True:
        with torch.autocast(device_type, torch.bfloat16, enabled=config.compute_dtype == "bfloat16"):
            part = next(parts, None)
        if part is None:
            return accumulation, backward_s
        before_backward = time.perf_counter()
        _must_be_finite("loss", float(part.loss.detach()), step)
        accumulation.add(part)
        backward_s += time.perf_counter() - before_backward


def _must_be_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise DraftsmithError(f"training: the {what} is {value} at step {step}; lower learning_rate, then run again")


def _add(totals: dict[str, float], **values: float) -> None:
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + value


def _save(
    ctx: StageContext,
    step: int,
    totals: dict[str, float],
    drafter: Drafter,
    optimiser: torch.optim.Optimizer,
    memory: Resumable | None,
    ranks: Ranks,
) -> None:
    """Of the first rank; all are here when it is there."""
    moments = whole_state(optimiser, ranks)
    if ranks.is_main:
        state = {"totals": totals, "drafter": drafter.state_dict(), "optimiser": moments}
        if memory is not None:
            state["memory"] = memory.state_dict()
        save_checkpoint(ctx.work, step, state)
    ranks.barrier()


def _restore(
    ctx: StageContext,
    drafter: Drafter,
    optimiser: torch.optim.Optimizer,
    memory: Resumable | None,
    ranks: Ranks,
) -> tuple[int, dict[str, float]]:
    """The step to go on with, and the totals so far. The checkpoint may be of another kind or number of devices.

    Raises RetryableError if ranks see others: the disk of a node may lag behind.
    """
    found = load_checkpoint(ctx.work, ctx.log) if ranks.is_main else None
    ranks.barrier()  # what is damaged has been set aside
    if not ranks.is_main:
        found = load_checkpoint(ctx.work, ctx.log)
    seen = ranks.gather(0 if found is None else found[0])
    if len(set(seen)) > 1:
        raise RetryableError(
            f"{ctx.work}: ranks see checkpoints of the steps {sorted(set(seen))}: all nodes must see the same files"
        )
    if found is None:
        ranks.broadcast_weights(drafter.parameters())
        return 0, {}
    step, state = found
    drafter.load_state_dict(state["drafter"])
    restore(optimiser, state["optimiser"])
    if memory is not None:
        memory.load_state_dict(state["memory"])
    return step, state["totals"]


class Accumulation:
    """Micro-batches of one step, each added when its loss is there, so that one graph is held at a time."""

    def __init__(self) -> None:
        self._reports: list[LossReport] = []

    def add(self, report: LossReport) -> None:
        """Add the gradient of a micro-batch. Of a single stream it is that of the sum, which `finish` divides: its
        weight in the whole step is not known before; several streams must bring theirs (`LossReport.whole`)."""
        if report.alone:
            report.loss.backward()
        elif report.whole is not None:
            parts = zip(report.streams, report.whole, strict=True)
            torch.stack([s.factor / max(w, 1e-9) * s.total for s, w in parts]).sum().backward()
        else:
            (stream,) = report.streams
            (stream.factor * stream.total).backward()
        report.loss = report.loss.detach()
        self._reports.append(report)

    def finish(self, parameters: Iterable[torch.nn.Parameter], ranks: Ranks = ALONE) -> LossReport:
        """The report of the step, whose gradient is that of its loss. Seconds are this rank's own."""
        if self._reports[0].alone:
            return self._reports[0]
        trained = list(parameters)
        mine = [_Sums.of(report) for report in self._reports]
        sums = [each for of_rank in ranks.gather(mine) for each in of_rank]
        ranks.sum_gradients(trained)
        factors = [stream.factor for stream in self._reports[0].streams]
        means = [Share.merged(shares) for shares in zip(*(each.streams for each in sums), strict=True)]
        if self._reports[0].whole is None:
            weight = max(sum(each.streams[0].whole for each in sums), 1e-9)
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad.div_(weight)
        figures = dict.fromkeys(name for each in sums for name in each.figures)  # a part may lack one
        return LossReport(
            torch.tensor(sum(factor * mean for factor, mean in zip(factors, means, strict=True))),
            sum(each.blocks for each in sums),
            sum(each.positions for each in sums),
            {name: Share.merged([each.figures[name] for each in sums if name in each.figures]) for name in figures},
            {name: sum(report.seconds[name] for report in self._reports) for name in self._reports[0].seconds},
            sum(each.operations for each in sums),
        )


@dataclass(frozen=True)
class _Sums:
    """Of a micro-batch what the step's report needs, in plain numbers that other ranks can read."""

    streams: tuple[Share, ...]
    blocks: int
    positions: int
    figures: dict[str, float]
    operations: float

    @classmethod
    def of(cls, report: LossReport) -> _Sums:
        streams = tuple(stream.share() for stream in report.streams)
        return cls(streams, report.blocks, report.positions, report.figures, report.operations)


def make_optimiser(
    parameters: Iterable[torch.nn.Parameter], config: OptimiserConfig, ranks: Ranks = ALONE
) -> torch.optim.Optimizer:
    """Split if the config says so: every rank then moves its part of the weights and sends it to the others."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, 0.95),
        "weight_decay": config.weight_decay,
        "fused": True,  # one pass over weights, gradients and moments
    }
    if ranks.world > 1 and config.parallel.shard_optimiser:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(list(parameters), torch.optim.AdamW, **settings)
    return torch.optim.AdamW(parameters, **settings)


def restore(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """From `whole_state`. Moments that are split are taken with their counts of steps on the CPU, where the fused step
    on a GPU does not look for them (pytorch/pytorch#124133)."""
    optimiser.load_state_dict(state)
    own = getattr(optimiser, "optim", optimiser)
    for parameter, values in own.state.items():
        values["step"] = values["step"].to(parameter.device)


def whole_state(optimiser: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any] | None:
    """AdamW's own state dict on the first rank, None on others. All call it."""
    consolidate = getattr(optimiser, "consolidate_state_dict", None)
    if consolidate is not None:
        consolidate(to=0)
    return optimiser.state_dict() if ranks.is_main else None
