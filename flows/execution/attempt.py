"""One attempt to build a node or a shard of it: its inputs are guarded, its stage runs as a process, and it has a note.

The note records who builds, where, since when, how far, and why it failed. It is a file in the attempt's folder, and is
deleted with it when the artifact is complete. A killed process leaves its note in place, so only the lock of the key
shows whether the attempt is running.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError, one_line
from draftsmith.artifacts.locks import user_name
from draftsmith.artifacts.store.local import Claim, Store
from draftsmith.artifacts.store.manifest import SHARD, Artifact, InputEntry, PendingManifest, local_time
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import format_duration
from draftsmith.flows.execution.machine import Device, OnWait
from draftsmith.flows.execution.process import Event, run_stage
from draftsmith.flows.planning.graph import Node, Pipeline, cache_key, node_seed
from draftsmith.flows.planning.inputs import external_digests
from draftsmith.stages.runtime.stage import Shard, StageRequest


@dataclass(frozen=True)
class StageJob:
    """A node to build, or one shard of it. A shard's job travels to the host that builds it."""

    config: RunOptions
    pipeline: Pipeline
    node: Node
    inputs: Mapping[str, Artifact]
    node_key: str  # cache key of the node's artifact
    external: Mapping[str, str] = field(default_factory=dict)  # `external_digests` that the key was made of
    shard: Shard | None = None  # None: the whole node
    earlier: Path | None = None  # the inconclusive artifact that this one replaces
    forced_attempt: str = ""  # of a node that is built again: its shards are too, each once

    @property
    def stage(self) -> str:
        """Return the stage's name in the store."""
        return self.node.stage.name if self.shard is None else f"{self.node.stage.name}{SHARD}"

    @property
    def key(self) -> str:
        """Return the cache key of the artifact of this job."""
        if self.shard is None:
            return self.node_key
        material = f"{self.node_key}{self.forced_attempt} {self.shard.index}/{self.shard.of}"
        return hashlib.sha256(material.encode()).hexdigest()

    @property
    def seed(self) -> int:
        """Return the seed of the node."""
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
    job: StageJob, claim: Claim, home: Path, device: Device, watch: Watch, shards: Sequence[Artifact] = ()
) -> tuple[dict[str, float], float, PendingManifest]:
    """Run the stage of a job as a process. Return its metrics, its seconds, and what the artifact is made from.

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
            listing=node.config.listing,
            shard=job.shard,
            shards=[ref.path for ref in shards],
            earlier=job.earlier,
        )
        began = time.monotonic()
        summary = run_stage(
            request,
            home / "logs" / f"{claim.stage}-{claim.key[:16]}-{time.strftime('%Y%m%d-%H%M%S')}.log",
            node=node.name,
            limit_s=options.time_limit_s(node.name),
            grace_s=options.grace_seconds,
            follow=on_event,
            check=watch.check,
            # The locks live as long as the process that writes and computes, even if we are killed.
            descriptors=(claim.lock.fd, *device.locks),
            environment=device.environment,
        )
        seconds = time.monotonic() - began
    return (
        summary,
        seconds,
        PendingManifest(
            stage=claim.stage,
            key=claim.key,
            config=config,
            inputs={name: InputEntry.of(made) for name, made in job.inputs.items()},
            code_digest=code_digest,
            seed=job.seed,
            modules=dict(modules),
            external=dict(job.external),
            volatile=node.stage.volatile,
        ),
    )


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


NOTE = "attempt.json"
_EVERY_S = 2.0  # between two writes of the progress


@dataclass(frozen=True)
class Attempt:
    """An attempt at an artifact, as its note records it. Moments are seconds since the epoch."""

    run: str
    node: str
    host: str
    pid: int  # of the command or the flow run, not of the stage's own process
    user: str
    since: float
    at: float  # of the progress, or of the error
    done: int = 0
    total: int = 0
    unit: str = ""
    left_s: float | None = None
    waits: str = ""  # what it waits for, before it begins
    error: str = ""  # why it failed, one line

    @property
    def failed_at(self) -> str:
        """When it failed, in local time."""
        return local_time(self.at)

    def __str__(self) -> str:
        now = time.time()
        text = f"node {self.node} of {self.run} on {self.host} (pid {self.pid}, user {self.user}) since "
        text += f"{local_time(self.since)} ({format_duration(now - self.since)})"
        if self.waits:
            text += f", {self.waits}"
        if self.total:
            text += f", {self.done}/{self.total} {self.unit}, reported {format_duration(max(0.0, now - self.at))} ago"
        return text + (f", {format_duration(self.left_s)} left then" if self.left_s is not None else "")


class AttemptNote:
    """Writes the note of one attempt. It never raises: a full disk may be what ended the attempt."""

    def __init__(self, folder: Path, run: str, node: str) -> None:
        """Write the first note. folder: the attempt's, as `Store.partial_path` returns it."""
        self._path, self._written = folder / NOTE, 0.0
        now = time.time()
        self._note = Attempt(run, node, platform.node(), os.getpid(), user_name(), since=now, at=now)
        self._write()

    def progress(self, done: int, total: int, unit: str, left_s: float | None) -> None:
        """Write the progress, at most every two seconds."""
        self._note = replace(self._note, at=time.time(), done=done, total=total, unit=unit, left_s=left_s)
        if time.monotonic() - self._written > _EVERY_S:
            self._write()

    def waiting(self, reason: str) -> None:
        """Write what the attempt waits for; an empty text: it has begun."""
        self._note = replace(self._note, waits=reason)
        self._write()

    def failed(self, error: BaseException) -> None:
        """Write why the attempt failed."""
        self._note = replace(self._note, at=time.time(), error=one_line(error))
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(DraftsmithError):
            write_text(self._path, json.dumps(asdict(self._note)))


def read_attempt(folder: Path) -> Attempt | None:
    """Return the note in the folder of an attempt, or None if there is no readable one."""
    try:
        return Attempt(**json.loads((folder / NOTE).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
