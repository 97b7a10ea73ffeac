"""The comparison of drafter architectures as a Prefect flow."""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.architectures_graph import ARCHITECTURES, ArchitecturesConfig
from flows.graph_run import run_graph


@flow(name="architectures", flow_run_name="{config.name}", persist_result=False)
def architectures(config: ArchitecturesConfig, force: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train drafters of several architectures for one target and measure all of them in one evaluation.

    Args:
        config: The comparison, as in a YAML file of `configs/experiments/`.
        force: Names of nodes to make again although the store has them.
    """
    return run_graph(config, ARCHITECTURES, force or [])
