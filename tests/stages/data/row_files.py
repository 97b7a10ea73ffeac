"""Files of rows as tests write them: every format from the same rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


def content(rows: Sequence[Any], name: str) -> bytes:
    """The rows as the bytes of a file whose name ends so; texts are lines as they are."""
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(list(rows)), sink)
        return bytes(sink.getvalue().to_pybytes())
    lines = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    return packed(lines, name)


def packed(data: bytes, name: str) -> bytes:
    """Compressed as the name says."""
    if name.endswith(".gz"):
        return gzip.compress(data)
    if name.endswith(".zst"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return bytes(sink.getvalue().to_pybytes())
    return data


def write(path: Path, rows: Sequence[Any]) -> Path:
    """In the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content(rows, path.name))
    return path
