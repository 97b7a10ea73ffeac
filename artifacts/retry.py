"""Repeats a call, plain or asynchronous, after errors that may pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar, cast

import tenacity

Call = TypeVar("Call", bound=Callable[..., object])
FIRST_S, LONGEST_S = 0.5, 10.0  # of the pauses, which double


def backed_off(_error: BaseException, attempts: int) -> float:
    """Return the seconds before the next attempt: exponential back-off with full jitter."""
    return random.uniform(0, min(LONGEST_S, FIRST_S * 2 ** (attempts - 1)))


def repeated(
    kinds: type[BaseException] | tuple[type[BaseException], ...],
    *,
    given_up: Callable[[BaseException, int, float], bool],
    pause_s: Callable[[BaseException, int], float] = backed_off,
    note: Callable[[BaseException, int], None] = lambda _error, _attempts: None,
) -> Callable[[Call], Call]:
    """Return a decorator that calls a function again after each error of these kinds; others are raised at once.

    given_up: of the error, the attempts so far, and the seconds since the first; true: the error is raised. note is
    called before each pause.
    """

    def error_of(state: tenacity.RetryCallState) -> BaseException:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        return error

    again = tenacity.retry(
        retry=tenacity.retry_if_exception_type(kinds),
        stop=lambda state: given_up(error_of(state), state.attempt_number, state.seconds_since_start or 0.0),
        wait=lambda state: pause_s(error_of(state), state.attempt_number),
        before_sleep=lambda state: note(error_of(state), state.attempt_number),
        reraise=True,
    )
    return cast(Callable[[Call], Call], again)
