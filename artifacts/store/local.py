"""The content-addressed store on a disk: an artifact has its final path only when it is complete."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Collection, ItemsView, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.artifacts.atomic import disk_errors, fsync, remove_temporary, write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.identifiers import file_path
from draftsmith.artifacts.locks import Lock, LockWait, is_locked, locked
from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.checksums import CachedChecksum, Checksums
from draftsmith.artifacts.store.manifest import (
    MANIFEST,
    PENDING,
    SCHEMA_VERSION,
    Artifact,
    FileEntry,
    Manifest,
    PendingManifest,
    artifact_files,
    canonical_json,
    content_id,
    damaged,
    describe_files,
    file_sizes,
    find_named,
    manifest_text,
    read_elsewhere,
    read_manifest,
    read_pending,
    reserve_space,
    sha256_file,
)

log = logging.getLogger(__name__)
_FOREVER = LockWait(math.inf)
SHORT = 16  # hex digits of a key in a folder's name
PARTIAL, REPLACED = ".partial-", ".replaced-"  # prefixes of folders that are not yet, or no longer, artifacts


class Store:
    """Artifacts under `<root>/<stage>/<key[:16]>/`; `root` is the folder `store` of a home."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._checksums = Checksums(self.root.parent)

    @property
    def location(self) -> str:
        """Return where the artifacts are, for display."""
        return str(self.root)

    # -- keys and paths ------------------------------------------------------------------------------------------

    @staticmethod
    def key(
        stage: str, code_digest: str, config: Mapping[str, object], inputs: Mapping[str, Artifact], seed: int
    ) -> str:
        """Return the key of a computation: sha256 of the stage, its code, config, seed and its inputs' content."""
        material = {
            "schema": SCHEMA_VERSION,
            "stage": stage,
            "code": code_digest,
            "config": config,
            "inputs": {name: ref.content_id for name, ref in inputs.items()},
            "seed": seed,
        }
        return hashlib.sha256(canonical_json(material).encode()).hexdigest()

    def path(self, stage: str, key: str) -> Path:
        """Return the folder of the complete artifact, which may not exist yet."""
        return self.root / stage / key[:SHORT]

    def partial_path(self, stage: str, key: str) -> Path:
        """Return the folder with `out` and `work` of an unfinished attempt."""
        return self.root / stage / f"{PARTIAL}{key[:SHORT]}"

    def check(self) -> None:
        """Raise DraftsmithError if artifacts cannot be stored. Call it before long work."""

    # -- finding -------------------------------------------------------------------------------------------------

    def find(self, stage: str, key: str) -> Artifact | None:
        """Return the complete artifact of this key, or None. Raises DraftsmithError for a damaged one."""
        path = self.path(stage, key)
        return self._check(path, stage, key) if path.is_dir() else None

    def manifest_at(self, stage: str, key: str) -> Manifest | None:
        """Return the manifest of a key, or of its first `SHORT` digits; None if it is missing or unreadable."""
        try:
            return read_manifest(self.path(stage, key))
        except DraftsmithError:
            return None

    def fetch(self, ref: Artifact, files: Collection[str] | None = None) -> None:
        """Make an artifact's files (all, or these) available under its path. Here they always are."""

    def folders(self, made: Mapping[str, Artifact]) -> Mapping[str, Path]:
        """Return the folders of artifacts by node. Looking one up makes its files available under it.

        `items` does not: a folder may hold only the manifest.
        """
        return _Folders(self, made)

    def localize(self, folder: Path) -> Path:
        """Return this home's path of an artifact's folder that a run, maybe on another host or before a move, recorded.

        folder: an artifact's folder, or a folder in one.
        """
        for path in (folder, folder.parent):
            here = self.path(path.parent.name, path.name)
            if not folder.exists() and (here / MANIFEST).is_file():
                return here / folder.relative_to(path)
        return folder

    def list(self) -> list[Manifest]:
        """Return the manifests of all complete artifacts, oldest first. Unreadable ones are only logged."""
        manifests = []
        for folder in sorted(self.root.glob("[!.]*/[!.]*/")):
            try:
                manifests.append(read_manifest(folder))
            except DraftsmithError as error:
                log.warning("ignored in the list: %s", error)
        return sorted(manifests, key=lambda manifest: manifest.created_at)

    def resolve(self, text: str) -> Artifact:
        """Return the artifact that `text` names: a stage, prefix of a key or content id, `stage/key`, path or URI."""
        path = file_path(text) if text.startswith("file://") else Path(text).expanduser()
        if path.is_dir() and (path / MANIFEST).is_file():
            return Artifact(path.resolve(), read_manifest(path))
        manifest = find_named(text, self.list(), self.location)
        return Artifact(self.path(manifest.stage, manifest.key), manifest)

    def verify(self, ref: Artifact) -> None:
        """Check every checksum, and that no file was added or removed."""
        manifest = read_manifest(ref.path, ref.stage)
        if (manifest.key, manifest.content_id) != (ref.key, ref.content_id):
            raise damaged(ref.path / MANIFEST, ref.stage, "names another key or content id")
        for name in artifact_files(ref.path):
            if name not in manifest.files:
                raise damaged(ref.path / name, ref.stage, "is not part of the artifact")
        for name, entry in manifest.files.items():
            if not (ref.path / name).is_file():
                raise damaged(ref.path / name, ref.stage, "is missing")
            if sha256_file(ref.path / name) != entry.sha256:
                self._repair(ref, name, "has changed since it was written")

    def verify_once(self, ref: Artifact, *, and_elsewhere: bool = True, read: bool = False) -> None:
        """Check the checksum of every file that was touched since the last check.

        Artifacts that were made from a damaged one since it was last intact are quarantined, with a log line.
        and_elsewhere: also check files outside the artifact that its readers need (`ELSEWHERE`). read: the files were
        read already, so a damaged one is an error even if there is another copy.
        """
        manifest = read_manifest(ref.path, ref.stage)
        for name, entry in (manifest.files if read else self.files_to_verify(ref, manifest)).items():
            path = ref.path / name
            before = self._checksums.cached(path)
            try:
                sha256 = self._checksums.sha256(path)
            except OSError as error:
                self._repair(ref, name, f"cannot be read ({error.strerror})", read=read)
                continue
            if sha256 != entry.sha256:
                self._quarantine_dependents(ref, path, before)
                self._repair(ref, name, "has changed since it was written (wrong checksum)", read=read)
        for name, sha256 in read_elsewhere(ref.path).items() if and_elsewhere else ():
            try:
                same = self._checksums.sha256(Path(name)) == sha256
            except OSError:
                same = False
            if not same:
                raise DraftsmithError(
                    f"{name}: has changed since stage {ref.stage} read it. Restore it, or add `--force {ref.stage}` to "
                    "the command to use what is there now."
                )

    def files_to_verify(self, ref: Artifact, manifest: Manifest) -> Mapping[str, FileEntry]:  # noqa: ARG002
        """Return the files that are, or should be, on this machine."""
        return manifest.files

    def _repair(self, ref: Artifact, name: str, what: str, *, read: bool = False) -> None:  # noqa: ARG002
        """Raise DraftsmithError: this store has no other copy of a damaged file. what: the damage, for the error."""
        raise damaged(ref.path / name, ref.stage, what)

    def _quarantine_dependents(self, ref: Artifact, path: Path, last_intact: CachedChecksum | None) -> None:
        """Quarantine the artifacts that were made from `ref` after its damaged file `path` was last intact."""
        intact_until = ref.manifest.created_at
        if last_intact is not None:
            stat = path.stat()
            touched = stat.st_ctime if not last_intact.matches(stat) else last_intact.at
            intact_until = datetime.fromtimestamp(touched, UTC).isoformat(timespec="milliseconds")
        for manifest in self.list():
            sources = [(entry.stage, entry.key, entry.content_id) for entry in manifest.inputs.values()]
            if (ref.stage, ref.key, ref.content_id) in sources and manifest.created_at > intact_until:
                folder = self.path(manifest.stage, manifest.key)
                log.warning("%s was made from %s, which is damaged. It is %s.", folder, path, self._quarantine(folder))

    def _quarantine(self, folder: Path) -> str:
        """Rename an artifact's folder so that it no longer counts as one; return a phrase about it for the log."""
        renamed = folder.with_name(f"{REPLACED}{folder.name}-{time.time_ns()}")
        folder.rename(renamed)
        return f"renamed to {renamed.name}"

    # -- making --------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(
        self, stage: str, key: str, *, force: bool = False, run: str = "", node: str = "", wait: LockWait = _FOREVER
    ) -> Iterator[Attempt | Artifact]:
        """Take the key's lock and yield an `Attempt`, or the artifact if another run has completed it.

        Commits the output of an earlier attempt whose commit failed. The kernel releases the lock of a dead process.

        force: make the artifact again even if it is complete. A forced attempt continues only an earlier forced one,
        and logs its folder. run, wait: as in `locked`. node: the node that the note names.
        """
        with ExitStack() as stack:
            with disk_errors(f"claiming {stage}"):
                lock = stack.enter_context(locked(self._lock(stage, key), run, wait))
                partial = self.partial_path(stage, key)
                forced_file, forced = partial / "forced", ""
                forced_before = forced_file.exists()
                finished = self._finish_interrupted_commit(stage, key)
                complete = (finished if forced_before else None) if force else self.find(stage, key)
                if complete is None:
                    if force and forced_before:
                        log.warning(
                            "%s continues an earlier forced attempt. To start from scratch, delete %s.", stage, partial
                        )
                    elif force and partial.exists():
                        shutil.rmtree(partial)
                    for folder in (partial / "out", partial / "work"):
                        folder.mkdir(parents=True, exist_ok=True)
                    if force:
                        if not forced_before:
                            forced_file.write_text(secrets.token_hex(8))
                        forced = forced_file.read_text()
                    else:
                        forced_file.unlink(missing_ok=True)
                    reserve_space(partial / PENDING)
            if complete is not None:
                yield complete
            else:
                yield Attempt(partial, stage, key, lock, self._complete, run=run, node=node, forced=forced)

    def is_claimed(self, stage: str, key: str) -> bool:
        """Return whether a living process holds this key's lock."""
        return is_locked(self._lock(stage, key))

    def _complete(self, pending: PendingManifest, lock: Lock | None = None) -> Artifact:
        """Commit the files of a stage that has ended."""
        out = self.partial_path(pending.stage, pending.key) / "out"
        files = describe_files(out, pending.volatile)
        fields = pending.model_dump(exclude={"volatile", "sizes"})
        manifest = Manifest.model_validate({**fields, "files": files, "content_id": content_id(files)})
        if lock is not None:  # checked again, since the checksums of a large artifact take minutes
            lock.check()
        write_text(out / MANIFEST, manifest_text(manifest))
        return self._install(manifest)

    def _install(self, manifest: Manifest) -> Artifact:
        """Rename a complete `out` to its final path. If this is killed midway, the next claim finishes it."""
        partial, final = self.partial_path(manifest.stage, manifest.key), self.path(manifest.stage, manifest.key)
        shutil.rmtree(partial / "work", ignore_errors=True)
        replaced = None
        if final.exists():
            replaced = final.with_name(f"{REPLACED}{final.name}-{time.time_ns()}")
            final.rename(replaced)
            os.utime(replaced)  # `draftsmith prune` reads the time of the replacement here
        (partial / "out").rename(final)
        for folder in (final.parent, self.root, self.root.parent):  # these too may be new
            fsync(folder)
        shutil.rmtree(partial, ignore_errors=True)
        if replaced is not None and not _holds_other_content(replaced, manifest.content_id):
            shutil.rmtree(replaced, ignore_errors=True)
        return Artifact(final, manifest)

    def _finish_interrupted_commit(self, stage: str, key: str) -> Artifact | None:
        """Commit the output of a stage whose commit was interrupted or failed; None if there is none."""
        out = self.partial_path(stage, key) / "out"
        if (out / MANIFEST).exists():
            try:
                self._check(out, stage, key)
                return self._install(read_manifest(out))
            except DraftsmithError:
                (out / MANIFEST).unlink()  # written again below, or by another attempt
        if (pending := read_pending(out.with_name(PENDING))) is None:
            return None
        remove_temporary(out)  # an unfinished manifest does not count among the sizes
        return None if pending.sizes != file_sizes(out) else self._complete(pending)

    def _check(self, folder: Path, stage: str, key: str) -> Artifact:
        """Return the artifact of a folder after checking its manifest, its key and the size of every file."""
        manifest = read_manifest(folder, stage)
        if manifest.key != key:
            raise damaged(folder / MANIFEST, stage, f"has another key, {manifest.key[:SHORT]}")
        for name, entry in manifest.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError:
                raise damaged(folder / name, stage, "is missing") from None
            if size != entry.bytes:
                raise damaged(folder / name, stage, f"has {size} bytes instead of {entry.bytes}")
        return Artifact(folder, manifest)

    def _lock(self, stage: str, key: str) -> Path:
        return self.root / stage / f".lock-{key[:SHORT]}"


class _Folders(Mapping[str, Path]):
    """Folders of artifacts, whose files are fetched when they are looked up."""

    def __init__(self, store: Store, made: Mapping[str, Artifact]) -> None:
        self._store, self._made = store, made

    def __getitem__(self, node: str) -> Path:
        self._store.fetch(self._made[node])
        return self._made[node].path

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __contains__(self, node: object) -> bool:
        return node in self._made

    def items(self) -> ItemsView[str, Path]:
        return {node: made.path for node, made in self._made.items()}.items()


def _holds_other_content(folder: Path, content: str) -> bool:
    """Return whether a replaced artifact is readable and has other content, from which others may have been made."""
    try:
        return read_manifest(folder).content_id != content
    except DraftsmithError:
        return False
