"""The plan of a run: what it makes for each node, under which key, and what the store already has."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import EXIT_RETRYABLE, DraftsmithError, RetryableError
from draftsmith.artifacts.store.code_digest import code_digest, code_modules
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import SHARD, Artifact, InputEntry, Manifest, PendingManifest
from draftsmith.artifacts.tracking.refresh_runs import Metrics
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.planning.external_files import external_digests
from draftsmith.flows.planning.graph import ALL_NODES, Node, Selection, nodes_named
from draftsmith.flows.planning.listings import pin_files, read_listings
from draftsmith.stages.runtime.stage import INCONCLUSIVE, InputListing, Shard

UNSERVED = "Unserved"  # name of a conclusion: a server does not draft with the champion


@dataclass(frozen=True)
class Conclusion:
    """The outcome of a run beyond its artifacts, such as a promotion."""

    name: str  # one word, the name of the flow's state in Prefect
    message: str
    error: DraftsmithError | None = None  # raised at the end of the run, after everything is stored and reported
    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    overrules_review: bool = False  # in the description of the MLflow run
    asset: str = ""  # in Prefect: the promoted model, such as draftsmith://line/NAME/champion
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the asset's


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
    what: str  # what happens to the nodes that follow
    certain: bool


class OutdatedPlanError(DraftsmithError):
    """Raised when what the plan was based on has changed. Running again makes a new plan and reuses finished nodes."""

    exit_code = EXIT_RETRYABLE


def load_attribute(text: str) -> Any:
    """Return the object that "module:attribute" names."""
    module, _, attribute = text.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Pipeline:
    """A kind of run: its config, its graph, and the Prefect flow that runs it. Most methods do nothing by default.

    folders: node -> folder of its artifact.
    """

    config: type[RunOptions]
    flow: str  # "module:attribute", imported when it is used: it imports Prefect
    headline: str = ""  # node whose metrics become those of the run in MLflow
    data: tuple[str, ...] = ()  # nodes that are data sets of the run in MLflow
    report: tuple[str, str] = ("", "")  # node and file of the report

    def nodes(self, config: Any) -> list[Node]:
        """Return the nodes of a resolved config in any order. Every pipeline has its own."""
        raise NotImplementedError

    def resolve(self, config: Any) -> Any:
        """Return the config with what must be looked up, such as the champion. The plan is based on it."""
        return config

    def code_digest(self, module: str) -> str:
        """Return the digest of the code of a stage's module, for keys."""
        return code_digest(module)

    def code_modules(self, module: str) -> dict[str, str]:
        """Return the modules that this digest covers, for `draftsmith why`."""
        return code_modules(module)

    def check(self, builds: Sequence[Build]) -> list[str]:  # noqa: ARG002
        """Check a plan before its first stage. Return lines to print; raises DraftsmithError if it cannot be run."""
        return []

    def check_after(
        self,
        node: Node,  # noqa: ARG002
        builds: Sequence[Build],  # noqa: ARG002
        folders: Mapping[str, Path],  # noqa: ARG002
    ) -> list[str]:
        """Make the checks that a node allows once it is made. Returns and raises like `check`. builds: the plan."""
        return []

    def concludes(self, config: Any) -> bool:  # noqa: ARG002
        """Return whether a complete run has a conclusion."""
        return False

    def early_end(
        self,
        config: Any,  # noqa: ARG002
        asked: Collection[str],  # noqa: ARG002
        folders: Mapping[str, Path],  # noqa: ARG002
    ) -> EarlyEnd | None:
        """Return where a complete run may end, as far as reused artifacts tell; None if it certainly goes on.

        asked: nodes of `--force` and `--from`.
        """
        return None

    def sticky_force(self, config: Any, asked: Collection[str]) -> Collection[str]:  # noqa: ARG002
        """Return names that must stay in `--force` when a failed run is continued, even if their nodes were made."""
        return ()

    def compared(self, folders: Mapping[str, Path]) -> Mapping[str, tuple[Manifest, Metrics]]:  # noqa: ARG002
        """Return the drafters that node `evaluation` compared, with their metrics by data set."""
        return {}

    def review(self, folders: Mapping[str, Path]) -> RunReview | None:  # noqa: ARG002
        """Return the review of a run for MLflow."""
        return None

    def show(self, display: Any, folders: Mapping[str, Path], ended: Any) -> None:
        """Print the results. display: a `Display`. ended: an `EndedRun`."""


class Status(StrEnum):
    """What a run would do with a node."""

    HIT = "reused"
    RUN = "run"
    RESUME = "resumes"
    FORCED = "forced"
    AFTER = "after"
    DAMAGED = "damaged"


@dataclass(frozen=True)
class Build:
    """The build of a node or of one of its shards: its inputs and its key. A shard's is sent to the shard's host."""

    pipeline: Pipeline
    config: RunOptions  # the run's
    node: Node
    inputs: Mapping[str, Artifact] = field(default_factory=dict)  # those that exist
    external: Mapping[str, str] = field(default_factory=dict)  # `external_digests` of the node's config
    code: str = ""  # digest of the stage's code
    status: Status = Status.AFTER
    artifact: Artifact | None = None  # the reused one
    damage: DraftsmithError | None = None  # what is wrong with the stored artifact, and the remedy
    newer_files: int = 0  # files that appeared since the listing that the run reuses
    shard: Shard | None = None  # None: the whole node
    forced_attempt: str = ""  # set if the node is made again: its shards are too, each once

    @classmethod
    def of(cls, pipeline: Pipeline, config: RunOptions, node: Node, inputs: Mapping[str, Artifact]) -> Build:
        """Return the build of a node from these inputs. Raises DraftsmithError for a file that is missing."""
        return cls(pipeline, config, node, inputs, _external(node), pipeline.code_digest(node.module))

    def complete(self, made: Mapping[str, Artifact]) -> Build:
        """Return this build with all its inputs. made: artifacts by node."""
        inputs = {name: made[source] for name, source in self.node.inputs.items()}
        if inputs == self.inputs:
            return self
        return replace(self, inputs=inputs, artifact=None, external=_external(self.node))

    @property
    def after(self) -> tuple[str, ...]:
        """Return the nodes that must be made before the key is known."""
        return tuple(dict.fromkeys(source for name, source in self.node.inputs.items() if name not in self.inputs))

    @property
    def name(self) -> str:
        """Return the node's name."""
        return self.node.name

    @property
    def stage(self) -> str:
        """Return the stage's name in the store."""
        return self.node.stage.name if self.shard is None else f"{self.node.stage.name}{SHARD}"

    @property
    def seed(self) -> int:
        return self.config.seed if self.node.seed is None else self.node.seed

    @cached_property
    def key(self) -> str:
        """Return the cache key; empty until all inputs are made."""
        if self.after:
            return ""
        node = self.node
        # a measurement at other settings has another key, though the same content
        measured = {name: self.inputs[name].key for name in node.stage.reads_volatile if name in self.inputs}
        more = {"external_files": dict(self.external), "measured": measured}
        key = Store.key(
            stage=node.stage.name,
            code_digest=self.code,
            config=node.config.key_material() | {name: value for name, value in more.items() if value},
            inputs=self.inputs,
            seed=self.seed,
        )
        if self.shard is None:
            return key
        return hashlib.sha256(f"{key}{self.forced_attempt} {self.shard.index}/{self.shard.of}".encode()).hexdigest()

    def shards(self, forced_attempt: str) -> list[Build]:
        """Return the builds of the node's shards; none if one process does all the work."""
        count = self.config.stages.shards
        if not self.node.stage.sharded or count == 1:
            return []
        return [replace(self, shard=Shard(index, count), forced_attempt=forced_attempt) for index in range(count)]

    def manifest(self) -> PendingManifest:
        """Return what the artifact is made from."""
        node, whole = self.node, dict[str, Any]()
        if self.shard is None:
            whole = {"run": self.config.name, "node": node.name, "modules": self.pipeline.code_modules(node.module)}
        return PendingManifest(
            stage=self.stage,
            key=self.key,
            config=node.config.model_dump(mode="json"),
            inputs={name: InputEntry.of(made) for name, made in self.inputs.items()},
            code_digest=self.code,
            seed=self.seed,
            external=dict(self.external),
            volatile=node.stage.volatile,
            **whole,
        )

    def reuses(self, made: Artifact) -> bool:
        """Return whether an artifact of this key may be reused.

        It may not if an input was measured again, with the same content, after the artifact was made from it, or if it
        holds an inconclusive measurement, which the next run adds to.
        """
        made_from = made.manifest.inputs
        outdated = any(
            name in self.inputs and name in made_from and made_from[name].volatile_id != self.inputs[name].volatile_id
            for name in self.node.stage.reads_volatile
        )
        return not outdated and not is_inconclusive(made)

    @property
    def newer_files_notice(self) -> str | None:
        """Return a line about the files that are newer than the reused listing, or None if there are none."""
        if not self.newer_files:
            return None
        return (
            f"{self.name}: the run reuses the last run's listing of files. {self.newer_files} newer ones are left "
            f"to the next run; `--force {self.name}` reads them now."
        )

    def __str__(self) -> str:
        return self.name if self.shard is None else f"{self.name}, shard {self.shard.index + 1} of {self.shard.of}"


def _external(node: Node) -> dict[str, str]:
    try:
        return external_digests(node.config)
    except DraftsmithError as error:
        raise type(error)(f"{node.name}: {error}") from error


def plan(
    config: RunOptions,
    store: Store,
    pipeline: Pipeline,
    selection: Selection = ALL_NODES,
    *,
    stop_at_damage: bool = True,
) -> list[Build]:
    """Return what a run of a resolved config would do now, in order. Reads the store and changes nothing.

    stop_at_damage: raise the error of a damaged artifact, as a run does; False: return it with the build.
    """
    nodes = selection.nodes(pipeline.nodes(config))
    forced = selection.forced(nodes)
    listings = read_listings(config.name, ended=selection.reuse_listing)
    builds: dict[str, Build] = {}
    for node in nodes:
        pinned, newer_files = pin_files(node.config, listings.get(node.name) if node.name not in forced else None)
        made = {name: builds[source].artifact for name, source in node.inputs.items()}
        inputs = {name: artifact for name, artifact in made.items() if artifact is not None}
        build = Build.of(pipeline, config, replace(node, config=pinned), inputs)
        build = replace(_with_status(build, store, forced=node.name in forced), newer_files=newer_files)
        if stop_at_damage and build.damage is not None:
            raise build.damage
        builds[node.name] = build
    if selection.start:
        _check_start(selection, list(builds.values()))
    return list(builds.values())


def _with_status(build: Build, store: Store, *, forced: bool) -> Build:
    if build.after:
        return build
    if forced:
        return replace(build, status=Status.FORCED)
    try:
        made = find(build, store)
    except RetryableError:
        raise
    except DraftsmithError as damage:
        return replace(build, status=Status.DAMAGED, damage=damage)
    if made is not None and build.reuses(made):
        return replace(build, status=Status.HIT, artifact=made)
    return replace(build, status=Status.RESUME if has_partial(store, build.stage, build.key) else Status.RUN)


def _check_start(selection: Selection, builds: Sequence[Build]) -> None:
    """Raise DraftsmithError if a node that does not follow from `--from` has to be made.

    Without this check a changed field could make the rerun of a late stage begin with hours of earlier ones.
    """
    nodes = [build.node for build in builds]
    built = nodes_named(nodes, selection.start, "--from") | selection.forced(nodes)
    for node in nodes:
        if built & set(node.inputs.values()):
            built.add(node.name)
    missing = [build.name for build in builds if build.status is not Status.HIT and build.name not in built]
    if missing and selection.alone:
        raise DraftsmithError(
            f"stage {selection.start[0]}: {', '.join(missing)}: not in the store, though needed before. Make it with "
            f"`draftsmith stage {missing[0]} CONFIG`, or all with `draftsmith run CONFIG`."
        )
    if missing:
        raise DraftsmithError(
            f"--from {', '.join(selection.start)}: {', '.join(missing)}: not in the store, but needed. Name them "
            f"with --from too, or run without --from; `draftsmith why CONFIG {missing[0]}` says what changed."
        )


def early_end(
    pipeline: Pipeline, config: RunOptions, builds: Sequence[Build], store: Store, selection: Selection
) -> EarlyEnd | None:
    """Return where a run with this plan may end before its last node."""
    if selection.until:
        return None
    asked = selection.asked([build.node for build in builds])
    reused = {build.name: build.artifact for build in builds if build.artifact is not None}
    return pipeline.early_end(config, asked, store.folders(reused))


def to_check(builds: Sequence[Build], end: EarlyEnd | None) -> Sequence[Build]:
    """Return the builds that are checked before they are made: none if all are reused up to a certain end."""
    return () if end is not None and end.certain else builds


def planned_listings(builds: Sequence[Build]) -> dict[str, InputListing]:
    """Return the listing of each node that has one."""
    return {build.name: listing for build in builds if (listing := build.node.config.listing) is not None}


def find(build: Build, store: Store, *, verify: bool = False) -> Artifact | None:
    """Return the artifact of a build's key, if the store has one. The error of a damaged one names the node to force.

    verify: compare checksums of files that were touched since they were last compared.
    """
    try:
        made = store.find(build.stage, build.key)
        if made is not None and verify:
            store.verify_once(made, and_elsewhere=False)
        return made
    except RetryableError:  # the store does not answer: no damage
        raise
    except DraftsmithError as error:
        if build.name == build.node.stage.name:
            raise
        raise DraftsmithError(f"{error} (here it is node {build.name}: `--force {build.name}`)") from error


def manifests_of_node(manifests: Sequence[Manifest], node: str) -> list[Manifest]:
    """Return those of the manifests (oldest first) that belong to a node, newest first."""
    return [manifest for manifest in reversed(manifests) if manifest.node == node]


def is_inconclusive(made: Artifact) -> bool:
    """Return whether the artifact holds an inconclusive measurement."""
    return bool(made.manifest.metrics.get(INCONCLUSIVE))


def has_partial(store: Store, stage: str, key: str) -> bool:
    """Return whether an unfinished attempt left files to resume from."""
    partial = store.partial_path(stage, key)
    return any(path.is_file() for name in ("out", "work") for path in (partial / name).rglob("*"))
