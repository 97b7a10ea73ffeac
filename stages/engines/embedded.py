"""The embedded engine: lossless batched decoding in this process, with or without a drafter.

Every request owns a row of the KV cache. A finished row is refilled from the queue immediately, so the batch stays
full. Invariant between steps: the target's cache and the drafter's context hold exactly the positions before `anchor`,
the position of the last committed token, which is the next input. A target with recurrent layers reads the committed
tokens of a verify step once more: its states stay at the anchor until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import group_by_length
from draftsmith.stages.drafters.base import Drafter, PreparedDrafter
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.rejection_sampling import Drafted, propose_blocks, sample_target, verify
from draftsmith.stages.replay.steps import recorded_steps
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.kv_cache import SlotCache

# Prompts of similar length are prefilled together, up to this many tokens: matrix products reach their full rate with a
# few hundred rows, and more prompts in one forward only mean more padding.
PREFILL_TOKENS = 512


@dataclass
class _Row:
    """A request in flight."""

    done: Completion
    anchor: int  # absolute position of the last committed token
    started: float
    steps: list[tuple[int, int, list[int], None]] = field(default_factory=list)  # anchor, accepted, proposed

    @property
    def request(self) -> Request:
        return self.done.request

    @property
    def last_token(self) -> int:
        return self.done.response_ids[-1]

    @property
    def tokens_left(self) -> int:
        """Return the number of tokens that may still be committed."""
        return self.request.max_new_tokens - len(self.done.response_ids)

    def commit(self, tokens: list[int], eos_ids: frozenset[int]) -> int:
        """Append tokens up to a stop token or the length limit. Returns the number appended."""
        committed = 0
        for token in tokens[: self.tokens_left]:
            self.done.response_ids.append(token)
            committed += 1
            if token in eos_ids:
                self.done.finish_reason = "stop"
                break
        if not self.done.finish_reason and self.tokens_left == 0:
            self.done.finish_reason = "length"
        self.anchor += committed
        return committed


class EmbeddedEngine:
    """Greedy or sampled decoding of many requests; speculative decoding with a drafter.

    Answers equal those without a drafter token for token. If a request is sampled and the drafter samples its proposals
    (`Drafter.samples_proposals`), they are equal in distribution.
    slots: requests in flight. capacity: positions of a request (prompt, answer and the proposals of one block).
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        *,
        slots: int = 8,
        capacity: int = 1024,
        drafting: DraftingConfig | None = None,
    ):
        self.name, self.records_trace, self.batch_decides = "embedded", drafter is not None, True
        self.target, self.drafter, self.slots, self.capacity = target, drafter, slots, capacity
        self.layer_ids = tuple(drafter.target_layer_ids) if drafter else ()
        drafting = drafting or DraftingConfig()
        self.block_size = 1
        if drafter:
            self.block_size = drafting.block_of(drafter.block_size)
            self._prepared = PreparedDrafter.packed(drafter, target, drafting.head_tokens, self.block_size)
            self.drafter = self._prepared.drafter

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield completions in the order in which they finish. Closing the iterator drops requests in flight."""
        queue = iter(requests)
        self._allocate()
        rows: list[_Row] = []
        while True:
            self._refill(rows, list(islice(queue, self.slots - len(rows))))
            if not rows:
                return
            if not any(row.done.finish_reason for row in rows):  # a first token may already be a stop token
                self._decode(rows)
            for index in reversed(range(len(rows))):
                if rows[index].done.finish_reason:
                    yield self._retire(rows, index)

    def _refill(self, rows: list[_Row], arrivals: Sequence[Request]) -> None:
        """Read the prompts of new requests, which get the rows after those in flight."""
        for group in self._prefill_groups([len(r.prompt_ids) for r in arrivals]):
            rows += self._prefill([arrivals[i] for i in group], first_row=len(rows))

    def _prefill_groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the indices of prompts for each forward: equally long ones if states would advance over padding."""
        for group in group_by_length(lengths, PREFILL_TOKENS):
            if not self.target.layers.recurrent:
                yield group
                continue
            for length in sorted({lengths[i] for i in group}):
                yield [i for i in group if lengths[i] == length]

    def _retire(self, rows: list[_Row], index: int) -> Completion:
        """Remove a finished row and move the last one into its slot, so that rows in flight stay contiguous."""
        row, last = rows[index], rows.pop()
        if last is not row:
            rows[index] = last
            self.cache.move_row(len(rows), index)
            if self.drafter and self.context:
                self.drafter.move_row(self.context, len(rows), index)
        row.done.seconds = time.perf_counter() - row.started
        if self.drafter:
            row.done.steps = recorded_steps(len(row.request.prompt_ids) + len(row.done.response_ids), row.steps)
        return row.done

    def _prefill(self, requests: list[Request], first_row: int) -> list[_Row]:
        """Read the prompts and commit each one's first token."""
        started = time.perf_counter()
        for request in requests:
            prompt, new, proposals = len(request.prompt_ids), request.max_new_tokens, self.block_size - 1
            if prompt + new + proposals > self.capacity:
                raise DraftsmithError(
                    f"request {request.request_id}: {prompt} prompt + {new} new + {proposals} proposed tokens exceed "
                    f"the engine's capacity of {self.capacity}. Raise the capacity."
                )
        device = self.target.device
        width = max(len(r.prompt_ids) for r in requests)
        lengths = to_device([len(r.prompt_ids) for r in requests], device)
        ids = to_device([r.prompt_ids + [0] * (width - len(r.prompt_ids)) for r in requests], device)
        positions = torch.arange(width, device=device).expand(len(requests), -1)
        at = slice(first_row, first_row + len(requests))
        out = self.target.step(ids, positions, self.cache, at, layer_ids=self.layer_ids)
        if self.drafter and self.context and out.features is not None:
            with torch.no_grad():
                self.drafter.extend(self.context, at, out.features, ids, positions, lengths)
        last = out.hidden[torch.arange(len(requests), device=device), lengths - 1]
        tokens = sample_target(self.target.logits(last)[:, None], lengths[:, None], requests)
        rows = []
        for request, token in zip(requests, tokens[:, 0].tolist(), strict=True):
            row = _Row(Completion(request), anchor=len(request.prompt_ids) - 1, started=started)
            row.commit([token], self.target.eos_ids)
            rows.append(row)
        return rows

    def step_timer(self, requests: Sequence[Request], width: int, cache: SlotCache) -> Callable[[], float]:
        """Return a function that times one step for requests in flight: its wall time in seconds.

        Each request stands at the end of its prompt. width: tokens that a step without a drafter verifies per request.
        cache: has a row per request and no entries of their prompts, since reading empty ones takes as long; engines
        may share it.
        """
        self._allocate(cache)
        self._prefill([replace(request, prompt_ids=request.prompt_ids[:1]) for request in requests], first_row=0)
        proposals = Drafted(torch.zeros(len(requests), width - 1, dtype=torch.long, device=self.target.device))

        def step_seconds() -> float:
            for _ in range(3):  # another engine's step leaves other data in the processor's caches
                rows = [_Row(Completion(r, r.prompt_ids[-1:]), anchor=len(r.prompt_ids), started=0.0) for r in requests]
                started = time.perf_counter()
                self._decode(rows, proposals)
            return time.perf_counter() - started

        return step_seconds

    def refill_timer(self, requests: Sequence[Request], cache: SlotCache) -> Callable[[], float]:
        """Return a function that reads the prompts of requests, and returns its wall time in seconds.

        cache: same as in `step_timer`.
        """
        self._allocate(cache)

        def refill_seconds() -> float:
            started = time.perf_counter()
            self._refill([], requests)
            return time.perf_counter() - started

        return refill_seconds

    def _allocate(self, cache: SlotCache | None = None) -> None:
        # compared with None: an empty cache of transformers is falsy
        self.cache = self.target.new_cache(self.slots, self.capacity) if cache is None else cache
        self.context = self.drafter.new_context(self.cache.rows, self.cache.capacity) if self.drafter else None

    def _decode(self, rows: list[_Row], drafted: Drafted | None = None) -> None:
        """Run one step for all rows in flight: draft (with a drafter), verify, commit.

        drafted: the proposals to verify without a drafter.
        """
        started = time.perf_counter()
        device = self.target.device
        at = slice(0, len(rows))
        starts = [row.anchor for row in rows]
        anchors, last_tokens = to_device([starts, [row.last_token for row in rows]], device)
        ids = last_tokens[:, None]
        requests = [row.request for row in rows]
        if self.drafter and self.context:
            context = self.drafter.select(self.context, at, max(starts))
            vocabulary = self.target.info.vocab_size
            drafted = propose_blocks(self._prepared, context, ids, anchors[:, None], requests, vocabulary)
        elif drafted is None:
            drafted = Drafted(ids[:, 1:])
        ids = torch.cat([ids, drafted.tokens], 1)  # [n, block_size]
        proposed = drafted.tokens.tolist()
        drafted_at = time.perf_counter()

        positions = anchors[:, None] + torch.arange(ids.shape[1], device=device)
        length, advance = max(starts) + ids.shape[1], ids.shape[1] == 1
        out = self.target.step(ids, positions, self.cache, at, length=length, layer_ids=self.layer_ids, advance=advance)
        if self.drafter and self.context and out.features is not None:
            with torch.no_grad():
                self.drafter.extend(self.context, at, out.features, ids, positions)
        verified = verify(drafted, self.target.logits(out.hidden), positions + 1, requests)
        committed = []
        for row, block, accepted, tokens in zip(
            rows, proposed, verified.accepted, verified.tokens.tolist(), strict=True
        ):
            anchor = row.anchor
            committed.append(row.commit(tokens[: accepted + 1], self.target.eos_ids))
            if self.drafter:
                row.steps.append((anchor, min(accepted, committed[-1]), block, None))
                row.done.verify_steps += 1
        if not advance:
            self.target.commit(ids, starts, self.cache, 0, committed)
        share = 1.0 / len(rows)
        verified_at = time.perf_counter()
        for row in rows:
            row.done.draft_seconds += (drafted_at - started) * share
            row.done.verify_seconds += (verified_at - drafted_at) * share
