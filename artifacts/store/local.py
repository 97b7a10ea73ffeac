"""The content-addressed store: an artifact stands under its final name only when it is complete."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from draftsmith.artifacts.atomic import disk_errors, fsync, remove_temporary, write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.locks import Lock, LockWait, is_locked, locked
from draftsmith.artifacts.store.checksums import CachedChecksum, Checksums
from draftsmith.artifacts.store.manifest import (
    MANIFEST,
    PENDING,
    SCHEMA_VERSION,
    ArtifactRef,
    FileEntry,
    InputEntry,
    Manifest,
    PendingManifest,
    Provenance,
    artifact_files,
    canonical_json,
    content_id,
    damaged,
    describe_files,
    file_sizes,
    find_named,
    manifest_text,
    overwrite_in_place,
    package_versions,
    read_checked_manifest,
    read_elsewhere,
    read_manifest,
    read_pending,
    reserve_space,
    sha256_file,
)

log = logging.getLogger(__name__)
_FOREVER = LockWait(math.inf)
SHORT = 16  # hex digits of a key in a folder's name
PARTIAL, REPLACED = ".partial-", ".replaced-"  # beginnings of the names of what is no artifact, or none any more


@dataclass(frozen=True)
class Claim:
    """The right to make one artifact, held as long as its lock. Both folders keep their content between attempts."""

    stage: str
    key: str
    out: Path  # becomes the artifact
    work: Path  # shards and checkpoints of the attempt; dropped when the artifact is complete
    lock: Lock
    forced: str = ""  # a name of a forced attempt, which it keeps where it goes on: its shards are made again once
    started: float = field(default_factory=time.monotonic)

    @property
    def lock_fd(self) -> int:
        """To be given to the stage's process (`pass_fds`): the lock lives as long as whoever writes."""
        return self.lock.fd


class Store:
    """Artifacts under `<root>/<stage>/<key[:16]>/`; `root` is `<home>/store` unless given."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or home() / "store").resolve()
        self._checksums = Checksums(self.root.parent)

    @property
    def location(self) -> str:
        """Of the artifacts, for a person."""
        return str(self.root)

    # -- names ---------------------------------------------------------------------------------------------------

    @staticmethod
    def key(
        stage: str, code_digest: str, config: Mapping[str, Any], inputs: Mapping[str, ArtifactRef], seed: int
    ) -> str:
        """Identity of a computation: sha256 of the stage, its code, its own config, its inputs' content and seed."""
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
        """Where the complete artifact stands, or will stand."""
        return self.root / stage / key[:SHORT]

    def partial_path(self, stage: str, key: str) -> Path:
        """Where an unfinished attempt keeps `out` and `work`."""
        return self.root / stage / f"{PARTIAL}{key[:SHORT]}"

    def check(self) -> None:
        """For who is about to work for hours: raises DraftsmithError where artifacts cannot be kept."""

    # -- finding -------------------------------------------------------------------------------------------------

    def find(self, stage: str, key: str) -> ArtifactRef | None:
        """The complete artifact of this key, or None. A damaged one is an error that says how to make it again."""
        path = self.path(stage, key)
        return self._check(path, stage, key) if path.is_dir() else None

    def manifest(self, ref: ArtifactRef) -> Manifest:
        return read_manifest(ref.path)

    def manifest_at(self, stage: str, key: str) -> Manifest | None:
        """Of the artifact of a key, or of its first `SHORT` digits. None if there is none that can be read."""
        try:
            return read_manifest(self.path(stage, key))
        except DraftsmithError:
            return None

    def fetch(self, ref: ArtifactRef, files: Collection[str] | None = None) -> None:
        """Have an artifact's files (all, or these) under its path, for who is about to read them: here they are."""

    def localize(self, folder: Path) -> Path:
        """Where the artifact is that a run kept as this folder, maybe on another host: here, where it says."""
        return folder

    def list(self) -> list[Manifest]:
        """Manifests of all complete artifacts, oldest first. An unreadable one is left out with a log line."""
        found = []
        for folder in sorted(self.root.glob("[!.]*/[!.]*/")):
            try:
                found.append(read_manifest(folder))
            except DraftsmithError as error:
                log.warning("left out of the list: %s", error)
        return sorted(found, key=lambda manifest: manifest.created_at)

    def resolve(self, text: str) -> ArtifactRef:
        """The one artifact that `text` names: a stage, a key or content id by prefix, `stage/key`, a path or URI."""
        path = Path(unquote(urlparse(text).path) if text.startswith("file://") else text).expanduser()
        if path.is_dir() and (path / MANIFEST).is_file():
            return read_manifest(path).ref(path.resolve())
        manifest = find_named(text, self.list(), self.location)
        return manifest.ref(self.path(manifest.stage, manifest.key))

    def verify(self, ref: ArtifactRef) -> None:
        """Check every checksum, and that no file was added or taken away."""
        manifest = read_checked_manifest(ref.path, ref.stage)
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

    def verify_once(self, ref: ArtifactRef, *, and_elsewhere: bool = True, read: bool = False) -> None:
        """Check the checksum of every file that was touched since it was last checked here, and of those that the
        artifact names elsewhere (`ELSEWHERE`), which only its readers need.

        For whoever is about to read them, or has (`read`): what was read is not mended. What was made from a damaged
        artifact since it was last found whole is set aside, with a log line: it is no artifact any more.
        """
        manifest = read_checked_manifest(ref.path, ref.stage)
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
                self._repair(ref, name, "has changed since it was written: its checksum is another", read=read)
        for name, sha256 in read_elsewhere(ref.path).items() if and_elsewhere else ():
            try:
                same = self._checksums.sha256(Path(name)) == sha256
            except OSError:
                same = False
            if not same:
                raise DraftsmithError(
                    f"{name}: is not what stage {ref.stage} found there; put it back, or take what is there now: add "
                    f"`--force {ref.stage}` to the command"
                )

    def files_to_verify(self, ref: ArtifactRef, manifest: Manifest) -> Mapping[str, FileEntry]:  # noqa: ARG002
        """The files that are there, or ought to be."""
        return manifest.files

    def _repair(self, ref: ArtifactRef, name: str, what: str, *, read: bool = False) -> None:  # noqa: ARG002
        """A file of an artifact is not as it was written; what: how. Raises DraftsmithError: it has no other copy."""
        raise damaged(ref.path / name, ref.stage, what)

    def _quarantine_dependents(self, ref: ArtifactRef, path: Path, known: CachedChecksum | None) -> None:
        """What was made from an artifact since one of its files was last whole. known: of that time."""
        whole_until = self.manifest(ref).created_at
        if known is not None:
            stat = path.stat()
            touched = stat.st_ctime if not known.matches(stat) else known.at
            whole_until = datetime.fromtimestamp(touched, UTC).isoformat(timespec="milliseconds")
        for made in self.list():
            sources = [(entry.stage, entry.key, entry.content_id) for entry in made.inputs.values()]
            if (ref.stage, ref.key, ref.content_id) in sources and made.created_at > whole_until:
                folder = self.path(made.stage, made.key)
                log.warning("%s was made from %s, which is damaged: %s", folder, path, self._quarantine(folder))

    def _quarantine(self, folder: Path) -> str:
        """An artifact is none any more; says what became of it."""
        aside = folder.with_name(f"{REPLACED}{folder.name}-{time.time_ns()}")
        folder.rename(aside)
        return f"set aside as {aside.name}"

    # -- making --------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(
        self,
        stage: str,
        key: str,
        *,
        force: bool = False,
        run: str = "",
        wait: LockWait = _FOREVER,
    ) -> Iterator[Claim | ArtifactRef]:
        """Take the key's lock (waiting for its holder) and yield a `Claim`, or the artifact if it is finished by then.

        Commits what an earlier attempt made but could not commit. The kernel releases the lock of a dead process.

        force: make the artifact again although it is complete. It does not continue an attempt without `force`, but
        does continue an earlier forced one, and logs where that is. run, wait: as in `locked`.
        """
        with ExitStack() as stack:
            with disk_errors(f"claiming {stage}"):
                lock = stack.enter_context(locked(self._lock(stage, key), run, wait))
                partial = self.partial_path(stage, key)
                begun_by_force, name = partial / "forced", ""
                forced_before = begun_by_force.exists()
                finished = self._finish_interrupted_commit(stage, key)
                done = (finished if forced_before else None) if force else self.find(stage, key)
                if done is None:
                    if force and forced_before:
                        log.warning(
                            "%s goes on from an earlier forced attempt; to begin anew, delete %s", stage, partial
                        )
                    elif force and partial.exists():
                        shutil.rmtree(partial)
                    for folder in (partial / "out", partial / "work"):
                        folder.mkdir(parents=True, exist_ok=True)
                    if force:
                        if not forced_before:
                            begun_by_force.write_text(secrets.token_hex(8))
                        name = begun_by_force.read_text()
                    else:
                        begun_by_force.unlink(missing_ok=True)
                    reserve_space(partial / PENDING)
            yield done or Claim(stage, key, partial / "out", partial / "work", lock, name)

    def is_claimed(self, stage: str, key: str) -> bool:
        """Whether a living process holds this key's lock."""
        return is_locked(self._lock(stage, key))

    def commit(
        self,
        claim: Claim,
        made_from: Provenance,
        *,
        metrics: Mapping[str, float] | None = None,
        volatile: tuple[str, ...] = (),
        duration_s: float | None = None,
    ) -> ArtifactRef:
        """Make `claim.out` the artifact: its manifest last, everything on disk, then one rename.

        If it fails on the way (a full disk), the next claim of this key commits what is there. Raises LockLostError
        if the claim's lock was taken over meanwhile.
        """
        claim.lock.check()
        with disk_errors(f"completing {claim.stage}"):
            remove_temporary(claim.out)
            names = artifact_files(claim.out)
            if not names:
                raise DraftsmithError(f"stage {claim.stage} wrote nothing to {claim.out}: there is no artifact to keep")
            for name in names:
                fsync(claim.out / name)
            for folder in (claim.out, *(path for path in claim.out.rglob("*") if path.is_dir())):
                fsync(folder)
            pending = PendingManifest(
                volatile=volatile,
                sizes=file_sizes(claim.out),
                schema_version=SCHEMA_VERSION,
                stage=claim.stage,
                key=claim.key,
                content_id="",
                created_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                config=dict(made_from.config),
                inputs={name: InputEntry.from_ref(ref) for name, ref in made_from.inputs.items()},
                code_digest=made_from.code_digest,
                seed=made_from.seed,
                files={},
                # NaN and infinity have no JSON form and would make the manifest unreadable
                metrics={name: value for name, value in (metrics or {}).items() if math.isfinite(value)},
                mlflow_run_id=made_from.mlflow_run_id,
                duration_s=round(time.monotonic() - claim.started if duration_s is None else duration_s, 3),
                versions=package_versions(claim.out),
                modules=dict(made_from.modules),
                external=dict(made_from.external),
                run=made_from.run,
                node=made_from.node,
            )
            overwrite_in_place(self.partial_path(claim.stage, claim.key) / PENDING, pending.model_dump_json().encode())
            return self._complete(pending, claim.lock)

    def _complete(self, pending: PendingManifest, lock: Lock | None = None) -> ArtifactRef:
        """Commit the files of an attempt that has ended."""
        out = self.partial_path(pending.stage, pending.key) / "out"
        files = describe_files(out, pending.volatile)
        fields = pending.model_dump(exclude={"volatile", "sizes"})
        manifest = Manifest.model_validate({**fields, "files": files, "content_id": content_id(files)})
        if lock is not None:  # again: the checksums of a large artifact take minutes
            lock.check()
        write_text(out / MANIFEST, manifest_text(manifest))
        return self._install(manifest)

    def _install(self, manifest: Manifest) -> ArtifactRef:
        """Rename a complete `out` to its final name. Killed anywhere in here, the next claim ends what was begun."""
        partial, final = self.partial_path(manifest.stage, manifest.key), self.path(manifest.stage, manifest.key)
        shutil.rmtree(partial / "work", ignore_errors=True)
        replaced = None
        if final.exists():
            replaced = final.with_name(f"{REPLACED}{final.name}-{time.time_ns()}")
            final.rename(replaced)
            os.utime(replaced)  # since when it is one
        (partial / "out").rename(final)
        for folder in (final.parent, self.root, self.root.parent):  # these too may be new
            fsync(folder)
        shutil.rmtree(partial, ignore_errors=True)
        if replaced is not None and not _holds_other_content(replaced, manifest.content_id):
            shutil.rmtree(replaced, ignore_errors=True)
        return manifest.ref(final)

    def _finish_interrupted_commit(self, stage: str, key: str) -> ArtifactRef | None:
        """The artifact of a stage that had ended when its commit was cut off, or could not be written."""
        out = self.partial_path(stage, key) / "out"
        if (out / MANIFEST).exists():
            try:
                self._check(out, stage, key)
                return self._install(read_manifest(out))
            except DraftsmithError:
                (out / MANIFEST).unlink()  # made again below, or an attempt like any other
        if (pending := read_pending(out.with_name(PENDING))) is None:
            return None
        remove_temporary(out)  # a manifest that was being written is none of the sizes
        return None if pending.sizes != file_sizes(out) else self._complete(pending)

    def _check(self, folder: Path, stage: str, key: str) -> ArtifactRef:
        """Manifest present and readable, of this key, and every file there with its size."""
        manifest = read_checked_manifest(folder, stage)
        if manifest.key != key:
            raise damaged(folder / MANIFEST, stage, f"is of another key, {manifest.key[:SHORT]}")
        for name, entry in manifest.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError:
                raise damaged(folder / name, stage, "is missing") from None
            if size != entry.bytes:
                raise damaged(folder / name, stage, f"has {size} bytes instead of {entry.bytes}")
        return manifest.ref(folder)

    def discard(self, claim: Claim) -> None:
        """Forget what an attempt has made so far: it read what it should not have."""
        for folder in (claim.out, claim.work):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)

    def _lock(self, stage: str, key: str) -> Path:
        return self.root / stage / f".lock-{key[:SHORT]}"


def _holds_other_content(folder: Path, content: str) -> bool:
    """A replaced artifact stays (hidden) only if it is sound and others may have been made from its content."""
    try:
        return read_manifest(folder).content_id != content
    except DraftsmithError:
        return False
