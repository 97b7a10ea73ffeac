"""Files of rows: JSON Lines and Parquet, plain or compressed, on this machine or behind fsspec (`s3://bucket/…`).

A row that cannot be read comes back as a `BadRow` with its reason, and so does the end of a file that is cut off: what
stands before it is used. Only what concerns a file as a whole (it is gone, or may not be read) is an error.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import time
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, one_line

KINDS = ".jsonl, .ndjson or .json with an object a line, also with .gz or .zst, or .parquet"
# what is taken out of a folder; behind the suffix a number or a date, as logrotate writes them
_OF_ROWS = re.compile(r".*(\.(jsonl|ndjson|json)([.-]\d[\d.T_-]*)?(\.gz|\.zst)?|\.parquet(\.gz|\.zst)?)")
_CHUNK = 1 << 18  # bytes
_REPORT_EVERY_S = 1.0
_PARQUET_ROWS = 256  # Python objects of so many rows at a time


@dataclass(frozen=True)
class _Line:
    file: str
    number: int  # from 1; blank lines count

    @property
    def where(self) -> str:
        return f"{self.file}, row {self.number}"


@dataclass(frozen=True)
class Row(_Line):
    """One row as it was written."""

    fields: dict[str, Any]


@dataclass(frozen=True)
class BadRow(_Line):
    """A row that cannot be read."""

    reason: str


class CutOff(BadRow):
    """Where a damaged file ends."""


class Throttle:
    """Says when progress is due: once a second, however many rows there are and however long one takes."""

    def __init__(self) -> None:
        self._reported = time.monotonic()

    def is_due(self) -> bool:
        now = time.monotonic()
        due = now - self._reported >= _REPORT_EVERY_S
        if due:
            self._reported = now
        return due


def is_remote(pattern: str) -> bool:
    """Is this an address for fsspec, not a path?"""
    return "://" in pattern and not pattern.startswith("file://")


def matched(patterns: Sequence[str], field: str, only: Collection[str] | None = None) -> list[str]:
    """The files that paths, folders and globs name: pattern by pattern, sorted within each, every file once.

    field: names the config's field in errors. only: of those, the ones that a listing has (`listed_as`). Raises
    DraftsmithError for a pattern that matches nothing, and for a name that no manifest could hold.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        found |= dict.fromkeys(_remote(pattern, field) if is_remote(pattern) else _local(pattern, field))
    for name in found:
        if (shown := name.encode("utf-8", "backslashreplace").decode()) != name:
            raise DraftsmithError(f"{field}: {shown}: its name is not UTF-8 text: rename the file")
    return [name for name in found if only is None or listed_as(name) in only]


def listed_as(name: str) -> str:
    """Return the name of a file in a listing: an address, or an absolute path."""
    return name if is_remote(name) else str(Path(name).absolute())


def local_files(patterns: Sequence[str], field: str, only: Collection[str] | None = None) -> list[Path]:
    """Return those of `matched` that are on this machine, absolute."""
    return [Path(name).absolute() for name in matched([each for each in patterns if not is_remote(each)], field, only)]


def remote_versions(patterns: Sequence[str], field: str, only: Collection[str] | None = None) -> dict[str, str]:
    """Return address → size and tag of every matched file that is not on this machine: other content, another text.

    The tag is the store's own (ETag, MD5), else fsspec's checksum of what the store says about the file.
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
        raise DraftsmithError(f"{field}: folder {path} has no file of rows ({KINDS}): correct the path")
    if not glob.has_magic(str(path)):
        raise DraftsmithError(f"{field}: {path.absolute()} is not an existing file: correct the path")
    files = []
    for name in sorted(glob.glob(str(path), recursive=True)):  # noqa: PTH207 (Path.glob takes no absolute one)
        files += _in_folder(Path(name)) if Path(name).is_dir() and "**" not in pattern else []
        files += [name] if Path(name).is_file() else []
    if not files:
        raise DraftsmithError(f"{field}: {path} matches no file: correct the pattern")
    return files


def _in_folder(folder: Path) -> list[str]:
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [str(folder / name) for name in sorted(names) if _holds_rows(name)]


def _holds_rows(name: str) -> bool:
    """By its name below a folder; what begins with a dot or an underscore is somebody's bookkeeping."""
    parts = name.split("/")
    return _OF_ROWS.fullmatch(parts[-1]) is not None and not any(part.startswith((".", "_")) for part in parts)


def _file_system(address: str, field: str) -> tuple[Any, str]:
    """The file system of an address, and the path there."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # the package for this protocol is not installed, or there is none
        raise DraftsmithError(f"{field}: {address}: {one_line(error)}") from error


def _remote(pattern: str, field: str) -> dict[str, dict[str, Any]]:
    """Address → what its file system tells about the file, sorted."""
    system, path = _file_system(pattern, field)
    try:
        system.invalidate_cache()
        if glob.has_magic(path):
            found = system.glob(path, detail=True)
            found = {name: info for name, info in found.items() if info.get("type") == "file"}
        elif system.isdir(path):
            found = system.find(path, detail=True)
            start = len(path.rstrip("/")) + 1
            found = {name: info for name, info in found.items() if _holds_rows(name[start:])}
        else:
            found = {path: system.info(path)} if system.isfile(path) else {}
    except Exception as error:  # of whichever package: no credentials, no such bucket, no network
        raise RetryableError(
            f"{field}: {pattern}: cannot be listed ({one_line(error)}): check the address, the credentials and the "
            "network"
        ) from error
    if not found:
        raise DraftsmithError(f"{field}: {pattern} matches no file ({KINDS} in a folder): correct the address")
    return {str(system.unstrip_protocol(name)): found[name] for name in sorted(found)}


def read_rows(files: Sequence[str]) -> Iterator[Row | BadRow]:
    """All rows of the files in turn, one in memory at a time (of Parquet: some hundreds).

    Raises DraftsmithError for a file that is gone or may not be read, RetryableError where a remote one fails.
    """
    for file in files:
        try:
            with _opened(file) as raw:
                if file.endswith(".parquet"):
                    yield from _parquet_rows(file, raw)
                else:
                    yield from _json_rows(file, raw)
        except FileNotFoundError:
            raise DraftsmithError(f"{file} does not exist: correct the path") from None
        except DraftsmithError:
            raise
        except Exception as error:
            if is_remote(file):
                raise RetryableError(f"{file}: cannot be read ({one_line(error)}): check the network") from error
            if isinstance(error, OSError):
                raise DraftsmithError(
                    f"{file}: cannot be read ({one_line(error)}): make it readable, or leave it out"
                ) from error
            raise


def no_rows(paths: Sequence[str]) -> str:
    """Return the error for files in which no line is a row."""
    return f"{', '.join(paths)}: is empty. Give a file with one JSON object a line."


class _DamagedError(Exception):
    """The rest of the file cannot be read; the message is the reason."""


def _opened(file: str) -> AbstractContextManager[IO[bytes]]:
    if not is_remote(file):
        return Path(file).open("rb")
    system, path = _file_system(file, "opening")
    return system.open(path, "rb")


def _json_rows(file: str, raw: IO[bytes]) -> Iterator[Row | BadRow]:
    number = 0
    try:
        if file.endswith((".parquet.gz", ".parquet.zst")):
            raise _DamagedError("a Parquet file that is compressed as a whole: unpack it")
        for number, line in enumerate(_lines(file, raw), start=1):
            if line.strip():
                parsed = _parsed(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                yield BadRow(file, number, parsed) if isinstance(parsed, str) else Row(file, number, parsed)
    except _DamagedError as damage:
        yield CutOff(file, number + 1, str(damage))


def _lines(file: str, raw: IO[bytes]) -> Iterator[bytes]:
    """Lines without their ends. Raises _DamagedError behind the last whole one where compressed data break off."""
    read: Any = raw.read
    packed = ""
    if file.endswith(".gz"):
        packed, read = "gzip", gzip.GzipFile(fileobj=raw).read1  # `read` loses what it has when the data break off
    elif file.endswith(".zst"):
        import pyarrow as pa

        packed, read = "zstd", pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd").read
    begun: list[bytes] = []
    while chunk := _chunk(read, packed):
        first, *rest = chunk.split(b"\n")
        begun.append(first)
        if rest:
            yield b"".join(begun)
            yield from rest[:-1]
            begun = [rest[-1]]
    if last := b"".join(begun):
        yield last


def _chunk(read: Any, packed: str) -> bytes:
    try:
        return bytes(read(_CHUNK))
    except (EOFError, zlib.error, OSError) as error:
        if not packed or (isinstance(error, OSError) and error.errno is not None):  # the disk's or the net's refusal
            raise
        raise _DamagedError(f"damaged or cut off {packed} ({one_line(error)}): copy or download it again") from error


def _parsed(line: bytes) -> dict[str, Any] | str:
    """The row, or why there is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return f"not UTF-8 text ({error.reason}): convert the file, or name it .gz or .zst if compressed"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({one_line(error)}): every line must be one JSON object"
    if not isinstance(row, dict):
        return f"a JSON {kind_of(row)}, not an object: every line must be one JSON object"
    return row


def _parquet_rows(file: str, raw: IO[bytes]) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

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
        yield CutOff(file, number + 1, reason)


def _python_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Rows of a batch; a value that Python cannot hold (text that is no UTF-8, a year above 9999) costs its row."""
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


def kind_of(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
