"""The graph of a run: its nodes in order, their cache keys, and the plan, which says what the store already has."""

from __future__ import annotations

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
from draftsmith.artifacts.store.manifest import Artifact, Manifest
from draftsmith.artifacts.tracking.refresh_runs import Metrics
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.planning.inputs import external_digests, pin_files, read_listings
from draftsmith.stages.runtime.stage import INCONCLUSIVE, Config, InputListing, Stage


@dataclass(frozen=True)
class Node:
    """One use of a stage in a run. Several nodes may use the same stage with other configs and inputs."""

    name: str
    module: str  # the stage's, e.g. "draftsmith.stages.training.sft.stage"
    config: Config
    inputs: Mapping[str, str] = field(default_factory=dict)  # name of the stage's input -> name of the node
    seed: int | None = None  # None: the run's seed

    @property
    def stage(self) -> Stage:
        stage: Stage = importlib.import_module(self.module).STAGE
        return stage


class Checks(Protocol):
    """The checks during a run. Each returns lines to print, or raises DraftsmithError if the run cannot go on."""

    def before(self, planned: Sequence[PlannedNode]) -> list[str]:
        """Check the plan before the first stage runs."""

    def after(self, node: Node, folders: Mapping[str, Path]) -> list[str]:
        """Check a node that has just been built. folders: the artifacts so far, by node."""


UNSERVED = "Unserved"  # name of a conclusion: a server does not draft with the champion


@dataclass(frozen=True)
class Conclusion:
    """The outcome of a run beyond its artifacts, such as a promotion."""

    name: str  # of the flow's state in Prefect, one word
    message: str
    error: DraftsmithError | None = None  # raised at the end of the run, after everything is stored and reported
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    overrules_review: bool = False  # in the description of the MLflow run
    asset: str = ""  # in Prefect: the promoted model, such as draftsmith://line/NAME/champion
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of the asset


@dataclass(frozen=True)
class RunReview:
    """Metrics, description and tags of a run in MLflow, for those who review it."""

    metrics: Mapping[str, float]
    description: str  # Markdown, the most important first
    concluded_description: str  # used once the run has come to the expected conclusion
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EarlyEnd:
    """Where a run may end before its last node."""

    after: str  # node
    what: str  # of the nodes that follow
    certain: bool


class RunPolicy(Protocol):
    """Decides whether a run ends early, and what follows from its artifacts."""

    def early_end(self, folders: Mapping[str, Path]) -> EarlyEnd | None:
        """Return where the run may end, as far as the artifacts that are reused tell; None if it surely goes on."""

    @property
    def sticky_force(self) -> Collection[str]:
        """Return names that must stay in `--force` when a failed run is continued, even if their nodes were built."""

    def should_stop(self, node: Node, folders: Mapping[str, Path]) -> Conclusion | None:
        """Return the conclusion with which the run ends after this node, or None if it goes on."""

    def conclude(self, folders: Mapping[str, Path], run_id: str | None) -> Conclusion | None:
        """Act on the artifacts after the last node. run_id: the run's id in MLflow.

        Raises `OutdatedPlanError` if what the plan was based on has changed meanwhile.
        """


class OutdatedPlanError(DraftsmithError):
    """Raised when what the plan was based on has changed. Running again makes a new plan and reuses finished nodes."""

    exit_code = EXIT_RETRYABLE


def load_attribute(text: str) -> Any:
    """Return the object that "module:attribute" names."""
    module, _, attribute = text.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Pipeline:
    """A kind of run: its config, its graph, and the Prefect flow that runs it.

    `folders` maps each node to the folder of its artifact.
    """

    config: type[RunOptions]
    nodes: Callable[[Any], list[Node]]  # config -> nodes in any order
    flow: str  # "module:attribute", imported when it is used: it imports Prefect
    code_digest: Callable[[str], str] = code_digest  # module of a stage -> digest of its code
    checks: Callable[[], Checks] | None = None  # makes the checks of one run
    resolve: Callable[[Any], Any] | None = None  # fills in what has to be looked up, such as the champion
    # resolved config, forced nodes -> policy
    policy: Callable[[Any, Collection[str]], RunPolicy | None] | None = None
    # display, folders, `EndedRun`: prints the results
    results: Callable[[Any, Mapping[str, Path], Any], None] | None = None
    headline: str = ""  # node whose metrics become those of the run in MLflow
    review: Callable[[Mapping[str, Path]], RunReview | None] | None = None  # folders -> review
    # folders -> the drafters that node `evaluation` compared, with their metrics by data set
    compared: Callable[[Mapping[str, Path]], Mapping[str, tuple[Manifest, Metrics]]] | None = None
    data: tuple[str, ...] = ()  # nodes that are data sets of the run in MLflow
    report: tuple[str, str] = ("", "")  # node and file of the report
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
    """A node with what a run would do with it."""

    node: Node
    status: Status
    key: str | None = None  # cache key; None if an input is not built yet
    ref: Artifact | None = None  # of a hit
    after: tuple[str, ...] = ()  # nodes that must be built before the key is known
    damage: DraftsmithError | None = None  # what is wrong with the stored artifact, and the remedy
    newer_files: int = 0  # files that appeared since the listing that the run reuses

    @property
    def newer_files_notice(self) -> str | None:
        """Return a line about the files that the reused listing leaves out, or None if there are none."""
        if not self.newer_files:
            return None
        return (
            f"{self.node.name}: the run reuses the last run's listing of files. {self.newer_files} newer ones are left "
            f"to the next run; `--force {self.node.name}` reads them now."
        )


@dataclass(frozen=True)
class Selection:
    """What a command selects of a graph. A name is a node's, or a stage's for all its nodes."""

    force: tuple[str, ...] = ()  # nodes to build again although the store has them
    start: tuple[str, ...] = ()  # `--from`: the first nodes; what does not follow from them must be in the store
    until: tuple[str, ...] = ()  # nodes to build, with all that they need; empty: the whole graph
    reuse_listing: bool = False  # read the files that the last run listed, although that run has ended

    @classmethod
    def from_options(
        cls,
        force: Collection[str] | None,
        start: Collection[str] | None,
        until: Collection[str] | None,
        *,
        deployed: bool = False,
    ) -> Selection:
        """Return the selection of a command, or of a deployment's run.

        A person who names nodes repeats a part of the last run, so its listing is reused. A deployment names the same
        nodes in every run, so that they do not say this.
        """
        repeats = bool(start or force) and not deployed
        return cls(tuple(force or ()), tuple(start or ()), tuple(until or ()), reuse_listing=repeats)

    def nodes(self, graph: Sequence[Node]) -> list[Node]:
        """Return the nodes of `until` and all that they need, in order."""
        ordered = topological_order(graph)
        if not self.until:
            return ordered
        wanted = nodes_named(ordered, self.until, "--until")
        for node in reversed(ordered):
            if node.name in wanted:
                wanted |= set(node.inputs.values())
        return [node for node in ordered if node.name in wanted]

    def forced(self, nodes: Sequence[Node]) -> set[str]:
        """Return the names of the nodes to build again. Raises DraftsmithError for an unknown name."""
        return nodes_named(nodes, self.force, "--force")

    def check_names(self, graph: Sequence[Node]) -> None:
        """Raise DraftsmithError for a name that the graph does not have."""
        nodes_named(nodes := self.nodes(graph), self.start, "--from")
        self.forced(nodes)

    def check_start(self, planned: Sequence[PlannedNode]) -> None:
        """Raise DraftsmithError if a node that does not follow from `start` has to be built.

        Without this check a changed field could make the rerun of a late stage begin with hours of earlier ones.
        """
        nodes = [item.node for item in planned]
        built = nodes_named(nodes, self.start, "--from") | self.forced(nodes)
        for node in nodes:
            if built & set(node.inputs.values()):
                built.add(node.name)
        missing = [item.node.name for item in planned if item.status is not Status.HIT and item.node.name not in built]
        if missing:
            raise DraftsmithError(
                f"--from {', '.join(self.start)}: {', '.join(missing)}: not in the store, though needed before. Name "
                f"them with --from too, or leave --from out; `draftsmith why CONFIG {missing[0]}` says what changed."
            )


def topological_order(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes, each after its inputs, else as given. Raises DraftsmithError for a graph that does not fit."""
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        twice = sorted(name for name, count in Counter(node.name for node in nodes).items() if count > 1)
        raise DraftsmithError(f"two nodes have the same name: {', '.join(twice)}")
    for node in nodes:
        _check_inputs(node, by_name)
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


def _check_inputs(node: Node, by_name: Mapping[str, Node]) -> None:
    stage = node.stage
    declared = {name.removesuffix("?") for name in stage.inputs}
    prefixes = tuple(name.removesuffix("*") for name in stage.inputs if name.endswith("*"))
    required = {name for name in stage.inputs if not name.endswith(("?", "*"))}
    if unknown := {name for name in set(node.inputs) - declared if not (prefixes and name.startswith(prefixes))}:
        raise DraftsmithError(f"node {node.name}: stage {stage.name} has no input {', '.join(sorted(unknown))}")
    if missing := required - set(node.inputs):
        raise DraftsmithError(f"node {node.name}: stage {stage.name} needs the input {', '.join(sorted(missing))}")
    for source in node.inputs.values():
        if source not in by_name:
            raise DraftsmithError(f"node {node.name}: its input comes from node {source}, which is not in the graph")


def nodes_named(nodes: Sequence[Node], names: Collection[str], option: str) -> set[str]:
    """Return the nodes that an option names by their own name or their stage's. Raises DraftsmithError for no node."""
    selected: set[str] = set()
    for name in names:
        matches = {node.name for node in nodes if node.name == name}
        matches = matches or {node.name for node in nodes if node.stage.name == name}
        if not matches:
            raise DraftsmithError(f"{option} {name}: no such node. Use one of: {', '.join(n.name for n in nodes)}.")
        selected |= matches
    return selected


def node_seed(node: Node, config: RunOptions) -> int:
    """Return the seed of a node in a run."""
    return config.seed if node.seed is None else node.seed


def cache_key(
    node: Node,
    inputs: Mapping[str, Artifact],
    seed: int,
    pipeline: Pipeline,
    external: Mapping[str, str] | None = None,
) -> str:
    """Return the cache key of what the node computes from these inputs.

    external: the node's `external_digests`; None: computed here.
    """
    if external is None:
        external = external_digests(node.config)
    # a measurement at other settings has another key, though the same content
    measured = {name: inputs[name].key for name in node.stage.reads_volatile if name in inputs}
    more = {"external_files": dict(external), "measured": measured}
    return Store.key(
        stage=node.stage.name,
        code_digest=pipeline.code_digest(node.module),
        config=node.config.key_material() | {name: value for name, value in more.items() if value},
        inputs=inputs,
        seed=seed,
    )


def resolve_config(config: RunOptions, pipeline: Pipeline) -> RunOptions:
    """Return the config with what has to be looked up, such as the champion. The plan is based on it."""
    resolved: RunOptions = config if pipeline.resolve is None else pipeline.resolve(config)
    return resolved


def plan(
    config: RunOptions,
    store: Store,
    pipeline: Pipeline,
    selection: Selection = Selection(),
    *,
    stop_at_damage: bool = True,
) -> list[PlannedNode]:
    """Return what a run would do now, in order. Reads the store and changes nothing.

    stop_at_damage: raise the error of a damaged artifact, as a run does; False: return it with the node.
    """
    nodes = selection.nodes(pipeline.nodes(config))
    forced = selection.forced(nodes)
    for node in nodes:
        try:
            node.config.external_files()  # a missing file is an error now, not hours later
        except DraftsmithError as error:
            raise type(error)(f"{node.name}: {error}") from error
    planned: dict[str, PlannedNode] = {}
    listings = read_listings(config.name, ended=selection.reuse_listing)
    for node in nodes:
        pinned, newer_files = pin_files(node.config, listings.get(node.name) if node.name not in forced else None)
        node = replace(node, config=pinned)
        item = _plan_node(node, planned, node_seed(node, config), store, pipeline, node.name in forced)
        if stop_at_damage and item.damage is not None:
            raise item.damage
        planned[node.name] = replace(item, newer_files=newer_files)
    if selection.start:
        selection.check_start(list(planned.values()))
    return list(planned.values())


def planned_listings(planned: Sequence[PlannedNode]) -> dict[str, InputListing]:
    """Return the listing of each node that has one."""
    return {item.node.name: listing for item in planned if (listing := item.node.config.listing) is not None}


def _plan_node(
    node: Node, before: Mapping[str, PlannedNode], seed: int, store: Store, pipeline: Pipeline, forced: bool
) -> PlannedNode:
    inputs: dict[str, Artifact] = {}
    after: list[str] = []
    for name, source in node.inputs.items():
        if (ref := before[source].ref) is None:
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
    if ref is not None and not is_outdated(node, ref, inputs) and not is_inconclusive(ref):
        return PlannedNode(node, Status.HIT, key, ref)
    return PlannedNode(node, Status.RESUME if has_partial(store, node.stage.name, key) else Status.RUN, key)


def find_artifact(store: Store, node: Node, key: str, *, verify: bool = False) -> Artifact | None:
    """Return the node's artifact in the store, if there is one. The error of a damaged one names the node to force.

    verify: compare checksums of files that were touched since they were last compared.
    """
    try:
        ref = store.find(node.stage.name, key)
        if ref is not None and verify:
            store.verify_once(ref, and_elsewhere=False)
        return ref
    except RetryableError:  # the store does not answer: no damage
        raise
    except DraftsmithError as error:
        if node.name == node.stage.name:
            raise
        raise DraftsmithError(f"{error} (here it is node {node.name}: `--force {node.name}`)") from error


def manifests_of_node(manifests: Sequence[Manifest], node: str) -> list[Manifest]:
    """Return those of the manifests (oldest first) that belong to a node, newest first."""
    return [manifest for manifest in reversed(manifests) if manifest.node == node]


def is_outdated(node: Node, ref: Artifact, inputs: Mapping[str, Artifact]) -> bool:
    """Return whether an input was measured again, with the same content, after the artifact was made from it."""
    made_from = ref.manifest.inputs
    return any(
        name in inputs and name in made_from and made_from[name].volatile_id != inputs[name].volatile_id
        for name in node.stage.reads_volatile
    )


def is_inconclusive(ref: Artifact) -> bool:
    """Return whether the artifact holds an inconclusive measurement, which the next run adds to."""
    return bool(ref.manifest.metrics.get(INCONCLUSIVE))


def has_partial(store: Store, stage: str, key: str) -> bool:
    """Return whether an unfinished attempt left files to resume from."""
    partial = store.partial_path(stage, key)
    return any(path.is_file() for name in ("out", "work") for path in (partial / name).rglob("*"))
