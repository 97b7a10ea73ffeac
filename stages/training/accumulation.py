"""A step's gradient from the micro-batches of all ranks: sums before quotients, so that neither the number of parts
nor that of processes changes anything but rounding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from draftsmith.stages.parallel.ranks import ALONE, Ranks
from draftsmith.stages.training.blocks import LossReport, Share


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
