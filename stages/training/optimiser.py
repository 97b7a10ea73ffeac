"""The optimiser loop: AdamW, cosine schedule with warm-up, clipping, micro-batches that fit, checkpoints.

It resumes bit for bit on a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, StageInterrupted
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.runtime.checkpoint import CheckpointWriter, load_checkpoint
from draftsmith.stages.runtime.memory import out_of_memory, release_memory
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.training.config import OptimiserConfig
from draftsmith.stages.training.loss_report import LossReport, Ratio

StateDict: TypeAlias = dict[str, Any]  # tensors and plain values, as torch's modules and optimisers have it
CLIP_NORM = 1.0  # largest norm of a step's gradient
_FITTING = "micro_batch_tokens"  # file in `ctx.work`


class Resumable(Protocol):
    """State that a training keeps between steps in addition to weights."""

    def state_dict(self) -> StateDict: ...

    def load_state_dict(self, state: StateDict) -> None: ...


class MicroBatches:
    """The micro-batches of a training's steps; their limit of tokens is halved when memory runs out."""

    def __init__(self, make: Callable[[int, int], Iterable[LossReport]], limit: int, smallest: int, ctx: StageContext):
        """Start with `limit` tokens, or with a smaller limit that an earlier attempt noted in `ctx.work`.

        make: returns the micro-batches of a step, given the step and a limit of tokens; each has at least one row.
        limit: at most the tokens of a full step. smallest: fewer tokens than any row has.
        """
        self._make, self._smallest, self._log, self._note = make, smallest, ctx.log, ctx.work / _FITTING
        self.limit = limit
        note = self._note.read_text("utf-8", "replace") if self._note.exists() else ""
        if note.isdecimal() and 0 < (fitting := int(note)) < limit:  # a damaged note is ignored
            self._log(
                f"micro-batches of {fitting} tokens, since an earlier attempt ran out of memory with {2 * fitting}."
            )
            self.limit = fitting

    def __call__(self, step: int) -> Iterable[LossReport]:
        return self._make(step, self.limit)

    def halve(self, ranks: Ranks) -> bool:
        """Halve the micro-batches from now on. Return False if each already is one row.

        With several ranks this raises RetryableError, and the next attempt uses the smaller ones: the other ranks
        cannot know that this one begins its step again.
        """
        if self.limit <= self._smallest:
            return False
        if ranks.world > 1:
            self._note.write_text(str(self.limit // 2), "utf-8")
            raise RetryableError(
                f"rank {ranks.rank} of {ranks.world}: out of memory with micro-batches of {self.limit} tokens. Run the "
                f"same command to continue from the checkpoint with {self.limit // 2}."
            )
        self._log(f"out of memory with micro-batches of {self.limit} tokens. Trying {self.limit // 2} tokens.")
        self.limit //= 2
        return True


def cosine(step: int, config: OptimiserConfig) -> float:
    """Return the factor of the learning rate at `step` (0-based): linear warm-up, then cosine to zero."""
    warmup = max(1, round(config.steps * config.warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def train(
    ctx: StageContext,
    drafter: Drafter,
    config: OptimiserConfig,
    micro_batches: Callable[[int], Iterable[LossReport]],
    memory: Resumable | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Run or continue `config.steps` steps on float32 weights in place. Return additive totals.

    The trained weights are those that require a gradient.

    `micro_batches(step)` yields the micro-batches of a step, each with its graph. They must depend only on the step,
    the weights and `memory`, which only they may change. Each rank has its own micro-batches; all have the same weights
    and memory after a step. The first rank's checkpoint, in `ctx.work`, serves all ranks, and any number of them. If a
    step of `MicroBatches` does not fit into memory, it is repeated in micro-batches of half the size: immediately in a
    process that trains alone, in the next attempt with several ranks.

    Raises DraftsmithError if the loss or its gradient is not finite or a checkpoint cannot be written, RetryableError
    if the next attempt needs less memory.
    """
    trained = {name: weight for name, weight in drafter.named_parameters() if weight.requires_grad}
    state = _TrainingState(trained, make_optimiser(trained.values(), config, ranks), memory)
    optimiser, totals = state.optimiser, state.totals
    first = state.restore(ctx, ranks)
    if first:
        ctx.log(f"continuing from the checkpoint at step {first} of {config.steps}")
    ctx.rewind_metrics(first)  # an attempt that was killed wrote beyond its checkpoint, or never reached one
    drafter.train()
    device_type = next(iter(trained.values())).device.type
    with CheckpointWriter(ctx.work) as checkpoints:
        for step in range(first, config.steps):
            checkpoints.check()
            started = time.perf_counter()
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * cosine(step, config)
            while True:
                try:
                    accumulation, backward_s = _accumulate(micro_batches, step, device_type, config)
                    break
                except Exception as error:
                    split = micro_batches if isinstance(micro_batches, MicroBatches) and out_of_memory(error) else None
                    if split is None or not split.halve(ranks):
                        raise
                optimiser.zero_grad(set_to_none=True)  # the gradient of micro-batches before the failed one
                release_memory()  # outside `except`: the error's frames still hold the memory
            before_update = time.perf_counter()
            report = accumulation.finish(trained.values(), ranks)
            loss = float(report.loss)
            norm = float(torch.nn.utils.clip_grad_norm_(trained.values(), CLIP_NORM))
            _check_finite("gradient's norm", norm, step)  # before it reaches weights and checkpoint
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            done = time.perf_counter()
            spent = {"blocks": report.blocks, "positions": report.positions, "seconds": done - started}
            spent |= {"tflop": report.operations / 1e12}
            spent |= {f"{name}_s": value for name, value in report.seconds.items()}
            spent |= {"backward_and_update_s": backward_s + done - before_update}
            for name, value in spent.items():
                totals[name] = totals.get(name, 0.0) + value
            ctx.metrics(
                step, loss=loss, grad_norm=norm, learning_rate=optimiser.param_groups[0]["lr"], **report.metrics,
                trained_positions=totals["positions"],
            )  # fmt: skip
            ctx.progress(step + 1, config.steps, "steps", loss=loss)
            due = (step + 1) % config.checkpoint_every == 0 if config.checkpoint_every else checkpoints.are_due()
            dues, stops = zip(*ranks.gather((due, ctx.interrupted)), strict=True)  # clocks differ, and so do signals
            if any(dues) or any(stops) or step + 1 == config.steps:
                state.save(checkpoints, step + 1, ranks)
                if any(stops):  # all end, or none
                    checkpoints.finish()
                    ranks.barrier()
                    ctx.check_interrupted()
                    raise StageInterrupted("another process of the training was stopped. Run the same command again.")
    drafter.eval()
    return totals


def _accumulate(
    micro_batches: Callable[[int], Iterable[LossReport]], step: int, device_type: str, config: OptimiserConfig
) -> tuple[Accumulation, float]:
    """Accumulate the gradient of a step's micro-batches. Return it with the seconds of their backward passes."""
    accumulation, reports, backward_s = Accumulation(), iter(micro_batches(step)), 0.0
    while True:
        with torch.autocast(device_type, torch.bfloat16, enabled=config.compute_dtype == "bfloat16"):
            report = next(reports, None)
        if report is None:
            return accumulation, backward_s
        before_backward = time.perf_counter()
        _check_finite("loss", float(report.loss.detach()), step)
        accumulation.add(report)
        backward_s += time.perf_counter() - before_backward


def _check_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise DraftsmithError(f"training: the {name} is {value} at step {step}. Lower learning_rate, then run again.")


@dataclass
class _TrainingState:
    """The content of a checkpoint: enough to continue as if nothing had happened."""

    trained: dict[str, torch.nn.Parameter]
    optimiser: torch.optim.Optimizer
    memory: Resumable | None
    totals: dict[str, float] = field(default_factory=dict)

    def save(self, checkpoints: CheckpointWriter, step: int, ranks: Ranks) -> None:
        """Start to write a checkpoint on the first rank. All ranks must call it."""
        moments = whole_state(self.optimiser, ranks)
        if ranks.is_main:
            state = {"totals": self.totals, "drafter": self.trained, "optimiser": moments}
            if self.memory is not None:
                state["memory"] = self.memory.state_dict()
            checkpoints.save(step, state)

    def restore(self, ctx: StageContext, ranks: Ranks) -> int:
        """Load the newest checkpoint, which may come from other devices, or another number of them.

        Returns the step to continue with; without a checkpoint all ranks take the first rank's weights. Raises
        RetryableError if ranks see different checkpoints: the disk of a node may lag.
        """
        checkpoint = load_checkpoint(ctx.work, ctx.log) if ranks.is_main else None
        ranks.barrier()  # the first rank has quarantined damaged files
        if not ranks.is_main:
            checkpoint = load_checkpoint(ctx.work, ctx.log)
        steps = ranks.gather(0 if checkpoint is None else checkpoint[0])
        if len(set(steps)) > 1:
            raise RetryableError(
                f"{ctx.work}: ranks see checkpoints of different steps {sorted(set(steps))}. Mount the same folder on "
                "all nodes."
            )
        if checkpoint is None:
            ranks.broadcast_weights(self.trained.values())
            return 0
        step, state = checkpoint
        with torch.no_grad():
            for name, weight in self.trained.items():
                weight.copy_(state["drafter"][name])
        restore(self.optimiser, state["optimiser"])
        if self.memory is not None:
            self.memory.load_state_dict(state["memory"])
        self.totals.update(state["totals"])
        return step


class Accumulation:
    """The gradient of a step, micro-batch by micro-batch, so that one graph is in memory at a time."""

    def __init__(self) -> None:
        self._reports: list[LossReport] = []

    def add(self, report: LossReport) -> None:
        """Add the gradient of a micro-batch.

        With a single stream it is the gradient of the sum, which `finish` divides, since the weight of the full step is
        not known earlier. Reports of several streams must have their weights (`LossReport.step_weights`).
        """
        if report.is_full_step:
            report.loss.backward()
        elif report.step_weights is not None:
            weighted = zip(report.streams, report.step_weights, strict=True)
            torch.stack([s.factor / max(w, 1e-9) * s.total for s, w in weighted]).sum().backward()
        else:
            (stream,) = report.streams
            (stream.factor * stream.total).backward()
        report.loss = report.loss.detach()
        self._reports.append(report)

    def finish(self, parameters: Iterable[torch.nn.Parameter], ranks: Ranks = ALONE) -> LossReport:
        """Return the report of the step, and make the parameters' gradient that of its loss. Seconds: this rank's."""
        if self._reports[0].is_full_step:
            return self._reports[0]
        trained = list(parameters)
        mine = [([s.ratio() for s in r.streams], r.blocks, r.positions, r.metrics, r.operations) for r in self._reports]
        everything = [report for rank_reports in ranks.gather(mine) for report in rank_reports]
        streams, blocks, positions, metrics, operations = zip(*everything, strict=True)
        ranks.sum_gradients(trained)
        factors = [stream.factor for stream in self._reports[0].streams]
        means = [Ratio.merge(ratios) for ratios in zip(*streams, strict=True)]
        if self._reports[0].step_weights is None:
            weight = max(sum(ratios[0].denominator for ratios in streams), 1e-9)
            for parameter in trained:
                if parameter.grad is not None:
                    parameter.grad.div_(weight)
        names = dict.fromkeys(name for values in metrics for name in values)  # a micro-batch may lack one
        return LossReport(
            torch.tensor(sum(factor * mean for factor, mean in zip(factors, means, strict=True))),
            sum(blocks),
            sum(positions),
            {name: Ratio.merge([values[name] for values in metrics if name in values]) for name in names},
            {name: sum(report.seconds[name] for report in self._reports) for name in self._reports[0].seconds},
            sum(operations),
        )


def make_optimiser(
    parameters: Iterable[torch.nn.Parameter], config: OptimiserConfig, ranks: Ranks = ALONE
) -> torch.optim.Optimizer:
    """Return AdamW; if the config shards it, each rank updates a shard of the weights and sends it to the others."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
        "fused": True,  # one pass over weights, gradients and moments
    }
    if ranks.world > 1 and config.parallel.shard_optimiser:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # takes a second, which only sharding needs

        return ZeroRedundancyOptimizer(list(parameters), torch.optim.AdamW, **settings)
    return torch.optim.AdamW(parameters, **settings)


def restore(optimiser: torch.optim.Optimizer, state: StateDict) -> None:
    """Load a state that `whole_state` returned.

    Sharded moments come with their step counts on the CPU, where the fused step on a GPU does not look for them
    (pytorch/pytorch#124133).
    """
    optimiser.load_state_dict(state)
    adamw = getattr(optimiser, "optim", optimiser)
    for parameter, values in adamw.state.items():
        values["step"] = values["step"].to(parameter.device)


def whole_state(optimiser: torch.optim.Optimizer, ranks: Ranks) -> StateDict | None:
    """Return AdamW's state dict on the first rank, None on others. All ranks must call it."""
    consolidate = getattr(optimiser, "consolidate_state_dict", None)
    if consolidate is not None:
        consolidate(to=0)
    return optimiser.state_dict() if ranks.is_main else None
