"""A stage `sft` in which one rank runs out of memory above a size of micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.sft import body as supervised
from draftsmith.stages.training.sft import stage as sft

FITTING = 40
REFUSED_AT = 5  # step


class ShortOfMemory(supervised.SftTraining):
    """Raises the allocator's error in the middle of a step."""

    def micro_batches(self, step: int, limit: int | None) -> Iterator[LossReport]:
        yield from super().micro_batches(step, limit)
        if self.ranks.rank == 1 and step >= REFUSED_AT and limit is not None and limit > FITTING:
            raise torch.OutOfMemoryError("of the test")


def run(ctx: StageContext, config: Any) -> None:
    supervised.SftTraining = ShortOfMemory  # type: ignore[misc]  # of this process, which is a rank
    sft.STAGE.run(ctx, config)


STAGE = replace(sft.STAGE, body=__name__)
