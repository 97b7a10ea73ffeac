"""The manifest: what an artifact is made of, from what, by which code, and how its content is identified."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from draftsmith.artifacts.errors import DraftsmithError

SCHEMA_VERSION = 1  # part of every key: raising it makes every artifact new
MANIFEST = "manifest.json"
# A file of an artifact, path -> sha256: files elsewhere (a model's folder) that whoever reads the artifact reads too.
ELSEWHERE = "elsewhere.json"
SHARD = ".shard"  # end of the name of a stage whose artifacts are parts of another's
# In the folder of an attempt: what the manifest of a stage that has ended will say. If the commit fails (a full disk, a
# bucket that does not answer), the next claim makes it without the stage.
PENDING = "pending.json"
_PENDING_BYTES = 1 << 16  # set aside when the attempt begins, so that a full disk cannot refuse them at its end
_MIN_PREFIX = 4  # characters of a key or content id that name an artifact
_CHECKSUM = "checksum"  # of the manifest itself
VERSIONS = "versions.json"  # a file of an artifact: name -> version of what made it, beside this environment's packages
_PACKAGES = (
    *("draftsmith", "torch", "transformers", "tokenizers", "safetensors", "gguf", "accelerate"),
    *("pyarrow", "numpy", "scipy", "datasets", "reasoning-gym", "huggingface-hub"),
)


@dataclass(frozen=True)
class ArtifactRef:
    """A complete artifact, small enough to travel between processes."""

    stage: str
    key: str  # sha256 of what the artifact was made from
    content_id: str  # sha256 of what it holds
    path: Path
    volatile_id: str = ""  # the same of its volatile files: what was measured when it was made

    @property
    def uri(self) -> str:
        return self.path.as_uri()


@dataclass(frozen=True)
class Provenance:
    """Holds what an artifact was made from and by which run, for its manifest."""

    config: Mapping[str, Any]
    inputs: Mapping[str, ArtifactRef]  # name of the input -> artifact
    code_digest: str
    seed: int
    modules: Mapping[str, str] = field(default_factory=dict)
    external: Mapping[str, str] = field(default_factory=dict)
    mlflow_run_id: str | None = None
    run: str = ""
    node: str = ""


def _check_relative(name: str) -> str:
    """A path that cannot lead out of the folder that it is taken from: a manifest may come from elsewhere."""
    if not name or name.startswith("/") or "\0" in name or ".." in name.split("/"):
        raise ValueError(f"{name!r} leads out of its folder")
    return name


_RelativePath = Annotated[str, AfterValidator(_check_relative)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Frozen):
    sha256: str
    bytes: int
    volatile: bool  # differs between identical runs (timings): not part of the content id


class InputEntry(_Frozen):
    stage: _RelativePath
    key: _RelativePath
    content_id: str
    volatile_id: str

    @classmethod
    def from_ref(cls, ref: ArtifactRef) -> Self:
        return cls(stage=ref.stage, key=ref.key, content_id=ref.content_id, volatile_id=ref.volatile_id)


class Manifest(_Frozen):
    schema_version: int
    stage: _RelativePath
    key: _RelativePath
    content_id: str
    created_at: str  # ISO 8601, UTC
    config: dict[str, Any]
    inputs: dict[str, InputEntry]
    code_digest: str
    seed: int
    files: dict[_RelativePath, FileEntry]  # path relative to the artifact's folder, with forward slashes
    metrics: dict[str, float]
    mlflow_run_id: str | None
    duration_s: float  # of the attempt that completed it
    versions: dict[str, str]
    modules: dict[str, str]  # of the code, each with the start of its source's digest; none of a shard
    external: dict[str, str]  # files outside the store that the key holds, with their digests
    run: str = ""  # name of the run that made it, and
    node: str = ""  # of the node that it was there

    def ref(self, path: Path) -> ArtifactRef:
        return ArtifactRef(self.stage, self.key, self.content_id, path, content_id(self.files, volatile=True))


def local_time(moment: datetime) -> str:
    """A moment as people here read it, with its offset from UTC."""
    return moment.astimezone().isoformat(sep=" ", timespec="seconds")


def canonical_json(value: object) -> str:
    """The one text of a JSON value, whatever the order of its fields. NaN and infinity have none."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_id(files: Mapping[str, FileEntry], *, volatile: bool = False) -> str:
    """Identity of a content: sha256 over the sorted (path, sha256) of its files that are not volatile, or of those."""
    counted = sorted((path, entry.sha256) for path, entry in files.items() if entry.volatile == volatile)
    return hashlib.sha256(canonical_json(counted).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifact_files(folder: Path) -> list[str]:
    """Relative paths of an artifact's files, its manifest aside. A link is refused: an artifact holds its content."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    for path in paths:
        if path.is_symlink() or not path.is_file():
            raise DraftsmithError(f"{path}: an artifact holds regular files only; copy the content instead of a link")
    return [name for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST]


def describe_files(folder: Path, volatile: Iterable[str]) -> dict[str, FileEntry]:
    """Checksums and sizes of all files; `volatile` are names or patterns such as `timings/*`."""
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
    """The content of a manifest's file, with a checksum over its fields."""
    fields = json.loads(manifest.model_dump_json())  # as it is read
    return json.dumps({**fields, _CHECKSUM: _checksum(fields)}, indent=2, ensure_ascii=False) + "\n"


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises `DraftsmithError` if it is absent, damaged or of another version."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DraftsmithError(f"{path}: missing") from None
    except OSError as error:
        raise DraftsmithError(f"{path}: {error.strerror}") from error
    return parse_manifest(data, path)


def parse_manifest(content: bytes, where: Path | str) -> Manifest:
    """The manifest that a file holds; `where` names it in errors. Raises `DraftsmithError`."""
    try:
        data = json.loads(content)
        found = data.get("schema_version")
        if found != SCHEMA_VERSION:
            raise DraftsmithError(f"{where}: schema version {found}, this Draftsmith reads {SCHEMA_VERSION}")
        if data.pop(_CHECKSUM, None) != _checksum(data):
            raise DraftsmithError(f"{where}: has changed since it was written: its checksum is another")
        return Manifest.model_validate(data)
    except (ValueError, AttributeError, RecursionError, ValidationError) as error:
        raise DraftsmithError(f"{where}: not a readable manifest (truncated or edited)") from error


def read_elsewhere(folder: Path) -> dict[str, str]:
    """What an artifact says of files elsewhere that belong to it: path -> sha256; nothing for one that says nothing.

    Raises `DraftsmithError` if it is damaged.
    """
    path = folder / ELSEWHERE
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except ValueError as error:
        raise DraftsmithError(f"{path}: cannot be read (truncated or edited): make the artifact again") from error


def write_versions(folder: Path, **found: str) -> None:
    """Keep, beside what a stage makes, the versions of programs outside this environment that decided it."""
    (folder / VERSIONS).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def package_versions(folder: Path | None = None) -> dict[str, str]:
    """Versions that can change a result, without importing anything heavy, and those that the stage noted.

    They are no part of a key: most updates change nothing, and each would make everything again.
    """
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    noted = folder / VERSIONS if folder is not None else None
    return found | (json.loads(noted.read_bytes()) if noted is not None and noted.is_file() else {})


def read_checked_manifest(folder: Path, stage: str) -> Manifest:
    """Return the manifest of a folder, whose content id is that of its files. Raises DraftsmithError."""
    try:
        manifest = read_manifest(folder)
    except DraftsmithError as error:
        raise DraftsmithError(f"{error}: {remedy(stage)}") from error
    check_content(manifest, folder / MANIFEST)
    return manifest


def check_content(manifest: Manifest, where: Path | str) -> None:
    """Raise DraftsmithError if a manifest's content id does not follow from its files."""
    if content_id(manifest.files) != manifest.content_id:
        raise damaged(where, manifest.stage, "its content id does not follow from its files")


def remedy(stage: str) -> str:
    return f"make it again: add `--force {stage.removesuffix(SHARD)}` to the command"


def damaged(where: Path | str, stage: str, what: str) -> DraftsmithError:
    """Return the error that names a file, what is wrong with it, and how its artifact is made again."""
    return DraftsmithError(f"{where}: {what}; {remedy(stage)}")


class PendingManifest(Manifest):
    """A manifest whose files are not described yet."""

    volatile: tuple[str, ...]
    sizes: dict[str, int]  # of the files that are there, by name


def file_sizes(out: Path) -> dict[str, int]:
    return {name: (out / name).stat().st_size for name in artifact_files(out)}


def reserve_space(path: Path) -> None:
    with path.open("wb") as file, suppress(OSError):  # some file systems cannot: the bytes are asked for at the end
        os.posix_fallocate(file.fileno(), 0, _PENDING_BYTES)


def overwrite_in_place(path: Path, content: bytes) -> None:
    """Write in the space that a file has, so that a full disk takes it. Lost in a crash, the stage is run again."""
    with path.open("r+b") as file:
        file.write(content)
        file.flush()
        file.truncate()


def read_pending(path: Path) -> PendingManifest | None:
    """Return what was written at the end of a stage; None: it has not ended."""
    try:
        return PendingManifest.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def find_named(text: str, manifests: Sequence[Manifest], where: str) -> Manifest:
    """Return the one manifest that `text` names. Raises DraftsmithError, with `where`, for none or several."""
    matches = [manifest for manifest in manifests if _matches(text, manifest)]
    if len(matches) == 1:
        return matches[0]
    if not matches:
        raise DraftsmithError(f"no artifact matches {text!r} in {where}: `draftsmith status` lists them")
    choices = ", ".join(f"{m.stage}/{m.key[:12]} ({m.created_at})" for m in matches[-5:])
    raise DraftsmithError(f"{text!r} names {len(matches)} artifacts: choose one by its key, e.g. {choices}")


def _matches(text: str, manifest: Manifest) -> bool:
    stage, slash, prefix = text.rpartition("/")
    if slash:
        return stage == manifest.stage and bool(prefix) and manifest.key.startswith(prefix)
    if text == manifest.stage:
        return True
    return len(text) >= _MIN_PREFIX and (manifest.key.startswith(text) or manifest.content_id.startswith(text))
