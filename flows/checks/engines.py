"""Checks of the engines: SGLang's environment, running servers, GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.preflight import cannot_sample, sglang_engines
from draftsmith.flows.pipeline.graph import Node
from draftsmith.flows.pipeline.machine import gpus
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.measure.config import EvaluationConfig


def check_engines(found: Findings, nodes: Sequence[Node]) -> bool:
    """True if servers are to be launched on GPUs and this machine has none: it is not the one that will run."""
    from draftsmith.stages.engines.sglang import environment

    elsewhere = False
    for config, names in sglang_engines(nodes):
        check = f"sglang ({', '.join(names)})"
        with found.part(check):
            warnings = []
            if config.python is not None:
                has = environment.installed(config.python)
                found.ok(check, f"{config.python}: sglang {has.sglang}, torch {has.torch}")
                warnings += environment.environment_warnings(config, has)
            for url in config.urls:
                if reason := environment.unreachable(url):
                    warnings.append(f"{url} does not answer now ({reason}): start it before the stage runs")
                else:
                    found.ok(check, f"{url} answers")
            for warning in warnings:
                found.warn(check, warning)
    for node in nodes:
        if problem := cannot_sample(node):
            found.error(node.name, problem)
        engine = getattr(node.config, "engine", None)
        if not isinstance(engine, SGLangEngineConfig) or engine.launch is None or engine.launch.on_cpu:
            continue
        servers = 1 if isinstance(node.config, EvaluationConfig) else engine.launch.servers  # one at a time, see there
        wanted, here = servers * engine.launch.tensor_parallel, len(gpus())
        if here == 0:
            elsewhere = True
        elif here < wanted:
            found.error(
                f"{node.name}: GPUs",
                f"{servers} servers of {engine.launch.tensor_parallel} GPUs need {wanted}, {here} are here: "
                + (
                    f"--set {node.name}.engine.launch.servers={fit}"
                    if (fit := here // engine.launch.tensor_parallel)
                    else f"--set {node.name}.engine.launch.tensor_parallel={here}"
                ),
            )
    if elsewhere:
        found.warn("GPUs", "none is visible here: memory is not compared; check again on the machine that will run it")
    return elsewhere
