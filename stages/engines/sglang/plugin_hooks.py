"""The plug-in's hooks: record verify steps on the device, move them to the host, and add them to answers.

A step's numbers are packed into one new tensor on the device's stream. It travels as SGLang's own "auxiliary output":
the scheduler copies it with the step's tokens (on its copy stream where scheduling overlaps) and hands it back when
the tokens have been committed, so nothing here waits for the device. If no request of a batch asks for records, the
original runs after one check per request.

`RequestLog` sums up the verify steps of a share of the requests, for `draftsmith watch`.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from bisect import bisect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.sglang.protocol import ENVIRONMENT, KEY, PROTOCOL, REQUESTS_STATE, Json
from draftsmith.stages.replay.steps import DEPTH_ENDS, DEPTHS

log = logging.getLogger(__name__)

LOWEST = -1e4  # log-prob of a token that a mask forbids: -inf is not JSON
CHUNK = 128  # positions with float32 logits in memory at a time: 80 MB for 150,000 tokens


def wants_trace(request: Any) -> bool:
    """Return whether a request's custom parameters ask for its trace."""
    custom = request.sampling_params.custom_params
    return bool(custom) and bool(custom.get(KEY))


def chain_logprobs(logits: torch.Tensor, candidates: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Return the log-probs of the proposals of `rows`, float32 [len(rows), B - 1].

    logits: [batch·B, V] of the target, row b·B + j after the j-th candidate of b. candidates: [batch, B], the anchor's
    token first.
    """
    B = candidates.shape[1]
    at = _on_device([row * B + j for row in rows for j in range(B - 1)], logits.device)
    proposed = candidates.reshape(-1)[at + 1].long()
    chunks = [
        torch.log_softmax(logits[places].float(), dim=-1).gather(1, tokens[:, None])[:, 0]
        for places, tokens in zip(at.split(CHUNK), proposed.split(CHUNK), strict=True)
    ]
    return torch.cat(chunks).view(len(rows), B - 1)


def pack_steps(
    rows: Sequence[int],
    anchors: torch.Tensor,
    candidates: torch.Tensor,
    accepted: torch.Tensor,
    bonus: torch.Tensor,
    logprobs: torch.Tensor,
) -> torch.Tensor:
    """Pack steps into one int32 tensor [len(rows), 3 + 2·(B - 1)]: anchor, accepted, bonus, proposals, log-probs.

    The log-probs are packed as their float32 bits. rows: the rows of the batch to pack. `logprobs` has
    only these, the other tensors have the whole batch.
    """
    at = _on_device(list(rows), candidates.device)
    counters = torch.stack([anchors[at].int(), accepted[at].int(), bonus[at].int()], dim=1)
    bits = logprobs.float().contiguous().view(torch.int32)
    return torch.cat([counters, candidates[at, 1:].int(), bits], dim=1)


def unpack_steps(packed: torch.Tensor) -> list[Json]:
    """Return the steps of a packed tensor on the host, without version and drafter."""
    proposals = (packed.shape[1] - 3) // 2
    logprobs = packed[:, 3 + proposals :].contiguous().view(torch.float32).clamp(min=LOWEST).tolist()
    return [
        {
            "anchor": anchor,
            "block": block[:proposals],
            "accepted": accepted,
            "bonus": bonus,
            "logprobs": [round(value, 6) for value in row],
        }
        for (anchor, accepted, bonus, *block), row in zip(packed.tolist(), logprobs, strict=True)
    ]


def _on_device(values: list[int], device: torch.device) -> torch.Tensor:
    """Move indices to the device without waiting for its queued work."""
    return torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@dataclass(frozen=True)
class BatchTrace:
    """The records of a batch: SGLang's DeviceAuxiliaryOutput before the copy to the host, HostAuxiliaryOutput after.

    steps: None after a prefill, the packed tensor after a verification, or the reason for a missing record.
    """

    drafter: str
    rows: Sequence[int]  # rows of the batch whose requests asked
    steps: torch.Tensor | str | None

    def copy_to_host(self, copy_tensor: Callable[[torch.Tensor], torch.Tensor]) -> BatchTrace:
        steps = copy_tensor(self.steps) if isinstance(self.steps, torch.Tensor) else self.steps
        return BatchTrace(self.drafter, self.rows, steps)

    def consume(self, batch: Any, commits: Sequence[Any]) -> None:
        """Append the records to the answers of the batch. commits[b]: None, or with output_index and token_ids."""
        head = {"v": PROTOCOL, "drafter": self.drafter}
        if isinstance(self.steps, torch.Tensor):
            records = [{**head, **step} for step in unpack_steps(self.steps)]
        else:
            records = [head if self.steps is None else {**head, "refused": self.steps} for _ in self.rows]
        for row, record in zip(self.rows, records, strict=True):
            if (commit := commits[row]) is None:  # a chunk of a prompt, or meanwhile finished or retracted
                continue
            start = commit.output_index
            # a prefill within an answer, after a retraction, is not a step
            element = record if self.steps is not None or start == 0 else None
            put_record(batch.reqs[row], start, len(commit.token_ids), element)


def put_record(request: Any, start: int, count: int, element: Json | None) -> None:
    """Store the record of `count` output tokens that were committed together, beginning at `start`."""
    if request.customized_info is None:
        request.customized_info = {}
    elements = request.customized_info.setdefault(KEY, [])
    del elements[start:]  # of an answer that was retracted and restarted
    elements.extend([None] * (start - len(elements)))
    elements.append(element)
    elements.extend([None] * (count - 1))


def traced_share(setting: str) -> float:
    """Return the share of requests to trace. Raises SystemExit: SGLang only logs other errors of a plug-in."""
    try:
        share = float(setting or 0)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise SystemExit(f"{ENVIRONMENT} is {setting!r}, which is not a share of requests. Set a number from 0 to 1.")
    return share


class Recorder:
    """The hooks of one scheduler process, whose single thread runs one batch at a time."""

    def __init__(self) -> None:
        self.drafter = ""
        self.active = False
        self.share = traced_share(os.environ.get(ENVIRONMENT, ""))  # share of requests; 1 puts records into all answers
        self.rows: Sequence[int] = ()  # rows of the running batch whose requests asked
        self.steps: torch.Tensor | str | None = None  # of the running batch's verification

    def after_load(self, _result: None, worker: Any, *_args: Any, **_kwargs: Any) -> None:
        """Run after `__init__` of a speculative worker, which has loaded its drafter."""
        arguments = worker.server_args
        if arguments.pp_size > 1:
            log.warning("draftsmith: no traces with pipeline parallelism (pp_size %d)", arguments.pp_size)
            return
        source = arguments.speculative_draft_model_path
        if source == arguments.model_path:  # SGLang sets it for some targets that draft with their own head
            source = None
        folder = drafter_folder(source, arguments.speculative_draft_model_revision)
        self.drafter = "" if folder is None else drafter_digest(folder)
        self.active = True
        mixed = f"requests that ask, and sums of a share of {self.share:g}"
        asks = {0.0: "requests that ask", 1.0: "every request"}.get(self.share, mixed)
        log.info("draftsmith: traces of %s, protocol %s, drafter %s", asks, PROTOCOL, self.drafter[:12] or "unknown")

    def traced_rows(self, batch: Any) -> Sequence[int]:
        """Return the rows of the batch whose requests ask for records."""
        if not self.active:
            return ()
        if self.share == 1:
            return range(len(batch.reqs))
        return [row for row, request in enumerate(batch.reqs) if wants_trace(request)]

    def around_generation(
        self, original: Callable[..., Any], worker: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Wrap `forward_batch_generation` of a speculative worker: a prefill, or drafting and verification."""
        rows = self.traced_rows(batch)
        if not rows:
            return original(worker, batch, *args, **kwargs)
        self.rows = rows
        try:
            result = original(worker, batch, *args, **kwargs)
            steps = self.steps
        finally:
            self.rows, self.steps = (), None
        output = result.logits_output
        if output is not None:
            # only servers have sglang; tests import this module without it
            from sglang.srt.managers.auxiliary_output import append_auxiliary_output

            trace = BatchTrace(self.drafter, rows, steps)
            output.auxiliary_device_output = append_auxiliary_output(output.auxiliary_device_output, trace)
        return result

    def around_accept_block(self, original: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap DFLASH's `_accept_block` (arguments by name), which decides accepted lengths and bonus tokens."""
        if not self.rows:
            return original(worker, *args, **kwargs)
        candidates = kwargs["candidates"]
        logprobs = chain_logprobs(kwargs["next_token_logits"], candidates, self.rows)  # before it modifies the logits
        result = original(worker, *args, **kwargs)
        accepted, _, bonus = result[:3]
        self.steps = pack_steps(self.rows, kwargs["prefix_lens"], candidates, accepted, bonus, logprobs)
        return result

    def around_dspark_accept(self, original: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrap DSPARK's `accept_and_finalize` (arguments by name), which all but DeepSeek V4.1's sampled steps call."""
        if not self.rows:
            return original(executor, *args, **kwargs)
        if kwargs["layout"] is not None:
            self.steps = "SGLANG_RAGGED_VERIFY_MODE may cut blocks, so acceptance depends on more than the drafter"
            return original(executor, *args, **kwargs)
        candidates = kwargs["verify_ids_2d"]
        logprobs = chain_logprobs(kwargs["target_logits"], candidates, self.rows)  # before it modifies the logits
        result = original(executor, *args, **kwargs)
        self.steps = pack_steps(
            self.rows, kwargs["prefix_lens"], candidates, result.correct_len, result.bonus, logprobs
        )
        return result

    def around_eagle_sample(
        self, original: Callable[..., Any], verify_input: Any, batch: Any, logits_output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Wrap EAGLE's `eagle_sample`, the verification of a chain or a tree. NGRAM calls it too, untraced."""
        call_original = functools.partial(original, verify_input, batch, logits_output, *args, **kwargs)
        if not self.rows or batch.forward_mode.is_idle():
            return call_original()
        if verify_input.tree_topk != 1:
            self.steps = f"a tree (speculative-eagle-topk {verify_input.tree_topk}) has no single proposed block"
            return call_original()
        candidates = verify_input.draft_token.reshape(-1, verify_input.draft_token_num)
        logprobs = chain_logprobs(logits_output.next_token_logits, candidates, self.rows)
        predict, accept_lens, accept_index = result = call_original()
        last = accept_index.gather(1, (accept_lens - 1)[:, None].long())  # index of the bonus among all candidates
        bonus = predict[last[:, 0].long()]
        self.steps = pack_steps(self.rows, batch.seq_lens, candidates, accept_lens - 1, bonus, logprobs)
        return result

    def after_can_skip_logits(self, _result: bool, *_args: Any, **_kwargs: Any) -> bool | None:
        """Change the result of DFLASH's `_can_skip_verify_logits`: records need gathered logits."""
        return False if self.rows else None


def drafter_folder(source: str | None, revision: str | None) -> Path | None:
    """Return the drafter's folder, or SGLang's snapshot of the hub; None if neither is found.

    source: None for a target that drafts with its own head.
    """
    if source is None:
        return None
    if (folder := Path(source)).is_dir():
        return folder
    from huggingface_hub import snapshot_download  # needed only for a hub id

    try:
        return Path(snapshot_download(source, revision=revision, local_files_only=True))
    except Exception as error:  # many kinds, all meaning: not in the cache
        log.warning("draftsmith: no digest of the drafter %s (%s). Its traces name none.", source, error)
        return None


LAST = 512  # requests kept


class RequestLog:
    """The hooks of one scheduler process. The sums of a running request are its attribute, so they end with it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        # drafter, time of the end in seconds since 1970, and by depth: committed tokens and verify steps
        self._ended: deque[tuple[str, int, dict[str, list[int]]]] = deque(maxlen=LAST)

    def around_decode(self, original: Callable[..., Any], processor: Any, batch: Any, result: Any) -> Any:
        """Wrap `process_batch_result_decode`, which commits a verify step to each request that has not ended."""
        if not self._recorder.active:
            return original(processor, batch, result)
        running = [request for request in batch.reqs if not request.finished() and self._is_chosen(request)]
        starts = [len(request.output_ids) for request in running]
        returned = original(processor, batch, result)
        for request, start in zip(running, starts, strict=True):
            end = len(request.output_ids) if request.finished_len is None else request.finished_len
            if end > start:  # otherwise it was retracted or aborted
                self._add(request, start, end - start)
        return returned

    def after_internal_state(self, result: Any, *_args: Any, **_kwargs: Any) -> None:
        """Add the last ended requests, by drafter, to the report of every scheduler in `/server_info`."""
        if self._recorder.active:
            requests: Json = {}
            for drafter, ended, depths in self._ended:
                requests.setdefault(drafter, []).append([ended, depths])
            result.internal_state[REQUESTS_STATE] = requests

    def _is_chosen(self, request: Any) -> bool:
        """Return whether a request belongs to the share. Requests that ask for records are measurements: excluded."""
        if not hasattr(request, "draftsmith_sums"):
            number = int.from_bytes(blake2b(request.rid.encode(), digest_size=4).digest(), "big")
            chosen = number < self._recorder.share * 2**32 and not wants_trace(request)
            request.draftsmith_sums = {} if chosen else None  # by drafter, as a swap may fall into its answer
        return request.draftsmith_sums is not None

    def _add(self, request: Any, start: int, committed: int) -> None:
        """Add a step with `committed` output tokens from the `start`-th on; keep the request if it has ended."""
        depths = request.draftsmith_sums.setdefault(self._recorder.drafter, {})
        anchor = len(request.origin_input_ids) + start - 1
        sums = depths.setdefault(DEPTHS[bisect(DEPTH_ENDS, anchor)], [0, 0])
        sums[0] += committed
        sums[1] += 1
        if request.finished():
            self._ended.append((self._recorder.drafter, int(time.time()), depths))
