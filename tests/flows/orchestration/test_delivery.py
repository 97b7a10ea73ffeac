"""How a run ends when Prefect's API is lost at its beginning, on the way or at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RefusedError, RetryableError
from draftsmith.flows.orchestration.flow_lifecycle import body, run_flow

MADE = {"sft": {"key": "k"}}


def lost() -> None:
    """As Prefect's client does: from a connection that nobody accepts."""
    httpx.get("http://127.0.0.1:9", trust_env=False)


def flow(before: Callable[[], None], within: Callable[[], None], after: Callable[[], None]) -> Callable[[Any], None]:
    def run(_config: Any) -> None:
        before()
        with body() as current:
            within()
            current.made = MADE
        after()

    return run


def nothing() -> None:
    pass


def bad_input() -> None:
    raise DraftsmithError("opd.steps: must be positive")


def test_a_loss_after_the_body_does_not_turn_success_into_failure() -> None:
    told: list[str] = []
    assert run_flow(flow(nothing, nothing, lost), None, told.append).made == MADE
    assert len(told) == 1 and "its artifacts are complete" in told[0]


@pytest.mark.parametrize(
    ("where", "said"), [((lost, nothing), "before the run began"), ((nothing, lost), "what is finished is kept")]
)
def test_a_loss_before_or_within_the_body_is_worth_a_retry(
    where: tuple[Callable[[], None], Callable[[], None]], said: str
) -> None:
    with pytest.raises(RetryableError, match=said):
        run_flow(flow(*where, nothing), None, lambda _: None)


def test_the_body_s_own_error_stays_what_it_is() -> None:
    with pytest.raises(DraftsmithError, match="must be positive") as raised:
        run_flow(flow(nothing, bad_input, nothing), None, lambda _: None)
    assert not isinstance(raised.value, RetryableError)


def test_a_refusal_comes_with_what_was_made() -> None:
    error = RefusedError("not promoted")

    def run(_config: Any) -> None:
        with body() as current:
            current.made, current.outcome = MADE, "refused"
            raise error

    ended = run_flow(run, None, lambda _: None)
    assert (ended.made, ended.outcome, ended.error) == (MADE, "refused", error)
