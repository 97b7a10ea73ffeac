"""The data that every engine takes and returns, and the interface between them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from draftsmith.stages.target.sampling import GREEDY, SamplingParams


@dataclass(frozen=True)
class Request:
    """One prompt to answer. The same seed gives the same answer, whatever else is in the batch (up to float ties)."""

    request_id: str
    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    seed: int = 0


@dataclass(frozen=True)
class VerifyStep:
    """One verification: what was proposed behind which anchor, and how much of it was kept."""

    anchor: int  # absolute position (prompt + response) of the last committed token
    accepted: int  # proposals kept, 0 … block_size-1; at most what the end of the answer left room for
    proposed: list[int]  # block_size-1 tokens
    target_logprobs: list[float] | None = None  # of the proposals on their draft-induced prefix, where recorded


@dataclass
class Completion:
    """The answer to a request.

    `seconds` is its latency: embedded, from the start of its prefill; served, as the client saw it, queueing included.
    draft and verify seconds are its share of the work: the time of a batch's step divided by the rows in it (0 where
    the engine does not say).
    """

    request: Request
    response_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    steps: list[VerifyStep] = field(default_factory=list)  # empty for plain decoding, or if no trace was recorded
    verify_steps: int = 0  # how many there were, recorded or not; 0 for plain decoding
    retractions: int = 0  # times that a server read it again, which makes a token without a verify step
    accepted_counts: list[int] = field(default_factory=list)  # steps that kept 0, 1, … proposals, where only counted
    seconds: float = 0.0
    first_token_seconds: float = float("nan")  # from the request to its first token, where measured
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def trace_rows(self) -> list[dict[str, Any]]:
        """Its recorded steps as rows of TRACE."""
        return [
            {
                "trajectory_id": self.request.request_id,
                "step": s,
                "anchor": step.anchor,
                "accepted": step.accepted,
                "proposed_ids": step.proposed,
                "target_logprobs": step.target_logprobs,
            }
            for s, step in enumerate(self.steps)
        ]


class Engine(Protocol):
    """Generates with the target, with or without a drafter in the loop; the answers follow the same distribution."""

    name: str  # with its version where it has one: kept beside every answer
    records_trace: bool  # whether completions carry their verify steps
    batch_decides: bool  # whether what is asked for at once may change an answer: near-ties of half precision do

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answers in the order in which they finish."""
