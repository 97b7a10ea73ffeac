"""Retries with exponential back-off and jitter, while the hub, Prefect or MLflow cannot be reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import tenacity

from draftsmith.artifacts.errors import RetryableError
from draftsmith.artifacts.text import duration
from draftsmith.flows.pipeline.options import RETRY_JITTER, StageOptions

T = TypeVar("T")


def retry_notice(error: object, failures: int, delays: Sequence[float]) -> str:
    """Return what the user reads when an attempt has failed and another one follows.

    failures: attempts that have failed so far, at most as many as there are delays. The first notice also says how
    often and for how long it is tried, and how to stop.
    """
    again = f"{error}. Trying again in about {duration(delays[failures - 1])} ({failures} of {len(delays)})"
    if failures > 1:
        return again
    return (
        f"{again}, and for about {duration(sum(delays))} in all. Ctrl-C stops the run (of a deployment: cancel it in "
        "Prefect), and the same command continues it."
    )


def patiently(work: Callable[[], T], options: StageOptions, tell: Callable[[str], None]) -> T:
    """Return `work()`, tried again after each `RetryableError` as `stages.retries` says.

    Raises the last error; any other error at once.
    """

    def say(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        tell(retry_notice(state.outcome.exception(), state.attempt_number, options.retry_delays))

    delay = options.retry_delay_seconds
    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(RetryableError),
        stop=tenacity.stop_after_attempt(options.retries + 1),
        wait=tenacity.wait_exponential(multiplier=delay) + tenacity.wait_random(0, RETRY_JITTER * delay),
        before_sleep=say,
        reraise=True,
    )
    return again(work)
