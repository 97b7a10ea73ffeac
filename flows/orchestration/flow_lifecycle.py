"""How a flow ends: as its body does, whatever becomes of Prefect's API meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from draftsmith.artifacts.errors import RefusedError, RetryableError, StageInterrupted

Nodes = dict[str, dict[str, Any]]


@dataclass
class FlowResult:
    """The body of a flow, and what it came to."""

    ended: bool = False
    made: Nodes = field(default_factory=dict)
    outcome: str | None = None  # of a run that came to a conclusion, as MLflow's tag has it
    message: str = ""
    error: BaseException | None = None


_RESULT: ContextVar[FlowResult | None] = ContextVar("body", default=None)


@contextmanager
def body() -> Iterator[FlowResult]:
    """To be entered by the body of a flow; it keeps what the body came to for `run_flow`."""
    current = _RESULT.get() or FlowResult()
    try:
        yield current
    except BaseException as error:
        current.error = error
        raise
    finally:
        current.ended = True


def run_flow(flow: Any, config: Any, lost: Callable[[str], None], **options: Any) -> FlowResult:
    """Call the flow of a config, with options. Return its body, which may hold a RefusedError, or raise what its body
    raised; `lost` is called if Prefect was lost before it knew how the run ended.

    Raises RetryableError if Prefect's API was lost before the body began, or so long that the body could not go on.
    """
    current = FlowResult()
    token = _RESULT.set(current)
    try:
        flow(config, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if not current.ended:
            if not is_api_loss(error):
                raise
            raise RetryableError(
                f"Prefect's API was lost before the run began ({_said(error)}); run it again"
            ) from error
        if current.error is not None and current.error is not error and is_api_loss(error):
            lost(f"Prefect could not be told how the run ended ({_said(error)})")
        elif current.error is None:
            lost(f"Prefect could not be told that the run ended well ({_said(error)}); its artifacts are complete")
    finally:
        _RESULT.reset(token)
    if current.error is not None and is_api_loss(current.error):
        raise RetryableError(
            f"Prefect's API was lost during the run ({_said(current.error)}): start its server again, then run the "
            "same command; what is finished is kept"
        ) from current.error
    if current.error is not None and not isinstance(current.error, RefusedError):
        raise current.error
    return current


def is_api_loss(error: BaseException) -> bool:
    """Of the API: not there, or ill."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


_ASK_EVERY_S = 5.0


class CancelledError(StageInterrupted):
    """The run was cancelled in Prefect; it goes on when it is run again."""


class Cancellation:
    """Asks Prefect's API every few seconds, from a thread of its own, whether the current flow run is to end."""

    def __init__(self) -> None:
        context = FlowRunContext.get()
        self._run: Any = context.flow_run.id if context is not None and context.flow_run is not None else None
        self._asked, self._over = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        if self._run is not None:
            threading.Thread(target=self._watch, name="prefect-cancellation", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()

    def check(self) -> None:
        """Raise `CancelledError` if it was cancelled."""
        if self._asked.is_set():
            raise CancelledError("cancelled in Prefect; what was saved is kept: run the same command again to continue")

    def _watch(self) -> None:
        while not self._over.wait(_ASK_EVERY_S):
            with suppress(Exception), get_client(sync_client=True) as client:  # an API that is away cancels nothing
                state = client.read_flow_run(self._run).state
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    self._asked.set()
                    return
