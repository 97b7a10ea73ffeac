"""Retries with exponential back-off and jitter while the Hub, Prefect or MLflow cannot be reached."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from draftsmith.artifacts.errors import RetryableError
from draftsmith.artifacts.retry import retry_on
from draftsmith.flows.config.options import RETRY_JITTER, StageOptions
from draftsmith.flows.execution.display import format_duration

T = TypeVar("T")


def retry_notice(error: object, failures: int, delays: Sequence[float]) -> str:
    """Return the line that is printed when an attempt has failed and another one follows.

    failures: number of failed attempts so far, at most as many as there are delays (s). The first notice also says how
    long retries go on, and how to stop them.
    """
    wait = format_duration(delays[failures - 1])
    again = f"{str(error).rstrip('.')}. Trying again in about {wait} ({failures} of {len(delays)})"
    if failures > 1:
        return again
    return (
        f"{again}, and for about {format_duration(sum(delays))} in all. Ctrl-C stops the run (of a deployment: cancel "
        "it in Prefect), and the same command continues it."
    )


def with_retries(work: Callable[[], T], options: StageOptions, notify: Callable[[str], None]) -> T:
    """Return `work()`, retried after each `RetryableError`, at most `stages.retries` times.

    notify: prints a line before each retry. Raises the last error. Another error is not retried.
    """
    delay = options.retry_delay_seconds
    again = retry_on(
        RetryableError,
        give_up=lambda _error, attempts, _seconds: attempts > options.retries,
        pause_s=lambda _error, attempts: delay * (2 ** (attempts - 1) + random.uniform(0, RETRY_JITTER)),
        on_retry=lambda error, attempts: notify(retry_notice(error, attempts, options.retry_delays)),
    )
    return again(work)()
