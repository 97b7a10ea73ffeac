"""The result of a flow whose Prefect API is lost at its start, while it runs, or at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RefusedError, RetryableError
from draftsmith.flows.orchestration.launch import flow_of
from draftsmith.flows.planning.graph import ALL_NODES
from draftsmith.flows.planning.plan import Conclusion


class Ended:
    """A prepared run whose body is a function."""

    config, selection = None, ALL_NODES

    def __init__(self, body: Callable[[], None]) -> None:
        self.body, self.ended = body, False
        self.error: BaseException | None = None
        self.conclusion: Conclusion | None = None

    def do(self) -> None:
        try:
            self.body()
            if self.conclusion is not None and self.conclusion.error is not None:
                self.error = self.conclusion.error
                raise self.error  # as Prefect does for a failed state
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.ended = True


def lost() -> None:
    """Raise what Prefect's client raises if no server accepts its connection."""
    httpx.get("http://127.0.0.1:9", trust_env=False)


def nothing() -> None:
    pass


def call(run: Any, before: Callable[[], None] = nothing) -> None:
    """Call the flow of a run."""

    with flow_of(run, lambda _: None):
        before()
        run.do()


@pytest.mark.parametrize(
    ("before", "within", "when"), [(lost, nothing, "before the run started"), (nothing, lost, "during the run")]
)
def test_a_loss_before_or_within_the_body_is_worth_a_retry(
    before: Callable[[], None], within: Callable[[], None], when: str
) -> None:
    """After the body it changes nothing: `test_run.py`."""
    with pytest.raises(RetryableError, match=when):
        call(Ended(within), before)


@pytest.mark.parametrize("kind", [RefusedError, RetryableError])
def test_the_error_of_a_conclusion_stays_in_the_run(kind: type[DraftsmithError]) -> None:
    run = Ended(nothing)
    run.conclusion = Conclusion("Refused", "why", kind("not promoted"))
    call(run)


def test_an_error_after_a_conclusion_is_raised() -> None:
    def event() -> None:
        raise KeyError("an event")

    run = Ended(event)
    run.conclusion = Conclusion("Promoted", "why")
    with pytest.raises(KeyError):
        call(run)
