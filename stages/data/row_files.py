"""Reads files of rows: JSON Lines and Parquet, plain or compressed, on this machine or through fsspec (`s3://…`).

A row that cannot be read is returned as a `BadRow` with its reason, and so is the end of a truncated file: the rows
before it are used. Only a problem of a whole file (it is missing or not readable) is an error.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import time
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, one_line
from draftsmith.artifacts.redaction import MAX_SHOWN

KINDS = ".jsonl, .ndjson or .json with one object per line, also with .gz or .zst, or .parquet"
# names of files in a folder; a number or a date may follow the suffix, as logrotate writes them
_ROW_FILE = re.compile(r".*(\.(jsonl|ndjson|json)([.-]\d[\d.T_-]*)?(\.gz|\.zst)?|\.parquet(\.gz|\.zst)?)")
_CSV = re.compile(rb"[^{}\[\],;\t]+([,;\t][^{}\[\],;\t]+)+")
Fields: TypeAlias = dict[str, Any]  # a row as it was written: JSON of any shape
_CHUNK = 1 << 18  # bytes
_MAX_LINE_MB = 16  # far above the longest answer: a million token ids are 7 MB
_REPORT_EVERY_S = 1.0
_PARQUET_ROWS = 256  # rows converted to Python objects at a time


@dataclass(frozen=True)
class _Line:
    """A row's place in a file."""

    file: str
    number: int  # from 1; blank lines count

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True)
class Row(_Line):
    """One row as it was written."""

    fields: Fields


@dataclass(frozen=True)
class BadRow(_Line):
    """A row that cannot be read."""

    reason: str


class TruncatedFile(BadRow):
    """The end of a damaged file."""


class Throttle:
    """Limits progress reports to one a second."""

    def __init__(self) -> None:
        self._reported = time.monotonic()

    def is_due(self) -> bool:
        """Return whether a second has passed since the last report, and start the next one if so."""
        now = time.monotonic()
        due = now - self._reported >= _REPORT_EVERY_S
        if due:
            self._reported = now
        return due


def is_remote(pattern: str) -> bool:
    """Return whether this is an address for fsspec, not a path."""
    return "://" in pattern and not pattern.startswith("file://")


def match_files(patterns: Sequence[str], field: str, only: Collection[str] | None = None) -> list[str]:
    """Return the files that paths, folders and globs name: pattern by pattern, sorted within each, every file once.

    field: the config field, for errors. only: canonical names to restrict the result to. Raises DraftsmithError for a
    pattern that matches nothing, and for a name that a manifest cannot hold.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        names |= dict.fromkeys(_remote(pattern, field) if is_remote(pattern) else _local(pattern, field))
    for name in names:
        if name.encode("utf-8", "replace").decode() != name:
            raise DraftsmithError(f"{field}: {name}: its name is not UTF-8 text. Rename the file.")
    return [name for name in names if only is None or canonical_name(name) in only]


def canonical_name(name: str) -> str:
    """Return the name of a file in a listing: an address, or an absolute path."""
    return name if is_remote(name) else str(Path(name).absolute())


def local_files(patterns: Sequence[str], field: str, only: Collection[str] | None = None) -> list[Path]:
    """Return the absolute paths of the matching files on this machine; arguments as in `match_files`."""
    local = [pattern for pattern in patterns if not is_remote(pattern)]
    return [Path(name).absolute() for name in match_files(local, field, only)]


def remote_versions(patterns: Sequence[str], field: str, only: Collection[str] | None = None) -> dict[str, str]:
    """Return address → size and tag of every matching remote file, which change with its content.

    The tag is the store's own (ETag, MD5), else fsspec's checksum of the store's information about the file.
    """
    versions: dict[str, str] = {}
    for pattern in filter(is_remote, patterns):
        for name, info in _remote(pattern, field).items():
            if only is None or name in only:
                tag = next((info[key] for key in ("ETag", "etag", "md5Hash") if info.get(key)), None)
                if tag is None:
                    system, path = _file_system(name, field)
                    tag = system.checksum(path)
                versions[name] = f"{info.get('size')}/{tag}"
    return versions


def _local(pattern: str, field: str) -> list[str]:
    path = Path(pattern.removeprefix("file://")).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        if files := _in_folder(path):
            return files
        raise DraftsmithError(f"{field}: folder {path} has no file of rows ({KINDS}). Correct the path.")
    if not glob.has_magic(str(path)):
        raise DraftsmithError(f"{field}: {path.absolute()} is not an existing file. Correct the path.")
    files = []
    for name in sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207 (Path.glob accepts no absolute pattern)
        files += _in_folder(Path(name)) if Path(name).is_dir() and "**" not in pattern else []
        files += [name] if Path(name).is_file() else []
    if not files:
        raise DraftsmithError(f"{field}: {path} matches no file. Correct the pattern.")
    return files


def _in_folder(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [str(folder / name) for name in sorted(names) if _holds_rows(name)]


def _holds_rows(name: str) -> bool:
    """Return whether a file in a folder has rows, by its name; names with a leading dot or underscore are internal."""
    parts = name.split("/")
    return _ROW_FILE.fullmatch(parts[-1]) is not None and not any(part.startswith((".", "_")) for part in parts)


def _file_system(address: str, field: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path in it."""
    import fsspec  # takes a while to load, and few configs have addresses

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # the package for this protocol is not installed, or there is none
        raise DraftsmithError(f"{field}: {address}: {one_line(error)}") from error


def _remote(pattern: str, field: str) -> dict[str, dict[str, object]]:
    """Return address → the file system's information about the file, sorted."""
    system, path = _file_system(pattern, field)
    try:
        system.invalidate_cache()
        if glob.has_magic(path):
            files = system.glob(path, detail=True)
            files = {name: info for name, info in files.items() if info.get("type") == "file"}
        elif system.isdir(path):
            files = system.find(path, detail=True)
            start = len(path.rstrip("/")) + 1
            files = {name: info for name, info in files.items() if _holds_rows(name[start:])}
        else:
            files = {path: system.info(path)} if system.isfile(path) else {}
    except Exception as error:  # its class depends on the package: no credentials, no such bucket, no network
        raise RetryableError(
            f"{field}: {pattern}: cannot be listed ({one_line(error)}). Check the address, the credentials and the "
            "network."
        ) from error
    if not files:
        raise DraftsmithError(f"{field}: {pattern} matches no file ({KINDS} in a folder). Correct the address.")
    return {str(system.unstrip_protocol(name)): files[name] for name in sorted(files)}


def read_rows(files: Sequence[str]) -> Iterator[Row | BadRow]:
    """Yield all rows of the files in order, with one in memory at a time (for Parquet, some hundreds).

    Raises DraftsmithError for a file that is missing or not readable, RetryableError if a remote one fails.
    """
    for file in files:
        try:
            with _opened(file) as raw:
                if file.endswith(".parquet"):
                    yield from _parquet_rows(file, raw)
                else:
                    yield from _json_rows(file, raw)
        except FileNotFoundError:
            raise DraftsmithError(f"{file} does not exist. Correct the path.") from None
        except DraftsmithError:
            raise
        except Exception as error:
            if is_remote(file):
                raise RetryableError(f"{file}: cannot be read ({one_line(error)}). Check the network.") from error
            if isinstance(error, OSError):
                raise DraftsmithError(
                    f"{file}: cannot be read ({one_line(error)}). Make it readable, or exclude it."
                ) from error
            raise


def no_rows_error(paths: Sequence[str]) -> str:
    return f"{', '.join(paths)}: is empty. Use a file with one JSON object per line."


class _TruncatedError(Exception):
    """Raised where the rest of a file cannot be read; the message is the reason."""


def _opened(file: str) -> AbstractContextManager[IO[bytes]]:
    if not is_remote(file):
        return Path(file).open("rb")
    system, path = _file_system(file, "opening")
    return system.open(path, "rb")


def _json_rows(file: str, raw: IO[bytes]) -> Iterator[Row | BadRow]:
    number = 0
    try:
        if file.endswith((".parquet.gz", ".parquet.zst")):
            raise _TruncatedError("a Parquet file that is compressed as a whole: unpack it")
        for number, line in enumerate(_lines(file, raw), start=1):
            if line.strip():
                parsed = _parsed(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                yield BadRow(file, number, parsed) if isinstance(parsed, str) else Row(file, number, parsed)
    except _TruncatedError as reason:
        yield TruncatedFile(file, number + 1, str(reason))


def _lines(file: str, raw: IO[bytes]) -> Iterator[bytes]:
    """Yield lines without their ends. A line over the limit is cut to a part that is also over it.

    Raises _TruncatedError after the last whole line of truncated compressed data.
    """
    read: Any = raw.read
    compression = ""
    if file.endswith(".gz"):
        compression, read = "gzip", gzip.GzipFile(fileobj=raw).read1  # `read` loses its data at a truncation
    elif file.endswith(".zst"):
        compression, read = "zstd", pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd").read
    partial = bytearray()  # of one line
    while chunk := _chunk(read, compression):
        first, *rest = chunk.split(b"\n")
        if len(partial) <= _MAX_LINE_MB << 20:
            partial += first
        if rest:
            yield bytes(partial)
            yield from rest[:-1]
            partial = bytearray(rest[-1])
    if partial:
        yield bytes(partial)


def _chunk(read: Any, compression: str) -> bytes:
    try:
        return bytes(read(_CHUNK))
    except (EOFError, zlib.error, OSError) as error:
        if not compression or (isinstance(error, OSError) and error.errno is not None):  # of the disk or the network
            raise
        raise _TruncatedError(
            f"damaged or truncated {compression} ({one_line(error)}): copy or download it again"
        ) from error


def _parsed(line: bytes) -> Fields | str:
    """Return the row, or the reason why it is bad."""
    if len(line) > _MAX_LINE_MB << 20:
        return f"longer than {_MAX_LINE_MB} MB: every line must be one JSON object"
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason}): convert the file, or name it .gz or .zst if compressed"
    except (ValueError, RecursionError) as error:
        if _CSV.fullmatch(line[:MAX_SHOWN]):
            return "looks like CSV, not JSON: convert the file to JSON Lines"
        return f"not JSON ({one_line(error)}): every line must be one JSON object"
    if not isinstance(row, dict):
        return f"a JSON {json_type(row)}, not an object: every line must be one JSON object"
    return row


def _parquet_rows(file: str, raw: IO[bytes]) -> Iterator[Row | BadRow]:
    number = 0
    try:
        for batch in pq.ParquetFile(raw, page_checksum_verification=True).iter_batches(batch_size=_PARQUET_ROWS):
            for row in _python_rows(batch):
                number += 1
                yield BadRow(file, number, row) if isinstance(row, str) else Row(file, number, row)
    except (pa.ArrowException, OSError, EOFError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = f"not a whole Parquet file ({one_line(error, 200)}): copy or download it again"
        yield TruncatedFile(file, number + 1, reason)


def _python_rows(batch: pa.RecordBatch) -> Iterator[Fields | str]:
    """Yield the rows of a batch; for a row with a value that Python cannot hold (the year 10000), the reason."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass
    for index in range(batch.num_rows):
        try:
            yield from batch.slice(index, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            yield f"a value that cannot be read ({one_line(error)}): correct the row"


def json_type(value: Any) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


UNREADABLE = "cannot be read"


def describe_counts(reasons: Counter[str]) -> str:
    """Return how often each reason occurred, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


class RejectLog:
    """The rows rejected so far: those that cannot be used here, and those that cannot be read (bad rows)."""

    def __init__(self, field: str, max_bad_share: float, lines: TextIO | None = None):
        """Start an empty log. field: the config field of `max_bad_share`, for errors. lines: receives JSON Lines."""
        self._field, self._max_bad_share, self._lines = field, max_bad_share, lines
        self.reasons: Counter[str] = Counter()
        self.rows = 0  # all rows read so far
        self.outside = 0  # of these, the rows outside the time window, which do not count for the share
        self.truncated = 0  # of these, missing ends of files
        self._first: BadRow | None = None
        self._counted = 0  # bad rows inside the window

    @property
    def bad(self) -> int:
        return self.reasons[UNREADABLE]

    def add_unusable(self, file: str, number: int, log_id: str | None, reason: str) -> None:
        self.reasons[reason] += 1
        self._write(file, number, log_id, reason)

    def add_unreadable(self, row: BadRow, log_id: str | None = None, *, outside: bool = False) -> None:
        """Count a bad row. Raises DraftsmithError if none is allowed. outside: probably outside the time window."""
        self.reasons[UNREADABLE] += 1
        self.truncated += isinstance(row, TruncatedFile)
        if outside:
            self.outside += 1
        else:
            self._first = self._first or row
            self._counted += 1
        self._write(row.file, row.number, log_id, f"{UNREADABLE}: {row.reason}")
        if self._max_bad_share == 0:
            raise DraftsmithError(f"{row.where}: {row.reason}")

    def check(self) -> None:
        """Raise DraftsmithError if more than the allowed share of the rows is bad."""
        rows = self.rows - self.outside
        if self._first is not None and self._counted > self._max_bad_share * max(rows, 1):
            window = " inside the window" if self.outside else ""
            raise DraftsmithError(
                f"{self._first.where}: {self._first.reason.removesuffix('.')} ({self._counted} of {rows} rows{window} "
                f"cannot be read, over {self._field} {self._max_bad_share:g})"
            )

    def describe(self) -> str:
        return describe_counts(self.reasons)

    def _write(self, file: str, number: int, log_id: str | None, reason: str) -> None:
        if self._lines is not None:
            entry = {"file": file, "row": number, "id": log_id, "reason": reason}
            self._lines.write(json.dumps(entry, ensure_ascii=True) + "\n")
