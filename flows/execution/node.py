"""Making one node's artifact: the store decides, a process does the work, the display and MLflow follow it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.locks import Holder
from draftsmith.artifacts.store.local import Claim, Store
from draftsmith.artifacts.store.manifest import MANIFEST, ArtifactRef, Provenance
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.runs import StageRun, Tracking
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.attempt import NOTE, AttemptNote
from draftsmith.flows.execution.devices import OnWait, lock_devices
from draftsmith.flows.execution.display import Display, StageDisplay
from draftsmith.flows.execution.input_guard import inputs_unchanged, snapshot_code
from draftsmith.flows.execution.process import Event, StageOutcome, run_stage
from draftsmith.flows.execution.shards import ShardJob, ShardPool, ShardProgress, build_shard, run_locally, shard_jobs
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
from draftsmith.stages.runtime.stage import SOURCES, Compute, InputListing, StageRequest

log = logging.getLogger("draftsmith.stages")  # Prefect shows it in the run


@dataclass(frozen=True)
class RunContext:
    """What every node of a run is made with."""

    home: Path
    config: RunOptions
    pipeline: Pipeline
    display: Display
    tracking: Tracking
    refresh_run: Callable[[], str | None] = lambda: None  # MLflow's id of the run that the stages' runs are nested in
    check: Callable[[], None] = lambda: None  # called while a stage waits or runs; what it raises stops it
    pool: ShardPool = run_locally  # who makes the shards of a node

    @property
    def store(self) -> Store:
        return open_store(self.home)

    @property
    def logs(self) -> Path:
        return self.home / "logs"


@dataclass(frozen=True)
class NodeResult:
    """A node's artifact, and whether it was there already."""

    ref: ArtifactRef
    reused: bool


def build_node(
    context: RunContext, node: Node, inputs: Mapping[str, ArtifactRef], *, force: bool = False
) -> NodeResult:
    """The node's artifact: reused from the store, or made by running its stage, going on from an earlier attempt.

    Raises the stage's own `DraftsmithError`; what the stage saved is kept for the next attempt.
    """
    if SOURCES in inputs:
        context.store.fetch(inputs[SOURCES])
        node = replace(node, config=node.config.with_pinned_files(InputListing.read(inputs[SOURCES].path)))
    external = external_digests(node.config)
    if gone := sorted((node.config.pinned_files or frozenset()) - external.keys()):
        raise DraftsmithError(
            f"{node.name}: {gone[0]} (and {len(gone) - 1} more) was there when the run began and is gone. Put it back, "
            "or run the same command again, which then reads what is there."
        )
    key = cache_key(node, inputs, node_seed(node, context.config), context.pipeline, external)
    stage = node.stage.name
    ref = None if force else find_artifact(context.store, node, key, verify=True)
    reused = True
    # also what an attempt left, or another run made
    while (
        ref is None or is_outdated(context.store, node, ref, inputs) or (reused and is_inconclusive(context.store, ref))
    ):
        force = force or ref is not None
        with context.store.claim(
            stage,
            key,
            force=force,
            run=context.config.name,
            wait=context.config.stages.lock_wait(context.check, _say_waiting(context, node)),
        ) as claim:
            reused = not isinstance(claim, Claim)
            if isinstance(claim, Claim):
                ref = _run(context, node, inputs, claim, external)
            else:  # another run has made it, or the commit of an earlier attempt was still to be made
                ref = claim
                context.tracking.finish_interrupted_run(context.store.manifest(ref), ref.path)
    if reused:
        with contextlib.suppress(OSError):
            (context.store.partial_path(stage, key) / NOTE).unlink(missing_ok=True)  # of a forced attempt that failed
            os.utime(ref.path / MANIFEST)  # when it was last used: `draftsmith prune`
        context.display.reused(node.name)
    return NodeResult(ref, reused)


def _say_waiting(context: RunContext, node: Node) -> Callable[[Holder | None], None]:
    def say(holder: Holder | None) -> None:
        who = f" ({holder})" if holder is not None else ""
        context.display.line(f"{node.name}: another run is making this artifact, waiting for it{who}")

    return say


def _devices(
    context: RunContext, node: Node, compute: Compute, note: AttemptNote | None = None
) -> AbstractContextManager[tuple[int, ...]]:
    options = context.config.stages
    limit_s = 60 * options.lock_wait_minutes
    waiting = _say_in_use(context, node, note)
    return lock_devices(compute, run=context.config.name, limit_s=limit_s, waiting=waiting, check=context.check)


def _say_in_use(context: RunContext, node: Node, note: AttemptNote | None = None) -> OnWait:
    def say(device: str, holder: Holder | None) -> None:
        # of those who share it the last one left its name, which may be this run
        who = f" ({holder})" if holder is not None and holder.pid != os.getpid() else " by another run"
        waits = f"waits for the device {device}, which is in use{who}"
        context.display.line(f"{node.name}: {waits}")
        if note is not None:
            note.waiting(waits)  # for `draftsmith status`

    return say


def _run(
    context: RunContext,
    node: Node,
    inputs: Mapping[str, ArtifactRef],
    claim: Claim,
    external: Mapping[str, str],
) -> ArtifactRef:
    config = node.config.model_dump(mode="json")
    by_node = {node.inputs[name]: ref for name, ref in inputs.items()}
    tracked = context.tracking.stage_run(
        context.refresh_run(), claim.stage, claim.key, name=node.name, params=config, inputs=by_node
    )
    note = AttemptNote(claim.out.parent, context.config.name, node.name)
    try:
        began = time.monotonic()
        shards = _shards(context, node, inputs, claim, note)
        spent = time.monotonic() - began if shards else 0.0
        compute = node.stage.compute_for(node.config)
        if shards and node.stage.join_compute is not None:
            compute = node.stage.join_compute
        with (
            _devices(context, node, compute, note) as devices,
            inputs_unchanged(context.store, node, inputs, claim, external),
            tracked.system_metrics(),
        ):
            note.waiting("")
            seed = node_seed(node, context.config)
            code_digest, modules = snapshot_code(node, inputs, seed, context.pipeline, external, claim.key)
            outcome = _run_process(context, node, inputs, claim, tracked, devices, shards, note)
            outcome.duration_s = round(outcome.duration_s + spent, 3)
        ref = context.store.commit(
            claim,
            Provenance(
                config,
                inputs,
                code_digest,
                seed,
                modules,
                external,
                mlflow_run_id=tracked.run_id,
                run=context.config.name,
                node=node.name,
            ),
            metrics=outcome.summary,
            volatile=node.stage.volatile,
            duration_s=outcome.duration_s,
        )
    except BaseException as error:
        stopped = isinstance(error, StageInterrupted) or not isinstance(error, Exception)
        if not stopped:
            note.failed(error)
        tracked.close("KILLED" if stopped else "FAILED")
        raise
    tracked.close("FINISHED", outcome.summary, ref.path)
    context.display.finished(node.name, outcome.duration_s, outcome.summary)
    return ref


def _shards(
    context: RunContext, node: Node, inputs: Mapping[str, ArtifactRef], claim: Claim, note: AttemptNote
) -> list[ArtifactRef]:
    """Artifacts of all shards of the node, whole on this machine; none if it is made in one piece."""
    orders = shard_jobs(context.config, context.pipeline, node, inputs, claim)
    if not orders:
        return []
    with context.display.stage(node.name) as shown:
        together, stopped = ShardProgress(shown, note.progress), threading.Event()

        def check() -> None:
            context.check()
            if stopped.is_set():
                raise StageInterrupted("the run was ended: run the same command to continue from what was saved")

        def make_one(order: ShardJob) -> ArtifactRef:
            return build_shard(
                order,
                context.home,
                on_event=lambda event: together.follow(order, event),
                waiting=_say_in_use(context, node),
                check=check,
            )

        made = context.pool(orders, make_one, stopped.set, check)
    store = context.store
    here = [replace(ref, path=store.path(ref.stage, ref.key)) for ref in made]  # another host has another home
    for ref in here:
        store.fetch(ref)
        store.verify_once(ref)
    return here


def _run_process(
    context: RunContext,
    node: Node,
    inputs: Mapping[str, ArtifactRef],
    claim: Claim,
    tracked: StageRun,
    devices: tuple[int, ...],
    shards: Sequence[ArtifactRef],
    note: AttemptNote,
) -> StageOutcome:
    options = context.config.stages
    request = StageRequest(
        stage=claim.stage,
        module=node.module,
        config=node.config.model_dump(mode="json"),
        inputs={name: ref.path for name, ref in inputs.items()},
        out=claim.out,
        work=claim.work,
        seed=node_seed(node, context.config),
        threads=options.threads,
        listing=node.config.list_inputs(),
        shards=[ref.path for ref in shards],
    )
    log_path = context.logs / f"{claim.stage}-{claim.key[:16]}-{time.strftime('%Y%m%d-%H%M%S')}.log"

    def follow(event: Event) -> None:
        claim.lock.check_periodically()
        _follow(event, node.name, shown, tracked, note)

    with context.display.stage(node.name) as shown:
        return run_stage(
            request,
            log_path=log_path,
            limit=options.time_limit(node.name),
            grace_s=options.grace_seconds,
            on_event=follow,
            # The locks live as long as the process that writes and computes, even if we are killed.
            pass_fds=(claim.lock_fd, *devices),
            check=context.check,
        )


def _follow(event: Event, name: str, shown: StageDisplay, tracked: StageRun, note: AttemptNote) -> None:
    match event["event"]:
        case "log":
            log.info("%s: %s", name, event["message"])
            shown.log(event["message"])
        case "progress":
            shown.progress(event["done"], event["total"], event["unit"], event["metrics"])
            note.progress(event["done"], event["total"], event["unit"])
        case "metrics":
            tracked.metrics(event["step"], event["values"])
