"""Shows what the store holds: the state of every node, an artifact with its files and lineage; finds a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.tree import Tree

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.local import PARTIAL, Store
from draftsmith.artifacts.store.manifest import ArtifactRef, InputEntry, Manifest, local_time
from draftsmith.artifacts.store.mirror import MirroredStore, open_store
from draftsmith.artifacts.tracking.refresh_runs import artifact_folders
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.config.load import read_config
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.attempt import read_attempt
from draftsmith.flows.execution.display import (
    Display,
    escape,
    folded_table,
    format_bytes,
    format_duration,
    format_number,
)
from draftsmith.flows.execution.node import ArtifactFolders
from draftsmith.flows.planning.graph import (
    Pipeline,
    PlannedNode,
    Selection,
    Status,
    has_partial,
    manifests_of_node,
    plan,
    resolve_config,
)

_TO_DO = "to do"


def show_config_status(display: Display, config: RunOptions, pipeline: Pipeline) -> None:
    """Show the nodes of a config: done, running, unfinished, failed (with the last error), damaged, or waiting."""
    store = open_store(home())
    table = folded_table("node", "stage", "key", "state")
    planned = plan(config, store, pipeline, stop_at_damage=False)
    earlier = [manifest for manifest in store.list() if manifest.run == config.name]
    for item in planned:
        state = _node_state(item, store) + _last_artifact(item, earlier)
        table.add_row(item.node.name, item.node.stage.name, (item.key or "-")[:16], state)
    display.console.print(table)
    display.newer_files(planned)
    for line in _last_verdict(earlier, pipeline, store):
        display.line(line)


def _last_verdict(earlier: Sequence[Manifest], pipeline: Pipeline, store: Store) -> list[str]:
    """Return the verdict of the last run of this name that made a report; nothing if its artifacts are gone."""
    node, _ = pipeline.report
    manifest = next(iter(manifests_of_node(earlier, node)), None)
    if manifest is None or pipeline.verdict is None:
        return []
    report = manifest.ref(store.path(manifest.stage, manifest.key))
    # All from the run of the report: a later one may have measured again and failed before its decision.
    inputs = {
        name: ArtifactRef(entry.stage, entry.key, entry.content_id, store.path(entry.stage, entry.key))
        for name, entry in manifest.inputs.items()
        if store.manifest_at(entry.stage, entry.key) is not None
    }
    lines = pipeline.verdict(ArtifactFolders(store, {**inputs, node: report}))
    return ["", f"Last report, {local_time(manifest.created_at)}:", *lines] if lines else []


def _node_state(item: PlannedNode, store: Store) -> str:
    if item.status is Status.AFTER or item.key is None:
        return f"[dim]waits for {', '.join(item.after)}[/dim]"
    stage = item.node.stage.name
    partial = has_partial(store, stage, item.key)
    return _artifact_state(store, stage, item.key, done=item.ref is not None, partial=partial, damage=item.damage)


def _last_artifact(item: PlannedNode, earlier: Sequence[Manifest]) -> str:
    """Return which artifact an unbuilt node had in the last run of this name.

    After a promotion the plan starts from the new champion, so that nothing of the last run would be seen otherwise.
    """
    if item.status not in (Status.AFTER, Status.RUN):
        return ""
    before = manifests_of_node(earlier, item.node.name)
    return f"[dim]; last time {before[0].stage}/{before[0].key[:16]}[/dim]" if before else ""


def _artifact_state(
    store: Store, stage: str, key: str, *, done: bool, partial: bool, damage: DraftsmithError | None = None
) -> str:
    attempt = read_attempt(store.partial_path(stage, key))
    if store.partial_path(stage, key).exists() and store.is_claimed(stage, key):
        state = "waiting" if attempt is not None and attempt.waits else "running"
        return f"[cyan]{state}[/cyan]" + (f": {escape(str(attempt))}" if attempt is not None else "")
    if damage is not None:
        return f"[red]damaged[/red]: {escape(str(damage))}"
    if attempt is not None and attempt.error:
        rest = ", resumes from what it saved" if partial else ""
        return f"[red]failed[/red] {attempt.failed_at}{rest}: {escape(attempt.error)}"
    if done:
        return "[green]done[/green]"
    return "[yellow]unfinished[/yellow], resumes from what it saved" if partial else _TO_DO


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
    manifest = store.manifest(ref)
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


def find_report(name: str, pipeline: Pipeline) -> Path:
    """Return the report page of a refresh. Raises DraftsmithError if there is none.

    name: a config file (of `pipeline`), name or id of a run of MLflow (the last of its name), the start of an
    artifact's key or content id, or its folder.
    """
    store, path = open_store(home()), Path(name).expanduser()
    if name.endswith((".yaml", ".yml")):
        return report_of_config(name, read_config(path, [], pipeline.config), pipeline)
    if path.is_dir():
        return _page(name, path.resolve())
    if (folder := artifact_folders(Tracking(home()), name, "report").get("report")) is not None:
        return _page(name, store.localize(Path(folder)))
    try:
        ref = store.resolve(name)
        store.fetch(ref)
    except RetryableError:
        raise
    except DraftsmithError as error:
        raise DraftsmithError(
            f"{name}: not a config file, nor a refresh's run in MLflow with a report; {error}"
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
    for planned in plan(resolve_config(config, pipeline), store, pipeline, last_listing, stop_at_damage=False):
        if planned.node.name == node and planned.ref is not None:
            store.fetch(planned.ref)
            return planned.ref.path / _PAGE
    last = artifact_folders(Tracking(home(), config.experiment), config.name, node).get(node)
    if last is not None:
        return _page(name, store.localize(Path(last)))
    raise DraftsmithError(
        f"{name}: its refresh has no report yet. Run `draftsmith run {name}`, or name a run in MLflow."
    )


def _page(name: str, folder: Path) -> Path:
    if not (folder / _PAGE).is_file():
        raise DraftsmithError(
            f"{name}: {folder} has no {_PAGE}. Give a report's artifact; of a pruned one, MLflow has the page."
        )
    return folder / _PAGE
