"""Checks the environments of servers, running servers, GPUs, and trainings over several processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from draftsmith.artifacts.host import gpu_driver, visible_gpus
from draftsmith.flows.checks.drafters import drafts_on_sglang, server_engine, server_engines, sglang_engine
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import GREEDY_ONLY, SGLangEngineConfig
from draftsmith.stages.engines.environment import EngineEnvironment, health_problem, inspect_environment
from draftsmith.stages.engines.sglang.server import build_problems, environment_warnings
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.targets.info import model_path, read_target_info
from draftsmith.stages.training.config import TrainingConfig


def check_engines(findings: Findings, nodes: Sequence[Node]) -> None:
    """Check the servers' interpreters, servers that should be running, and the GPUs of servers to be launched."""
    for node in nodes:
        if problem := sampling_problem(node):
            findings.error(node.name, problem)
    for config, names in server_engines(nodes):
        check = f"{config.kind} ({', '.join(names)})"
        with findings.check(check):
            config.api_key()
            if config.launch is not None:
                has = inspect_environment(config)
                plugin = f"{'with' if has.plugin else 'without'} Draftsmith's plug-in"
                findings.ok(check, f"{config.interpreter}: {config.kind} {has.version}, torch {has.torch}, {plugin}")
                if isinstance(config, SGLangEngineConfig):
                    _check_sglang(findings, check, config, has)
            for url in config.urls:
                if reason := health_problem(url):
                    findings.skip(check, f"{url} does not answer now ({reason}). Start it before the stage runs.")
                else:
                    findings.ok(check, f"{url} answers")
    _check_gpus(findings, nodes)


def _check_sglang(findings: Findings, check: str, config: SGLangEngineConfig, installed: EngineEnvironment) -> None:
    """Check what SGLang's servers need in addition to SGLang."""
    assert config.launch is not None
    for warning in environment_warnings(config, installed):
        findings.warn(check, warning)
    if visible_gpus() and not config.launch.on_cpu:
        for problem in build_problems(config, gpu_driver()):
            findings.error(check, problem)


def check_served_targets(findings: Findings, nodes: Sequence[Node], artifact: Path, stored: Path | None) -> None:
    """Report servers that compute the target differently from transformers; for running ones, by how much.

    artifact: the target's folder, perhaps without weights. stored: a folder with its weights; None if the store has
    none.
    """
    from draftsmith.stages.engines.registry import differing_settings, open_servers  # import torch
    from draftsmith.stages.engines.servers.requirements import server_requirements

    for node in nodes:
        if (engine := server_engine(node)) is None:
            continue
        with findings.check(node.name), tempfile.TemporaryDirectory() as scratch:
            if not (settings := differing_settings(engine, read_target_info(artifact))):
                continue
            text = f"{', '.join(settings)}: a run measures the difference of log-probs"
            if engine.urls and stored is not None:
                required = server_requirements(engine, stored, None, DraftingConfig(), 1)
                with open_servers(engine, required, Path(scratch), lambda _line: None) as servers:
                    text = servers.target_difference.text if servers.target_difference is not None else text
            findings.warn(node.name, f"its servers compute the target differently from transformers. {text}.")


def _check_gpus(findings: Findings, nodes: Sequence[Node]) -> None:
    here = len(visible_gpus())
    for node in nodes:
        engine = server_engine(node)
        if engine is None or engine.launch is None or engine.launch.on_cpu or not here:
            continue
        # an evaluation needs one, and runs as many side by side as there are GPUs for
        servers = 1 if isinstance(node.config, EvaluationConfig) else engine.launch.servers
        gpus = engine.launch.tensor_parallel
        needed = servers * gpus
        if here < needed:
            findings.error(
                f"{node.name}: GPUs",
                f"{servers} servers of {gpus} GPUs need {needed}, and this machine has {here}. Lower "
                "engine.launch.servers or tensor_parallel.",
            )
    if runs_elsewhere(nodes):
        findings.skip(
            "GPUs", "none is visible here, so memory is not compared. Check again on the machine that will run it."
        )


def runs_elsewhere(nodes: Sequence[Node]) -> bool:
    """Return whether servers need GPUs and this machine has none, so another machine will run the config."""
    engines = [engine for node in nodes if (engine := server_engine(node)) is not None]
    return not visible_gpus() and any(engine.launch is not None and not engine.launch.on_cpu for engine in engines)


def sampling_problem(node: Node) -> str | None:
    """Return why a launched server would change sampled answers, None if it would not.

    Servers that run already are checked by the handshake.
    """
    engine, config = sglang_engine(node), node.config
    if not drafts_on_sglang(node) or engine is None or engine.launch is None or not engine.launch.on_cpu:
        return None
    if isinstance(config, EvaluationConfig) and config.temperatures is not None:
        return f"temperatures: {GREEDY_ONLY}" if any(config.temperatures) else None
    sampled = isinstance(config, RolloutConfig | EvaluationConfig) and config.sampling.temperature > 0
    return f"sampling.temperature: {GREEDY_ONLY}" if sampled else None


def check_shared_target(findings: Findings, nodes: Sequence[Node], artifact: Path) -> None:
    """Check that a target shared by processes can be divided among them. artifact: the target's folder."""
    from draftsmith.stages.targets.loading import check_divides  # imports torch, and planning must not

    for node in nodes:
        parallel = node.stage.parallel(node.config) if node.stage.parallel is not None else None
        if parallel is None or parallel.target_parallel == 1:
            continue
        check = f"{node.name}: target"
        with findings.check(check):
            check_divides(model_path(artifact), parallel.target_parallel)
            findings.ok(check, f"{parallel.target_parallel} processes share a copy")


def check_parallel(findings: Findings, nodes: Sequence[Node]) -> None:
    """Check that each process has a GPU, if there are any, and as many answers as others, and that nodes can meet."""
    here, elsewhere = len(visible_gpus()), runs_elsewhere(nodes)
    for node in nodes:
        parallel = node.stage.parallel(node.config) if node.stage.parallel is not None else None
        if parallel is None or parallel.world == 1:
            continue
        check, count = f"{node.name}: processes", parallel.processes
        with findings.check(check):
            meet = "" if parallel.nodes == 1 else f" on each of {parallel.nodes} nodes that meet at %s:%d"
            text = f"{count}{meet % parallel.endpoint() if meet else ''}"
            if 0 < here < count:
                findings.error(check, f"{text} need a GPU each, and this machine has {here}. Lower parallel.processes.")
            elif not here and not elsewhere and count > (os.cpu_count() or 1):
                findings.warn(
                    check, f"{text} are more than this machine's {os.cpu_count()} cores, which only makes it slower."
                )
            elif isinstance(node.config, TrainingConfig) and (rest := node.config.sequences_per_step % parallel.world):
                answers, world = node.config.sequences_per_step, parallel.world
                idle = 1 - answers / (answers - rest + world)
                findings.warn(
                    check,
                    f"{text}: with {answers} answers a step the processes are idle for {idle:.1%} of the time. Set "
                    f"sequences_per_step to {answers - rest} or {answers - rest + world}.",
                )
            else:
                findings.ok(check, text)
