"""The manifest of an artifact: its files, inputs, config and code, and the id of its content."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.identifiers import Digest, PlainName, RelativePath, RunId

SCHEMA_VERSION = 1  # part of every key: raising it invalidates every artifact
MANIFEST = "manifest.json"
# File of an artifact: path -> sha256 of files outside it (such as a model's folder) that its readers also read.
ELSEWHERE = "elsewhere.json"
SHARD = ".shard"  # suffix of the stage name of shards
# File in the folder of an attempt: the manifest-to-be of a stage that has ended. If the commit fails (a full disk, an
# unreachable bucket), the next claim commits without running the stage again.
PENDING = "pending.json"
_PENDING_BYTES = 1 << 16  # reserved when the attempt begins, so that a full disk cannot prevent the write at its end
_MIN_PREFIX = 4  # fewest characters of a key or content id that can name an artifact
_CHECKSUM = "checksum"  # field: checksum of the manifest itself
VERSIONS = "versions.json"  # file of an artifact: versions of programs outside this environment that made it
_PACKAGES = (
    *("draftsmith", "torch", "transformers", "tokenizers", "safetensors", "gguf", "accelerate"),
    *("pyarrow", "numpy", "scipy", "datasets", "reasoning-gym", "huggingface-hub"),
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    sha256: Digest
    bytes: int
    volatile: bool  # differs between identical runs (timings), so it is not part of the content id


class InputEntry(_Frozen):
    stage: PlainName
    key: Digest
    content_id: Digest
    volatile_id: str

    @classmethod
    def of(cls, made: Artifact) -> Self:
        return cls(stage=made.stage, key=made.key, content_id=made.content_id, volatile_id=made.volatile_id)


class Manifest(_Frozen):
    schema_version: int
    stage: PlainName
    key: Digest
    content_id: Digest
    created_at: str  # ISO 8601, UTC
    config: dict[str, Any]
    inputs: dict[str, InputEntry]
    code_digest: str
    seed: int
    files: dict[RelativePath, FileEntry]  # path relative to the artifact's folder, with forward slashes
    metrics: dict[str, float]
    mlflow_run_id: RunId | None
    duration_s: float  # duration of the attempt that completed it
    versions: dict[str, str]
    modules: dict[str, str]  # module -> start of its source's digest; empty for a shard
    external: dict[str, str]  # files outside the store that are part of the key, with their digests
    run: str = ""  # name of the run that made it
    node: str = ""  # name of the node in that run


@dataclass(frozen=True)
class Artifact:
    """A complete artifact: its folder and its manifest."""

    path: Path
    manifest: Manifest
    reused: bool = field(default=False, compare=False)  # found in the store, not made by this run

    @property
    def stage(self) -> str:
        return self.manifest.stage

    @property
    def key(self) -> str:
        """Return the sha256 of what it was made from."""
        return self.manifest.key

    @property
    def content_id(self) -> str:
        """Return the sha256 of its non-volatile files."""
        return self.manifest.content_id

    @property
    def volatile_id(self) -> str:
        """Return the sha256 of its volatile files, such as timings."""
        return content_id(self.manifest.files, volatile=True)

    @property
    def uri(self) -> str:
        return self.path.as_uri()


def local_time(moment: str | float) -> str:
    """Format a time (ISO 8601, or seconds since the epoch) in the local time zone, with its offset from UTC."""
    time = datetime.fromisoformat(moment) if isinstance(moment, str) else datetime.fromtimestamp(moment, UTC)
    return time.astimezone().isoformat(sep=" ", timespec="seconds")


def canonical_json(value: object) -> str:
    """Return the canonical JSON text of a value: sorted fields, no spaces. NaN and infinity are errors."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_id(files: Mapping[str, FileEntry], *, volatile: bool = False) -> str:
    """Return the sha256 over the sorted (path, sha256) of the non-volatile files, or of the volatile ones."""
    counted = sorted((path, entry.sha256) for path, entry in files.items() if entry.volatile == volatile)
    return hashlib.sha256(canonical_json(counted).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifact_files(folder: Path) -> list[str]:
    """Return the relative paths of an artifact's files, except its manifest. Raises DraftsmithError for a link."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise DraftsmithError(f"{path}: an artifact holds only regular files. Copy the content instead of a link.")
    return [name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST]


def describe_files(folder: Path, volatile: Iterable[str]) -> dict[str, FileEntry]:
    """Return checksums and sizes of all files. volatile: names or patterns such as `timings/*`."""
    patterns = tuple(volatile)
    return {
        name: FileEntry(
            sha256=sha256_file(folder / name),
            bytes=(folder / name).stat().st_size,
            volatile=any(fnmatch(name, pattern) for pattern in patterns),
        )
        for name in artifact_files(folder)
    }


def manifest_text(manifest: Manifest) -> str:
    """Return the content of a manifest's file, including a checksum over its fields."""
    fields = json.loads(manifest.model_dump_json())  # the checksum is over the fields as they are read
    return json.dumps({**fields, _CHECKSUM: _checksum(fields)}, indent=2, ensure_ascii=False) + "\n"


def _checksum(fields: Mapping[str, object]) -> str:
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()


def read_manifest(folder: Path, stage: str = "") -> Manifest:
    """Read the manifest of a folder. Raises DraftsmithError if it is missing, damaged or of another version.

    stage: its stage, so that the error can say how to make it again; empty if it is unknown.
    """
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DraftsmithError(f"{path}: missing. {remedy(stage)}") from None
    except OSError as error:
        raise DraftsmithError(f"{path}: {error.strerror}. {remedy(stage)}") from error
    return parse_manifest(data, path, stage)


def parse_manifest(content: bytes, where: Path | str, stage: str = "") -> Manifest:
    """Parse the content of a manifest's file; `where` names the file in errors. Raises as `read_manifest` does."""
    advice = remedy(stage)
    try:
        data = json.loads(content)
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise DraftsmithError(
                f"{where}: schema version {version}, this Draftsmith reads {SCHEMA_VERSION}. {advice}"
            )
        if data.pop(_CHECKSUM, None) != _checksum(data):
            raise DraftsmithError(f"{where}: has changed since it was written (wrong checksum). {advice}")
        return Manifest.model_validate(data)
    except (ValueError, AttributeError, RecursionError, ValidationError) as error:
        raise DraftsmithError(f"{where}: not a readable manifest (truncated or edited). {advice}") from error


def read_elsewhere(folder: Path) -> dict[str, str]:
    """Return path -> sha256 of the files outside the artifact that belong to it, if any.

    Raises DraftsmithError if the list is damaged.
    """
    path = folder / ELSEWHERE
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except ValueError as error:
        raise DraftsmithError(f"{path}: cannot be read (truncated or edited). Make the artifact again.") from error


def write_versions(folder: Path, **programs: str) -> None:
    """Write the versions of programs outside this environment that affect a stage's output."""
    (folder / VERSIONS).write_text(json.dumps(programs, indent=2) + "\n", encoding="utf-8")


def package_versions(folder: Path | None = None) -> dict[str, str]:
    """Return the versions of packages that can change a result, and those that the stage wrote in `folder`.

    Imports none of them. Versions are not part of a key: most updates change no result, but all would invalidate it.
    """
    installed = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    noted = folder / VERSIONS if folder is not None else None
    return installed | (json.loads(noted.read_bytes()) if noted is not None and noted.is_file() else {})


def remedy(stage: str) -> str:
    """Return the sentence that says how to make a stage's artifact again. stage: empty if it is unknown."""
    if not stage:
        return "Restore it, or make the artifact again."
    return f"Make it again: add `--force {stage.removesuffix(SHARD)}` to the command."


def damaged(where: Path | str, stage: str, what: str) -> DraftsmithError:
    """Return the error that names a file, the damage and the remedy."""
    return DraftsmithError(f"{where}: {what}. {remedy(stage)}")


class PendingManifest(Manifest):
    """A manifest-to-be: what an artifact is made from and, once its files are complete, their sizes."""

    schema_version: int = SCHEMA_VERSION
    content_id: str = ""
    created_at: str = ""
    files: dict[RelativePath, FileEntry] = {}
    metrics: dict[str, float] = {}
    mlflow_run_id: RunId | None = None
    duration_s: float = 0.0
    versions: dict[str, str] = {}
    modules: dict[str, str] = {}
    external: dict[str, str] = {}
    volatile: tuple[str, ...] = ()  # names or patterns of files that differ between identical runs
    sizes: dict[str, int] = {}  # bytes of each file of the attempt


def file_sizes(out: Path) -> dict[str, int]:
    return {name: (out / name).stat().st_size for name in artifact_files(out)}


def reserve_space(path: Path) -> None:
    """Reserve disk space for a pending manifest."""
    with path.open("wb") as file, suppress(OSError):  # not every file system can; then the write at the end may fail
        os.posix_fallocate(file.fileno(), 0, _PENDING_BYTES)


def overwrite_in_place(path: Path, content: bytes) -> None:
    """Write into the space that a file already has, so that it works on a full disk. Not durable in a crash."""
    with path.open("r+b") as file:
        file.write(content)
        file.flush()
        file.truncate()


def read_pending(path: Path) -> PendingManifest | None:
    """Return the pending manifest that was written at the end of a stage; None if the stage has not ended."""
    try:
        return PendingManifest.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def find_named(text: str, manifests: Sequence[Manifest], where: str) -> Manifest:
    """Return the one manifest that `text` identifies. Raises DraftsmithError for none or several, naming `where`."""
    matches = [manifest for manifest in manifests if _matches(text, manifest)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise DraftsmithError(f"no artifact matches {text!r} in {where}. `draftsmith status` lists them.")
    choices = ", ".join(f"{m.stage}/{m.key[:12]} ({m.created_at})" for m in matches[-5:])
    raise DraftsmithError(f"{text!r} matches {len(matches)} artifacts. Choose one by its key, such as {choices}.")


def _matches(text: str, manifest: Manifest) -> bool:
    stage, slash, prefix = text.rpartition("/")
    if slash:
        return stage == manifest.stage and bool(prefix) and manifest.key.startswith(prefix)
    if text == manifest.stage:
        return True
    return len(text) >= _MIN_PREFIX and (manifest.key.startswith(text) or manifest.content_id.startswith(text))
