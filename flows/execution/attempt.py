"""One attempt to build a node or a shard of it: its inputs are guarded, and its stage runs as a process."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.store.local import Claim, Store
from draftsmith.artifacts.store.manifest import SHARD, ArtifactRef, Provenance
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.devices import Device, OnWait
from draftsmith.flows.execution.process import Event, ProcessOptions, StageOutcome, run_stage
from draftsmith.flows.planning.graph import Node, Pipeline, cache_key, node_seed
from draftsmith.flows.planning.inputs import external_digests
from draftsmith.stages.runtime.stage import Shard, StageRequest


@dataclass(frozen=True)
class StageJob:
    """A node to build, or one shard of it. A shard's job travels to the host that builds it."""

    config: RunOptions
    pipeline: Pipeline
    node: Node
    inputs: Mapping[str, ArtifactRef]
    node_key: str  # cache key of the node's artifact
    external: Mapping[str, str] = field(default_factory=dict)  # `external_digests` that the key was made of
    shard: Shard | None = None  # None: the whole node
    forced_attempt: str = ""  # of a node that is built again: its shards are too, each once

    @property
    def stage(self) -> str:
        """The stage's name in the store."""
        return self.node.stage.name if self.shard is None else f"{self.node.stage.name}{SHARD}"

    @property
    def key(self) -> str:
        """The cache key of the artifact of this job."""
        if self.shard is None:
            return self.node_key
        material = f"{self.node_key}{self.forced_attempt} {self.shard.index}/{self.shard.of}"
        return hashlib.sha256(material.encode()).hexdigest()

    @property
    def seed(self) -> int:
        """The seed of the node."""
        return node_seed(self.node, self.config)

    def __str__(self) -> str:
        if self.shard is None:
            return self.node.name
        return f"{self.node.name}, shard {self.shard.index + 1} of {self.shard.of}"


def _ignore(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """Functions that are called during an attempt."""

    on_event: Callable[[Event], None] = _ignore
    check: Callable[[], None] = _ignore  # called often, also while the attempt waits; what it raises ends the attempt
    on_wait: OnWait = _ignore  # called when the attempt has to wait for a device


NO_WATCH = Watch()


def run_attempt(
    job: StageJob, claim: Claim, home: Path, device: Device, watch: Watch, shards: Sequence[ArtifactRef] = ()
) -> tuple[StageOutcome, Provenance]:
    """Run the stage of a job as a process, and return its outcome and what the artifact is made from.

    shards: artifacts of all shards of the node, which the process joins; empty: it does all the work.

    Raises the stage's own `DraftsmithError`, RetryableError if the code has changed since the key was made, and
    DraftsmithError if an input is damaged or has changed.
    """
    node, options = job.node, job.config.stages
    config = node.config.model_dump(mode="json")

    def on_event(event: Event) -> None:
        claim.lock.check_periodically()
        watch.on_event(event)

    with inputs_unchanged(open_store(home), job, claim):
        code_digest, modules = snapshot_code(job)
        request = StageRequest(
            stage=claim.stage,
            module=node.module,
            config=config,
            inputs={name: ref.path for name, ref in job.inputs.items()},
            out=claim.out,
            work=claim.work,
            seed=job.seed,
            threads=options.threads,
            listing=node.config.list_inputs(),
            shard=job.shard,
            shards=[ref.path for ref in shards],
        )
        process = ProcessOptions(
            log_path=home / "logs" / f"{claim.stage}-{claim.key[:16]}-{time.strftime('%Y%m%d-%H%M%S')}.log",
            limit=options.time_limit(node.name),
            grace_s=options.grace_seconds,
            # The locks live as long as the process that writes and computes, even if we are killed.
            pass_fds=(claim.lock_fd, *device.locks),
            environment=device.environment,
        )
        outcome = run_stage(request, process, on_event, watch.check)
    return outcome, Provenance(config, job.inputs, code_digest, job.seed, modules, job.external)


def snapshot_code(job: StageJob) -> tuple[str, Mapping[str, str]]:
    """Return digest and modules of the stage's code as it is now, for the manifest.

    Raises RetryableError if it is not the code that the key was made of: a stage may wait for hours, and a shard may be
    built on another host.
    """
    pipeline, node = job.pipeline, job.node
    code = pipeline.code_digest(node.module), pipeline.code_modules(node.module)
    if cache_key(node, job.inputs, job.seed, pipeline, job.external) != job.node_key:
        raise RetryableError(
            f"{node.name}: the code here (or a file that it reads) is not that of its key: it changed while the stage "
            "waited, or this host has another version. Run the same command again, with one version everywhere."
        )
    return code


@contextmanager
def inputs_unchanged(store: Store, job: StageJob, claim: Claim) -> Iterator[None]:
    """Check before and after the body that inputs and external files are those of the cache key.

    Raises DraftsmithError if one is damaged or has changed. After the body, however it ended, the attempt's files are
    then discarded too.
    """
    _check_inputs(store, job, after=False)
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    try:
        _check_inputs(store, job, after=True)
    except RetryableError:  # a bucket that does not answer proves no damage, and must not hide the stage's error
        if failed is None:
            raise
    except DraftsmithError:
        store.discard(claim)
        raise
    if failed is not None:
        raise failed


def _check_inputs(store: Store, job: StageJob, *, after: bool) -> None:
    """Compare inputs and files with the key. after: the stage has read them, so a damaged copy is not repaired."""
    node = job.node
    if not after:
        _check_content(store, job)
    for name, ref in job.inputs.items():
        try:
            if not after:
                store.fetch(ref)
            store.verify_once(ref, read=after)
        except DraftsmithError as error:
            alone = f" (`draftsmith stage {node.inputs[name]} CONFIG --force` builds it alone)"
            hint = alone if "--force" in str(error) else ""
            raise type(error)(f"{node.name}: its input {name}: {error}{hint}") from error
    if after:  # last, as it may ask a bucket
        _check_content(store, job)
    now = external_digests(node.config)  # of the listed files only: those that arrived later are not read
    if changed := [path for path in sorted({*now, *job.external}) if now.get(path) != job.external.get(path)]:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DraftsmithError(
            f"{node.name}: {changed[0]}{more} changed while it was read, so the output was discarded. Run the same "
            "command again, which reads what is there."
        )


def _check_content(store: Store, job: StageJob) -> None:
    for name, ref in job.inputs.items():
        now = store.manifest_at(ref.stage, ref.key)
        if now is not None and now.content_id != ref.content_id:
            raise DraftsmithError(
                f"{job.node.name}: its input {name} ({ref.path}) was built again by another run, with other content. "
                "Run the same command again, which starts from the new one."
            )
