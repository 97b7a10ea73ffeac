"""The answers of an unfinished rollout: parts that are on the disk whole, or not at all.

A part is a shard of each table under the same number. The trajectories' is written last, and only it makes the part
count: what a killed attempt left of an unfinished part is written over by the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.keyed_rows import KeyedRows
from draftsmith.artifacts.parquet import Rows, read_table, write_table
from draftsmith.artifacts.row_reader import RowReader
from draftsmith.artifacts.schemas import TIMINGS, TRACE, TRAJECTORIES
from draftsmith.stages.engines.base import Completion

log = logging.getLogger(__name__)
SCHEMAS = {"timings": TIMINGS, "trace": TRACE, "trajectories": TRAJECTORIES}  # in the order of writing
_LAST = "trajectories"


class AnswerParts:
    """Parts under a folder. A damaged one is left out, with a log line: its answers are made again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        numbers = sorted(int(path.stem.removeprefix("shard-")) for path in (folder / _LAST).glob("shard-*.parquet"))
        self._numbers = [number for number in numbers if self._whole(number)]
        self._next = numbers[-1] + 1 if numbers else 0

    def append(self, completions: Sequence[Completion], splits: Mapping[str, str], engine: str) -> None:
        """Write one part; nothing for no answers. splits: of each prompt, by its id."""
        if not completions:
            return
        rows: dict[str, Rows] = {
            "timings": [_timing(each) for each in completions],
            "trace": [row for each in completions for row in each.trace_rows()],
            "trajectories": [_trajectory(each, splits, engine) for each in completions],
        }
        for name, schema in SCHEMAS.items():
            write_table(self._path(name, self._next), schema, rows[name])
        self._numbers.append(self._next)
        self._next += 1

    def finished(self, *, with_trace: bool) -> set[str]:
        """Ids of the answers that are there; `with_trace`, of those whose verify steps are there too, as far as there
        are any: an engine that records steps wrote all answers of a part, and gives one without steps only where these
        cannot be told (retracted by its server)."""
        answers, parts = self._read("trajectories", ["trajectory_id"])
        ids = answers["trajectory_id"].to_pylist()
        if not with_trace:
            return set(ids)
        latest = dict(zip(ids, parts.tolist(), strict=True))
        timings, timed_in = self._read("timings", ["trajectory_id", "verify_steps"])
        traced = {
            number for number in self._numbers if read_table(self._path("trace", number), TRACE, ["step"]).num_rows
        }
        return {
            row["trajectory_id"]
            for row, part in zip(timings.to_pylist(), timed_in.tolist(), strict=True)
            if latest[row["trajectory_id"]] == part and (part in traced or row["verify_steps"] == 0)
        }

    def rows(self, answers: list[str]) -> dict[str, KeyedRows]:
        """Of each table the rows of each answer; of one that was made again those of its last part."""
        keys, paths = pa.array(answers, pa.string()), {name: self._paths(name) for name in SCHEMAS}
        readers = {name: RowReader(paths[name], schema, keep=8) for name, schema in SCHEMAS.items()}
        found = {
            name: KeyedRows(reader, keys, counter="step" if name == "trace" else None)
            for name, reader in readers.items()
        }
        part = {name: readers[name].place_of(rows.starts) for name, rows in found.items()}
        for name, rows in found.items():
            rows.leave_out(part[name] != part[_LAST])
        return found

    def _read(self, name: str, columns: list[str]) -> tuple[pa.Table, np.ndarray]:
        """Columns of a row an answer, of all parts, and the part of each row."""
        tables = [read_table(path, SCHEMAS[name], columns) for path in self._paths(name)]
        if not tables:
            return SCHEMAS[name].with_metadata.empty_table().select(columns), np.zeros(0, dtype=np.int64)
        return pa.concat_tables(tables), np.repeat(self._numbers, [table.num_rows for table in tables])

    def _paths(self, name: str) -> list[Path]:
        return [self._path(name, number) for number in self._numbers]

    def _whole(self, number: int) -> bool:
        for name, schema in SCHEMAS.items():
            try:
                read_table(self._path(name, number), schema)
            except DraftsmithError as error:
                log.warning("a part of an unfinished rollout is left out, its answers are made again: %s", error)
                return False
        return True

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name / f"shard-{number:05d}.parquet"


def _timing(completion: Completion) -> dict[str, object]:
    return {
        "trajectory_id": completion.request.request_id,
        "seconds": completion.seconds,
        "first_token_seconds": completion.first_token_seconds,
        "verify_steps": completion.verify_steps,
        "retractions": completion.retractions,
        "draft_seconds": completion.draft_seconds,
        "verify_seconds": completion.verify_seconds,
    }


def _trajectory(completion: Completion, splits: Mapping[str, str], engine: str) -> dict[str, object]:
    request = completion.request
    prompt_id, sample = request.request_id.rsplit("/", 1)
    return {
        "trajectory_id": request.request_id,
        "prompt_id": prompt_id,
        "split": splits[prompt_id],
        "sample": int(sample),
        "prompt_ids": request.prompt_ids,
        "response_ids": completion.response_ids,
        "finish_reason": completion.finish_reason,
        "temperature": request.sampling.temperature,
        "top_p": request.sampling.top_p,
        "top_k": request.sampling.top_k,
        "seed": request.seed,
        "engine": engine,
    }
