"""Writes a drafter into running SGLang servers, one after the other; each has to prove that it drafts with it.

The plug-in in the servers does the writing (`plugin_swap.py`). All servers are checked before the first one is written.
If a server's verify steps are not the new drafter's, its old weights are written back and no other server is touched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RefusedError, RetryableError
from draftsmith.stages.engines.servers.client import key_header
from draftsmith.stages.engines.sglang.protocol import SWAP_ACTION, SWAP_STATE, Json
from draftsmith.stages.engines.sglang.served import API_KEY

_TIMEOUT_S = 300.0  # of one request: a write waits for the step that is computed
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


Prove = Callable[[str], Proof]  # takes the address of a server that should serve the new drafter


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
    """The drafter that a server serves."""

    url: str
    drafter: str  # digest
    since: str  # ISO 8601, UTC
    before: str = ""  # digest of the drafter before the last swap
    block_size: int = 0  # tokens of a verify step
    dtype: str = ""
    started_with: str = ""  # folder or hub id of the drafter in its options
    pause_s: float = 0.0  # of the swap to it
    proof: str = ""


def swap_servers(
    urls: Sequence[str],
    new: NewDrafter,
    prover: Callable[[Served], Prove],
    done: Callable[[Served], None],
    api_key: str | None = None,
) -> None:
    """Write the drafter into each server and prove it, the first one as the canary.

    A server that serves it already is left, unless a swap to it ended before its proof.

    prover: takes what a server serves before. done: called for each server that serves the drafter by a proof.

    Raises DraftsmithError before the first write if a server cannot serve the drafter, and later if a proof fails:
    that server serves its old drafter again then. Raises RetryableError if a server does not answer.
    """
    with httpx.Client(headers=key_header(api_key), timeout=_TIMEOUT_S, trust_env=False) as client:
        due = []
        for served in [_check(client, url, new) for url in urls]:
            if served.drafter != new.digest:
                due.append(served)
            elif served.before and not served.proof:
                due.append(replace(served, drafter=served.before))
        proofs = [prover(old) for old in due]  # which loads what a proof needs
        for old, prove in zip(due, proofs, strict=True):
            done(_swap(client, old, new, prove))


def _get(client: httpx.Client, url: str) -> Json:
    response = _send(client, "GET", f"{url}/server_info")
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code != 200 or not isinstance(body, dict):
        raise DraftsmithError(
            f"{url}: /server_info gives status {response.status_code}. Give a SGLang server's address."
        )
    return body


def _served(url: str, server: Json) -> Served | None:
    """Return what a server serves; None if it has no plug-in that can write a drafter."""
    states = [state.get(SWAP_STATE) for state in server.get("internal_states") or ()]
    if not states or not all(states):
        return None
    # replicas may differ after a swap that was interrupted
    digests = sorted({state["drafter"] for state in states})
    return Served(
        url,
        ", ".join(digests),
        max(state["since"] for state in states),
        states[0]["before"],
        int(server.get("speculative_num_draft_tokens") or 0),
        str(server.get("dtype")),
        str(server.get("speculative_draft_model_path")),
        proof=min(state["proof"] for state in states),  # empty if one has none
    )


def _check(client: httpx.Client, url: str, new: NewDrafter) -> Served:
    """Return what a server serves now. Raises DraftsmithError if the new drafter cannot be written into it."""
    server = _get(client, url)
    version, algorithm = server.get("version", "of an unknown version"), server.get("speculative_algorithm")
    if algorithm != new.algorithm:
        drafts = f"drafts by {algorithm}" if algorithm else "has no drafter"
        raise DraftsmithError(f"{url}: {drafts}, the new drafter needs {new.algorithm}. Start the server with it.")
    if (served := _served(url, server)) is None:
        raise DraftsmithError(f"{url}: sglang {version} has no plug-in that can write a drafter. {_INSTALL}.")
    if served.block_size > new.block_size:
        raise DraftsmithError(
            f"{url}: drafts blocks of {served.block_size}, the new drafter's are of {new.block_size}. Start the server "
            "with it."
        )
    return served


def _swap(client: httpx.Client, old: Served, new: NewDrafter, prove: Prove) -> Served:
    url, served = old.url, _write(client, old.url, new)
    try:
        proof = prove(url)
        if not proof.swapped:
            word = "is inconclusive" if proof.swapped is None else "fails"
            raise RefusedError(f"{url}: the proof of the new drafter {word}: {proof.reason}")
        _write(client, url, new, proof.reason)
    except BaseException as error:
        try:
            _write(client, url, NewDrafter(old.drafter, Path(), new.algorithm, new.block_size))
        except DraftsmithError as problem:
            raise DraftsmithError(
                f"{error} The old drafter {old.drafter[:12]} was not written back ({problem}). Restart the server."
            ) from error
        if not isinstance(error, DraftsmithError):
            raise
        raise type(error)(
            f"{error} It drafts with {old.drafter[:12]} again, and no server after it was touched."
        ) from error
    return replace(old, drafter=new.digest, before=old.drafter, **served, proof=proof.reason)


def _write(client: httpx.Client, url: str, new: NewDrafter, proof: str = "") -> Json:
    """Make a server serve a drafter, and record the proof of it. The plug-in takes the same request again."""
    wanted: Mapping[str, Any] = {
        "drafter": new.digest,
        "folder": str(new.folder.absolute()),
        "upload": new.upload,
        "tracking": new.tracking,
        "proof": proof,
    }
    deadline = time.monotonic() + _READ_LIMIT_S
    while time.monotonic() < deadline:
        response = _send(client, "POST", f"{url}/weights_checker", {"action": SWAP_ACTION + json.dumps(wanted)})
        message = _message(url, response)
        if response.status_code != 200:
            raise DraftsmithError(f"{url}: refuses the drafter: {message}.")
        replicas = [json.loads(part) for part in message.split(" | ")]  # as SGLang joins the messages of replicas
        if all(each["state"] == "served" for each in replicas):
            return {name: max(each[name] for each in replicas) for name in ("since", "pause_s")}
        time.sleep(_POLL_S)
    raise RetryableError(f"{url}: did not read the drafter in {_READ_LIMIT_S:.0f} s. Look at its log.")


def _message(url: str, response: httpx.Response) -> str:
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        raise DraftsmithError(
            f"{url}: /weights_checker gives status {response.status_code}. Give a SGLang server's address."
        ) from None


def _send(client: httpx.Client, method: str, url: str, body: Json | None = None) -> httpx.Response:
    try:
        response = client.request(method, url, json=body)
    except httpx.HTTPError as error:
        raise RetryableError(
            f"{url} cannot be reached ({type(error).__name__} {error}). Run the same command again."
        ) from error
    if response.status_code in (401, 403):
        raise DraftsmithError(f"{url} refuses the request. Set {API_KEY} to the server's key.")
    return response
