"""Stage `earlier`: the logged answers that the champion was trained on, for the next refresh of its model line.

Its cache key depends on their content and their target, not on the file's path. Stage `logs` mixes a share of them in
(`logs.replay_share`) if the target and the tokenizer are still the same. It also skips these answers where its window
overlaps what the champion's refresh has read (`logs.lateness_hours`). Their digests suffice for that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from draftsmith.artifacts.atomic import atomic_path, write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.manifest import sha256_file
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tables.parquet import GROUP_BYTES, has_current_version, table_errors
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.held_out import token_digest
from draftsmith.stages.runtime.stage import Config, NotInKey, Stage, StageContext
from draftsmith.stages.targets.info import TargetInfo

TABLE = "trajectories.parquet"
ORIGIN, _CONTENTS = "earlier.json", "contents.npy"  # digests of target and tokenizer; digests of the answers
_DIGEST_BYTES = 16
_BATCH_ROWS = 4096


class EarlierConfig(Config):
    """Answers of a refresh that promoted its drafter."""

    folder: Annotated[str, NotInKey()]
    """The artifact that holds them."""
    sha256: str
    """Checksum of their table."""
    target_digest: str
    """The target that gave them."""
    tokenizer_digest: str
    """Its tokenizer."""
    replayed: bool = True
    """Whether they may be mixed in. The artifact then holds the answers themselves, else only their digests."""


def is_available(config: EarlierConfig) -> bool:
    """Return whether this machine or the store's bucket has the answers, without fetching them.

    Raises RetryableError if the bucket does not answer.
    """
    folder = Path(config.folder)
    if (folder / TABLE).is_file():
        return True
    manifest = open_store(home()).manifest_at(folder.parent.name, folder.name)
    return manifest is not None and TABLE in manifest.files


def run(ctx: StageContext, config: EarlierConfig) -> None:
    """Write the digests of the answers and of their target, and a verified copy of their table if it is replayed.

    Raises DraftsmithError if the table is missing or has changed.
    """
    # its checksum decides whether it is the right one
    source = open_store(home()).localize(Path(config.folder)) / TABLE
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
        changed.append("the table of answers")
    return " and ".join(changed) or None


def answer_content(prompt_ids: np.ndarray, answer_ids: np.ndarray) -> bytes:
    """Return 16 bytes that equal answers to equal prompts share."""
    return token_digest(np.concatenate([prompt_ids, np.array([-1], np.int32), answer_ids]))


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Yield a Parquet file in batches, each of at most about `GROUP_BYTES`, whoever wrote it."""
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        size = sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
        rows = max(1, min(_BATCH_ROWS, file.metadata.num_rows * GROUP_BYTES // max(1, size)))
        # one group per reader: a reader of all groups holds more memory the more there are
        for group in range(file.num_row_groups):
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


STAGE = Stage(name="earlier", config=EarlierConfig, inputs=(), body="draftsmith.stages.data.logs.earlier")
