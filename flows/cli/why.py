"""Why a node's key is new: what differs from the artifact that the node was in the run before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import ArtifactRef, InputEntry, Manifest, local_time, package_versions
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.text import flatten, shorten
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display
from draftsmith.flows.planning.graph import Node, Pipeline, PlannedNode, Status, manifests_of_node, node_seed, plan
from draftsmith.flows.planning.inputs import external_digests
from draftsmith.stages.runtime.stage import Config

_ABSENT = "nothing"


def why(display: Display, config: RunOptions, pipeline: Pipeline, name: str) -> None:
    """Says what makes the key of a node new against the last run of this name, field by field, file by file, module by
    module; of a node whose key is not known yet, also what it waits for. Raises DraftsmithError for no such node."""
    store = open_store(home())
    planned = {item.node.name: item for item in plan(config, store, pipeline)}
    if name not in planned:
        raise DraftsmithError(f"no node {name!r}: use one of {', '.join(planned)}")
    manifests = store.list()
    for each in _with_what_it_waits_for(planned, name):
        item = planned[each]
        display.line(f"{each}: {_state(item, store)}")
        display.newer_files([item])
        earlier = _earlier(manifests, config.name, item)
        if earlier is None:
            display.line("  there is no earlier artifact of it to compare with")
            continue
        manifest, whose = earlier
        made = local_time(datetime.fromisoformat(manifest.created_at))
        display.line(f"  against {manifest.stage}/{manifest.key[:16]}, {whose}, made {made}:")
        found = list(_differences(manifest, item, planned, config, pipeline, store))
        for line in found or ["nothing differs that a manifest holds"]:
            display.line(f"    {line}")


def _with_what_it_waits_for(planned: Mapping[str, PlannedNode], name: str) -> list[str]:
    """The node, then those that it waits for, the nearest first."""
    found = [name]
    for each in found:
        found += [source for source in planned[each].after if source not in found]
    return found


def _state(item: PlannedNode, store: Store) -> str:
    if item.key is None:
        return f"its key is known when there is {', '.join(item.after)}"
    if item.ref is not None:
        made = local_time(datetime.fromisoformat(store.manifest(item.ref).created_at))
        return f"not new: {item.ref.stage}/{item.key[:16]} is in the store, made {made}"
    if store.manifest_at(item.node.stage.name, item.key) is not None:
        return f"made again: the artifact of the key {item.key[:16]} was made from other measurements of its inputs"
    rest = ", and an unfinished attempt that goes on" if item.status is Status.RESUME else ""
    return f"new: no artifact has the key {item.key[:16]}{rest}"


def _earlier(manifests: Sequence[Manifest], run: str, item: PlannedNode) -> tuple[Manifest, str] | None:
    """The last artifact of another key that the node was, else the last one of its stage with the same inputs."""
    others = [each for each in manifests if each.key != item.key]
    if before := manifests_of_node([each for each in others if each.run == run], item.node.name):
        return before[0], f"this node in the last run of {run} that had another key"
    same = [each for each in others if each.stage == item.node.stage.name and set(each.inputs) == set(item.node.inputs)]
    return (same[-1], "the last artifact of its stage (no run of this name has made the node)") if same else None


def _differences(
    old: Manifest,
    item: PlannedNode,
    planned: Mapping[str, PlannedNode],
    config: RunOptions,
    pipeline: Pipeline,
    store: Store,
) -> Iterator[str]:
    node = item.node
    for field, before, now in _changed(*_decisive(old.config, node.config)):
        yield f"config   {field}: {shorten(before)} -> {shorten(now)}"
    if (seed := node_seed(node, config)) != old.seed:
        yield f"seed     {old.seed} -> {seed}"
    for name in sorted({*old.inputs, *node.inputs}):
        yield from _input(name, old.inputs.get(name), node, planned, store)
    for path, before, now in _changed(old.external, external_digests(node.config)):
        yield f"file     {path}: {shorten(before[:16])} -> {shorten(now[:16])}"
    yield from _code(old, node, pipeline)
    installed = package_versions() | node.config.programs()
    known = {package: version for package, version in old.versions.items() if package in installed}
    for package, before, now in _changed(known, installed):
        yield f"version  {package}: {before} -> {now} (no part of the key)"
    for package in sorted(old.versions.keys() - installed.keys()):  # of a server, say, which is asked when it serves
        yield f"version  {package}: {old.versions[package]} -> not known before the stage runs (no part of the key)"


def _decisive(old: Mapping[str, Any], now: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the old config and of this one that are a part of their keys."""
    after = flatten(now.key_material())
    operational = flatten(now.model_dump(mode="json")).keys() - after.keys()
    return {field: value for field, value in flatten(old).items() if field not in operational}, after


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted({*before, *now}):
        if (old := before.get(name, _ABSENT)) != (new := now.get(name, _ABSENT)):
            yield name, old, new


def _input(
    name: str, old: InputEntry | None, node: Node, planned: Mapping[str, PlannedNode], store: Store
) -> Iterator[str]:
    source = planned[node.inputs[name]] if name in node.inputs else None
    if source is None or old is None:
        yield f"input    {name}: {'taken away' if source is None else f'new, node {source.node.name}'}"
    elif source.ref is None:
        yield f"input    {name}: node {source.node.name} has still to be made"
    elif source.ref.content_id != old.content_id:
        files = _files(old, source.ref, store)
        yield (
            f"input    {name}: content {old.content_id[:16]} -> {source.ref.content_id[:16]} of node "
            f"{source.node.name}{files}; `draftsmith why CONFIG {source.node.name}` says why"
        )


def _files(old: InputEntry, now: ArtifactRef, store: Store) -> str:
    """The files of an input that differ, where the old one is still there."""
    before = store.manifest_at(old.stage, old.key)
    if before is None or before.content_id != old.content_id:
        return ""
    digests = [
        {name: entry.sha256 for name, entry in manifest.files.items() if not entry.volatile}
        for manifest in (before, store.manifest(now))
    ]
    return f": {', '.join(name for name, *_ in _changed(*digests))}"


def _code(old: Manifest, node: Node, pipeline: Pipeline) -> Iterator[str]:
    if pipeline.code_digest(node.module) == old.code_digest:
        return
    found = False
    for module, before, now in _changed(old.modules, pipeline.code_modules(node.module)):
        found = True
        yield f"code     {module}: " + ("added" if before == _ABSENT else "taken away" if now == _ABSENT else "changed")
    if not found:
        yield "code     which module is imported where"
