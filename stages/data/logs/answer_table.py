"""Tables of answers, written and read some thousand rows at a time: token ids are Arrow arrays, no Python numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from draftsmith.artifacts.tables.parquet import GROUP_BYTES, TableWriter
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.logs.filter import Taken

_COLUMNS = ("prompt_id", "prompt_ids", "response_ids", "finish_reason")  # of an answer that was read
_GROUP_TOKENS = 1 << 20
_GROUP_ROWS = 4096


def tables(answers: Iterable[Taken]) -> Iterator[pa.Table]:
    """Yield the answers as tables."""
    rows: list[Taken] = []
    tokens = 0
    for answer in answers:
        rows.append(answer)
        tokens += len(answer.prompt_ids) + len(answer.response_ids)
        if tokens >= _GROUP_TOKENS or len(rows) >= _GROUP_ROWS:
            yield _table(rows)
            rows, tokens = [], 0
    if rows:
        yield _table(rows)


def _table(rows: list[Taken]) -> pa.Table:
    types = {name: TRAJECTORIES.columns.field(name).type for name in _COLUMNS}
    return pa.table({name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in types.items()})


def parts(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a Parquet file, some rows of about a row group's bytes at a time, whoever wrote it."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        held = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        rows = max(1, min(_GROUP_ROWS, file.metadata.num_rows * GROUP_BYTES // max(1, held)))
        for group in range(file.num_row_groups):  # one at a time: a reader of all keeps more the more there are
            for batch in file.iter_batches(rows, [group], columns, use_threads=False):
                yield pa.Table.from_batches([batch])


def chosen_rows(path: Path, mask: np.ndarray) -> Iterator[pa.Table]:
    """Yield rows of a Parquet file by a mask over all of them ([rows] bool), part by part."""
    start = 0
    for table in parts(path):
        part = mask[start : start + table.num_rows]
        start += table.num_rows
        if part.any():
            yield table.filter(pa.array(part))


class TrajectoryTable(TableWriter):
    """`trajectories.parquet` of training answers; those to one prompt are numbered as they come."""

    def __init__(self, path: Path):
        super().__init__(path, TRAJECTORIES)
        self._samples: Counter[str] = Counter()
        self.response_tokens = 0

    def add(self, part: pa.Table, **same: Any) -> None:
        """Append answers. part: the columns of a read answer, and those that `same` does not give for all rows."""
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
        self.append(pa.table(columns, names=TRAJECTORIES.columns.names))
        self.response_tokens += pc.sum(pc.list_value_length(part["response_ids"])).as_py()
