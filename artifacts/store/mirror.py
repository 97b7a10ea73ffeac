"""A store that is mirrored in a bucket: artifacts are pushed at commit, and pulled when they are missing here.

In the bucket an artifact has its manifest at `STAGE/KEY/manifest.json` (KEY: its first digits, as on disk) and its
files at `STAGE/KEY/CONTENT-VOLATILE/…`, by their content ids. Files are pushed first and the manifest last, so that an
artifact exists if and only if its manifest does. If two hosts make the same key concurrently, the second takes the
artifact of the first. `--force` replaces the manifest; the files of the old one stay for their readers.

`<home>/store` has the same folders as a store on disk, as a cache: the bucket's manifests are authoritative, and an
artifact whose files were not read here yet has only its manifest.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from draftsmith.artifacts.atomic import atomic_path, disk_errors, remove_temporary, write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError, one_line
from draftsmith.artifacts.locks import LockWait, locked
from draftsmith.artifacts.redaction import describe_secret
from draftsmith.artifacts.retry import retry_on
from draftsmith.artifacts.store.local import REPLACED, SHORT, Store
from draftsmith.artifacts.store.manifest import (
    MANIFEST,
    Artifact,
    FileEntry,
    Manifest,
    content_id,
    damaged,
    manifest_text,
    parse_manifest,
    read_manifest,
    sha256_file,
)

_LOCAL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_PROBE = ".written-once"  # an object that `check` writes
_WRITE = "written"
_ATTEMPTS = 3

Result = TypeVar("Result")


class Bucket:
    """Objects under an address such as `s3://bucket/prefix`, with forward slashes in their names.

    Credentials come from the environment, as fsspec's package for the protocol reads them, never from the address.
    Raises DraftsmithError for an unusable address, RetryableError if the object store cannot be reached.
    """

    def __init__(self, address: str, field: str) -> None:
        """Open the object store behind an address. field: name of the setting, for errors."""
        self.address, self._field = address.rstrip("/"), field
        if "://" not in address:
            raise DraftsmithError(f"{field}: {address} is not an address. Use one such as s3://bucket/prefix.")
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
        """Return the content of the existing ones of these objects, by name."""
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

        def give_up(error: BaseException, attempts: int, _seconds: float) -> bool:
            return attempts == _ATTEMPTS or isinstance(error, FileNotFoundError) or _is_local_disk_error(error)

        again = retry_on(Exception, give_up=give_up)
        try:
            return again(act)()
        except Exception as error:  # its class depends on the package: no credentials, no such bucket, no network
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


def _is_local_disk_error(error: BaseException) -> bool:
    """Return whether an error is about a local file: an object store's errors name none."""
    return isinstance(error, OSError) and bool(error.filename or error.errno in _LOCAL_DISK_ERRORS)


log = logging.getLogger(__name__)
STORE_VARIABLE = "DRAFTSMITH_STORE"  # an address for fsspec, such as s3://bucket/prefix
_FETCH_LIMIT_S = 24 * 3600.0  # wait for another process of this home that fetches the same artifact


class MirroredStore(Store):
    """A store whose artifacts are also in a bucket."""

    def __init__(self, root: Path, bucket: Bucket) -> None:
        """Keep copies on this machine in folder `root`."""
        super().__init__(root)
        self._bucket = bucket

    @property
    def location(self) -> str:
        return self._bucket.address

    def check(self) -> None:
        self._bucket.check()

    # -- finding -------------------------------------------------------------------------------------------------

    def find(self, stage: str, key: str) -> Artifact | None:
        manifest = self._pushed(stage, key[:SHORT])
        if manifest is None:
            return None
        try:
            self._adopt_manifest(manifest)
        except OSError as error:  # in a read-only home the manifest stays in memory
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        return Artifact(self.path(stage, key), manifest)

    def manifest_at(self, stage: str, key: str) -> Manifest | None:
        try:
            return self._pushed(stage, key[:SHORT])
        except RetryableError:
            raise
        except DraftsmithError:
            return None

    def list(self) -> list[Manifest]:
        manifests = []
        names = [name for name in self._bucket.sizes() if name.count("/") == 2 and name.endswith(f"/{MANIFEST}")]
        for name, content in self._bucket.read_all(names).items():
            try:
                manifest = parse_manifest(content, self._bucket.address_of(name))
            except DraftsmithError as error:
                log.warning("ignored in the list: %s", error)
                continue
            manifests.append(manifest)
        return sorted(manifests, key=lambda manifest: manifest.created_at)

    def verify(self, ref: Artifact) -> None:
        self.fetch(ref)
        super().verify(ref)

    def files_to_verify(self, ref: Artifact, manifest: Manifest) -> Mapping[str, FileEntry]:
        return {name: entry for name, entry in manifest.files.items() if (ref.path / name).exists()}

    def _repair(self, ref: Artifact, name: str, what: str, *, read: bool = False) -> None:
        """Fetch a damaged copy again. Raises DraftsmithError if it was `read` or is damaged in the bucket."""
        if read:
            raise DraftsmithError(f"{ref.path / name}: {what}. Run the same command again: it fetches the file again.")
        log.warning("%s: %s. It is fetched again.", ref.path / name, what)
        with self._fetching(ref):
            self._pull(read_manifest(ref.path), name, ref.path / name)

    def _quarantine(self, folder: Path) -> str:
        """Only return advice: another host with an intact copy may have made the artifact."""
        return f"to be made again with `--force {folder.parent.name}` if this host made it"

    def _pushed(self, stage: str, short: str) -> Manifest | None:
        """Return the manifest in the bucket, or None. Raises DraftsmithError for a damaged one."""
        name = _manifest_name(stage, short)
        content = self._bucket.read(name)
        if content is None:
            return None
        address = self._bucket.address_of(name)
        manifest = parse_manifest(content, address, stage)
        if (manifest.stage, manifest.key[:SHORT]) != (stage, short):
            raise damaged(address, stage, f"belongs to {manifest.stage}/{manifest.key[:SHORT]}")
        return manifest

    # -- pulling -------------------------------------------------------------------------------------------------

    def fetch(self, ref: Artifact, files: Collection[str] | None = None) -> None:
        """Download an artifact's missing files (all, or these) and verify their checksums.

        Raises DraftsmithError for files missing or damaged in the bucket, RetryableError if it cannot be reached.
        """
        manifest = ref.manifest
        requested = {name: entry for name, entry in manifest.files.items() if files is None or name in files}
        if not _missing(ref.path, requested):
            return
        with self._fetching(ref):
            self._adopt_manifest(manifest)
            remove_temporary(ref.path)
            for name in _missing(ref.path, requested):
                self._pull(manifest, name, ref.path / name)

    def localize(self, folder: Path) -> Path:
        for path in (folder, folder.parent):  # an artifact, or a folder in one
            manifest = self.manifest_at(path.parent.name, path.name) if len(path.name) == SHORT else None
            if manifest is not None:
                ref = Artifact(self.path(manifest.stage, manifest.key), manifest)
                self.fetch(ref)
                return ref.path / folder.relative_to(path)
        return super().localize(folder)

    @contextmanager
    def _fetching(self, ref: Artifact) -> Iterator[None]:
        """Hold the lock that lets one process of this home at a time write an artifact's copy."""
        lock = self.root / ref.stage / f".lock-fetch-{ref.key[:SHORT]}"
        with (
            disk_errors(f"fetching {ref.stage}"),
            locked(lock, f"fetching {ref.stage}", LockWait(_FETCH_LIMIT_S)),
        ):
            yield

    def _pull(self, manifest: Manifest, name: str, path: Path) -> None:
        source = f"{_files_folder(manifest)}/{name}"
        with atomic_path(path) as tmp:
            for _ in range(2):  # a second time, in case the network damaged it
                if not self._bucket.download(source, tmp):
                    raise damaged(self._bucket.address_of(source), manifest.stage, "is missing")
                if sha256_file(tmp) == manifest.files[name].sha256:
                    return
            what = "has changed since it was uploaded (wrong checksum)"
            raise damaged(self._bucket.address_of(source), manifest.stage, what)

    def _adopt_manifest(self, manifest: Manifest) -> None:
        """Create an artifact's folder with this manifest. Renames a folder of other content, which may be in use."""
        folder = self.path(manifest.stage, manifest.key)
        with suppress(DraftsmithError):
            local = read_manifest(folder)
            if local.files == manifest.files:
                if local.created_at != manifest.created_at:  # made again with the same content
                    write_text(folder / MANIFEST, manifest_text(manifest))
                return
        if folder.exists():
            with suppress(FileNotFoundError):  # another process was faster
                folder.rename(renamed := folder.with_name(f"{REPLACED}{folder.name}-{time.time_ns()}"))
                os.utime(renamed)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / MANIFEST, manifest_text(manifest))

    # -- pushing -------------------------------------------------------------------------------------------------

    def _install(self, manifest: Manifest) -> Artifact:
        """Push, then rename locally. If this is interrupted, the next claim in this home continues."""
        partial = self.partial_path(manifest.stage, manifest.key)
        forced = (partial / "forced").exists()
        first = None if forced else self._pushed(manifest.stage, manifest.key[:SHORT])
        if first is not None and first.files != manifest.files:
            log.warning("another host made %s/%s first. Its artifact is used.", first.stage, first.key[:SHORT])
            self._adopt_manifest(first)
            shutil.rmtree(partial)
            return Artifact(self.path(first.stage, first.key), first)
        self._push(manifest, partial / "out", again=forced)
        return super()._install(manifest)

    def _push(self, manifest: Manifest, folder: Path, *, again: bool = False) -> None:
        """Upload the files, then the manifest. again: also upload files that are in the bucket already."""
        target = _files_folder(manifest)
        uploaded = {} if again else self._bucket.sizes(target)
        for name, entry in manifest.files.items():
            if uploaded.get(f"{target}/{name}") != entry.bytes:
                self._bucket.upload(folder / name, f"{target}/{name}")
        self._bucket.write(_manifest_name(manifest.stage, manifest.key), manifest_text(manifest).encode())

    def _finish_interrupted_commit(self, stage: str, key: str) -> Artifact | None:
        """Finish a commit; also push an artifact that this home made before it had a bucket."""
        finished = super()._finish_interrupted_commit(stage, key)
        folder = self.path(stage, key)
        if finished is not None or not folder.is_dir() or self._bucket.read(_manifest_name(stage, key)) is not None:
            return finished
        try:
            ref = self._check(folder, stage, key)
            super().verify(ref)
        except DraftsmithError:
            return None  # damaged: it is made again
        self._push(read_manifest(folder), folder)
        return ref


def _manifest_name(stage: str, key: str) -> str:
    return f"{stage}/{key[:SHORT]}/{MANIFEST}"


def _files_folder(manifest: Manifest) -> str:
    """Return the folder of an artifact's files in the bucket, which depends on their content."""
    volatile = content_id(manifest.files, volatile=True)
    return f"{manifest.stage}/{manifest.key[:SHORT]}/{manifest.content_id[:SHORT]}-{volatile[:SHORT]}"


def _missing(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Return the names of files that are missing here or have another size."""
    sizes = {name: (folder / name).stat().st_size for name in files if (folder / name).is_file()}
    return [name for name, entry in files.items() if sizes.get(name) != entry.bytes]


def open_store(home: Path) -> Store:
    """Return the store of a home: `<home>/store`, mirrored in the bucket of `DRAFTSMITH_STORE` if that is set.

    Raises DraftsmithError for an address that cannot be used.
    """
    root, address = home / "store", os.environ.get(STORE_VARIABLE)
    return MirroredStore(root, Bucket(address, STORE_VARIABLE)) if address else Store(root)
