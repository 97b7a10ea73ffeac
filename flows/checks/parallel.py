"""Checks of trainings over several processes: devices, cores, and where nodes meet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from draftsmith.flows.checks.engines import runs_elsewhere
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.pipeline.graph import Node
from draftsmith.flows.pipeline.machine import gpus


def check_shared_target(found: Findings, nodes: Sequence[Node], artifact: Path) -> None:
    """A target that processes are to share can be divided among them. artifact: of the target."""
    from draftsmith.stages.targets.info import model_path
    from draftsmith.stages.targets.split import check_divides

    for node in nodes:
        parallel = node.stage.parallel(node.config) if node.stage.parallel is not None else None
        if parallel is None or parallel.target_parallel == 1:
            continue
        check = f"{node.name}: target"
        with found.part(check):
            check_divides(model_path(artifact), parallel.target_parallel)
            found.ok(check, f"{parallel.target_parallel} processes share a copy")


def check_parallel(found: Findings, nodes: Sequence[Node]) -> None:
    """A GPU for every process, where there are GPUs, and a rendezvous for several nodes."""
    here, elsewhere = len(gpus()), runs_elsewhere(nodes)
    for node in nodes:
        parallel = node.stage.parallel(node.config) if node.stage.parallel is not None else None
        if parallel is None or parallel.world == 1:
            continue
        check, count = f"{node.name}: processes", parallel.processes
        with found.part(check):
            meet = "" if parallel.nodes == 1 else f" on each of {parallel.nodes} nodes that meet at %s:%d"
            text = f"{count}{meet % parallel.endpoint() if meet else ''}"
            if 0 < here < count:
                found.error(check, f"{text} need a GPU each, {here} are here. Lower parallel.processes.")
            elif not here and not elsewhere and count > (os.cpu_count() or 1):
                found.warn(
                    check, f"{text}, more than this machine has cores ({os.cpu_count()}): that only makes it slower"
                )
            else:
                found.ok(check, text)
