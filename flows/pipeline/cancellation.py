"""A flow run that somebody cancels in Prefect, wherever it runs: nobody else tells a process that no worker started."""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext

from draftsmith.artifacts.errors import StageInterrupted

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
