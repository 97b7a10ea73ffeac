"""A folder of an object store, accessed through fsspec, with retries and clear errors."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, one_line
from draftsmith.artifacts.redaction import describe_secret
from draftsmith.artifacts.retry import retry_on

_LOCAL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PROBE = ".written-once"  # an object that `check` writes
_WRITE = "written"
_ATTEMPTS = 3

Result = TypeVar("Result")


class Bucket:
    """Objects under an address such as `s3://bucket/prefix`, with forward slashes in their names.

    Credentials come from the environment, in the way of fsspec's package for the protocol, never from the address.
    Raises DraftsmithError for an unusable address, RetryableError if the object store cannot be reached.
    """

    def __init__(self, address: str, field: str) -> None:
        """field: name of the setting, for errors."""
        self.address, self._field = address.rstrip("/"), field
        if "://" not in address:
            raise DraftsmithError(f"{field}: {address} is no address. Give one such as s3://bucket/prefix.")
        if (secret := describe_secret(address)) is not None:
            raise DraftsmithError(
                f"{field}: {address} is {secret}. Remove it, and set the credentials in the environment (for S3 "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile)."
            )
        import fsspec  # here: only a store with a bucket needs it

        try:
            options = {"use_listings_cache": False}  # other hosts write too
            if address.startswith(("file:", "local:")):
                options["auto_mkdir"] = True
            self._system, root = fsspec.core.url_to_fs(self.address, **options)
        except (ImportError, ValueError, TypeError) as error:  # no such protocol, or its package is missing
            raise DraftsmithError(f"{field}: {address}: {one_line(error)}") from error
        self._root = root.rstrip("/")

    def address_of(self, name: str) -> str:
        return f"{self.address}/{name}"

    def check(self) -> None:
        """Write an empty object. Raises DraftsmithError if there is no such bucket."""
        self.write(_PROBE, b"")

    def read(self, name: str) -> bytes | None:
        """Return the object's content; None if there is none."""
        return self.read_all([name]).get(name)

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the content of those objects that exist, by name."""
        paths = {self._path(name): name for name in names}

        def cat() -> dict[str, bytes]:
            contents = self._system.cat(list(paths), on_error="return") if paths else {}
            existing = {path: value for path, value in contents.items() if not isinstance(value, FileNotFoundError)}
            for value in existing.values():
                if isinstance(value, Exception):
                    raise value
            return {paths[path]: bytes(value) for path, value in existing.items()}

        return self._call(next(iter(paths.values()), ""), "read", cat)

    def write(self, name: str, content: bytes) -> None:
        """Write the object, replacing any existing one."""
        self._call(name, _WRITE, lambda: self._system.pipe_file(self._path(name), content))

    def upload(self, path: Path, name: str) -> None:
        """Upload a file as an object, which appears only when it is complete."""
        self._call(name, _WRITE, lambda: self._system.put_file(str(path), self._path(name)))

    def download(self, name: str, path: Path) -> bool:
        """Download the object into a file; return False if there is none."""

        def get() -> bool:
            try:
                self._system.get_file(self._path(name), str(path))
            except FileNotFoundError:
                return False
            return True

        return self._call(name, "read", get)

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Return the size in bytes of every object below a folder, by its name relative to the address."""

        def find() -> dict[str, int]:
            self._system.invalidate_cache()
            try:
                listing = self._system.find(self._path(folder) if folder else self._root, detail=True)
            except FileNotFoundError:
                return {}
            return {path[len(self._root) + 1 :]: int(info["size"]) for path, info in listing.items()}

        return self._call(folder, "listed", find)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _call(self, name: str, doing: str, act: Callable[[], Result]) -> Result:
        """Call the file system, with retries; `doing` completes "cannot be …" in errors."""
        again = retry_on(Exception, give_up=lambda error, attempts, _seconds: _is_final(error) or attempts == _ATTEMPTS)
        try:
            return again(act)()
        except Exception as error:  # depends on the package: no credentials, no such bucket, no network
            if _is_local_disk_error(error):
                raise
            if isinstance(error, FileNotFoundError) and doing == _WRITE:
                raise DraftsmithError(
                    f"{self._field}: {self.address}: there is no such bucket ({one_line(error)}). Correct the address "
                    "or create the bucket."
                ) from error
            raise RetryableError(
                f"{self.address_of(name)}: cannot be {doing} ({one_line(error)}). Check the address, the credentials "
                "and the network."
            ) from error


def _is_final(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError) or _is_local_disk_error(error)


def _is_local_disk_error(error: BaseException) -> bool:
    """Return whether an error is about a local file: an object store's errors name none."""
    return isinstance(error, OSError) and bool(error.filename or error.errno in _LOCAL_DISK_ERRORS)
