"""The answers of an unfinished rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import TIMINGS, TRACE, TRAJECTORIES
from draftsmith.artifacts.tables.shards import TableShards
from draftsmith.stages.engines.base import Completion

SCHEMAS = {"timings": TIMINGS, "trace": TRACE, "trajectories": TRAJECTORIES}  # in the order of writing


class PartialAnswers:
    """Answers with their timings and verify steps, kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self._parts = TableShards(folder, SCHEMAS)

    def append(self, completions: Sequence[Completion], splits: Mapping[str, str], engine: str) -> None:
        """Write one part; nothing for no answers. splits: of each prompt, by its id."""
        if completions:
            self._parts.append(
                {
                    "timings": [_timing(each) for each in completions],
                    "trace": [row for each in completions for row in each.trace_rows()],
                    "trajectories": [_trajectory(each, splits, engine) for each in completions],
                }
            )

    def finished(self, *, with_trace: bool) -> set[str]:
        """Return the ids of the answers that are there; `with_trace`, of those whose verify steps are there too.

        An engine that records steps wrote all answers of a part, and gives one without steps only where these cannot be
        told (retracted by its server).
        """
        answers, parts = self._read("trajectories", ["trajectory_id"])
        ids = answers["trajectory_id"].to_pylist()
        if not with_trace:
            return set(ids)
        latest = dict(zip(ids, parts.tolist(), strict=True))
        timings, timed_in = self._read("timings", ["trajectory_id", "verify_steps"])
        traced = {part for part, steps in enumerate(self._parts.tables("trace", ["step"])) if steps.num_rows}
        return {
            row["trajectory_id"]
            for row, part in zip(timings.to_pylist(), timed_in.tolist(), strict=True)
            if latest[row["trajectory_id"]] == part and (part in traced or row["verify_steps"] == 0)
        }

    def rows(self, answers: list[str]) -> dict[str, KeyedRows]:
        """Return the rows of each answer by table; of one that was made again those of its last part."""
        keys = pa.array(answers, pa.string())
        readers = {name: RowReader(self._parts.paths(name), schema, keep=8) for name, schema in SCHEMAS.items()}
        found = {
            name: KeyedRows(reader, keys, counter="step" if name == "trace" else None)
            for name, reader in readers.items()
        }
        part = {name: readers[name].file_index(rows.starts) for name, rows in found.items()}
        for name, rows in found.items():
            rows.exclude(part[name] != part["trajectories"])
        return found

    def _read(self, name: str, columns: list[str]) -> tuple[pa.Table, np.ndarray]:
        """Return columns of a row an answer, of all parts, and which part each row is of."""
        tables = self._parts.tables(name, columns)
        if not tables:
            return SCHEMAS[name].with_metadata.empty_table().select(columns), np.zeros(0, dtype=np.int64)
        return pa.concat_tables(tables), np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])


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
