"""The Prefect flow of the toy pipeline."""

from __future__ import annotations

from typing import Any

from prefect import flow

from draftsmith.flows.orchestration.run import Run
from draftsmith.flows.planning.plan import Conclusion
from tests.flows.toy import TOY, ToyConfig, conclude


@flow(name="toy-refresh", flow_run_name="{config.name}", persist_result=False)
def toy_refresh(
    config: ToyConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    return Run.of(TOY, config, force, start, until).do(make_and_conclude)


def make_and_conclude(run: Run) -> Conclusion | None:
    """Make every node, and conclude as a refresh does."""
    for build in run.plan:
        run.make(build)
    run.show_comparison()
    if not run.whole or not isinstance(run.config, ToyConfig) or run.config.verdict is None:
        return None
    run.note_tracker()
    config = run.config
    return run.retry(lambda: conclude(config))
