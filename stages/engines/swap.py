"""Writes a drafter into running servers, one after the other; each has to prove that it drafts with the new one.

Our plug-in in the servers does the writing (`plugin_swap.py`). All servers are checked before the first one is written.
If a server's verify steps are not the new drafter's, its old weights are written back and no other server is touched.
A rollback writes all servers that answer, and proves them afterwards: their drafter must be replaced at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RefusedError
from draftsmith.artifacts.identifiers import Digest, ServerUrl
from draftsmith.stages.engines.server_state import ask_servers, from_servers
from draftsmith.stages.engines.servers.http import Json
from draftsmith.stages.engines.servers.state import NewDrafter, ServerState, Time
from draftsmith.stages.engines.sglang.swap import write_drafter as write_sglang
from draftsmith.stages.engines.vllm.plugin import BACKEND
from draftsmith.stages.engines.vllm.swap import write_drafter as write_vllm

if TYPE_CHECKING:  # it imports torch
    from draftsmith.stages.replay.proof import Proof

_PLUGIN = "has no plug-in that can write a drafter. Install this Draftsmith without its dependencies next to"
_INSTALL = {
    "sglang": "sglang >=0.5.21, and start the server again.",
    "vllm": "vllm >=0.32, and start the server again with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config "
    f"""'{{"backend": "{BACKEND}"}}'.""",
}


@dataclass(frozen=True)
class Served:
    """The drafter that a server serves, and the swap to it; stored in a registry."""

    url: ServerUrl
    drafter: Digest
    since: Time
    pause_s: float
    proof: str  # empty: not proven yet


class Prover(Protocol):
    """Makes the proof of each server."""

    def served(self, before: ServerState) -> NewDrafter:
        """Return the drafter of a server. Raises DraftsmithError if it is unknown, or differs by more than weights."""

    def load(self, olds: Sequence[NewDrafter]) -> None:
        """Load target and drafters. Raises DraftsmithError if they are not here, or do not fit into memory."""

    def prove(self, before: ServerState, old: NewDrafter) -> Proof:
        """Return whether a server drafts with the new drafter and no longer with the old one."""


@dataclass(frozen=True)
class Swap:
    """A swap of servers to a new drafter.

    prover: proves the new drafter. recorded: returns the registry's proof of the drafter that a server serves, None if
    it has none; the server's own report does not count. done: called with the drafter that a server serves now. named:
    same as in `from_servers`.
    """

    new: NewDrafter
    prover: Prover
    recorded: Callable[[ServerState], str | None]
    done: Callable[[Served], None]
    named: bool = False

    def swap(self, urls: Sequence[str]) -> None:
        """Write the drafter into each server and prove it, the first one as the canary.

        A server that serves it already is skipped, unless a swap to it ended before its proof.

        Raises DraftsmithError before the first write if a server cannot serve the drafter, and later if a proof fails:
        that server serves its old drafter again then. Raises RetryableError if a server does not answer.
        """
        due = []
        for state in ask_servers(urls, named=self.named).values():
            if isinstance(state, DraftsmithError):
                raise state
            if (before := self._due(state)) is not None:
                due.append((before, self.prover.served(before)))
        if due:
            self.prover.load([old for _, old in due])
        for before, old in due:
            self._swap(before, old)

    def roll_back(self, urls: Sequence[str]) -> None:
        """Write the drafter into all servers that answer, then prove it on each. Nothing is written back.

        Raises one DraftsmithError at the end that names every server which does not draft with it, or is not proven.
        """
        problems, written = list[DraftsmithError](), list[tuple[ServerState, NewDrafter, Served]]()
        for state in ask_servers(urls, named=self.named).values():
            with _kept(problems):
                if isinstance(state, DraftsmithError):
                    raise state
                if (before := self._due(state)) is None:
                    continue
                old = self.prover.served(before)
                written.append((before, old, self._write(before, self.new)))
                self.done(written[-1][2])
        unproven = [served.url for _, _, served in written]
        with _kept(problems):
            if written:
                self.prover.load([old for _, old, _ in written])
            for before, old, served in written:
                with _kept(problems):
                    self.done(replace(served, proof=self._prove(before, old)))
                    unproven.remove(served.url)
        if problems:
            said = " ".join(map(str, problems))
            if unproven:
                said += f" {', '.join(unproven)}: it is written, and not proven."
            kinds = {type(problem) for problem in problems}
            raise (kinds.pop() if len(kinds) == 1 else DraftsmithError)(said)

    def _due(self, state: ServerState) -> ServerState | None:
        """Return the state of a server that must be swapped; None if it serves the new drafter.

        Raises DraftsmithError if the drafter cannot be written into it.
        """
        _check(state, self.new)
        if state.digest != self.new.digest:
            return state
        proof = self.recorded(state) if state.before else "It was started with it."
        if proof is None:
            return replace(state, digest=state.before)
        self.done(replace(_report(state), proof=proof))
        return None

    def _swap(self, before: ServerState, old: NewDrafter) -> None:
        try:
            served = self._write(before, self.new)
            served = replace(served, proof=self._prove(before, old))
        except BaseException as error:
            try:
                self._restore(before, old)
            except DraftsmithError as problem:
                raise DraftsmithError(
                    f"{error} Whether it drafts with its old drafter {old.digest[:12]} is unknown ({problem}). Run the "
                    "same command again when it answers, or restart it."
                ) from error
            if not isinstance(error, DraftsmithError):
                raise
            raise type(error)(
                f"{error} It drafts with {old.digest[:12]} again, and no server after it was touched."
            ) from error
        self.done(served)

    def _prove(self, before: ServerState, old: NewDrafter) -> str:
        """Return the evidence. Raises RefusedError unless the server drafts with the new drafter."""
        proof = self.prover.prove(before, old)
        if not proof.swapped:
            word = "is inconclusive" if proof.swapped is None else "fails"
            raise RefusedError(f"{before.url}: the proof of the new drafter {word}: {proof.reason}")
        return proof.reason

    def _restore(self, before: ServerState, old: NewDrafter) -> None:
        """Write the old drafter back, unless the server still serves it. Raises DraftsmithError if that is unknown."""
        now = ask_servers([before.url], named=self.named)[before.url]
        if isinstance(now, DraftsmithError):
            raise now
        if (now.digest, now.since) != (before.digest, before.since):
            served = self._write(now, old)
            self.done(
                replace(served, proof=f"It served before a swap to {self.new.digest[:12]}, which was not proven.")
            )

    def _write(self, before: ServerState, drafter: NewDrafter) -> Served:
        """Make a server serve a drafter. The same request may be sent again."""

        async def write(client: httpx.AsyncClient, url: str) -> Json:
            if before.engine == "vllm":
                return await write_vllm(client, url, drafter, before)
            return await write_sglang(client, url, drafter)

        written = from_servers([before.url], write, named=self.named)[before.url]
        if isinstance(written, DraftsmithError):
            raise written
        return Served(before.url, drafter.digest, written["since"], written["pause_s"], "")


def _report(state: ServerState) -> Served:
    """Return a server's own report, which is no proof."""
    assert state.digest is not None and state.since is not None
    return Served(state.url, state.digest, state.since, state.pause_s, "")


@contextmanager
def _kept(problems: list[DraftsmithError]) -> Iterator[None]:
    """Store an error of the block, so that the other servers are still written."""
    try:
        yield
    except DraftsmithError as error:
        problems.append(error)


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
