"""A store whose artifacts lie in an object store; the home keeps copies of what its runs make and read.

In the bucket an artifact is `STAGE/KEY/manifest.json` (KEY: its first digits, as on a disk), and its files lie beside
it under their content: `STAGE/KEY/CONTENT-VOLATILE/…`. Files go up first and the manifest last, so that an artifact is
there if and only if its manifest is: what an upload leaves that was cut off is named by none. The manifest is written
on the condition that there is none. No lock holds across hosts: of two that make the same key at once the first one's
manifest stands, and the second takes that artifact for its own. `--force` replaces the manifest; the files of the old
one stay until they are pruned, for whoever reads them.

`<home>/store` has the same folders as a store on a disk. A folder without a manifest in the bucket is no artifact, and
one whose files were not read here yet has its manifest alone.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from draftsmith.artifacts.atomic import atomic_path, disk_errors, remove_temporary, write_text
from draftsmith.artifacts.bucket import Bucket, Stored
from draftsmith.artifacts.checksums import Known
from draftsmith.artifacts.damage import check_content, damaged
from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.locks import locked
from draftsmith.artifacts.manifest import (
    MANIFEST,
    ArtifactRef,
    FileEntry,
    Manifest,
    artifact_files,
    content_id,
    manifest_text,
    parse_manifest,
    read_manifest,
    sha256_file,
)
from draftsmith.artifacts.store import REPLACED, SHORT, Store

log = logging.getLogger(__name__)
FRESH_S = 24 * 3600.0  # an object that an upload finds there counts as its own, and prune leaves it, for so long
_FETCH_LIMIT_S = 24 * 3600.0  # for another process of this home that fetches the same artifact


class RemoteStore(Store):
    """As `Store`, with the artifacts in a bucket."""

    def __init__(self, root: Path, bucket: Bucket) -> None:
        """root: of the copies on this machine."""
        super().__init__(root)
        self._bucket = bucket
        self._seen: dict[tuple[str, str], Manifest] = {}  # stage and short key: as they were last read

    @property
    def where(self) -> str:
        return self._bucket.address

    def check(self) -> None:
        self._bucket.check()

    # -- finding -------------------------------------------------------------------------------------------------

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        manifest = self._stored(stage, key[:SHORT])
        if manifest is None:
            return None
        if manifest.key != key:
            raise damaged(self._address(stage, key), stage, f"is of another key, {manifest.key[:SHORT]}")
        try:
            self._keep(manifest)
        except OSError as error:  # a home that may only be read: the manifest is kept in memory
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        return manifest.ref(self.path(stage, key))

    def manifest(self, ref: ArtifactRef) -> Manifest:
        seen = self._seen.get((ref.stage, ref.key[:SHORT]))
        return seen if seen is not None and ref.content_id == seen.content_id else read_manifest(ref.path)

    def manifest_at(self, stage: str, key: str) -> Manifest | None:
        try:
            return self._stored(stage, key[:SHORT])
        except RetryableError:
            raise
        except DraftsmithError:
            return None

    def list(self) -> list[Manifest]:
        found = []
        manifests = [name for name in self._bucket.listed() if _place(name) is not None]
        for name, content in self._bucket.read_all(manifests).items():
            try:
                manifest = parse_manifest(content, self._bucket.address_of(name))
            except DraftsmithError as error:
                log.warning("left out of the list: %s", error)
                continue
            self._seen[manifest.stage, manifest.key[:SHORT]] = manifest
            found.append(manifest)
        return sorted(found, key=lambda manifest: manifest.created_at)

    def verify(self, ref: ArtifactRef) -> None:
        self.fetch(ref)
        super().verify(ref)

    def to_verify(self, ref: ArtifactRef, manifest: Manifest) -> Mapping[str, FileEntry]:
        return {name: entry for name, entry in manifest.files.items() if (ref.path / name).exists()}

    def _mend(self, ref: ArtifactRef, name: str, what: str, *, read: bool = False) -> None:
        """The copy here is damaged: fetched once more, unless it was `read`. Raises DraftsmithError then, and if the
        bucket's is damaged too."""
        path, manifest = ref.path / name, read_manifest(ref.path)
        if read:
            raise DraftsmithError(f"{path}: {what}; run the same command again, which fetches it again")
        with self._fetching(ref):
            if path.is_file() and sha256_file(path) == manifest.files[name].sha256:
                return  # another process was faster
            if path.exists():
                path.rename(aside := _aside(ref.path))
                log.warning("%s: %s: fetched again; the damaged copy is %s", path, what, aside)
            self._fetch_file(manifest, name, path)

    def _set_doubtful_aside(self, ref: ArtifactRef, path: Path, known: Known | None) -> None:
        with suppress(RetryableError):  # a bucket that does not answer hides no damage
            super()._set_doubtful_aside(ref, path, known)

    def _set_aside(self, folder: Path) -> str:
        """Which host made it is not known: what others read there was whole."""
        return f"make it again (`--force {folder.parent.name}`) if this host made it"

    # -- fetching ------------------------------------------------------------------------------------------------

    def fetch(self, ref: ArtifactRef, files: Collection[str] | None = None) -> None:
        """Have the files of an artifact under its path, each compared with its checksum when it comes.

        Raises DraftsmithError for what is gone or damaged in the bucket, RetryableError if that does not answer.
        """
        manifest = self.manifest(ref)
        wanted = {name: entry for name, entry in manifest.files.items() if files is None or name in files}
        if not _missing(ref.path, wanted):
            return
        with self._fetching(ref):
            self._keep(manifest)
            remove_temporary(ref.path)
            for name in _missing(ref.path, wanted):
                self._fetch_file(manifest, name, ref.path / name)

    @contextmanager
    def _fetching(self, ref: ArtifactRef) -> Iterator[None]:
        """One process of this home at a time writes an artifact's copy."""
        lock = self.root / ref.stage / f".lock-fetch-{ref.key[:SHORT]}"
        with (
            disk_errors(f"fetching {ref.stage}"),
            locked(lock, run=f"fetching {ref.stage}", limit_s=_FETCH_LIMIT_S),
        ):
            yield

    def here(self, folder: Path) -> Path:
        for place in (folder, folder.parent):  # of an artifact, or a folder in it
            manifest = self.manifest_at(place.parent.name, place.name) if len(place.name) == SHORT else None
            if manifest is not None:
                ref = manifest.ref(self.path(manifest.stage, manifest.key))
                self.fetch(ref)
                return ref.path / folder.relative_to(place)
        return folder

    def _fetch_file(self, manifest: Manifest, name: str, path: Path) -> None:
        source, entry = f"{_files_of(manifest)}/{name}", manifest.files[name]
        with atomic_path(path) as tmp:
            for _ in range(2):  # what the network damages once comes whole the second time
                if not self._bucket.download(source, tmp):
                    raise damaged(self._bucket.address_of(source), manifest.stage, "is missing")
                if sha256_file(tmp) == entry.sha256:
                    return
            what = "has changed since it was uploaded: its checksum is another"
            raise damaged(self._bucket.address_of(source), manifest.stage, what)

    def _stored(self, stage: str, short: str) -> Manifest | None:
        """The manifest in the bucket. Raises DraftsmithError for a damaged one."""
        address = self._address(stage, short)
        content = self._bucket.read(f"{stage}/{short}/{MANIFEST}")
        if content is None:
            self._seen.pop((stage, short), None)
            return None
        manifest = parse_manifest(content, address)
        if (manifest.stage, manifest.key[:SHORT]) != (stage, short):
            raise damaged(address, stage, f"is that of {manifest.stage}/{manifest.key[:SHORT]}")
        check_content(manifest, address)
        self._seen[stage, short] = manifest
        return manifest

    def _has(self, stage: str, short: str) -> bool:
        """Whether a manifest is there, damaged or not."""
        try:
            return self._stored(stage, short) is not None
        except RetryableError:
            raise
        except DraftsmithError:
            return True

    def _keep(self, manifest: Manifest) -> None:
        """The folder of an artifact with its manifest. One of another content is moved aside: a stage may read it."""
        folder = self.path(manifest.stage, manifest.key)
        with suppress(DraftsmithError):
            kept = read_manifest(folder)
            if _same(kept, manifest):
                return
            if kept.files == manifest.files:  # made again, with what it was
                write_text(folder / MANIFEST, manifest_text(manifest))
                return
        if folder.exists():
            with suppress(FileNotFoundError):  # another process was faster
                folder.rename(aside := _aside(folder))
                os.utime(aside)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / MANIFEST, manifest_text(manifest))

    # -- making --------------------------------------------------------------------------------------------------

    def _install(self, manifest: Manifest) -> ArtifactRef:
        """Upload, then the same on the disk. Killed anywhere in here, the next claim of this home goes on."""
        partial = self.partial(manifest.stage, manifest.key)
        taken = self._upload(manifest, partial / "out", replace=(partial / "forced").exists())
        if not _same(taken, manifest):
            log.warning("another host has made %s/%s meanwhile: its artifact is taken", taken.stage, taken.key[:SHORT])
            _become(partial / "out", taken)
        self._seen[taken.stage, taken.key[:SHORT]] = taken
        return super()._install(taken)

    def _upload(self, manifest: Manifest, folder: Path, *, replace: bool) -> Manifest:
        """Files, then the manifest. Returns that which stands in the bucket: another one if that was first."""
        beside = _files_of(manifest)
        there = {} if replace else self._bucket.listed(beside)
        for name, entry in manifest.files.items():
            if not _is_fresh(there.get(f"{beside}/{name}"), entry.bytes):
                self._bucket.upload(folder / name, f"{beside}/{name}")
        place = f"{manifest.stage}/{manifest.key[:SHORT]}/{MANIFEST}"
        content = manifest_text(manifest).encode()
        if replace:
            self._bucket.replace(place, content)
            return manifest
        if self._bucket.create(place, content):
            return manifest
        first = self._stored(manifest.stage, manifest.key[:SHORT])
        if first is None:
            raise RetryableError(
                f"{self._bucket.address_of(place)}: another host writes it: run the same command again"
            )
        return first

    def _finish_interrupted_commit(self, stage: str, key: str) -> ArtifactRef | None:
        """Also: an artifact of this home that was made before the bucket was chosen is uploaded, not made again."""
        finished = super()._finish_interrupted_commit(stage, key)
        folder = self.path(stage, key)
        if finished is not None or not folder.is_dir() or self._has(stage, key[:SHORT]):
            return finished
        try:
            ref = self._check(folder, stage, key)
            super().verify(ref)
        except DraftsmithError:
            return None  # no whole artifact: made again
        self._upload(read_manifest(folder), folder, replace=False)
        return ref

    # -- pruning -------------------------------------------------------------------------------------------------

    def unnamed(self, before: float) -> Iterator[tuple[str, Mapping[str, Stored]]]:
        """Objects that no manifest names and that were not written since a moment: of uploads that were cut off, and
        of artifacts that were replaced. Yields (folder in the bucket, its objects), none of the last day: an upload in
        progress looks the same."""
        before = min(before, time.time() - FRESH_S)
        folders: dict[str, dict[str, Stored]] = {}
        for name, stored in self._bucket.listed().items():
            if _place(name) is None and name.count("/") > 2:
                folders.setdefault("/".join(name.split("/")[:3]), {})[name] = stored
        for folder, objects in folders.items():
            if max(each.modified for each in objects.values()) < before and not self._names(folder):
                yield folder, objects

    def delete_unnamed(self, folder: str, objects: Mapping[str, Stored]) -> bool:
        """Delete what `unnamed` found, unless a manifest names it by now, or somebody goes on with the upload."""
        if self._names(folder) or self._bucket.listed(folder) != objects:
            return False
        self._bucket.delete(objects)
        return True

    def _names(self, folder: str) -> bool:
        """Whether the manifest names a folder of files; one that cannot be read may."""
        stage, short, _ = folder.split("/")
        try:
            manifest = self._stored(stage, short)
        except RetryableError:
            raise
        except DraftsmithError:
            return True
        return manifest is not None and _files_of(manifest) == folder

    def _address(self, stage: str, key: str) -> str:
        return self._bucket.address_of(f"{stage}/{key[:SHORT]}/{MANIFEST}")


def _aside(path: Path) -> Path:
    return path.with_name(f"{REPLACED}{path.name}-{time.time_ns()}")


def _files_of(manifest: Manifest) -> str:
    """The folder of an artifact's files in the bucket: of the same content, the same."""
    volatile = content_id(manifest.files, volatile=True)
    return f"{manifest.stage}/{manifest.key[:SHORT]}/{manifest.content_id[:SHORT]}-{volatile[:SHORT]}"


def _place(name: str) -> tuple[str, str] | None:
    """Stage and short key of a manifest's object; None for another one."""
    parts = name.split("/")
    return (parts[0], parts[1]) if len(parts) == 3 and parts[2] == MANIFEST else None


def _same(one: Manifest, other: Manifest) -> bool:
    return one.files == other.files and one.created_at == other.created_at


def _missing(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Those that are not there, or not whole."""
    sizes = {name: (folder / name).stat().st_size for name in files if (folder / name).is_file()}
    return [name for name, entry in files.items() if sizes.get(name) != entry.bytes]


def _is_fresh(stored: Stored | None, size: int) -> bool:
    return stored is not None and stored.bytes == size and stored.modified > time.time() - FRESH_S


def _become(out: Path, manifest: Manifest) -> None:
    """An attempt's files become those of the artifact that was first, as far as they are the same."""
    for name in artifact_files(out):
        if name not in manifest.files or sha256_file(out / name) != manifest.files[name].sha256:
            (out / name).unlink()
    for folder in sorted((path for path in out.rglob("*") if path.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            shutil.rmtree(folder)
    write_text(out / MANIFEST, manifest_text(manifest))
