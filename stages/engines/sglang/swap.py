"""Writes a drafter into running SGLang servers, one after the other; each has to prove that it drafts with it.

The plug-in in the servers does the writing (`plugin_swap.py`). All servers are checked before the first one is written.
If a server's verify steps are not the new drafter's, its old weights are written back and no other server is touched.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RefusedError, RetryableError
from draftsmith.stages.engines.servers.client import Json, check_status, json_object, query
from draftsmith.stages.engines.sglang.protocol import SWAP_ACTION
from draftsmith.stages.engines.sglang.served import ServerState, ask_servers, from_servers

_WRITE_TIMEOUT_S = 300.0  # a write waits for the step that is computed
_READ_LIMIT_S = 1800.0  # until a server has read the files
_POLL_S = 0.5
_INSTALL = "Install this Draftsmith without its dependencies beside sglang >=0.5.21, and start the server again"


class Proof(Protocol):
    """The outcome of a proof."""

    @property
    def swapped(self) -> bool | None:
        """Whether the server's verify steps are the new drafter's; None: inconclusive."""

    @property
    def reason(self) -> str:
        """The evidence, in a few words."""


Prove = Callable[[], Proof]  # of one server, which should serve the new drafter by then


@dataclass(frozen=True)
class NewDrafter:
    """A drafter that servers are to draft with."""

    digest: str
    folder: Path  # of the checkpoint, under the same path on the servers' hosts
    algorithm: str
    block_size: int  # tokens of a verify step, as trained
    upload: str = ""  # its address in MLflow's artifact store, for hosts without the folder
    tracking: str = ""  # MLflow's URI


@dataclass(frozen=True)
class Served:
    """The drafter that a server serves, and the swap to it."""

    url: str
    drafter: str  # digest
    since: str  # ISO 8601, UTC
    pause_s: float
    proof: str


def swap_servers(
    urls: Sequence[str],
    new: NewDrafter,
    prover: Callable[[ServerState], Prove],
    done: Callable[[Served], None],
) -> None:
    """Write the drafter into each server and prove it, the first one as the canary.

    A server that serves it already is left, unless a swap to it ended before its proof.

    prover: takes what a server serves before. done: called for each server that serves the drafter.

    Raises DraftsmithError before the first write if a server cannot serve the drafter, and later if a proof fails:
    that server serves its old drafter again then. Raises RetryableError if a server does not answer.
    """
    due = []
    for state in ask_servers(urls).values():
        if isinstance(state, DraftsmithError):
            raise state
        _check(state, new)
        if state.digest != new.digest:
            due.append(state)
        elif state.before and not state.proof:
            due.append(replace(state, digest=state.before))
        else:
            assert state.since is not None
            proof = state.proof or "It was started with it."
            done(Served(state.url, new.digest, state.since, state.pause_s, proof))
    proofs = [prover(old) for old in due]  # which loads what a proof needs
    for old, prove in zip(due, proofs, strict=True):
        done(_swap(old, new, prove))


def _check(state: ServerState, new: NewDrafter) -> None:
    """Raise DraftsmithError if the drafter cannot be written into a server."""
    if state.algorithm != new.algorithm:
        drafts = f"drafts by {state.algorithm}" if state.algorithm else "has no drafter"
        raise DraftsmithError(
            f"{state.url}: {drafts}, the new drafter needs {new.algorithm}. Start the server with it."
        )
    if state.digest is None:
        raise DraftsmithError(
            f"{state.url}: sglang {state.version} has no plug-in that can write a drafter. {_INSTALL}."
        )
    if state.block_size > new.block_size:
        raise DraftsmithError(
            f"{state.url}: drafts blocks of {state.block_size}, the new drafter's are of {new.block_size}. Start the "
            "server with it."
        )


def _swap(old: ServerState, new: NewDrafter, prove: Prove) -> Served:
    assert old.digest is not None
    written = _write(old.url, new)
    try:
        proof = prove()
        if not proof.swapped:
            word = "is inconclusive" if proof.swapped is None else "fails"
            raise RefusedError(f"{old.url}: the proof of the new drafter {word}: {proof.reason}")
        _write(old.url, new, proof.reason)
    except BaseException as error:
        try:
            _write(old.url, NewDrafter(old.digest, Path(), new.algorithm, new.block_size))
        except DraftsmithError as problem:
            raise DraftsmithError(
                f"{error} The old drafter {old.digest[:12]} was not written back ({problem}). Restart the server."
            ) from error
        if not isinstance(error, DraftsmithError):
            raise
        raise type(error)(
            f"{error} It drafts with {old.digest[:12]} again, and no server after it was touched."
        ) from error
    return Served(old.url, new.digest, written["since"], written["pause_s"], proof.reason)


def _write(url: str, new: NewDrafter, proof: str = "") -> Json:
    """Make a server serve a drafter, and record the proof of it. The plug-in takes the same request again."""
    wanted = {
        "drafter": new.digest,
        "folder": str(new.folder.absolute()),
        "upload": new.upload,
        "tracking": new.tracking,
        "proof": proof,
    }

    async def write(client: httpx.AsyncClient, url: str) -> Json:
        deadline = time.monotonic() + _READ_LIMIT_S
        while time.monotonic() < deadline:
            body = {"action": SWAP_ACTION + json.dumps(wanted)}
            response = await query(client, "POST", f"{url}/weights_checker", body, _WRITE_TIMEOUT_S)
            if response.status_code == HTTPStatus.BAD_REQUEST:
                raise DraftsmithError(f"{url}: refuses the drafter: {json_object(response).get('message')}.")
            check_status("of a swap", url, response.status_code, response.text)
            # as SGLang joins the messages of replicas
            replicas = [json.loads(part) for part in json_object(response)["message"].split(" | ")]
            if all(each["state"] == "served" for each in replicas):
                return {name: max(each[name] for each in replicas) for name in ("since", "pause_s")}
            await asyncio.sleep(_POLL_S)
        raise RetryableError(f"{url}: did not read the drafter in {_READ_LIMIT_S:.0f} s. Look at its log.")

    written = from_servers([url], write)[url]
    if isinstance(written, DraftsmithError):
        raise written
    return written
