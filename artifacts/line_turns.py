"""One change of a drafter line at a time, over all homes that use one MLflow, whose database alone they share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import RetryableError
from draftsmith.artifacts.locks import OTHERS_LIMIT_S

if TYPE_CHECKING:
    from mlflow import MlflowClient

_STALE_S = 60.0


@contextmanager
def turn_of(client: MlflowClient, line: str) -> Iterator[Callable[[], None]]:
    """Held is a registered model of a name of its own: a name is there once, whoever asks.

    What a killed process left behind is taken away when it was there for longer than any promotion takes. Yields what
    says that it is still ours, for before the decisive write: it raises RetryableError if we were as slow as that.
    Raises RetryableError after ten minutes of waiting.
    """
    from mlflow.exceptions import MlflowException

    name, seen, begun = f"{line}.promotion", None, time.monotonic()
    since = begun
    while True:
        try:
            ours = int(
                client.create_registered_model(
                    name, description="Held for the second that a change of the line takes."
                ).creation_timestamp
            )
            break
        except MlflowException as error:
            # the second: given back between MLflow's insertion, which the name refused, and its look at what has it
            if error.error_code not in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                raise
        if time.monotonic() - begun > OTHERS_LIMIT_S:
            raise RetryableError(
                f"{line}: another change of the line holds MLflow's registered model {name} all the time: if none is "
                "going on, delete that model in MLflow, and run the same command again"
            )
        held = _created(client, name)
        if held is not None and held != seen:  # the clocks of two hosts are not compared
            seen, since = held, time.monotonic()
        elif time.monotonic() - since > _STALE_S:
            with suppress(MlflowException):  # another one that waits was faster
                client.delete_registered_model(name)
        time.sleep(0.1)

    def check() -> None:
        if _created(client, name) != ours:
            raise RetryableError(
                f"{line}: MLflow took longer than {_STALE_S:g} s for a change of the line, and another one began: run "
                "the same command again"
            )

    try:
        yield check
    finally:
        with suppress(MlflowException):
            if _created(client, name) == ours:
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
