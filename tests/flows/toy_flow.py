"""The Prefect flow of the toy pipeline."""

from __future__ import annotations

from typing import Any

from prefect import flow

from draftsmith.flows.orchestration.run import run_graph
from tests.flows.toy import TOY, ToyConfig


@flow(name="toy-refresh", flow_run_name="{config.name}", persist_result=False)
def toy_refresh(
    config: ToyConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    return run_graph(config, TOY, force, start, until)
