"""Explains why a node's cache key is new: what differs from the node's artifact in the last run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact, InputEntry, Manifest, local_time, package_versions
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display, flatten, shorten
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.planning.plan import Build, Pipeline, Status, manifests_of_node, plan
from draftsmith.stages.runtime.stage import Config

_ABSENT = "nothing"


def explain_key(display: Display, config: RunOptions, pipeline: Pipeline, name: str) -> None:
    """Show how a node's key differs from the last run of this name, by field, file and module of the code.

    The nodes that an unknown key depends on follow. Raises DraftsmithError for an unknown node.
    """
    store = open_store(home())
    planned = {item.node.name: item for item in plan(config, store, pipeline)}
    if name not in planned:
        raise DraftsmithError(f"no node {name!r}. Use one of {', '.join(planned)}.")
    manifests = store.list()
    for node in _with_dependencies(planned, name):
        item = planned[node]
        display.line(f"{node}: {_state(item, store)}")
        display.newer_files([item])
        reference = _reference(manifests, config.name, item)
        if reference is None:
            display.line("  there is no earlier artifact of it to compare with")
            continue
        manifest, description = reference
        made = local_time(manifest.created_at)
        display.line(f"  against {manifest.stage}/{manifest.key[:16]}, {description}, made {made}:")
        lines = list(_differences(manifest, item, planned, store))
        for line in lines or ["nothing differs that a manifest records"]:
            display.line(f"    {line}")


def _with_dependencies(planned: Mapping[str, Build], name: str) -> list[str]:
    """Return the node and the unbuilt nodes that its key depends on, the nearest first."""
    nodes = [name]
    for node in nodes:  # grows in the loop
        nodes += [source for source in planned[node].after if source not in nodes]
    return nodes


def _state(item: Build, store: Store) -> str:
    if not item.key:
        return f"its key is known after {', '.join(item.after)}"
    if item.artifact is not None:
        made = local_time(item.artifact.manifest.created_at)
        return f"not new: {item.artifact.stage}/{item.key[:16]} is in the store, made {made}"
    if store.manifest_at(item.node.stage.name, item.key) is not None:
        return f"made again: its inputs were measured again after the artifact (key {item.key[:16]}) was made"
    rest = ", but an unfinished attempt resumes" if item.status is Status.RESUME else ""
    return f"new: no artifact has the key {item.key[:16]}{rest}"


def _reference(manifests: Sequence[Manifest], run: str, item: Build) -> tuple[Manifest, str] | None:
    """Return the artifact to compare with, and its description: the node's last one, else its stage's last one."""
    others = [manifest for manifest in manifests if manifest.key != item.key]
    if before := manifests_of_node([manifest for manifest in others if manifest.run == run], item.node.name):
        return before[0], f"this node in the last run of {run} that had another key"
    stage, inputs = item.node.stage.name, set(item.node.inputs)
    same = [manifest for manifest in others if manifest.stage == stage and set(manifest.inputs) == inputs]
    return (same[-1], "the last artifact of its stage (no run of this name has made the node)") if same else None


def _differences(
    old: Manifest,
    item: Build,
    planned: Mapping[str, Build],
    store: Store,
) -> Iterator[str]:
    node = item.node
    for field, before, now in _changed(*_key_fields(old.config, node.config)):
        yield f"config   {field}: {shorten(before)} -> {shorten(now)}"
    if item.seed != old.seed:
        yield f"seed     {old.seed} -> {item.seed}"
    for name in sorted({*old.inputs, *node.inputs}):
        yield from _input(name, old.inputs.get(name), node, planned, store)
    for path, before, now in _changed(old.external, item.external):
        yield f"file     {path}: {str(before)[:16]} -> {str(now)[:16]}"
    yield from _code(old, item)
    installed = package_versions() | node.config.programs()
    recorded = {package: version for package, version in old.versions.items() if package in installed}
    for package, before, now in _changed(recorded, installed):
        yield f"version  {package}: {before} -> {now} (not part of the key)"
    for package in sorted(old.versions.keys() - installed.keys()):  # such as a server's, which only the stage asks
        yield f"version  {package}: {old.versions[package]} -> not known before the stage runs (not part of the key)"


def _key_fields(old: Mapping[str, Any], now: Config) -> tuple[Mapping[str, object], Mapping[str, object]]:
    """Return the fields of the old config and of the new one that are part of their keys."""
    after = flatten(now.key_material())
    operational = flatten(now.model_dump(mode="json")).keys() - after.keys()
    return {field: value for field, value in flatten(old).items() if field not in operational}, after


def _changed(before: Mapping[str, object], now: Mapping[str, object]) -> Iterator[tuple[str, object, object]]:
    """Yield the names whose values differ, with both values."""
    for name in sorted({*before, *now}):
        if (old := before.get(name, _ABSENT)) != (new := now.get(name, _ABSENT)):
            yield name, old, new


def _input(name: str, old: InputEntry | None, node: Node, planned: Mapping[str, Build], store: Store) -> Iterator[str]:
    source = planned[node.inputs[name]] if name in node.inputs else None
    if source is None or old is None:
        yield f"input    {name}: {'removed' if source is None else f'new, node {source.node.name}'}"
    elif source.artifact is None:
        yield f"input    {name}: node {source.node.name} is not made yet"
    elif source.artifact.content_id != old.content_id:
        files = _changed_files(old, source.artifact, store)
        yield (
            f"input    {name}: content {old.content_id[:16]} -> {source.artifact.content_id[:16]} of node "
            f"{source.node.name}{files}; `draftsmith why CONFIG {source.node.name}` says why"
        )


def _changed_files(old: InputEntry, now: Artifact, store: Store) -> str:
    """Return the files of an input that differ, if the old input is still in the store."""
    before = store.manifest_at(old.stage, old.key)
    if before is None or before.content_id != old.content_id:
        return ""
    digests = [
        {name: entry.sha256 for name, entry in manifest.files.items() if not entry.volatile}
        for manifest in (before, now.manifest)
    ]
    return f": {', '.join(name for name, *_ in _changed(*digests))}"


def _code(old: Manifest, item: Build) -> Iterator[str]:
    if item.code == old.code_digest:
        return
    changes = list(_changed(old.modules, item.pipeline.code_modules(item.node.module)))
    for module, before, now in changes:
        yield f"code     {module}: " + ("added" if before == _ABSENT else "removed" if now == _ABSENT else "changed")
    if not changes:
        yield "code     which module imports which"
