"""The interface of one kind of server, and the checks of every kind's answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import httpx

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.evaluation import TargetDifference
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.servers.http import Json, ServerAnswer
from draftsmith.stages.engines.servers.process import ServerProcess
from draftsmith.stages.targets.info import TargetInfo


@dataclass(frozen=True)
class ServerInfo:
    """A server's report about itself."""

    version: str
    records_trace: bool
    greedy_only: bool = False  # it drafts and verifies greedily, so sampled answers would not be the target's
    replicas: int = 1  # replicas of the model
    remarks: list[str] = field(default_factory=list)  # checks that were not possible, and other notes
    target_difference: TargetDifference | None = None  # from transformers' results, by the server's settings


class BadAnswerError(DraftsmithError):
    """An answer does not fit its request."""


class ServerApi(ABC):
    """One kind of server: its command line, its endpoints and its answers. An object serves one engine.

    The asynchronous methods run in the engine's event loop. They raise RequestLostError or a subclass if a
    repetition may succeed, and DraftsmithError if it would not.
    """

    title: ClassVar[str]  # the kind's name in messages
    no_trace: ClassVar[str]  # reason for missing verify steps
    id_field: ClassVar[str]  # field of a request's body with the id, by which it is aborted

    @abstractmethod
    def processes(self, folder: Path, api_key: str) -> list[ServerProcess]:
        """Return the servers of `launch`, not yet started; they write their logs to `folder`."""

    @abstractmethod
    async def check(self, client: httpx.AsyncClient, url: str, *, ours: bool) -> ServerInfo:
        """Check a server before its first request. ours: it was started here, so its files are the right ones."""

    @abstractmethod
    def payload(self, request: Request, *, traced: bool) -> Json:
        """Return the body of a request. traced: ask for the verify steps."""

    @abstractmethod
    async def generate(
        self, client: httpx.AsyncClient, url: str, name: str, payload: Json, *, stream: bool = False
    ) -> ServerAnswer:
        """Send a request. name: the request's, for errors. stream: measure the first token's time.

        Raises RequestLostError, or DraftsmithError if the server refuses the request.
        """

    async def abort(self, _client: httpx.AsyncClient, _url: str, _request_id: str) -> None:
        """Stop an answer whose connection was closed, where the server does not do so by itself."""
        return

    @abstractmethod
    def completion(self, request: Request, answer: ServerAnswer, *, traced: bool) -> Completion:
        """Return the completion of an answer. Raises BadAnswerError if it does not fit the request."""

    @abstractmethod
    async def check_health(self, client: httpx.AsyncClient, url: str) -> None:
        """Check that the server computes. Raises RequestLostError if not, ServerStalledError if it is only stalled."""

    @abstractmethod
    async def flush_cache(self, client: httpx.AsyncClient, url: str) -> None:
        """Make the next requests find an empty prefix cache."""

    def close(self) -> None:
        """Remove the files other than logs that `processes` wrote. Called when the servers have ended."""
        return

    async def workers(self, _client: httpx.AsyncClient, _url: str) -> list[str] | None:
        """Return the addresses of a router's healthy servers; None: not a router."""
        return None

    async def check_router(self, _client: httpx.AsyncClient, _url: str) -> None:
        """Check that a router answers. Raises RequestLostError."""
        return

    async def router_passes_records(self, _client: httpx.AsyncClient, _url: str) -> bool:
        """Return whether answers come through this router with the records of their steps. Its servers are checked."""
        return True


def wrong_tokens(
    request: Request, tokens: list[int], reason: str, matched: object, prompt_tokens: int, target: TargetInfo
) -> str | None:
    """Return the error in the tokens of an answer and its remedy; None if they are right.

    reason: "stop" or "length". matched: the token or text that ended it, if the server reports it.
    """
    if not tokens:
        return "is empty. Look at the server's log."
    if not all(0 <= token < target.vocab_size for token in tokens):
        return (
            f"has token {max(tokens)}, the target's vocabulary ends at {target.vocab_size - 1}: another model is "
            "served. Serve the target."
        )
    if prompt_tokens != len(request.prompt_ids):
        return f"saw {prompt_tokens} prompt tokens; {len(request.prompt_ids)} were sent. Look at the server's log."
    if reason == "stop" and tokens[-1] not in target.eos_ids:
        return f"ends at token {tokens[-1]}, no end token of the target. Start the server without other stop tokens."
    if reason == "stop" and matched not in (None, tokens[-1]):
        # SGLang replaces a token outside the vocabulary by an end token, and reports it only here.
        return (
            f"was ended by {matched!r}, not by its last token. Look for a stop string, or an error in the server's log."
        )
    if reason == "length" and len(tokens) < request.max_new_tokens:
        return (
            f"was cut after {len(tokens)} of {request.max_new_tokens} tokens: the server's context or key/value "
            "memory is too small. Raise it or lower sampling.max_new_tokens."
        )
    if reason not in ("stop", "length"):
        return f"ended by {reason!r}. Look at the server's log."
    return None
