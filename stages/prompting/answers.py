"""Answers on their way into a table of trajectories: token ids are Arrow arrays, some thousand rows at a time.

Reading knows an answer before it knows how many are used. So answers wait in a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from draftsmith.artifacts.parquet import GROUP_BYTES, WRITTEN, TableWriter
from draftsmith.artifacts.schemas import TRAJECTORIES
from draftsmith.stages.prompting.intake import Taken

_WAITING = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
    ]
)
_GROUP_TOKENS = 1 << 20
_GROUP_ROWS = 4096


class WaitingAnswers:
    """A file that answers are appended to; read it when it is closed."""

    def __init__(self, path: Path):
        self.path = path
        self._rows: list[Taken] = []
        self._tokens = 0

    def __enter__(self) -> Self:
        self._writer = pq.ParquetWriter(self.path, _WAITING, **WRITTEN, compression_level=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def append(self, answer: Taken) -> None:
        self._rows.append(answer)
        self._tokens += len(answer.prompt_ids) + len(answer.response_ids)
        if self._tokens >= _GROUP_TOKENS or len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [pa.array([getattr(row, field.name) for row in self._rows], field.type) for field in _WAITING]
            self._writer.write_table(pa.table(columns, schema=_WAITING))
        self._rows, self._tokens = [], 0


def parts(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A Parquet file, some rows of about a row group's bytes at a time, whoever wrote it."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        held = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        rows = max(1, min(_GROUP_ROWS, file.metadata.num_rows * GROUP_BYTES // max(1, held)))
        for group in range(file.num_row_groups):  # one at a time: a reader of all keeps more the more there are
            for batch in file.iter_batches(rows, [group], columns, use_threads=False):
                yield pa.Table.from_batches([batch])


def chosen_rows(path: Path, mask: np.ndarray) -> Iterator[pa.Table]:
    """Rows of a Parquet file by a mask over all of them ([rows] bool), part by part."""
    start = 0
    for table in parts(path):
        part = mask[start : start + table.num_rows]
        start += table.num_rows
        if part.any():
            yield table.filter(pa.array(part))


class TrajectoryTable:
    """`trajectories.parquet`, appended to part by part; it appears whole or not at all.

    Answers to one prompt are numbered as they come.
    """

    def __init__(self, path: Path):
        self._table = TableWriter(path, TRAJECTORIES)
        self._samples: Counter[str] = Counter()
        self.response_tokens = 0

    @property
    def rows(self) -> int:
        return self._table.rows

    def __enter__(self) -> Self:
        self._table.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.__exit__(kind, error, trace)

    def append(self, part: pa.Table, **same: Any) -> None:
        """part: prompt_id, prompt_ids, response_ids, finish_reason and what else `same` does not give for all rows."""
        prompts = part["prompt_id"].to_pylist()
        samples = []
        for prompt in prompts:
            samples.append(self._samples[prompt])
            self._samples[prompt] += 1
        made: dict[str, Any] = {
            "trajectory_id": [f"{prompt}/{sample}" for prompt, sample in zip(prompts, samples, strict=True)],
            "sample": samples,
            **{name: [value] * part.num_rows for name, value in (same | {"split": "train"}).items()},
        }
        columns = [
            pa.array(made[field.name], field.type) if field.name in made else part[field.name]
            for field in TRAJECTORIES.columns
        ]
        self._table.append(pa.table(columns, names=TRAJECTORIES.columns.names))
        self.response_tokens += pc.sum(pc.list_value_length(part["response_ids"])).as_py()
