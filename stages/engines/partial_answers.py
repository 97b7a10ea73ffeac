"""The stored answers of an unfinished rollout, generated or taken from a log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import TableShards
from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import TIMINGS, TRACE, TRAJECTORIES
from draftsmith.stages.data.held_out import token_digest
from draftsmith.stages.data.logs.rows import LoggedRow, logged_ids
from draftsmith.stages.data.row_files import BadRow, read_rows
from draftsmith.stages.engines.base import Completion, Request, recorded_table

SCHEMAS = {"timings": TIMINGS, "trace": TRACE, "trajectories": TRAJECTORIES}  # in the order of writing
# A start reads only these, since tokens and steps may have 100 GB: ids and numbers of steps, and the trace's row count.
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
                    "timings": [_timing(completion) for completion in completions],
                    "trace": recorded_table(completions),
                    "trajectories": [_trajectory(completion, splits, engine) for completion in completions],
                }
            )

    def finished(self, *, with_trace: bool) -> set[str]:
        """Return the ids of the stored answers; with `with_trace`, only answers whose verify steps are stored too.

        A shard comes from one engine. An engine that records steps lacks them only for answers that a server retracted,
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
        """Read all shards, and forget the answers of damaged ones. Returns whether any was damaged."""
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
    }


def store_logged_answers(
    files: Iterable[Path],
    requests: Iterable[Request],
    splits: Mapping[str, str],
    vocab_size: int,
    answers: PartialAnswers,
) -> None:
    """Store the logged answer to every request, the first one of a prompt that was asked several times.

    files: rows of `prompt_token_ids` and `completion_token_ids`. splits: prompt id -> split. vocab_size: the target's.
    Raises DraftsmithError if a row cannot be read, or if an answer is another model's, was sampled differently from
    its request, or is missing.
    """
    missing = {token_digest(request.prompt_ids): request for request in requests}
    completions = []
    for row in read_rows([str(file) for file in files]):
        if isinstance(row, BadRow):
            raise DraftsmithError(f"{row.where}: {row.reason}. Correct the row, or remove it.")
        logged = LoggedRow(row.file, row.number, row.fields)
        ids = logged_ids(logged)
        request = None if ids is None else missing.pop(token_digest(ids[0]), None)
        if ids is None or request is None:
            continue
        if difference := logged.sampling_difference(request.sampling):
            raise DraftsmithError(
                f"{row.where}: the answer was not sampled as configured ({difference}). Set sampling to the "
                "values of the answers."
            )
        if max(ids[1], default=0) >= vocab_size:
            raise DraftsmithError(f"{row.where}: token id outside the target's vocabulary. Use this target's answers.")
        reason = "stop" if row.fields.get("finish_reason") == "stop" else "length"
        completions.append(Completion(request, ids[1], finish_reason=reason))
    if missing:
        first = next(iter(missing.values())).request_id
        raise DraftsmithError(
            f"answers: {len(missing)} prompts have none, such as {first}. Add their rows, or ask for fewer prompts."
        )
    answers.append(completions, splits, "logs")
