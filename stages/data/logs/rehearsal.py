"""Answers of an earlier refresh, mixed in so that a drafter does not forget: the body of stage `earlier`, their use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from draftsmith.artifacts.atomic import atomic_path, write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.manifest import sha256_file
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tables.parquet import GROUP_BYTES, has_current_version, read_table, table_errors
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.logs.filter import LogFilter, answer_content, prompt_id
from draftsmith.stages.data.logs.rehearsal_stage import TABLE, EarlierConfig, folder_in_home
from draftsmith.stages.data.trajectories import random_rank
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.target.info import TargetInfo
from draftsmith.stages.target.sampling import SamplingParams

ORIGIN, _CONTENTS = "earlier.json", "contents.npy"  # digests of target and tokenizer; digests of the answers
_DIGEST_BYTES = 16
_COLUMNS = ["split", "temperature", "top_p", "top_k", "prompt_ids", "response_ids"]
_BATCH_ROWS = 4096


def run(ctx: StageContext, config: EarlierConfig) -> None:
    """Write the digests of the answers, their target and, to replay them, a verified copy of their table.

    Raises DraftsmithError if the table is missing or has changed.
    """
    store, folder = open_store(home()), Path(config.folder)
    source = store.localize(folder) / TABLE
    if not source.is_file():
        source = folder_in_home(store, folder) / TABLE  # its checksum decides whether it is the right one
    remedy = "Restore it, or set logs.replay_share and logs.lateness_hours to 0."
    if not source.is_file():
        raise DraftsmithError(f"{source}, with the answers of the champion's refresh, does not exist. {remedy}")
    with atomic_path(ctx.out / TABLE) if config.replayed else nullcontext(source) as path:
        if config.replayed:
            shutil.copyfile(source, path)
        if sha256_file(path) != config.sha256:
            raise DraftsmithError(f"{source} has changed since the champion was trained on it. {remedy}")
        _write_contents(ctx.out, path)
    write_text(ctx.out / ORIGIN, config.model_dump_json(include={"target_digest", "tokenizer_digest"}) + "\n")


def _write_contents(folder: Path, table: Path) -> None:
    """Write `answer_content` of all different answers as [answers, 16] uint8.

    All versions of the table have the columns that are read here. Raises DraftsmithError for a damaged table.
    """
    with table_errors(table, TRAJECTORIES.name):
        contents = {
            answer_content(prompt.values.to_numpy(), answer.values.to_numpy())
            for batch in read_batches(table, ["prompt_ids", "response_ids"])
            for prompt, answer in zip(batch["prompt_ids"], batch["response_ids"], strict=True)
        }
    with atomic_path(folder / _CONTENTS) as path, path.open("wb") as file:
        np.save(file, np.frombuffer(b"".join(sorted(contents)), np.uint8).reshape(-1, _DIGEST_BYTES))


def read_contents(folder: Path) -> frozenset[bytes]:
    """Return `answer_content` of all answers of an artifact of stage `earlier`."""
    return frozenset(content.tobytes() for content in np.load(folder / _CONTENTS))


def changes_since(folder: Path, info: TargetInfo) -> str | None:
    """Return what has changed since the answers of an artifact of stage `earlier` were given; None if nothing has.

    Another target would give other answers, another tokenizer reads other text in their ids, and tables of another
    version do not record the sampling in today's form.
    """
    origin = json.loads((folder / ORIGIN).read_text("utf-8"))
    current = {"tokenizer": info.tokenizer_digest, "target": info.digest}
    changed = [f"the {what}" for what, digest in current.items() if origin[f"{what}_digest"] != digest]
    if not has_current_version(folder / TABLE, TRAJECTORIES):
        changed.append("what is stored of answers")
    return " and ".join(changed) or None


@dataclass(frozen=True)
class EarlierAnswers:
    """The answers of an earlier artifact that may be trained on: same sampling, and accepted by the log filter."""

    path: Path
    contents: list[bytes | None]  # of every row; None: not to be used
    of_other_sampling: int = 0  # rows that are not used because they were sampled differently

    def choose(self, count: int, seed: int, excluded: set[bytes]) -> np.ndarray:
        """Return a mask [rows] of `count` random answers, or of all there are, without those in `excluded`."""
        usable = [(content, row) for row, content in enumerate(self.contents) if content and content not in excluded]
        ranked = sorted((random_rank(seed, content), row) for content, row in usable)
        mask = np.zeros(len(self.contents), dtype=bool)
        mask[[row for _, row in ranked[:count]]] = True
        return mask

    @property
    def usable(self) -> int:
        return sum(content is not None for content in self.contents)

    def rows(self, mask: np.ndarray) -> Iterator[pa.Table]:
        """Yield the rows that the mask selects in batches, with the prompt ids of stage `logs`."""
        for batch in select_rows(self.path, mask):
            ids = [prompt_id(row.values.to_numpy()) for row in batch["prompt_ids"]]
            column = batch.column_names.index("prompt_id")
            yield batch.set_column(column, "prompt_id", pa.array(ids, pa.string()))


def read_earlier_answers(
    folder: Path,
    log_filter: LogFilter,
    sampling: SamplingParams,
    progress: Callable[[int], None],
) -> EarlierAnswers:
    """Read the usable answers of an artifact of stage `earlier`.

    sampling: of the new answers. progress: called with the number of answers read. Raises DraftsmithError if the table
    is damaged or of another version.
    """
    path = folder / TABLE
    read_table(path, TRAJECTORIES, columns=["sample"])  # checks that it is intact and of this version
    contents: list[bytes | None] = []
    seen: set[bytes] = set()
    stored_sampling = _as_stored(sampling)
    of_other_sampling = 0
    for batch in read_batches(path, _COLUMNS):
        for split, *values, prompt, answer in zip(*(batch[name] for name in _COLUMNS), strict=True):
            content = None
            if split.as_py() == "train":
                if SamplingParams(*(value.as_py() for value in values)) == stored_sampling:
                    content = _usable_content(prompt.values.to_numpy(), answer.values.to_numpy(), log_filter)
                else:
                    of_other_sampling += 1
            contents.append(None if content in seen else content)
            if content is not None:
                seen.add(content)
        progress(len(contents))
    return EarlierAnswers(path, contents, of_other_sampling)


def _as_stored(sampling: SamplingParams) -> SamplingParams:
    """Return the sampling with the precision of the table's columns."""
    return SamplingParams(float(np.float32(sampling.temperature)), float(np.float32(sampling.top_p)), sampling.top_k)


def _usable_content(prompt: np.ndarray, answer: np.ndarray, log_filter: LogFilter) -> bytes | None:
    """Return `answer_content`; None for an answer that the filter would reject."""
    if not log_filter.fits(prompt, answer) or log_filter.is_held_out(prompt):
        return None
    return answer_content(prompt, answer)


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a Parquet file in batches, each of at most about `GROUP_BYTES`, whoever wrote it."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        rows = max(1, min(_BATCH_ROWS, file.metadata.num_rows * GROUP_BYTES // max(1, size)))
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
