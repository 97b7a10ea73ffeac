"""Checks of the engines: SGLang's environment, running servers, GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from draftsmith.flows.checks.drafters import drafts_on_sglang, sglang_engine, sglang_engines
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.execution.machine import gpus
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.engines.config import GREEDY_ONLY
from draftsmith.stages.engines.sglang import environment
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig


def check_engines(found: Findings, nodes: Sequence[Node]) -> None:
    """Interpreters, servers that should be running, and what launched servers cannot do here."""
    for node in nodes:
        if problem := cannot_sample(node):
            found.error(node.name, problem)
    for config, names in sglang_engines(nodes):
        check = f"sglang ({', '.join(names)})"
        with found.part(check):
            config.api_key()
            if config.python is not None:
                has = environment.installed(config.python)
                found.ok(check, f"{config.python}: sglang {has.sglang}, torch {has.torch}")
                if missing := environment.router_missing(config, has):
                    found.error(check, missing)
                for warning in environment.environment_warnings(config, has):
                    found.warn(check, warning)
            for url in config.urls:
                if reason := environment.unreachable(url):
                    found.skip(check, f"{url} does not answer now ({reason}): start it before the stage runs")
                else:
                    found.ok(check, f"{url} answers")
    _check_gpus(found, nodes)


def _check_gpus(found: Findings, nodes: Sequence[Node]) -> None:
    here = len(gpus())
    for node in nodes:
        engine = sglang_engine(node)
        if engine is None or engine.launch is None or engine.launch.on_cpu or not here:
            continue
        servers = 1 if isinstance(node.config, EvaluationConfig) else engine.launch.servers  # one at a time, see there
        wanted = servers * engine.launch.gpus
        if here < wanted:
            found.error(
                f"{node.name}: GPUs",
                f"{servers} servers of {engine.launch.gpus} GPUs need {wanted}, {here} are here. Lower "
                "engine.launch.servers, data_parallel or tensor_parallel.",
            )
    if runs_elsewhere(nodes):
        found.skip("GPUs", "none is visible here, so memory is not compared: check again on the machine that will run")


def check_heads(found: Findings, nodes: Sequence[Node], artifact: Path) -> None:
    """A server spreads the target's heads evenly over its GPUs, which SGLang finds out when it starts. artifact: of the
    target."""
    from draftsmith.stages.drafters.checkpoint import read_target_config
    from draftsmith.stages.target.info import model_path

    for node in nodes:
        engine = sglang_engine(node)
        if engine is None or engine.launch is None or engine.launch.on_cpu:  # there SGLang fills up what lacks
            continue
        over = engine.launch.tensor_parallel
        with found.part(node.name):
            config = read_target_config(model_path(artifact))
            heads, shared = config.num_attention_heads, config.num_key_value_heads
            if heads % over or (shared % over and over % shared):
                found.warn(
                    node.name,
                    f"engine.launch.tensor_parallel: {over} does not divide the target's {heads} heads ({shared} of "
                    "keys and values), and SGLang starts no server of most models then: give a number that does",
                )


def runs_elsewhere(nodes: Sequence[Node]) -> bool:
    """Whether servers are to be launched on GPUs and this machine has none: it is not the one that will run."""
    engines = [engine for node in nodes if (engine := sglang_engine(node)) is not None]
    return not gpus() and any(engine.launch is not None and not engine.launch.on_cpu for engine in engines)


def cannot_sample(node: Node) -> str | None:
    """Why a launched server would change sampled answers there; None if it would not. Of running servers the handshake
    finds it."""
    engine, config = sglang_engine(node), node.config
    if not drafts_on_sglang(node) or engine is None or engine.launch is None or not engine.launch.on_cpu:
        return None
    if isinstance(config, EvaluationConfig) and config.temperatures is not None:
        return f"temperatures: {GREEDY_ONLY}" if any(config.temperatures) else None
    sampled = isinstance(config, RolloutConfig | EvaluationConfig) and config.sampling.temperature > 0
    return f"sampling.temperature: {GREEDY_ONLY}" if sampled else None


def check_shared_target(found: Findings, nodes: Sequence[Node], artifact: Path) -> None:
    """A target that processes are to share can be divided among them. artifact: of the target."""
    from draftsmith.stages.target.info import model_path
    from draftsmith.stages.target.loading import check_divides

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
