"""The stored answers of an unfinished rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.tables.parquet import TableShards
from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import ADAPTED_TRAJECTORIES, TIMINGS, TRACE
from draftsmith.stages.engines.base import Completion

SCHEMAS = {"timings": TIMINGS, "trace": TRACE, "trajectories": ADAPTED_TRAJECTORIES}  # in the order of writing
# All that a start reads, since tokens and steps may have 100 GB: ids and numbers of steps; of the trace its row count.
_COUNTED = {"timings": ["trajectory_id", "verify_steps"], "trace": [], "trajectories": ["trajectory_id"]}


class PartialAnswers:
    """Answers with their timings and verify steps, in shards of tables in a folder."""

    def __init__(self, folder: Path) -> None:
        self._shards = TableShards(folder, SCHEMAS, checked=_COUNTED)

    def append(self, completions: Sequence[Completion], splits: Mapping[str, str], engine: str) -> None:
        """Write one shard; nothing for no answers. splits: prompt id -> split."""
        if completions:
            self._shards.append(
                {
                    "timings": [_timing(each) for each in completions],
                    "trace": [row for each in completions for row in each.trace_rows()],
                    "trajectories": [_trajectory(each, splits, engine) for each in completions],
                }
            )

    def finished(self, *, with_trace: bool) -> set[str]:
        """Return the ids of the stored answers; with `with_trace`, of those whose verify steps are stored too.

        A shard comes from one engine. One that records steps leaves them out only for answers that a server retracted,
        so a shard with any step counts as traced.
        """
        answers, shards = self._read("trajectories")
        ids = answers["trajectory_id"].to_pylist()
        if not with_trace:
            return set(ids)
        latest = dict(zip(ids, shards.tolist(), strict=True))
        timings, timed_in = self._read("timings")
        steps = self._shards.tables("trace", _COUNTED["trace"])
        traced = {shard for shard, table in enumerate(steps) if table.num_rows}
        return {
            row["trajectory_id"]
            for row, shard in zip(timings.to_pylist(), timed_in.tolist(), strict=True)
            if latest[row["trajectory_id"]] == shard and (shard in traced or row["verify_steps"] == 0)
        }

    def rows(self, answers: list[str]) -> dict[str, KeyedRows]:
        """Return the rows of each answer by table; for an answer generated twice, those of its last shard."""
        keys = pa.array(answers, pa.string())
        readers = {name: RowReader(self._shards.paths(name), schema, keep=8) for name, schema in SCHEMAS.items()}
        tables = {
            name: KeyedRows(reader, keys, counter="step" if name == "trace" else None)
            for name, reader in readers.items()
        }
        shard = {name: readers[name].file_index(rows.starts) for name, rows in tables.items()}
        for name, rows in tables.items():
            rows.exclude(shard[name] != shard["trajectories"])
        return tables

    def drop_damaged(self) -> bool:
        """Read all shards, and forget the answers of damaged ones. Return whether there were any."""
        return self._shards.drop_damaged()

    def _read(self, name: str) -> tuple[pa.Table, np.ndarray]:
        """Return the `_COUNTED` columns of all shards of a table with one row per answer, and the shard of each row."""
        tables = self._shards.tables(name, _COUNTED[name])
        if not tables:
            return SCHEMAS[name].with_metadata.empty_table().select(_COUNTED[name]), np.zeros(0, dtype=np.int64)
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
        "adapter": request.adapter,
    }
