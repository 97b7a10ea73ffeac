"""The commands champions, promote, rollback, swap and export: which version of a line serves, and how to change it."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, find_disk_error, from_os_error
from draftsmith.artifacts.home import apply_user_umask, home
from draftsmith.artifacts.identifiers import server_url
from draftsmith.artifacts.results.evaluation import ConfidenceCalibration
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact, read_manifest, remedy
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.store.retention import artifacts_in_use
from draftsmith.artifacts.tracking.registry import BY_HAND, PREVIOUS, ROLLED_BACK, Registry, Version
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh.swap import forget, served_by, swap_to, swapped_servers
from draftsmith.flows.refresh.versions import (
    CONFIDENCE,
    FASTEST_BLOCK,
    SCHEDULE,
    STEP_COSTS,
    artifact_folder,
    download_upload,
    find_artifact,
    registry,
)
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.servers.requirements import served_block_size, speculative_algorithm
from draftsmith.stages.engines.sglang.server import drafting_options, write_schedule, write_step_costs
from draftsmith.stages.engines.vllm.server import drafting_options as options_of_vllm
from draftsmith.stages.targets.info import model_path, read_target_info

log = logging.getLogger(__name__)
_WIDE = 120  # columns of a terminal that shows more


def champions(display: Display, line: str | None) -> None:
    """Print the versions of a line with their metrics, then its promotions, rollbacks and drift checks by time.

    line: the line's name; None: print all lines with their champions instead.
    """
    lines = registry()
    if line is None:
        rows = []
        for name in lines.names():
            version = lines.champion(name)
            rows.append(
                [name, "-", "-"] if version is None else [name, str(version.number), version.tags.get("tau") or "-"]
            )
        display.table(["line", "champion", "tau"], rows, text_columns=2)
        return
    versions = lines.versions(line)
    if not versions:
        raise lines.unknown_line(line)
    head = ["version", "alias", "outcome", "why", "tau", "speed-up", "registered"]
    rows = [_row(version) for version in versions]
    if display.console.width >= _WIDE:
        head += ["arm", "target", "artifact"]
        for row, version in zip(rows, versions, strict=True):
            target = version.tags.get("target_digest", "")[:12]
            row += [version.tags.get("arm", "-"), target or "-", f"{version.stage}/{version.key[:16]}"]
    display.table(head, rows, title=line, text_columns=len(head))
    entries = []
    for event in lines.events(line):
        before = "none" if event.before is None else f"version {event.before}"
        text = f"version {event.version} {event.what} (before: {before}) by {event.by}: {event.why}"
        entries.append((event.at, text))
    for version in versions:
        for served in served_by(version):
            entries.append((served.since, f"{served.url} drafts with version {version.number}. {served.proof}"))
    for check in lines.drift(line):
        tau = "-" if check.tau is None else f"{check.tau:.3f}"
        entries.append((check.at, f"version {check.version} checked: tau {tau}: {check.decision}"))
    for at, text in sorted(entries):
        display.line(f"{at}  {text}")


def _row(version: Version) -> list[str]:
    """Return the cells that fit into 80 columns: the gate's outcome and the version's metrics."""
    tags = version.tags
    outcome = "waiting" if version.waits else tags.get("outcome") or "-"
    metrics = [f"{float(tags[name]):.3f}" if tags.get(name) else "-" for name in ("tau", "speedup")]
    aliases = ", ".join(version.aliases) or "-"
    return [str(version.number), aliases, outcome, tags.get("rules") or "-", *metrics, version.created_at[:10]]


def promote(display: Display, text: str, why: str, *, dry_run: bool, servers: Sequence[str] = ()) -> None:
    """Make `LINE@VERSION` the champion, after comparing its files with their checksums. servers: see `rollback`."""
    lines, servers = registry(), named_servers(servers)
    version = lines.resolve(text)
    if not dry_run:
        lines.complete_promotion(version.line)
    _move(display, lines, version, why or "by hand", BY_HAND, dry_run=dry_run, servers=servers)


def rollback(display: Display, line: str, why: str, *, dry_run: bool, servers: Sequence[str] = ()) -> None:
    """Make the previous champion serve again, unless a rollback took that one out of service.

    servers: URLs of servers to swap; empty: all that a version of the line was swapped into.
    """
    lines, servers = registry(), named_servers(servers)
    interrupted = None if dry_run else lines.complete_promotion(line)
    if interrupted is not None and interrupted.what == ROLLED_BACK:  # the same command ran before and lost MLflow
        display.line(
            f"{line} version {interrupted.version} is the champion now, in place of version {interrupted.before}"
        )
        _serve(display, f"{line}@{interrupted.version}", servers)
        return
    version = lines.resolve(f"{line}@{PREVIOUS}")
    earlier = lines.rollback_event(version)
    if earlier is not None and earlier.what == ROLLED_BACK:
        raise DraftsmithError(
            f"{version} served before, and {earlier.by} rolled it back at {earlier.at} "
            f"({earlier.why}). Run `draftsmith promote {line}@VERSION` to choose a version (`draftsmith champions "
            f"{line}` lists them)."
        )
    _move(display, lines, version, why or "by hand", ROLLED_BACK, dry_run=dry_run, servers=servers)


def _move(
    display: Display,
    lines: Registry,
    version: Version,
    why: str,
    what: str,
    *,
    dry_run: bool,
    servers: Sequence[str] = (),
) -> None:
    now = lines.champion(version.line)
    if now is not None and now.number == version.number:
        display.line(f"{version} is the champion already")
        return
    replaced = "no version" if now is None else f"version {now.number}"
    targets = [champion.tags.get("target_digest", "") for champion in (version, now) if champion is not None]
    if len(set(targets)) > 1 and all(targets):
        display.line(
            f"warning: {version} was trained for target {targets[0][:12]}, {replaced} for {targets[1][:12]}. Servers "
            "of the latter will accept fewer of its proposals."
        )
    if dry_run:
        verify_checkpoint(version)
        display.line(f"{version} would become the champion in place of {replaced} (nothing was changed)")
        return
    with artifacts_in_use(home(), f"promotion of {version}", display.line):  # `prune` waits
        verify_checkpoint(version)
        lines.promote(version, expected=now, why=why, what=what)
    display.line(f"{version} is the champion now, in place of {replaced}")
    _serve(display, f"{version.line}@{version.number}", servers)


def _serve(display: Display, champion: str, servers: Sequence[str]) -> None:
    """Have the servers draft with the new champion, `LINE@VERSION`. Empty `servers`: those that were swapped before."""
    line = champion.partition("@")[0]
    if not (servers or swapped_servers(line)):
        display.line(f"restart the servers that draft, or name them: `draftsmith swap {line} --url URL`")
        return
    try:
        swap(display, champion, servers)
    except DraftsmithError as error:  # the same command would find the champion in place
        command = " ".join(["draftsmith swap", line, *(f"--url {url}" for url in servers)])
        gone = "" if servers else f" (`draftsmith swap {line} --forget URL` drops a server that is gone)"
        raise type(error)(
            f"{error} {champion} is the champion nevertheless. When that is repaired, run `{command}`{gone}."
        ) from error


def swap(display: Display, text: str, urls: Sequence[str]) -> None:
    """Have servers draft with a version: those at `urls`, or else all that a version of its line was swapped into."""
    lines = registry()
    version = lines.resolve(text)
    servers = named_servers(urls) or swapped_servers(version.line)
    if not servers:
        raise DraftsmithError(f"{version.line}: no server is known to draft with it. Name some with --url.")
    with artifacts_in_use(home(), f"swap to {version}", display.line):
        swap_to(version, verify_checkpoint(version), servers, display.line, named=bool(urls))
    display.line(f"{', '.join(servers)}: {version} is served")


def forget_servers(display: Display, text: str, urls: Sequence[str]) -> None:
    """Drop servers from a line without asking them. Raises DraftsmithError for a server that no version names."""
    line = text.partition("@")[0]
    for url in named_servers(urls, "--forget"):
        if not forget(line, url):
            known = ", ".join(swapped_servers(line)) or "none"
            raise DraftsmithError(f"--forget: {line} has no server {url}. It has {known}.")
        display.line(f"{url} is forgotten: no version of {line} names it")


def named_servers(urls: Sequence[str], option: str = "--url") -> list[str]:
    """Return the servers that a command names. Raises DraftsmithError for an invalid URL, or one with a password."""
    return [server_url(url.rstrip("/"), where=option) for url in urls]


def export(display: Display, text: str, folder: Path, layout: str = "sglang", *, calibrated: bool = False) -> None:
    """Write a verified copy of a version's checkpoint.

    layout: `sglang`; `speculators`, which vLLM loads; or `stitched`, in a copy of the target's checkpoint.
    calibrated: correct the confidence head as its evaluation measured.
    """
    version = registry().resolve(text)
    writable = os.access(home(), os.W_OK)  # in a read-only home nothing can be locked
    with artifacts_in_use(home(), f"export of {version}", display.line) if writable else nullcontext():
        _export(display, version, folder, layout, calibrated=calibrated)


def _export(display: Display, version: Version, folder: Path, layout: str, *, calibrated: bool) -> None:
    if calibrated and not version.tags.get(CONFIDENCE):
        raise DraftsmithError(
            f"{version}: its confidence was not calibrated: it has no confidence head, or was measured without "
            "validation answers. Export without --calibrated."
        )
    source = verify_checkpoint(version)
    if "promoted_at" not in version.tags:
        log.warning(
            "%s was not promoted (%s). `draftsmith export %s FOLDER` copies the champion.",
            version,
            version.tags.get("decision", "no gate has decided"),
            version.line,
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = "not empty" if folder.is_dir() else "a file"
        raise DraftsmithError(f"{folder} is {problem}. Give a new folder.")
    size = sum(path.stat().st_size for path in source.iterdir())
    if layout == "speculators":
        with _all_or_nothing(folder):
            _export_speculators(version, source, folder)
            if calibrated:
                _calibrate(version, source, folder)
        display.line(f"{version}: in speculators' layout, with the target's embedding and head, in {folder}")
        _show_options(display, "vLLM", version, folder)
        return
    if layout == "stitched":
        from draftsmith.stages.drafters.stitched import export_stitched  # imports torch

        with _all_or_nothing(folder):
            export_stitched(source, model_path(_target_of(version)), folder)
        display.line(f"{version}: in a copy of the target's checkpoint, which drafts with it, in {folder}")
        return
    with _all_or_nothing(folder):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        apply_user_umask(folder)
        if drafter_digest(folder) != version.tags.get("drafter_digest", drafter_digest(source)):
            raise DraftsmithError(
                f"{folder}: the copy differs from the registered one. Try again, or use another disk."
            )
        if calibrated:
            _calibrate(version, source, folder)
    display.line(f"{version}: {size / 1e6:.1f} MB in {folder}")
    _show_options(display, "SGLang", version, folder)


def _show_options(display: Display, engine: str, version: Version, folder: Path) -> None:
    """Print a server's options for an exported checkpoint, and those for blocks by load if they were predicted."""
    algorithm = speculative_algorithm(folder)
    fastest = version.tags.get(FASTEST_BLOCK)  # empty if no speed was measured
    block = int(fastest) if fastest else served_block_size(folder, DraftingConfig(), algorithm)
    options = options_of_vllm if engine == "vLLM" else drafting_options
    display.line(f"  for {engine}: {shlex.join(options(folder, algorithm, block))}")
    schedule = [row[:3] for row in version.json(SCHEDULE, [])]  # fewest, most, proposals
    if not schedule:
        return
    most = max(proposals for *_, proposals in schedule)
    if engine == "vLLM":
        by_load = options_of_vllm(folder, algorithm, 1 + most, schedule)
    elif algorithm == "EAGLE3":
        by_load = [*drafting_options(folder, algorithm, 1 + most), *write_schedule(folder, schedule)]
    elif algorithm == "DSPARK" and version.tags.get(STEP_COSTS):
        block = served_block_size(folder, DraftingConfig(), algorithm)
        drafting, verifying, *_ = version.json(STEP_COSTS, [])
        costs = write_step_costs(folder, drafting, verifying)
        by_load = ["SGLANG_RAGGED_VERIFY_MODE=compact", *drafting_options(folder, algorithm, block), *costs]
    else:  # SGLang changes no other drafter's block by load
        return
    display.line(f"  for {engine}, by load: {shlex.join(by_load)}")


@contextmanager
def _all_or_nothing(folder: Path) -> Iterator[None]:
    """Remove the folder if the block fails, so that the same command can be tried again."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        disk = find_disk_error(error) or error
        if isinstance(disk, OSError):
            raise from_os_error(disk, f"exporting to {folder}{':' * bool(disk.filename)}") from error
        raise


def _calibrate(version: Version, source: Path, folder: Path) -> None:
    from draftsmith.stages.drafters.export import calibrate_confidence  # imports torch, unlike the other commands here

    calibration = ConfidenceCalibration.model_validate_json(version.tags[CONFIDENCE])
    calibrate_confidence(folder, source, calibration.scale, calibration.shift)
    apply_user_umask(folder)


def _export_speculators(version: Version, source: Path, folder: Path) -> None:
    from draftsmith.stages.drafters.export import export_speculators  # imports torch, unlike the other commands here

    target = _target_of(version)
    export_speculators(source, model_path(target), read_target_info(target).source, folder)
    apply_user_umask(folder)


def _target_of(version: Version) -> Path:
    """Return the verified artifact of the target that a version was trained for. Raises DraftsmithError."""
    if not (artifact_folder(version) / MANIFEST).is_file():
        raise DraftsmithError(f"{version}: its artifact, which names the target, is not here. Mount the store.")
    store, made_from = open_store(home()), read_manifest(artifact_folder(version)).inputs["target"]
    store.localize(store.path(made_from.stage, made_from.key))  # fetches it if the store is a bucket
    if (target := find_artifact(made_from, store)) is None:  # its embedding and head are copied
        raise DraftsmithError(
            f"{version}: the target that it was trained for ({made_from.stage}/{made_from.key[:16]}, content "
            f"{made_from.content_id[:16]}) is no longer in the store, or was replaced. Export without --format."
        )
    store.verify_once(Artifact(target, read_manifest(target)))  # with the model, if that lies elsewhere
    return target


def verify_checkpoint(version: Version) -> Path:
    """Return a version's checkpoint on this machine after comparing every file of its artifact with its checksum.

    If the artifact is missing or damaged, return the copy of the version's upload; raise DraftsmithError without one.
    """
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
            f"{version}: its artifact {folder} is not here. Mount the store that has it; if it was pruned, choose "
            "another version (`registry.upload` copies later ones whole into MLflow)."
        )
    try:
        ref = Artifact(folder, read_manifest(folder, version.stage))
        if ref.content_id == version.content_id:
            open_store(home()).verify(ref)
    except RetryableError:
        raise
    except DraftsmithError as error:  # it cannot be made again: another refresh made it
        problem = str(error).removesuffix(f". {remedy(version.stage)}")
        raise DraftsmithError(
            f"{version}: {problem}. Restore it from a backup, or promote another version (`draftsmith promote`)."
        ) from error
    if ref.content_id != version.content_id:
        raise DraftsmithError(
            f"{version}: {folder} has other content now (made again with --force). Register it by a refresh."
        )
