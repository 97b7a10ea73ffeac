"""The plug-in's hooks that sum up the verify steps of a share of the requests, for `draftsmith watch`.

They run on the host, where a verify step has been committed, and change nothing. Kept are numbers of steps and tokens
by depth, of the requests that ended last; no token, no text and no id.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

from draftsmith.stages.engines.sglang.plugin_hooks import Recorder, wants_trace
from draftsmith.stages.engines.sglang.protocol import REQUESTS_STATE, Json
from draftsmith.stages.replay.trace import DEPTH_ENDS, DEPTHS

LAST = 512  # requests kept


class RequestLog:
    """The hooks of one scheduler process. The sums of a running request are an attribute of it, so they end with it."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        # drafter, time of the end in seconds since 1970, and by depth: committed tokens and verify steps
        self._ended: deque[tuple[str, int, dict[str, list[int]]]] = deque(maxlen=LAST)

    def around_decode(self, original: Callable[..., Any], processor: Any, batch: Any, result: Any) -> Any:
        """Wrap `process_batch_result_decode`, which commits a verify step to each request that has not ended."""
        if not self._recorder.active:
            return original(processor, batch, result)
        running = [each for each in batch.reqs if not each.finished() and self._is_chosen(each)]
        starts = [len(each.output_ids) for each in running]
        returned = original(processor, batch, result)
        for request, start in zip(running, starts, strict=True):
            end = len(request.output_ids) if request.finished_len is None else request.finished_len
            if end > start:  # else retracted, or aborted
                self._add(request, start, end - start)
        return returned

    def after_internal_state(self, result: Any, *_args: Any, **_kwargs: Any) -> None:
        """Add the requests that ended last, by drafter, to what `/server_info` reports of every scheduler."""
        if self._recorder.active:
            requests: Json = {}
            for drafter, ended, depths in self._ended:
                requests.setdefault(drafter, []).append([ended, depths])
            result.internal_state[REQUESTS_STATE] = requests

    def _is_chosen(self, request: Any) -> bool:
        """Return whether a request belongs to the share. Those that ask for records measure, and are left out."""
        if not hasattr(request, "draftsmith_sums"):
            number = int.from_bytes(blake2b(request.rid.encode(), digest_size=4).digest(), "big")
            chosen = number < self._recorder.share * 2**32 and not wants_trace(request)
            request.draftsmith_sums = {} if chosen else None  # by drafter, as a swap may fall into its answer
        return request.draftsmith_sums is not None

    def _add(self, request: Any, start: int, committed: int) -> None:
        """Add a step that committed so many output tokens from the `start`-th on; keep the request if it has ended."""
        depths = request.draftsmith_sums.setdefault(self._recorder.drafter, {})
        anchor = len(request.origin_input_ids) + start - 1
        sums = depths.setdefault(DEPTHS[bisect(DEPTH_ENDS, anchor)], [0, 0])
        sums[0] += committed
        sums[1] += 1
        if request.finished():
            self._ended.append((self._recorder.drafter, int(time.time()), depths))
