"""The result of a flow whose Prefect API is lost at its start, while it runs, or at its end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RefusedError, RetryableError
from draftsmith.flows.orchestration.flow_run import flow_result, run_flow
from draftsmith.flows.planning.plan import Conclusion
from tests.testbed.artifacts import fake_artifact

NODES = {"sft": fake_artifact("sft", "k", "c", Path("/store/sft/k"))}


def lost() -> None:
    """Raise what Prefect's client raises if no server accepts its connection."""
    httpx.get("http://127.0.0.1:9", trust_env=False)


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("before", "within", "when"), [(lost, nothing, "before the run started"), (nothing, lost, "during the run")]
)
def test_a_loss_before_or_within_the_body_is_worth_a_retry(
    before: Callable[[], None], within: Callable[[], None], when: str
) -> None:
    """After the body it changes nothing: `test_run.py`."""

    def run(_config: Any) -> None:
        before()
        with flow_result():
            within()

    with pytest.raises(RetryableError, match=when):
        run_flow(run, None, lambda _: None)


@pytest.mark.parametrize("kind", [RefusedError, RetryableError])
def test_the_error_of_a_conclusion_is_returned_with_the_artifacts(kind: type[DraftsmithError]) -> None:
    conclusion = Conclusion("Refused", "why", kind("not promoted"))

    def run(_config: Any) -> None:
        with flow_result() as current:
            current.nodes, current.conclusion = NODES, conclusion
            assert conclusion.error is not None
            raise conclusion.error

    ended = run_flow(run, None, lambda _: None)
    assert (ended.nodes, ended.conclusion) == (NODES, conclusion)


def test_an_error_after_a_conclusion_is_raised() -> None:
    def run(_config: Any) -> None:
        with flow_result() as current:
            current.conclusion = Conclusion("Promoted", "why")
            raise KeyError("an event")

    with pytest.raises(KeyError):
        run_flow(run, None, lambda _: None)
