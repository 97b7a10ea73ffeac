"""Commands about a line of drafters: who serves and why, and how to change it by hand."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, find_disk_error, from_os_error
from draftsmith.artifacts.home import apply_user_umask, home
from draftsmith.artifacts.store.manifest import MANIFEST, Manifest, read_manifest, remedy
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.store.retention import artifacts_in_use
from draftsmith.artifacts.tracking.registry import BY_HAND, PREVIOUS, ROLLED_BACK, Registry, Version
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh.line import FASTEST_BLOCK, artifact_folder, download_upload, find_artifact, registry
from draftsmith.stages.data.load import DRAFTER_FOLDER
from draftsmith.stages.target.info import model_path, read_target_info

log = logging.getLogger(__name__)
_WIDE = 120  # columns of a terminal


def champions(display: Display, line: str) -> None:
    """Every version of a line with what it was worth, then what happened to the line: who became the champion when and
    why, and what drift checks saw."""
    lines = registry()
    versions = lines.versions(line)
    if not versions:
        raise lines.unknown_line(line)
    head = ["version", "alias", "outcome", "why", "tau", "speed-up", "registered"]
    rows = [_row(each) for each in versions]
    if display.console.width >= _WIDE:
        head += ["arm", "target", "artifact"]
        for row, each in zip(rows, versions, strict=True):
            target = each.tags.get("target_digest", "")[:12]
            row += [each.tags.get("arm", "-"), target or "-", f"{each.stage}/{each.key[:16]}"]
    display.table(head, rows, title=line, text_columns=len(head))
    told = []
    for event in lines.events(line):
        before = "none" if event.before is None else f"version {event.before}"
        text = f"version {event.version} {event.what} (before: {before}) by {event.by}: {event.why}"
        told.append((event.at, text))
    for seen in lines.drift(line):
        told.append((seen["at"], f"version {seen['version']} checked: tau {seen['tau']:.3f}: {seen['decision']}"))
    for at, text in sorted(told):
        display.line(f"{at}  {text}")


def _row(version: Version) -> list[str]:
    """Return what fits into 80 columns: what the gate decided of a version, and what it was worth."""
    tags = version.tags
    outcome = tags.get("outcome") or ("promoted" if "promoted_at" in tags else "-")  # an earlier version kept none
    figures = [f"{float(tags[name]):.3f}" if tags.get(name) else "-" for name in ("tau", "speedup")]
    aliases = ", ".join(version.aliases) or "-"
    return [str(version.number), aliases, outcome, tags.get("rules") or "-", *figures, version.created_at[:10]]


def promote(display: Display, text: str, why: str, *, dry_run: bool) -> None:
    """`LINE@VERSION` becomes the champion, after its files were compared with their checksums."""
    lines = registry()
    version = lines.resolve(text)
    if not dry_run:
        lines.complete_promotion(version.line)
    _move(display, lines, version, why or "by hand", BY_HAND, dry_run=dry_run)


def rollback(display: Display, line: str, why: str, *, dry_run: bool) -> None:
    """The previous champion serves again, unless that is the one that a rollback has just taken out of service."""
    lines = registry()
    lost = None if dry_run else lines.complete_promotion(line)
    if lost is not None and lost.what == ROLLED_BACK:  # the same command, when MLflow was lost in the midst of it
        display.line(f"{line} version {lost.version} is the champion now, in place of version {lost.before}")
        return
    version = lines.resolve(f"{line}@{PREVIOUS}")
    undone = lines.rollback_event(version)
    if undone is not None and undone.what == ROLLED_BACK:
        raise DraftsmithError(
            f"{version} served before, and {undone.by} rolled it back at {undone.at} ({undone.why}): to have it or "
            f"another one serve, `draftsmith promote {line}@VERSION` (`draftsmith champions {line}` lists them)"
        )
    _move(display, lines, version, why or "by hand", ROLLED_BACK, dry_run=dry_run)


def _move(display: Display, lines: Registry, version: Version, why: str, what: str, *, dry_run: bool) -> None:
    now = lines.champion(version.line)
    if now is not None and now.number == version.number:
        display.line(f"{version} is the champion already")
        return
    from_what = "nobody" if now is None else f"version {now.number}"
    made_for = [each.tags.get("target_digest", "") for each in (version, now) if each is not None]
    if len(set(made_for)) > 1 and all(made_for):
        display.line(
            f"warning: {version} was trained for target {made_for[0][:12]}, {from_what} for {made_for[1][:12]}: what "
            "serves the latter accepts fewer of its drafts"
        )
    if dry_run:
        verified(version)
        display.line(f"{version} would become the champion in place of {from_what} (nothing was changed)")
        return
    with artifacts_in_use(home(), f"promotion of {version}", display.line):  # until an alias says that it is needed
        verified(version)
        lines.promote(version, expected=now, why=why, what=what)
    display.line(f"{version} is the champion now, in place of {from_what}; restart or reload the servers that draft")


def export(display: Display, text: str, folder: Path, layout: str = "sglang", *, dry_run: bool) -> None:
    """A verified copy of a version's checkpoint: as it is, which is what SGLang loads, or in vLLM's `speculators`."""
    version = registry().resolve(text)
    writable = os.access(home(), os.W_OK)  # in a home that we only read, nobody sees that we do
    with artifacts_in_use(home(), f"export of {version}", display.line) if writable else nullcontext():
        _export(display, version, folder, layout, dry_run=dry_run)


def _export(display: Display, version: Version, folder: Path, layout: str, *, dry_run: bool) -> None:
    source = verified(version)
    if "promoted_at" not in version.tags:
        log.warning(
            "%s was not promoted (%s). `draftsmith export %s FOLDER` copies the champion.",
            version,
            version.tags.get("decision", "no gate has decided"),
            version.line,
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "not empty" if folder.is_dir() else "a file"
        raise DraftsmithError(f"{folder} is {what}: give a new folder")
    size = sum(path.stat().st_size for path in source.iterdir())
    if dry_run:
        display.line(f"{version}: {size / 1e6:.1f} MB would be copied from {source} to {folder}")
        return
    if layout == "speculators":
        with _whole(folder):
            _export_speculators(version, source, folder)
        display.line(f"{version}: in speculators' layout, with the target's embedding and head, in {folder}")
        display.line(f"  for vLLM: vllm serve {shlex.quote(os.fspath(folder.absolute()))}")
        return
    from draftsmith.stages.drafters.digest import drafter_digest
    from draftsmith.stages.drafters.spec import DraftingConfig
    from draftsmith.stages.engines.sglang.server import drafting_options, served_block_size, speculative_algorithm

    with _whole(folder):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        apply_user_umask(folder)
        if drafter_digest(folder) != version.tags.get("drafter_digest", drafter_digest(source)):
            raise DraftsmithError(f"{folder}: the copy differs from what was registered: try again, or another disk")
    display.line(f"{version}: {size / 1e6:.1f} MB in {folder}")
    algorithm = speculative_algorithm(folder)
    fastest = version.tags.get(FASTEST_BLOCK)  # empty where no speed was measured
    block = int(fastest) if fastest else served_block_size(folder, DraftingConfig(), algorithm)
    display.line(f"  for SGLang: {shlex.join(drafting_options(folder, algorithm, block))}")


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """What is copied to a new folder is there when the block ends, or nothing of it: the same command may try again."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        disk = find_disk_error(error) or error
        if isinstance(disk, OSError):
            raise from_os_error(disk, f"exporting to {folder}{':' * bool(disk.filename)}") from error
        raise


def _export_speculators(version: Version, source: Path, folder: Path) -> None:
    from draftsmith.stages.drafters.export import export_speculators

    if not (artifact_folder(version) / MANIFEST).is_file():
        raise DraftsmithError(f"{version}: its artifact, which names the target, is not here: mount the store")
    store, made_from = open_store(home()), _manifest(version, artifact_folder(version)).inputs["target"]
    store.localize(store.path(made_from.stage, made_from.key))  # fetched, if the store is a bucket
    if (target := find_artifact(made_from, store)) is None:  # whose table and head are copied
        raise DraftsmithError(
            f"{version}: the target that it was made for ({made_from.stage}/{made_from.key[:16]}, content "
            f"{made_from.content_id[:16]}) is not in the store any more, or was made again and is another: export the "
            "drafter without --format"
        )
    store.verify_once(read_manifest(target).ref(target))  # and the model, where that stays elsewhere
    info = read_target_info(target)
    export_speculators(source, model_path(target), info.source, folder)
    apply_user_umask(folder)


def verified(version: Version) -> Path:
    """Its checkpoint on this machine, after every file of its artifact was compared with what was written; of a version
    that was uploaded, where the artifact is not here or damaged, the copy. Raises DraftsmithError."""
    folder = artifact_folder(version)
    try:
        _verify(version, folder)
    except RetryableError:
        raise
    except DraftsmithError:
        if version.uploaded:
            return download_upload(version)
        raise
    return folder / DRAFTER_FOLDER


def _verify(version: Version, folder: Path) -> None:
    if not (folder / MANIFEST).is_file():
        raise DraftsmithError(
            f"{version}: its artifact {folder} is not here: mount the store that it lies in; if it was pruned, choose "
            "another version (`registry.upload` copies later ones into MLflow)"
        )
    ref = _manifest(version, folder).ref(folder)
    if ref.content_id != version.content_id:
        raise DraftsmithError(
            f"{version}: {folder} holds other content by now (made again with --force): register it by a refresh"
        )
    try:
        open_store(home()).verify(ref)
    except RetryableError:
        raise
    except DraftsmithError as error:  # to make it again is no remedy here: that needs the refresh of then
        raise _damaged(version, str(error).removesuffix(f". {remedy(ref.stage)}")) from error


def _manifest(version: Version, folder: Path) -> Manifest:
    try:
        return read_manifest(folder)
    except DraftsmithError as error:
        raise _damaged(version, str(error)) from error


def _damaged(version: Version, what: str) -> DraftsmithError:
    return DraftsmithError(
        f"{version}: {what}: restore it from a backup, or have another version serve (`draftsmith promote`)"
    )
