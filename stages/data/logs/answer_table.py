"""Tables of answers, written and read some thousand rows at a time, with token ids as Arrow arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from draftsmith.artifacts.tables.parquet import GROUP_BYTES, TableWriter
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.logs.filter import AcceptedAnswer

_COLUMNS = ("prompt_id", "prompt_ids", "response_ids", "finish_reason")  # fields of an AcceptedAnswer
_GROUP_TOKENS = 1 << 20
_GROUP_ROWS = 4096


def answer_batches(answers: Iterable[AcceptedAnswer]) -> Iterator[pa.Table]:
    """Yield the answers as tables of some thousand rows."""
    rows: list[AcceptedAnswer] = []
    tokens = 0
    for answer in answers:
        rows.append(answer)
        tokens += len(answer.prompt_ids) + len(answer.response_ids)
        if tokens >= _GROUP_TOKENS or len(rows) >= _GROUP_ROWS:
            yield _table(rows)
            rows, tokens = [], 0
    if rows:
        yield _table(rows)


def _table(rows: list[AcceptedAnswer]) -> pa.Table:
    types = {name: TRAJECTORIES.columns.field(name).type for name in _COLUMNS}
    return pa.table({name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in types.items()})


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a Parquet file in batches, each of at most about `GROUP_BYTES`, whoever wrote it."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        rows = max(1, min(_GROUP_ROWS, file.metadata.num_rows * GROUP_BYTES // max(1, size)))
        for group in range(
            file.num_row_groups
        ):  # one group per reader: a reader of all groups holds more memory the more there are
            for batch in file.iter_batches(rows, [group], columns, use_threads=False):
                yield pa.Table.from_batches([batch])


def select_rows(path: Path, mask: np.ndarray) -> Iterator[pa.Table]:
    """Yield the rows of a Parquet file that a mask selects ([rows] bool), in batches."""
    start = 0
    for table in read_batches(path):
        selected = mask[start : start + table.num_rows]
        start += table.num_rows
        if selected.any():
            yield table.filter(pa.array(selected))


class TrajectoryTable(TableWriter):
    """Writes `trajectories.parquet` of training answers; answers to one prompt are numbered in their order."""

    def __init__(self, path: Path):
        super().__init__(path, TRAJECTORIES)
        self._samples: Counter[str] = Counter()
        self.answer_tokens = 0

    def add(self, batch: pa.Table, **constants: Any) -> None:
        """Append answers. constants: values of columns that are the same in all rows, in place of those of `batch`."""
        prompts = batch["prompt_id"].to_pylist()
        samples = []
        for prompt in prompts:
            samples.append(self._samples[prompt])
            self._samples[prompt] += 1
        added: dict[str, Sequence[object]] = {
            "trajectory_id": [f"{prompt}/{sample}" for prompt, sample in zip(prompts, samples, strict=True)],
            "sample": samples,
            **{name: [value] * batch.num_rows for name, value in (constants | {"split": "train"}).items()},
        }
        columns = [
            pa.array(added[field.name], field.type) if field.name in added else batch[field.name]
            for field in TRAJECTORIES.columns
        ]
        self.append(pa.table(columns, names=TRAJECTORIES.columns.names))
        self.answer_tokens += pc.sum(pc.list_value_length(batch["response_ids"])).as_py()
