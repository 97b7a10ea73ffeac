"""One stage at a time on an accelerator: a global concurrency limit of Prefect's server, held while a stage works."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from draftsmith.artifacts.errors import RetryableError
from draftsmith.flows.pipeline.delivery import is_loss
from draftsmith.flows.pipeline.machine import accelerators
from draftsmith.flows.pipeline.prefect_server import is_temporary

_PREFIX = "accelerator."


_POLL_S = 2.0
_RACE_S = 20.0  # for a slot that was free a moment ago: Prefect's own wait for it hears no `check`


@contextlib.contextmanager
def held(say: Callable[[str], None], check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold every accelerator that this process sees, after waiting for its holder: what another run does on it would
    change what is measured. Nothing to hold on a temporary server, which no other run knows. `check` is called while it
    waits; what it raises ends that.

    The limit is made on first use, with one slot; strict: an error if it is gone. Of a holder that was killed, the
    server takes the slot back after its lease (five minutes). A lease that cannot be renewed stops no stage, for what
    it has computed would be worth less than the turn; Prefect warns in the run's log, and on one machine the locks of
    the devices (`pipeline.devices`) still keep stages apart.
    """
    if is_temporary():
        yield
        return
    names = [f"{_PREFIX}{each}" for each in accelerators()]
    worked = False
    ended: BaseException | None = None
    try:
        with contextlib.ExitStack() as stack:
            _take(stack, names, say, check)
            try:
                yield
            except BaseException as error:
                ended = error
                raise
            worked = True
    except httpx.HTTPError as error:
        if not is_loss(error):
            raise
        if error is ended or not (worked or ended):
            raise RetryableError(f"Prefect's server was lost ({error}): start it again, or run again later") from error
        say(f"Prefect's server is lost, and does not know yet that {', '.join(names)} is free")
    if ended is not None:  # giving back failed behind it
        raise ended


def _take(
    stack: contextlib.ExitStack, names: Sequence[str], say: Callable[[str], None], check: Callable[[], None]
) -> None:
    """Wait for a slot of every limit, and hold them as long as the stack."""
    told = False
    while True:
        if not (taken := _taken(names)):
            with contextlib.suppress(TimeoutError):  # another run was faster
                slots = concurrency(
                    list(names), strict=True, timeout_seconds=_RACE_S, raise_on_lease_renewal_failure=False
                )
                stack.enter_context(slots)
                return
        elif not told:
            told = True
            free = "; ".join(f"prefect gcl update {name} --active-slots 0" for name in taken)
            say(
                f"waits for {', '.join(taken)}, which another run holds (if none does, since Prefect's server was "
                f"started again and has forgotten its holder: {free})"
            )
        check()
        time.sleep(_POLL_S)


def _taken(names: Sequence[str]) -> list[str]:
    """Those without a free slot; makes those that the server does not know."""
    taken = []
    with get_client(sync_client=True) as client:
        for name in names:
            try:
                limit = client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                with contextlib.suppress(ObjectAlreadyExists):  # another run was faster
                    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
                continue
            if limit.active and limit.active_slots >= limit.limit:
                taken.append(name)
    return taken
