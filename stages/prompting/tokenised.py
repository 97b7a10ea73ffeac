"""Texts as token ids, kept on disk while a stage reads its rows: an interrupted one does not tokenise them again.

Rows come in the same order in every attempt, so what was made of them is read back in that order, a hundred at a
time, however many there are. A kill loses what the last half minute made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.parquet as pq

from draftsmith.artifacts.parts import Parts
from draftsmith.artifacts.schemas import TOKENISED

_WRITTEN_EVERY_S = 30.0
_TOKENS_AT_ONCE = 1 << 20  # in memory, some 40 MB
_BATCH = 128  # rows read at once

Made = tuple[list[int], list[int], str]  # ids of the prompt, ids of the answer, why the row is not used


class Tokenised:
    """What was made of the texts of a stage, in their order. Leave it to have everything on disk."""

    def __init__(self, folder: Path):
        self._parts = Parts(folder, {"texts": TOKENISED})
        self._earlier = _rows(self._parts.paths("texts"))
        self._next = next(self._earlier, None)
        self._waiting: list[dict[str, Any]] = []
        self._tokens, self._written = 0, time.monotonic()
        self.kept = 0  # of an earlier attempt

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()

    def of(self, key: str, make: Callable[[], Made]) -> Made:
        """What `make` gives, or gave in an earlier attempt. key: of the text, to see that it is the same one."""
        if self._next is not None:
            if self._next["key"] != key:  # one that could not be tokenised at all: nothing of it was kept
                return make()
            earlier, self._next = self._next, next(self._earlier, None)
            self.kept += 1
            return earlier["prompt_ids"], earlier["response_ids"], earlier["reason"]
        prompt_ids, response_ids, reason = made = make()
        row = {"key": key, "prompt_ids": prompt_ids, "response_ids": response_ids, "reason": reason}
        self._waiting.append(row)
        self._tokens += len(prompt_ids) + len(response_ids)
        if self._tokens >= _TOKENS_AT_ONCE or time.monotonic() - self._written >= _WRITTEN_EVERY_S:
            self._flush()
        return made

    def _flush(self) -> None:
        if self._waiting:
            self._parts.append({"texts": self._waiting})
        self._waiting, self._tokens, self._written = [], 0, time.monotonic()


def _rows(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                yield from batch.to_pylist()
