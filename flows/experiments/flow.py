"""Experiments as Prefect flows."""

from __future__ import annotations

from typing import Any

from prefect import flow

from draftsmith.flows.experiments.architectures import ARCHITECTURES, ArchitecturesConfig
from draftsmith.flows.experiments.arms import EXPERIMENT, ExperimentConfig
from draftsmith.flows.pipeline.run import run_graph


@flow(name="experiment", flow_run_name="{config.name}", persist_result=False)
def experiment(
    config: ExperimentConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    """Train a drafter on in several ways and compare the results on identical held-out trajectories.

    Args:
        config: The experiment, as in a YAML file of `configs/experiments/`.
        force: Names of nodes to make again although the store has them.
        start: Begin at these nodes: all that is neither there nor behind them must be in the store.
        until: Make only these nodes and what they need; nothing is promoted.
    """
    return run_graph(config, EXPERIMENT, force, start, until)


@flow(name="architectures", flow_run_name="{config.name}", persist_result=False)
def architectures(
    config: ArchitecturesConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    """Train drafters of several architectures for one target and measure all of them in one evaluation.

    Args:
        config: The comparison, as in a YAML file of `configs/experiments/`.
        force: Names of nodes to make again although the store has them.
        start: Begin at these nodes: all that is neither there nor behind them must be in the store.
        until: Make only these nodes and what they need; nothing is promoted.
    """
    return run_graph(config, ARCHITECTURES, force, start, until)
