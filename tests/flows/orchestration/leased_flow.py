"""The toy pipeline under a lease, like the flow of a deployment; the server drops the lease during the first stage."""

from __future__ import annotations

import threading
import time
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency import _leases
from prefect.concurrency.context import ConcurrencyContext
from prefect.concurrency.sync import concurrency

from draftsmith.artifacts.home import home
from draftsmith.flows.orchestration.run import Run
from tests.flows.toy import TOY, ToyConfig
from tests.flows.toy_flow import make_and_conclude

_leases._RENEWAL_FRACTION = 0.002  # of five minutes
_leases._RENEWAL_RETRY_BASE_DELAY = 0  # seconds


@flow(name="leased-toy", flow_run_name="{config.name}", persist_result=False)
def leased_toy(
    config: ToyConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    with get_client(sync_client=True) as client:
        client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="leased", limit=1))
    with concurrency("leased", strict=True, raise_on_lease_renewal_failure=True):
        known = ConcurrencyContext.get()
        assert known is not None
        threading.Thread(target=_forget, args=(known.cleanup_lease_ids[-1],), daemon=True).start()
        return Run.of(TOY, config, force, start, until).do(make_and_conclude)


def _forget(lease: UUID) -> None:
    while not list(home().glob("store/collect/.partial-*/work/saved.json")):
        time.sleep(0.05)
    with get_client(sync_client=True) as client:
        client.release_concurrency_slots_with_lease(lease)
