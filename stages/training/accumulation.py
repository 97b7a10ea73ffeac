"""A step's gradient from micro-batches: sums before quotients, so that their number changes nothing but rounding."""

from __future__ import annotations

from collections.abc import Iterable

import torch

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

    def finish(self, parameters: Iterable[torch.nn.Parameter]) -> LossReport:
        """The report of the step, whose gradient is that of its loss."""
        if self._reports[0].alone:
            return self._reports[0]
        streams = [
            (each[0].factor, Share(sum(float(s.total.detach()) for s in each), sum(float(s.weight) for s in each)))
            for each in zip(*(report.streams for report in self._reports), strict=True)
        ]
        if self._reports[0].whole is None:
            weight = max(streams[0][1].whole, 1e-9)
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(weight)
        reports = self._reports
        return LossReport(
            torch.tensor(sum(factor * mean for factor, mean in streams)),
            sum(report.blocks for report in reports),
            sum(report.positions for report in reports),
            {name: Share.merged([r.figures[name] for r in reports if name in r.figures]) for name in _names(reports)},
            {name: sum(report.seconds[name] for report in reports) for name in reports[0].seconds},
            sum(report.operations for report in reports),
        )


def _names(reports: list[LossReport]) -> list[str]:
    """Of all figures: a micro-batch may lack one (nothing of it was mined again, say)."""
    return list(dict.fromkeys(name for report in reports for name in report.figures))
