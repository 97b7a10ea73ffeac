"""Shows what the store holds: the state of every node, an artifact with its files and lineage; finds a report."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from rich.tree import Tree

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.home import UPLOADED, home
from draftsmith.artifacts.store.attempt import AttemptNote
from draftsmith.artifacts.store.local import PARTIAL, Store
from draftsmith.artifacts.store.manifest import InputEntry, Manifest, local_time
from draftsmith.artifacts.store.mirror import MirroredStore, open_store
from draftsmith.artifacts.tracking.refresh_runs import artifact_folders, fetch_page
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.config.load import read_config
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import (
    Display,
    escape,
    folded_table,
    format_bytes,
    format_duration,
    format_number,
)
from draftsmith.flows.planning.graph import ALL_NODES, Selection
from draftsmith.flows.planning.plan import (
    Build,
    Pipeline,
    Status,
    early_end,
    has_partial,
    manifests_of_node,
    plan,
)
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.line_page import last_refresh
from draftsmith.flows.refresh.versions import registry

_TO_DO = "to do"


def show_config_status(display: Display, config: RunOptions, pipeline: Pipeline) -> None:
    """Show the nodes of a config: done, running, unfinished, failed (with the last error), damaged, or waiting."""
    store = open_store(home())
    table = folded_table("node", "stage", "key", "state")
    planned = plan(config, store, pipeline, stop_at_damage=False)
    earlier = [manifest for manifest in store.list() if manifest.run == config.name]
    end, ended = early_end(pipeline, config, planned, store, ALL_NODES), False
    for item in planned:
        state = _node_state(item, store, end.what if ended and end is not None else "") + _last_artifact(item, earlier)
        table.add_row(item.node.name, item.node.stage.name, item.key[:16] or "-", state)
        ended = ended or (end is not None and item.node.name == end.after)
    if isinstance(config, RefreshConfig) and config.registry is not None:
        display.line(f"last refresh: {last_refresh(config.registry.name)}")
        table.title, table.title_justify = "The next refresh", "left"
    display.console.print(table)
    display.newer_files(planned)


def _node_state(item: Build, store: Store, condition: str) -> str:
    """Return a node's state for the table. condition: when a run makes the node at all; empty: always."""
    stage, state = item.node.stage.name, f"[dim]waits for {', '.join(item.after)}[/dim]"
    if item.status is not Status.AFTER:
        partial = has_partial(store, stage, item.key)
        state = _artifact_state(
            store, stage, item.key, done=item.artifact is not None, partial=partial, damage=item.damage
        )
    return (
        f"[dim]{escape(condition)}[/dim]" if condition and (item.status is Status.AFTER or state == _TO_DO) else state
    )


def _last_artifact(item: Build, earlier: Sequence[Manifest]) -> str:
    """Return the artifact that an unbuilt node had in the last run of this name.

    After a promotion the plan starts from the new champion, and would show nothing of the last run.
    """
    if item.status not in (Status.AFTER, Status.RUN):
        return ""
    before = manifests_of_node(earlier, item.node.name)
    return f"[dim]; last time {before[0].stage}/{before[0].key[:16]}[/dim]" if before else ""


def _artifact_state(
    store: Store, stage: str, key: str, *, done: bool, partial: bool, damage: DraftsmithError | None = None
) -> str:
    attempt = AttemptNote.read(store.partial_path(stage, key))
    if store.partial_path(stage, key).exists() and store.is_claimed(stage, key):
        state = "waiting" if attempt is not None and attempt.waits else "running"
        return f"[cyan]{state}[/cyan]" + (f": {escape(_describe(attempt))}" if attempt is not None else "")
    if damage is not None:
        return f"[red]damaged[/red]: {escape(str(damage))}"
    if attempt is not None and attempt.error:
        rest = ", resumes from what it saved" if partial else ""
        return f"[red]failed[/red] {local_time(attempt.at)}{rest}: {escape(attempt.error)}"
    if done:
        return "[green]done[/green]"
    return "[yellow]unfinished[/yellow], resumes from what it saved" if partial else _TO_DO


def _describe(attempt: AttemptNote) -> str:
    """Return who makes an artifact, where, since when, and the progress."""
    now = time.time()
    text = f"node {attempt.node} of {attempt.run} on {attempt.host} (pid {attempt.pid}, user {attempt.user}) since "
    text += f"{local_time(attempt.since)} ({format_duration(now - attempt.since)})"
    if attempt.waits:
        text += f", {attempt.waits}"
    if attempt.total:
        ago = format_duration(max(0.0, now - attempt.at))
        text += f", {attempt.done}/{attempt.total} {attempt.unit}, reported {ago} ago"
    return text + (f", {format_duration(attempt.left_s)} left then" if attempt.left_s is not None else "")


def show_store_status(display: Display) -> None:
    """Show all artifacts, oldest first, then what is running or unfinished."""
    store = open_store(home())
    table = folded_table("stage", "key", "state", "made at", "took", "size", "metrics")
    for manifest in store.list():
        damage = _damage(store, manifest)
        table.add_row(
            escape(manifest.stage),
            escape(manifest.key[:16]),
            _artifact_state(store, manifest.stage, manifest.key, done=True, partial=False, damage=damage),
            local_time(manifest.created_at),
            format_duration(manifest.duration_s),
            format_bytes(sum(entry.bytes for entry in manifest.files.values())),
            escape(_metrics(manifest)),
        )
    for folder in sorted(store.root.glob(f"*/{PARTIAL}*")):
        stage, key = folder.parent.name, folder.name.removeprefix(PARTIAL)
        state = _artifact_state(store, stage, key, done=False, partial=has_partial(store, stage, key))
        table.add_row(stage, key, "[yellow]unfinished[/yellow], nothing is saved yet" if state == _TO_DO else state)
    if table.row_count:
        display.console.print(table)
    else:
        display.line(f"nothing in {store.location} yet. Start with `draftsmith run CONFIG`.")


def _damage(store: Store, manifest: Manifest) -> DraftsmithError | None:
    """Return the error of an artifact whose files are missing or have another size. A bucket is not checked."""
    if isinstance(store, MirroredStore):
        return None
    try:
        store.find(manifest.stage, manifest.key)
    except DraftsmithError as damage:
        return damage
    return None


def show_artifact(display: Display, text: str, *, verify: bool = False) -> None:
    """Show the artifact that `text` names: its manifest, its files, and its lineage back to the data.

    text: a stage, the start of a key or content id, or a path. verify: compare every file with its checksum first, and
    raise DraftsmithError at the first that differs.
    """
    store = open_store(home())
    ref = store.resolve(text)
    if verify:
        store.verify(ref)
    manifest = ref.manifest
    display.line(f"{ref.stage}/{ref.key}")
    for name, value in (
        ("folder", str(ref.path)),
        *((("store", store.location),) if store.location != str(store.root) else ()),
        ("content", f"{ref.content_id}, every checksum is right" if verify else ref.content_id),
        ("made at", f"{manifest.created_at} in {format_duration(manifest.duration_s)}"),
        ("seed", str(manifest.seed)),
        ("code", manifest.code_digest),
        ("versions", ", ".join(f"{package} {version}" for package, version in manifest.versions.items())),
        ("MLflow run", manifest.mlflow_run_id or "-"),
        ("metrics", _metrics(manifest, limit=None) or "-"),
        ("config", json.dumps(manifest.config, ensure_ascii=False)),
    ):
        display.line(f"  {name + ':':<12}{value}")
    table = folded_table("file", "size", "sha256", "")
    for name, entry in sorted(manifest.files.items()):
        table.add_row(escape(name), format_bytes(entry.bytes), entry.sha256[:16], "volatile" if entry.volatile else "")
    display.console.print(table)
    lineage = Tree(escape(f"made from: {ref.stage}/{ref.key[:16]}"))
    _add_inputs(lineage, store, manifest.inputs, seen=set())
    display.console.print(lineage)


def _add_inputs(tree: Tree, store: Store, inputs: dict[str, InputEntry], seen: set[str]) -> None:
    for name, entry in inputs.items():
        label = escape(f"{name}: {entry.stage}/{entry.key[:16]}  content {entry.content_id[:16]}")
        source = store.manifest_at(entry.stage, entry.key)
        if source is not None and {"line", "version"} <= source.config.keys():  # a drafter from the registry
            label += escape(f"  {source.config['line']} version {source.config['version']}")
        if source is None:
            tree.add(f"{label} [red](no longer in the store)[/red]")
        elif entry.key in seen:
            tree.add(f"{label} [dim](above)[/dim]")
        else:
            seen.add(entry.key)
            _add_inputs(tree.add(label), store, source.inputs, seen)


def _metrics(manifest: Manifest, limit: int | None = 4) -> str:
    return "  ".join(f"{name}={format_number(value)}" for name, value in list(manifest.metrics.items())[:limit])


_PAGE = "report.html"
_VERSION = re.compile(r"[^\s@]+@\w+")  # such as smollm2@3


def find_report(name: str, pipeline: Pipeline) -> Path:
    """Return the report page of a refresh. Raises DraftsmithError if there is none.

    name: a config file of `pipeline`, a version (`NAME@2`), a run in MLflow (its id, or the last of a name), the start
    of an artifact's key or content id, or its folder.
    """
    store, path = open_store(home()), Path(name).expanduser()
    if name.endswith((".yaml", ".yml")):
        return report_of_config(name, read_config(path, [], pipeline.config), pipeline)
    if path.is_dir():
        return _page(name, path.resolve())
    tracking, run = Tracking(home()), registry().resolve(name).run_id if _VERSION.fullmatch(name) else name
    if (folder := artifact_folders(tracking, run, "report").get("report")) is not None:
        if (local := store.localize(Path(folder)) / _PAGE).is_file():
            return local
        copy = home() / UPLOADED / f"report-{Path(folder).name}"
        fetch_page(tracking, run, "report", _PAGE, copy)
        return _page(name, copy)
    try:
        ref = store.resolve(name)
        store.fetch(ref)
    except RetryableError:
        raise
    except DraftsmithError as error:
        raise DraftsmithError(
            f"{name}: neither a config file, nor a version or a run in MLflow with a report; {error}"
        ) from error
    return _page(name, ref.path)


def report_of_config(name: str, config: RunOptions, pipeline: Pipeline) -> Path:
    """Return the report that a config's refresh would reuse, or else the last one of a refresh of its name.

    After a promotion a refresh plans from another champion, so its report is no longer in the plan. Raises
    DraftsmithError if there is none.
    """
    node, _ = pipeline.report
    store = open_store(home())
    last_listing = Selection(reuse_listing=True)
    for planned in plan(pipeline.resolve(config), store, pipeline, last_listing, stop_at_damage=False):
        if planned.node.name == node and planned.artifact is not None:
            store.fetch(planned.artifact)
            return planned.artifact.path / _PAGE
    last = artifact_folders(Tracking(home(), config.experiment), config.name, node).get(node)
    if last is not None:
        return _page(name, store.localize(Path(last)))
    raise DraftsmithError(
        f"{name}: its refresh has no report yet. Run `draftsmith run {name}`, or name a run in MLflow."
    )


def _page(name: str, folder: Path) -> Path:
    if not (folder / _PAGE).is_file():
        raise DraftsmithError(f"{name}: {folder} has no {_PAGE}. Give a report's artifact, its version or its run.")
    return folder / _PAGE
