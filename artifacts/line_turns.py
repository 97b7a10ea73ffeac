"""One change of a drafter line at a time, over all homes that use one MLflow, whose database alone they share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

_STALE_S = 60.0


@contextmanager
def turn_of(client: MlflowClient, line: str) -> Iterator[None]:
    """Held is a registered model of a name of its own: a name is there once, whoever asks.

    What a killed process left behind is taken away when it was there for longer than any promotion takes.
    """
    from mlflow.exceptions import MlflowException

    name, seen, since = f"{line}.promotion", None, time.monotonic()
    while True:
        try:
            client.create_registered_model(name, description="Held for the second that a change of the line takes.")
            break
        except MlflowException as error:
            # the second: given back between MLflow's insertion, which the name refused, and its look at what has it
            if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                raise
        held = _created(client, name)
        if held is not None and held != seen:  # the clocks of two hosts are not compared
            seen, since = held, time.monotonic()
        elif time.monotonic() - since > _STALE_S:
            with suppress(MlflowException):  # another one that waits was faster
                client.delete_registered_model(name)
        time.sleep(0.1)
    try:
        yield
    finally:
        with suppress(MlflowException):
            client.delete_registered_model(name)


def _created(client: MlflowClient, name: str) -> int | None:
    """When the model was made, in ms of the server's clock; None where it is gone."""
    from mlflow.exceptions import MlflowException

    try:
        return int(client.get_registered_model(name).creation_timestamp)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
