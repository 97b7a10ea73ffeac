"""The graph of a run: its nodes in order, their keys, and what the store already has."""

from __future__ import annotations

import hashlib
import importlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from draftsmith.artifacts.errors import EXIT_RETRYABLE, DraftsmithError, RetryableError
from draftsmith.artifacts.store.code_digest import code_digest, code_modules
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import ArtifactRef, FileEntry, Manifest, content_id
from draftsmith.artifacts.tracking.models import Metrics
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.planning.inputs import external_digests, read_listings
from draftsmith.stages.runtime.stage import INCONCLUSIVE, LISTING_FILE, SOURCES, Config, InputListing, Stage


@dataclass(frozen=True)
class Node:
    """One use of a stage in a run: several nodes may use the same stage with other configs and inputs."""

    name: str
    module: str  # of the stage, e.g. "draftsmith.stages.training.sft.stage"
    config: Config
    inputs: Mapping[str, str] = field(default_factory=dict)  # name of the stage's input -> name of the node
    seed: int | None = None  # None: the run's

    @property
    def stage(self) -> Stage:
        stage: Stage = importlib.import_module(self.module).STAGE
        return stage


class Checks(Protocol):
    """What a run checks on its way. Raises DraftsmithError for what it cannot get past; returns lines to print."""

    def before(self, planned: Sequence[PlannedNode]) -> list[str]:
        """Before the first stage runs."""

    def after(self, node: Node, made: Mapping[str, Path]) -> list[str]:
        """When a node is done. made: the artifacts so far, by node."""


@dataclass(frozen=True)
class Conclusion:
    """What a run came to, beyond its artifacts."""

    name: str  # of the flow's state, one word
    message: str
    error: DraftsmithError | None = None  # what the run ends with, after everything was kept and told
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    overrules: bool = False  # what the review says
    asset: str = ""  # in Prefect: what was promoted, such as draftsmith://line/NAME/champion
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of the asset


@dataclass(frozen=True)
class RunReview:
    """A run as MLflow shows it to who decides."""

    metrics: Mapping[str, float]
    description: str  # Markdown, what matters first
    concluded: str  # the same, of a run that came to the conclusion which the review expects
    tags: Mapping[str, str] = field(default_factory=dict)


class RunPolicy(Protocol):
    """What decides how far a run goes, and what follows from it."""

    @property
    def sticky_force(self) -> Collection[str]:
        """Names to force that decide how far it goes: the same command needs them again."""

    def should_stop(self, node: Node, made: Mapping[str, Path]) -> Conclusion | None:
        """After a node: why the run may end here, or None to go on."""

    def conclude(self, made: Mapping[str, ArtifactRef], run_id: str | None) -> Conclusion | None:
        """After the last node. Raises `OutdatedPlanError` if what the run was planned from has changed meanwhile."""


class OutdatedPlanError(DraftsmithError):
    """What the run was planned from has changed. Its retry plans anew and reuses what is done."""

    exit_code = EXIT_RETRYABLE


def load_attribute(text: str) -> Any:
    """Return what `module:attribute` names."""
    module, _, attribute = text.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Pipeline:
    """A kind of run: its config, its graph, and the Prefect flow that runs it."""

    config: type[RunOptions]
    nodes: Callable[[Any], list[Node]]  # the nodes of a config, any order
    flow: str  # "module:attribute", imported only when a run starts
    code_digest: Callable[[str], str] = code_digest  # of a stage's module
    checks: Callable[[], Checks] | None = None  # for one run
    resolve: Callable[[Any], Any] | None = None  # a config with what only the outside knows, when the plan is made
    policy: Callable[[Any, Collection[str]], RunPolicy | None] | None = (
        None  # of a resolved config and the forced nodes
    )
    results: str = ""  # "module:function", given display, the nodes' folders, and an `Ending`
    verdict: str = ""  # "module:function", given the folders of the last report and its inputs: lines for `status`
    headline: str = ""  # the node whose figures are the run's in MLflow
    review: Callable[[Mapping[str, Path]], RunReview | None] | None = (
        None  # of the nodes' folders: what MLflow shows too
    )
    # of the nodes' folders: the drafters that node `evaluation` compared, with their metrics by data set
    compared: Callable[[Mapping[str, Path]], Mapping[str, tuple[Manifest, Metrics]]] | None = None
    data: tuple[str, ...] = ()  # nodes that are the run's data sets
    report: tuple[str, str] = ("", "")  # the node and the file of it that a person reads first
    code_modules: Callable[[str], dict[str, str]] = code_modules  # what the digest is over, for `draftsmith why`


class Status(StrEnum):
    """What a run would do with a node."""

    HIT = "reused"
    RUN = "run"
    RESUME = "resumes"
    FORCED = "forced"
    AFTER = "after"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class PlannedNode:
    node: Node
    status: Status
    key: str | None = None  # None while an input has still to be made
    ref: ArtifactRef | None = None  # of a hit
    after: tuple[str, ...] = ()  # nodes that must be made before the key is known
    damage: DraftsmithError | None = None  # what is wrong with an artifact that is there, and what to do
    newer: int = 0  # files that came since the listing that the run goes on with

    @property
    def left_over(self) -> str | None:
        """Say how many files a listing of the last run leaves out, and what would read them."""
        if not self.newer:
            return None
        return (
            f"{self.node.name}: the run goes on with the files that the last one listed. {self.newer} that came since "
            f"are for the next one; `--force {self.node.name}` reads them now."
        )


def topological_order(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, each behind its inputs, else as given. A graph that does not fit its stages is an error."""
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        twice = sorted(name for name, count in Counter(node.name for node in nodes).items() if count > 1)
        raise DraftsmithError(f"two nodes have the same name: {', '.join(twice)}")
    for node in nodes:
        _check(node, by_name)
    ordered: list[Node] = []
    waiting = list(nodes)
    while waiting:
        placed = {node.name for node in ordered}
        ready = next((node for node in waiting if placed.issuperset(node.inputs.values())), None)
        if ready is None:
            raise DraftsmithError(f"nodes need each other: {', '.join(node.name for node in waiting)}")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _check(node: Node, by_name: Mapping[str, Node]) -> None:
    stage = node.stage
    known = {name.removesuffix("?") for name in stage.inputs}
    many = tuple(name.removesuffix("*") for name in stage.inputs if name.endswith("*"))
    required = {name for name in stage.inputs if not name.endswith(("?", "*"))}
    if unknown := {name for name in set(node.inputs) - known if not (many and name.startswith(many))}:
        raise DraftsmithError(f"node {node.name}: stage {stage.name} has no input {', '.join(sorted(unknown))}")
    if missing := required - set(node.inputs):
        raise DraftsmithError(f"node {node.name}: stage {stage.name} needs the input {', '.join(sorted(missing))}")
    for source in node.inputs.values():
        if source not in by_name:
            raise DraftsmithError(f"node {node.name}: its input comes from node {source}, which is not in the graph")


def node_seed(node: Node, config: RunOptions) -> int:
    """The seed of a node in a run."""
    return config.seed if node.seed is None else node.seed


def cache_key(
    node: Node,
    inputs: Mapping[str, ArtifactRef],
    seed: int,
    pipeline: Pipeline,
    external: Mapping[str, str] | None = None,
) -> str:
    """Identity of what the node computes from these inputs. external: its `external_digests`, where they are known."""
    if external is None:
        external = external_digests(node.config)
    # what was measured at other settings is no remeasurement, though its content be the same
    measured = {name: inputs[name].key for name in node.stage.reads_volatile if name in inputs}
    said = {"external_files": dict(external), "measured": measured}
    return Store.key(
        stage=node.stage.name,
        code_digest=pipeline.code_digest(node.module),
        config=node.config.key_material() | {name: what for name, what in said.items() if what},
        inputs=inputs,
        seed=seed,
    )


def resolve_config(config: RunOptions, pipeline: Pipeline) -> RunOptions:
    """The config that a plan is made of."""
    found: RunOptions = config if pipeline.resolve is None else pipeline.resolve(config)
    return found


def plan(
    config: RunOptions,
    store: Store,
    pipeline: Pipeline,
    force: Collection[str] = (),
    *,
    nodes: Sequence[Node] | None = None,
    stop_at_damage: bool = True,
    again: bool = False,
) -> list[PlannedNode]:
    """What a run would do now, in the order in which it would do it. Reads the store, changes nothing.

    nodes: only these of the graph, which are in order and need no others.
    stop_at_damage: a damaged artifact is an error, as it is for a run; else it is a node like one that is not made.
    again: only some nodes are wanted again: files that came since the last run listed them are left out, though that
    has ended.
    """
    nodes = topological_order(pipeline.nodes(config)) if nodes is None else nodes
    forced = forced_nodes(nodes, force)
    for node in nodes:
        try:
            node.config.external_files()  # a file that is not there is an error now, not when its turn comes
        except DraftsmithError as error:
            raise type(error)(f"{node.name}: {error}") from error
    planned: dict[str, PlannedNode] = {}
    known = read_listings(config.name, ended=again)
    for node in nodes:
        newer = 0
        if node.stage.name == SOURCES:
            node, newer = _with_listing(node, store, known.get(node.name) if node.name not in forced else None)
        item = _plan_node(node, planned, node_seed(node, config), store, pipeline, node.name in forced)
        if stop_at_damage and item.damage is not None:
            raise item.damage
        planned[node.name] = replace(item, newer=newer)
    return list(planned.values())


def _with_listing(node: Node, store: Store, key: str | None) -> tuple[Node, int]:
    """Return a node of stage `sources` with its listing, and how many files that leaves out.

    key: of the listing that the run goes on with, where that is of the same config and all its files are there; else
    it is what is there.
    """
    listing = now = node.config.list_inputs()
    assert listing is not None and now is not None
    if key is not None and (ref := find_artifact(store, node, key, verify=True)) is not None:
        store.fetch(ref)
        before = InputListing.read(ref.path)
        same = store.manifest(ref).config == node.config.model_dump(mode="json")
        listing = before if same and set(before.files) <= set(now.files) else now
    return replace(node, config=node.config.with_pinned_files(listing)), len(now.files) - len(listing.files)


def _plan_node(
    node: Node, before: Mapping[str, PlannedNode], seed: int, store: Store, pipeline: Pipeline, forced: bool
) -> PlannedNode:
    inputs: dict[str, ArtifactRef] = {}
    after: list[str] = []
    for name, source in node.inputs.items():
        if before[source].node.stage.name == SOURCES:
            listing = before[source].node.config.list_inputs()
            assert listing is not None
            node = replace(node, config=node.config.with_pinned_files(listing))
        ref = before[source].ref or _foreseen(before[source], store)
        if ref is None:
            after.append(source)
        else:
            inputs[name] = ref
    if after:
        return PlannedNode(node, Status.AFTER, after=tuple(dict.fromkeys(after)))
    key = cache_key(node, inputs, seed, pipeline)
    if forced:
        return PlannedNode(node, Status.FORCED, key)
    try:
        ref = find_artifact(store, node, key)
    except RetryableError:
        raise
    except DraftsmithError as damage:
        return PlannedNode(node, Status.DAMAGED, key, damage=damage)
    if ref is not None and not is_outdated(store, node, ref, inputs) and not is_inconclusive(store, ref):
        return PlannedNode(node, Status.HIT, key, ref)
    return PlannedNode(node, Status.RESUME if has_partial(store, node.stage.name, key) else Status.RUN, key)


def _foreseen(item: PlannedNode, store: Store) -> ArtifactRef | None:
    """Return what a listing will be that is to be made."""
    listing = item.node.config.list_inputs() if item.node.stage.name == SOURCES else None
    if listing is None or item.key is None:
        return None
    content = listing.to_json().encode()
    file = FileEntry(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content), volatile=False)
    return ArtifactRef(SOURCES, item.key, content_id({LISTING_FILE: file}), store.path(SOURCES, item.key))


def find_artifact(store: Store, node: Node, key: str, *, verify: bool = False) -> ArtifactRef | None:
    """As `Store.find`; the error of a damaged artifact names the node, which is what `--force` takes.

    verify: by checksum, where a file was touched since it was last compared.
    """
    try:
        ref = store.find(node.stage.name, key)
        if ref is not None and verify:
            store.verify_once(ref, and_elsewhere=False)
        return ref
    except RetryableError:  # no damage: the store does not answer
        raise
    except DraftsmithError as error:
        if node.name == node.stage.name:
            raise
        raise DraftsmithError(f"{error} (here it is node {node.name}: `--force {node.name}`)") from error


def manifests_of_node(manifests: Sequence[Manifest], node: str) -> list[Manifest]:
    """Return those of the manifests (oldest first) that a node has made, the last one first."""
    return [manifest for manifest in reversed(manifests) if manifest.node == node]


def is_outdated(store: Store, node: Node, ref: ArtifactRef, inputs: Mapping[str, ArtifactRef]) -> bool:
    """Return whether the artifact was made from other measurements of the same content than its inputs hold now."""
    made_from = store.manifest(ref).inputs
    return any(
        name in inputs and name in made_from and made_from[name].volatile_id != inputs[name].volatile_id
        for name in node.stage.reads_volatile
    )


def is_inconclusive(store: Store, ref: ArtifactRef) -> bool:
    """Return whether the artifact holds a measurement that says nothing: the next run measures again."""
    return bool(store.manifest(ref).metrics.get(INCONCLUSIVE))


def has_partial(store: Store, stage: str, key: str) -> bool:
    """Whether an unfinished attempt left anything to go on from."""
    partial = store.partial_path(stage, key)
    return any(path.is_file() for name in ("out", "work") for path in (partial / name).rglob("*"))


def forced_nodes(nodes: Sequence[Node], force: Collection[str]) -> set[str]:
    """The nodes that `--force` names."""
    return select_nodes(nodes, force, "--force")


def select_nodes(nodes: Sequence[Node], names: Collection[str], option: str) -> set[str]:
    """The nodes that an option names, by their own name or by their stage's. Raises DraftsmithError for no node."""
    selected: set[str] = set()
    for name in names:
        matches = {node.name for node in nodes if node.name == name}
        matches = matches or {node.name for node in nodes if node.stage.name == name}
        if not matches:
            raise DraftsmithError(f"{option} {name}: no such node, use one of: {', '.join(n.name for n in nodes)}")
        selected |= matches
    return selected
