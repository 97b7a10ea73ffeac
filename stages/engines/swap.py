"""Writes a drafter into running servers, one after the other; each has to prove that it drafts with it.

Our plug-in in the servers does the writing (`plugin_swap.py`). All servers are checked before the first one is written.
If a server's verify steps are not the new drafter's, its old weights are written back and no other server is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RefusedError
from draftsmith.stages.engines.served import ask_servers, from_servers
from draftsmith.stages.engines.servers.client import Json
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState
from draftsmith.stages.engines.sglang.served import write_drafter as write_sglang
from draftsmith.stages.engines.vllm.plugin import BACKEND
from draftsmith.stages.engines.vllm.served import write_drafter as write_vllm

if TYPE_CHECKING:  # it imports torch
    from draftsmith.stages.replay.proof import Proof

_PLUGIN = "has no plug-in that can write a drafter. Install this Draftsmith without its dependencies beside"
_INSTALL = {
    "sglang": "sglang >=0.5.21, and start the server again.",
    "vllm": "vllm >=0.32, and start the server again with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config "
    f"""'{{"backend": "{BACKEND}"}}'.""",
}


Prove = Callable[[], "Proof"]  # of one server, which should serve the new drafter by then


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
    if state.algorithm is not None and state.digest is None:
        raise DraftsmithError(f"{state.url}: {state.engine} {state.version} {_PLUGIN} {_INSTALL[state.engine]}")
    if state.algorithm != new.algorithm:
        drafts = f"drafts by {state.algorithm}" if state.algorithm else "has no drafter"
        raise DraftsmithError(
            f"{state.url}: {drafts}, the new drafter needs {new.algorithm}. Start the server with it."
        )
    if state.block_size > new.block_size:
        raise DraftsmithError(
            f"{state.url}: drafts blocks of {state.block_size}, the new drafter's are of {new.block_size}. Start the "
            "server with it."
        )


def _swap(old: ServerState, new: NewDrafter, prove: Prove) -> Served:
    assert old.digest is not None
    written = _write(old, new)
    try:
        proof = prove()
        if not proof.swapped:
            word = "is inconclusive" if proof.swapped is None else "fails"
            raise RefusedError(f"{old.url}: the proof of the new drafter {word}: {proof.reason}")
        _write(old, new, proof.reason)
    except BaseException as error:
        try:
            restored = NewDrafter(old.digest, Path(), new.algorithm, new.block_size)
            _write(old, restored)
            _write(old, restored, f"It served before a swap to {new.digest[:12]}, which was not proven.")
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


def _write(old: ServerState, new: NewDrafter, proof: str = "") -> Json:
    """Make a server serve a drafter, and record the proof of it. The same request may be sent again."""

    async def write(client: httpx.AsyncClient, url: str) -> Json:
        if old.engine == "vllm":
            return await write_vllm(client, url, new, proof, old.digest or "")
        return await write_sglang(client, url, new, proof)

    written = from_servers([old.url], write)[old.url]
    if isinstance(written, DraftsmithError):
        raise written
    return written
