"""The requests and completions of every engine, and the interface of an engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from draftsmith.artifacts.tables.schemas import TRACE
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.replay.step_tables import steps_table
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams


@dataclass(frozen=True)
class Request:
    """A prompt to answer. The same seed gives the same answer whatever else is in the batch, up to float ties."""

    request_id: str
    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams = GREEDY
    seed: int = 0


@dataclass
class Completion:
    """The answer to a request.

    `seconds` is the latency: from the start of the prefill in the embedded engine; with servers as the client measures
    it, queueing included. `draft_seconds` and `verify_seconds` are the time of the batch's steps divided by the rows in
    them (0 if the engine does not measure them).
    """

    request: Request
    response_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""  # "stop" or "length"
    steps: Steps | None = None  # None without a drafter, or if not recorded
    verify_steps: int = 0  # number of verify steps, recorded or not; 0 without a drafter
    retractions: int = 0  # prefills that a full server repeated; each gives a token without a verify step
    accepted_counts: list[int] = field(default_factory=list)  # steps with 0, 1, … accepted proposals, if only counted
    seconds: float = 0.0
    first_token_seconds: float = float("nan")  # from the request to its first token, if measured
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    def trajectory(self) -> Trajectory:
        """Return prompt and answer, as replay reads them."""
        prompt = self.request.prompt_ids
        return Trajectory(self.request.request_id, prompt + self.response_ids, len(prompt))


def recorded_table(completions: Iterable[Completion]) -> pa.Table:
    """Return the recorded steps of answers as rows of TRACE."""
    return steps_table(TRACE, ((done.trajectory(), done.steps) for done in completions if done.steps))


class Engine(Protocol):
    """Generates with the target, with or without a drafter; the answers follow the same distribution."""

    name: str  # stored with every answer; servers add their version
    records_trace: bool  # completions have their verify steps
    batch_decides: bool  # the batch may change an answer, through near-ties in half precision

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions in the order in which they finish."""
