"""Builds one node's artifact: the store decides, a process does the work, the display and MLflow follow it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.locks import Holder
from draftsmith.artifacts.store.local import Claim, Store
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.runs import StageRun, Tracking
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.attempt import NOTE, AttemptNote, StageJob, Watch, run_attempt
from draftsmith.flows.execution.display import Display, StageDisplay
from draftsmith.flows.execution.machine import OnWait, lock_devices
from draftsmith.flows.execution.process import Event
from draftsmith.flows.execution.shards import ShardPool, ShardProgress, build_shard, run_locally, shard_jobs
from draftsmith.flows.planning.graph import (
    Node,
    Pipeline,
    cache_key,
    find_artifact,
    is_inconclusive,
    is_outdated,
    node_seed,
)
from draftsmith.flows.planning.inputs import external_digests

log = logging.getLogger("draftsmith.stages")  # Prefect shows it in the run


@dataclass(frozen=True)
class RunContext:
    """Everything that the nodes of a run share."""

    home: Path
    config: RunOptions
    pipeline: Pipeline
    display: Display
    tracking: Tracking
    refresh_run: Callable[[], str | None] = lambda: None  # returns the id of the MLflow run that encloses the stages'
    check: Callable[[], None] = lambda: None  # called while a stage waits or runs; what it raises stops it
    pool: ShardPool = run_locally  # builds the shards of a node

    @property
    def store(self) -> Store:
        return open_store(self.home)


def build_node(context: RunContext, node: Node, inputs: Mapping[str, Artifact], *, force: bool = False) -> Artifact:
    """Return the node's artifact: reused from the store, or built by its stage, which resumes an unfinished attempt.

    Raises the stage's own `DraftsmithError`. What the stage has saved is kept for the next attempt.
    """
    store, config = context.store, context.config
    try:
        external = external_digests(node.config)
    except DraftsmithError as error:
        raise type(error)(f"{node.name}: {error}") from error
    key = cache_key(node, inputs, node_seed(node, config), context.pipeline, external)
    job = StageJob(config, context.pipeline, node, inputs, key, external)
    ref = None if force else find_artifact(store, node, key, verify=True)
    reused = True
    # An artifact that another run or the commit of an earlier attempt has completed may be outdated too.
    while ref is None or is_outdated(node, ref, inputs) or (reused and is_inconclusive(ref)):
        force = force or ref is not None
        if ref is not None and is_inconclusive(ref):
            store.fetch(ref)
            job = replace(job, earlier=ref.path)
        wait = config.stages.lock_wait(context.check, _report_artifact_wait(context, node))
        with store.claim(job.stage, key, force=force, run=config.name, wait=wait) as claim:
            reused = not isinstance(claim, Claim)
            if isinstance(claim, Claim):
                ref = _build(context, job, claim)
            else:
                ref = claim
                context.tracking.finish_interrupted_run(ref.manifest, ref.path)
    if reused:
        with contextlib.suppress(OSError):
            (store.partial_path(job.stage, key) / NOTE).unlink(missing_ok=True)  # of a forced attempt that failed
            os.utime(ref.path / MANIFEST)  # time of the last use, for `draftsmith prune`
        context.display.reused(node.name)
    return replace(ref, reused=reused)


def _report_artifact_wait(context: RunContext, node: Node) -> Callable[[Holder | None], None]:
    def report(holder: Holder | None) -> None:
        who = f" ({holder})" if holder is not None else ""
        context.display.line(f"{node.name}: waits for another run that builds this artifact{who}")

    return report


def _report_device_wait(context: RunContext, node: Node, note: AttemptNote | None = None) -> OnWait:
    def report(device: str, holder: Holder | None) -> None:
        # The last of those who share a device has left its name, which may be this run's.
        who = f" ({holder})" if holder is not None and holder.pid != os.getpid() else " by another run"
        waits = f"waits for the device {device}, which is in use{who}"
        context.display.line(f"{node.name}: {waits}")
        if note is not None:
            note.waiting(waits)  # for `draftsmith status`

    return report


def _build(context: RunContext, job: StageJob, claim: Claim) -> Artifact:
    """Run the node's stage, with its shards first, and commit its artifact. MLflow has a run of it, however it ends."""
    node, options = job.node, context.config.stages
    tracked = context.tracking.stage_run(
        context.refresh_run(),
        claim.stage,
        claim.key,
        name=node.name,
        inputs={node.inputs[name]: ref for name, ref in job.inputs.items()},
    )
    note = AttemptNote(claim.out.parent, context.config.name, node.name)
    try:
        began = time.monotonic()
        shards = _build_shards(context, job, claim, note)
        shards_s = time.monotonic() - began if shards else 0.0
        compute = node.stage.compute_for(node.config)
        if shards and node.stage.join_compute is not None:
            compute = node.stage.join_compute
        with (
            lock_devices(
                compute, context.config.name, options.lock_wait(context.check), _report_device_wait(context, node, note)
            ) as device,
            tracked.system_metrics(),
            context.display.stage(node.name) as shown,
        ):
            note.waiting("")
            watch = Watch(lambda event: _follow(event, node.name, shown, tracked, note), context.check)
            summary, seconds, made_from = run_attempt(job, claim, context.home, device, watch, shards)
        duration_s = round(seconds + shards_s, 3)
        ref = context.store.commit(
            claim,
            made_from.model_copy(
                update={"mlflow_run_id": tracked.run_id, "run": context.config.name, "node": node.name}
            ),
            metrics=summary,
            duration_s=duration_s,
        )
    except BaseException as error:
        stopped = isinstance(error, StageInterrupted) or not isinstance(error, Exception)
        if not stopped:
            note.failed(error)
        tracked.close("KILLED" if stopped else "FAILED")
        raise
    tracked.close("FINISHED", ref.path)
    context.display.finished(node.name, duration_s, summary)
    return ref


def _build_shards(context: RunContext, job: StageJob, claim: Claim, note: AttemptNote) -> list[Artifact]:
    """Return the artifacts of all shards of the node, complete on this machine; none if it is built in one piece."""
    jobs = shard_jobs(job, claim)
    if not jobs:
        return []
    with context.display.stage(job.node.name) as shown:
        progress, stopped = ShardProgress(shown, note.progress), threading.Event()

        def check() -> None:
            context.check()
            if stopped.is_set():
                raise StageInterrupted("The run was ended. Run the same command to continue from what was saved.")

        def build(shard: StageJob) -> Artifact:
            on_wait = _report_device_wait(context, job.node)
            return build_shard(shard, context.home, Watch(lambda event: progress.follow(shard, event), check, on_wait))

        refs = context.pool(jobs, build, stopped.set, check)
    store = context.store
    refs = [replace(ref, path=store.path(ref.stage, ref.key)) for ref in refs]  # another host has another home
    for ref in refs:
        store.fetch(ref)
        store.verify_once(ref)
    return refs


def _follow(event: Event, name: str, shown: StageDisplay, tracked: StageRun, note: AttemptNote) -> None:
    match event["event"]:
        case "log":
            log.info("%s: %s", name, event["message"])
            shown.log(event["message"])
        case "progress":
            left = shown.progress(event["done"], event["total"], event["unit"], event["metrics"])
            note.progress(event["done"], event["total"], event["unit"], left)
        case "metrics":
            tracked.metrics(event["step"], event["values"])
