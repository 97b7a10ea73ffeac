"""Micro-batches: how many tokens of a step go through the drafter at once, by estimate and by what the memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from draftsmith.artifacts.errors import RetryableError
from draftsmith.artifacts.host import memory_bytes
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.estimate import AnswerCounts, ModelSize, Sizes, StageUse
from draftsmith.stages.target.loading import divided_parameters
from draftsmith.stages.training.blocks import LossReport
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.estimate import fixed_memory, row_tokens, rows_at_once, rows_of_process

_FITTING = "micro_batch_tokens"  # file in `ctx.work`


class MicroBatches:
    """The micro-batches of a training's steps, of as many tokens as the memory has held so far."""

    def __init__(self, make: Callable[[int, int], Iterable[LossReport]], limit: int, smallest: int, ctx: StageContext):
        """Start with `limit` tokens, or with fewer that an earlier attempt left in `ctx.work`.

        make: returns the micro-batches of a step, each of at most a limit of tokens, or of one row.
        limit: no more than a full step has. smallest: fewer tokens than any row has.
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

    def halve(self) -> bool:
        """Make smaller micro-batches from here on. Return False if each is one row already."""
        if self.limit <= self._smallest:
            return False
        self._log(f"out of memory with micro-batches of {self.limit} tokens. Trying {self.limit // 2} tokens.")
        self.limit //= 2
        return True

    def halve_for_all(self, ranks: Ranks) -> None:
        """End the training of several ranks, so that another attempt continues with smaller micro-batches.

        The other ranks cannot know that this one begins its step again. Returns if each micro-batch is one row already.
        Raises RetryableError.
        """
        if self.limit <= self._smallest:
            return
        self._note.write_text(str(self.limit // 2), "utf-8")
        raise RetryableError(
            f"rank {ranks.rank} of {ranks.world}: out of memory with micro-batches of {self.limit} tokens. Run the "
            f"same command to continue from the checkpoint with {self.limit // 2}."
        )


def micro_batch_tokens(config: TrainingConfig, target: Target, drafter: Drafter, longest: int) -> int:
    """Return the tokens of trajectories and blocks that go through the drafter at once on the target's device.

    That is what the config says, or what fits by the estimate; no more than a process trains in a step.
    longest: tokens of the longest trajectory.
    """
    whole = rows_of_process(config) * (longest + config.anchors_per_sequence * drafter.block_size)
    if config.micro_batch_tokens is not None:
        return min(config.micro_batch_tokens, whole)
    sizes = loaded_sizes(target, drafter, longest)
    fixed = sum(fixed_memory(config, StageUse(sizes, answers=AnswerCounts(longest))).values())
    return rows_at_once(config, sizes, longest, fixed) * row_tokens(config, sizes, longest)


def loaded_sizes(target: Target, drafter: Drafter, longest: int) -> Sizes:
    """Return the sizes of loaded models on the target's device. longest: tokens of the longest trajectory."""
    return Sizes(
        ModelSize.from_config(
            target.config, sum(p.numel() for p in target.model.parameters()), divided_parameters(target.model)
        ),
        ModelSize.from_config(
            drafter.config, sum(p.numel() for p in drafter.parameters()), map_sizes=drafter.map_sizes
        ),
        features=len(drafter.target_layer_ids),
        block_size=drafter.block_size,
        itemsize=target.dtype.itemsize,
        longest_prompt=longest,
        positions=longest,
        kind=drafter.kind,
        deepest=max(drafter.target_layer_ids) + 1,
        operations=drafter.operations,
        device_memory=_device_memory(target),
        accelerated=target.device.type == "cuda",
    )


def _device_memory(target: Target) -> float:
    """Return the bytes that this process may use on the target's device."""
    if target.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(target.device)  # a server may hold the rest
        return float(free + torch.cuda.memory_reserved(target.device))
    return memory_bytes()
