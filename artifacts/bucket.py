"""A folder of an object store, behind fsspec: whole objects by name, and one clear error for whatever fails."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, one_line
from draftsmith.artifacts.redaction import secret_in

_MODIFIED = ("LastModified", "updated", "last_modified", "mtime", "created")  # as S3, GCS, Azure and disks call it
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PROBE = ".written-once"  # an object of the check
_WRITTEN = "written"
_ADVICE = "check the address, the credentials and the network"

Found = TypeVar("Found")


@dataclass(frozen=True)
class Stored:
    """What a listing tells of an object."""

    bytes: int
    modified: float  # seconds since the epoch


class Bucket:
    """Objects under an address such as `s3://bucket/prefix`. Their names have forward slashes.

    Credentials come from the environment, as the file system's package takes them, and stand in no address. Raises
    DraftsmithError for an address that cannot be used, RetryableError where the store does not answer.
    """

    def __init__(self, address: str, field: str) -> None:
        """field: what names the address in errors."""
        self.address, self._field = address.rstrip("/"), field
        if "://" not in address:
            raise DraftsmithError(f"{field}: {address}: give an address such as s3://bucket/prefix")
        if (secret := secret_in(address)) is not None:
            raise DraftsmithError(
                f"{field}: {address}: it is {secret}: leave it out, and give it to the file system's package in the "
                "environment (for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)"
            )
        import fsspec

        try:
            # a listing that is kept is not what is there: others write too
            options = {"use_listings_cache": False} | ({"auto_mkdir": True} if _is_folder(address) else {})
            self._system, self._root = fsspec.core.url_to_fs(self.address, **options)
        except (
            ImportError,
            ValueError,
            TypeError,
        ) as error:  # no such protocol, or its package is missing
            raise DraftsmithError(f"{field}: {address}: {one_line(error)}") from error

    def address_of(self, name: str) -> str:
        return f"{self.address}/{name}"

    def check(self) -> None:
        """Write a small object, twice: raises DraftsmithError where there is no such bucket, or where the second one
        replaces the first."""
        self.create(_PROBE, b"")
        if self.create(_PROBE, b""):
            raise DraftsmithError(
                f"{self._field}: {self.address}: a write on the condition that there is none replaced an object, so of "
                "two hosts the second would overwrite the first: use a store that keeps the condition, such as S3"
            )

    def read(self, name: str) -> bytes | None:
        """The object's content; None if there is none."""
        return self._or_none(name, "read", lambda: self._system.cat_file(self._path(name)))

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """The same of many at once, as far as they are there."""
        paths = {self._path(name): name for name in names}
        if not paths:
            return {}
        with_errors: Mapping[str, Any] = self._do("", "read", lambda: self._system.cat(list(paths), on_error="return"))
        found = {}
        for path, content in with_errors.items():
            if isinstance(content, FileNotFoundError):
                continue
            if isinstance(content, Exception):
                raise self._lost(paths[path], "read", content) from content
            found[paths[path]] = bytes(content)
        return found

    def create(self, name: str, content: bytes) -> bool:
        """Write the object if there is none, in one step; whether it was written."""

        def write() -> bool:
            try:
                self._system.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if _was_there(error):
                    return False
                raise
            return True

        return self._do(name, _WRITTEN, write)

    def replace(self, name: str, content: bytes) -> None:
        """Write the object, in place of another if there is one."""
        self._do(name, _WRITTEN, lambda: self._system.pipe_file(self._path(name), content))

    def upload(self, path: Path, name: str) -> None:
        """A file's content as an object; it is there when it is whole."""
        self._do(name, _WRITTEN, lambda: self._system.put_file(str(path), self._path(name)))

    def download(self, name: str, path: Path) -> bool:
        """The object's content into a file; False if there is none."""
        return self._or_none(name, "read", lambda: self._system.get_file(self._path(name), str(path)) or True) is True

    def listed(self, folder: str = "") -> dict[str, Stored]:
        """Every object below a folder, by its name (from the address on)."""
        start = len(self._root.rstrip("/")) + 1

        def find() -> Mapping[str, Any]:
            self._system.invalidate_cache()
            found: Mapping[str, Any] = self._system.find(self._path(folder) if folder else self._root, detail=True)
            return found

        found = self._or_none(folder, "listed", find) or {}
        return {path[start:]: Stored(int(info["size"]), _modified(info)) for path, info in found.items()}

    def delete(self, names: Iterable[str]) -> None:
        paths = [self._path(name) for name in names]
        if paths:
            self._do("", "deleted from", lambda: self._system.rm(paths))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _or_none(self, name: str, doing: str, act: Callable[[], Found]) -> Found | None:
        def found() -> Found | None:
            try:
                return act()
            except FileNotFoundError:
                return None

        return self._do(name, doing, found)

    def _do(self, name: str, doing: str, act: Callable[[], Found]) -> Found:
        try:
            return act()
        except Exception as error:  # of whichever package: no credentials, no such bucket, no network
            if isinstance(error, OSError) and (error.filename or error.errno in _OF_A_DISK):
                raise  # of this machine's: an object store's errors name no file
            if isinstance(error, FileNotFoundError) and doing == _WRITTEN:
                raise DraftsmithError(
                    f"{self._field}: {self.address}: there is no such bucket ({one_line(error)}): correct the "
                    "address, or make it"
                ) from error
            raise self._lost(name, doing, error) from error

    def _lost(self, name: str, doing: str, error: BaseException) -> RetryableError:
        return RetryableError(f"{self.address_of(name)}: cannot be {doing} ({one_line(error)}): {_ADVICE}")


def _is_folder(address: str) -> bool:
    return address.startswith(("file:", "local:"))


def _was_there(error: OSError) -> bool:
    """Whether S3 refused a conditional write: another one was first (412), or is under way (409)."""
    code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", "")
    return code in ("PreconditionFailed", "ConditionalRequestConflict") or "PreconditionFailed" in str(error)


def _modified(info: Mapping[str, Any]) -> float:
    found = next((info[name] for name in _MODIFIED if info.get(name) is not None), 0.0)
    if isinstance(found, str):
        found = datetime.fromisoformat(found)
    if isinstance(found, datetime):
        return (found if found.tzinfo is not None else found.replace(tzinfo=UTC)).timestamp()
    return float(found)
