"""An experiment as a Prefect flow."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.experiment_graph import EXPERIMENT, ExperimentConfig
from flows.graph_run import run_graph


@flow(name="experiment", flow_run_name="{config.name}", persist_result=False)
def experiment(config: ExperimentConfig, force: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train a drafter on in several ways and compare the results on identical held-out trajectories.

    Args:
        config: The experiment, as in a YAML file of `configs/experiments/`.
        force: Names of nodes to make again although the store has them.
    """
    return run_graph(config, EXPERIMENT, force or [])
