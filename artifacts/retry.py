"""Retries of a call, synchronous or asynchronous, after transient errors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar, cast

import tenacity

Call = TypeVar("Call", bound=Callable[..., object])
FIRST_S, LONGEST_S = 0.5, 10.0  # bounds of the pauses, which double


def backoff_s(_error: BaseException, attempts: int) -> float:
    """Return the seconds before the next attempt: exponential back-off with full jitter."""
    return random.uniform(0, min(LONGEST_S, FIRST_S * 2 ** (attempts - 1)))


def retry_on(
    kinds: type[BaseException] | tuple[type[BaseException], ...],
    *,
    give_up: Callable[[BaseException, int, float], bool],
    pause_s: Callable[[BaseException, int], float] = backoff_s,
    on_retry: Callable[[BaseException, int], None] = lambda _error, _attempts: None,
) -> Callable[[Call], Call]:
    """Return a decorator that calls a function again after each error of these kinds; others are raised immediately.

    give_up: called with the error, the attempts so far and the seconds since the first one; true raises the error.
    pause_s: called with the error and the attempts so far. on_retry: called with the same before each pause.
    """

    def error_of(state: tenacity.RetryCallState) -> BaseException:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        return error

    again = tenacity.retry(
        retry=tenacity.retry_if_exception_type(kinds),
        stop=lambda state: give_up(error_of(state), state.attempt_number, state.seconds_since_start or 0.0),
        wait=lambda state: pause_s(error_of(state), state.attempt_number),
        before_sleep=lambda state: on_retry(error_of(state), state.attempt_number),
        reraise=True,
    )
    return cast(Callable[[Call], Call], again)
