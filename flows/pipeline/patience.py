"""Patience with what is away for a while: the hub, a server of Prefect or MLflow. Back-off and jitter, over minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tenacity

from draftsmith.artifacts.errors import RetryableError
from draftsmith.flows.pipeline.options import RETRY_JITTER, StageOptions

T = TypeVar("T")


def patiently(work: Callable[[], T], options: StageOptions, tell: Callable[[str], None]) -> T:
    """`work()`, again after each `RetryableError`, `stages.retries` times: `stages.retry_delay_seconds` later, then
    twice as long, with jitter. Raises its last error; any other error at once.
    """

    def say(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None and state.next_action is not None
        tell(f"{state.outcome.exception()}; trying again in {state.next_action.sleep:.0f} s")

    delay = options.retry_delay_seconds
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(RetryableError),
        stop=tenacity.stop_after_attempt(options.retries + 1),
        wait=tenacity.wait_exponential(multiplier=delay) + tenacity.wait_random(0, RETRY_JITTER * delay),
        before_sleep=say,
        reraise=True,
    )
    return again(work)
