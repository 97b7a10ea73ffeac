"""The Prefect flows of refresh, evaluate and diagnose, for commands, deployments and schedules."""

from __future__ import annotations

from typing import Any

from prefect import flow

from draftsmith.flows.orchestration.run import run_graph
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.flows.refresh.measurements import DIAGNOSE, EVALUATE, DiagnoseConfig, EvaluateConfig


@flow(name="refresh", flow_run_name="{config.name}", persist_result=False)
def refresh(
    config: RefreshConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    """Keep a drafter matched to its target: rollout, SFT, mining, distillation, evaluation.

    Args:
        config: The run, as in a YAML file of `configs/`.
        force: Nodes to make again although the store has them.
        start: Nodes to start from; all nodes that do not follow from them must be in the store.
        until: Make only these nodes and what they need; nothing is promoted.
    """
    return run_graph(config, REFRESH, force, start, until)


@flow(name="evaluate", flow_run_name="{config.name}", persist_result=False)
def evaluate(
    config: EvaluateConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    """Compare drafters on held-out prompts, without training any.

    Args:
        config: The drafters and how they are measured.
        force: Nodes to make again although the store has them.
        start: Nodes to start from; all nodes that do not follow from them must be in the store.
        until: Make only these nodes and what they need; nothing is promoted.
    """
    return run_graph(config, EVALUATE, force, start, until)


@flow(name="diagnose", flow_run_name="{config.name}", persist_result=False)
def diagnose(
    config: DiagnoseConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    """Check whether a running server drafts as replay does, and if not, why.

    Args:
        config: The server, the drafter and the prompts.
        force: Nodes to make again although the store has them.
        start: Nodes to start from; all nodes that do not follow from them must be in the store.
        until: Make only these nodes and what they need; nothing is promoted.
    """
    return run_graph(config, DIAGNOSE, force, start, until)
