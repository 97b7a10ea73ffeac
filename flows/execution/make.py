"""Makes the artifact of a build: the store decides, a process does the work, the display and MLflow follow it.

A node may be made in shards: each is an artifact and a separate process, on this host or another. Only a lost shard is
made again. The node's artifact is joined from all shards, and does not depend on their number. The shards' keys follow
from the node's key, which does not mention shards.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, StageInterrupted
from draftsmith.artifacts.locks import Holder
from draftsmith.artifacts.store.attempt import NOTE, Attempt
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact, PendingManifest
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.runs import StageRun, Tracking
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display, StageDisplay
from draftsmith.flows.execution.machine import Device, OnWait, gpu_names, lock_devices
from draftsmith.flows.execution.process import Event, run_stage
from draftsmith.flows.planning.external_files import external_digests
from draftsmith.flows.planning.plan import Build, OutdatedPlanError, find, is_inconclusive
from draftsmith.stages.runtime.stage import StageRequest

GRACE_S = 60  # in which a stage saves, from the request to stop until it is killed
log = logging.getLogger("draftsmith.stages")  # Prefect shows it in the run


def _ignore(*_: object) -> None:
    pass


MakeShard = Callable[[Build], Artifact]
# Makes all shards and returns them in order. Arguments: the shards' builds, a function that makes one, one that stops
# all that are being made here (called if the pool itself is ended), and one that raises if the run is to end. Raises
# the first error when all have ended.
ShardPool = Callable[[Sequence[Build], MakeShard, Callable[[], None], Callable[[], None]], list[Artifact]]


def run_locally(
    shards: Sequence[Build], make_one: MakeShard, stop: Callable[[], None], _check: Callable[[], None]
) -> list[Artifact]:
    """Make the shards on this machine. A `ShardPool`; every shard checks whether the run is to end."""
    with ThreadPoolExecutor(local_parallelism(shards)) as pool:
        futures = [pool.submit(make_one, shard) for shard in shards]
        try:
            wait(futures)
        except BaseException:  # a signal
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise
    return [future.result() for future in futures]


def local_parallelism(shards: Sequence[Build]) -> int:
    """Return how many shards this machine makes at a time: one per GPU, or one per core."""
    return min(len(shards), len(gpu_names()) or os.cpu_count() or 1)


class RunContext:
    """The objects that the nodes of a run share."""

    def __init__(self, home: Path, config: RunOptions, display: Display, tracking: Tracking) -> None:
        self.home, self.config, self.display, self.tracking = home, config, display, tracking
        self.store = open_store(home)
        self.pool: ShardPool = run_locally  # makes the shards of a node

    def check(self) -> None:
        """Do nothing. This is called while a stage waits or runs; an error that an override raises stops the stage."""

    def refresh_run(self) -> str | None:
        """Return the id of the MLflow run that encloses the stages'; None if there is none."""
        return None


def make(context: RunContext, build: Build, *, force: bool = False) -> Artifact:
    """Return the artifact of a build: reused from the store, or made by its stage, which resumes an unfinished attempt.

    Raises the stage's own `DraftsmithError`. What the stage has saved is kept for the next attempt.
    """
    store = context.store
    made, earlier = None if force else find(build, store, verify=True), None

    def on_wait(holder: Holder | None) -> None:
        who = f" ({holder})" if holder is not None else ""
        context.display.line(f"{build}: waits for another run that makes this artifact{who}")

    # An artifact that another run or the commit of an earlier attempt has completed may be outdated too.
    while made is None or not build.reuses(made):
        if made is not None and is_inconclusive(made):
            store.fetch(made)
            earlier = made.path
        waiting = context.config.stages.lock_wait(context.check, on_wait)
        again = force or made is not None
        with store.claim(
            build.stage, build.key, force=again, run=context.config.name, node=build.name, wait=waiting
        ) as attempt:
            if isinstance(attempt, Attempt):
                return _make_node(context, build, attempt, earlier)
            made = attempt
            context.tracking.finish_interrupted_run(made.manifest, made.path)
    with contextlib.suppress(OSError):
        (store.partial_path(build.stage, build.key) / NOTE).unlink(missing_ok=True)  # of a failed forced attempt
        os.utime(made.path / MANIFEST)  # time of the last use, for `draftsmith prune`
    context.display.reused(build.name)
    return replace(made, reused=True)


def _make_node(context: RunContext, build: Build, attempt: Attempt, earlier: Path | None) -> Artifact:
    """Run the node's stage, with its shards first, and commit its artifact. MLflow gets a run, however this ends."""
    node, options = build.node, context.config.stages
    tracked = context.tracking.stage_run(
        context.refresh_run(),
        attempt.stage,
        attempt.key,
        name=node.name,
        inputs={node.inputs[name]: made for name, made in build.inputs.items()},
    )
    try:
        began = time.monotonic()
        shards = _make_shards(context, build, attempt)
        shards_s = time.monotonic() - began if shards else 0.0
        compute = node.stage.compute_for(node.config)
        if shards and node.stage.join_compute is not None:
            compute = node.stage.join_compute
        on_wait = _report_wait(context, build, attempt.waiting)
        with (
            lock_devices(compute, context.config.name, options.lock_wait(context.check), on_wait) as device,
            tracked.system_metrics(),
            context.display.stage(node.name) as shown,
        ):
            attempt.waiting("")

            def follow(event: Event) -> None:
                _follow(event, node.name, shown, tracked, attempt)

            made_from = run_attempt(
                build, attempt, context.home, device, follow, context.check, shards=shards, earlier=earlier
            )
        more = {"mlflow_run_id": tracked.run_id, "duration_s": made_from.duration_s + shards_s}
        made = attempt.commit(made_from.model_copy(update=more))
    except BaseException as error:
        stopped = isinstance(error, StageInterrupted) or not isinstance(error, Exception)
        if not stopped:
            attempt.failed(error)
        tracked.close("KILLED" if stopped else "FAILED")
        raise
    tracked.close("FINISHED", made.path)
    context.display.finished(node.name, made.manifest.duration_s, made.manifest.metrics)
    return made


def _report_wait(context: RunContext, build: Build, note: Callable[[str], None] = _ignore) -> OnWait:
    def report(device: str, holder: Holder | None) -> None:
        # A shared lock has the name of its latest holder, which may be this run.
        who = f" ({holder})" if holder is not None and holder.pid != os.getpid() else " by another run"
        waits = f"waits for the device {device}, which is in use{who}"
        context.display.line(f"{build.name}: {waits}")
        note(waits)  # for `draftsmith status`

    return report


def _follow(event: Event, name: str, shown: StageDisplay, tracked: StageRun, attempt: Attempt) -> None:
    match event["event"]:
        case "log":
            log.info("%s: %s", name, event["message"])
            shown.log(event["message"])
        case "progress":
            left = shown.progress(event["done"], event["total"], event["unit"], event["metrics"])
            attempt.progress(event["done"], event["total"], event["unit"], left)
        case "metrics":
            tracked.metrics(event["step"], event["values"])


# -- shards ------------------------------------------------------------------------------------------------------


def _make_shards(context: RunContext, build: Build, attempt: Attempt) -> list[Artifact]:
    """Return the artifacts of all shards of the node, complete on this machine; none if it is made in one piece."""
    if not (shards := build.shards(attempt.forced)):
        return []
    done: dict[int, tuple[int, int]] = {}  # index of the shard -> units done, units in all
    lock, stopped = threading.Lock(), threading.Event()

    def check() -> None:
        context.check()
        if stopped.is_set():
            raise StageInterrupted("The run was ended. Run the same command to continue from what was saved.")

    with context.display.stage(build.name) as shown:

        def follow(shard: Build, event: Event) -> None:
            """Show the progress of all shards as one."""
            assert shard.shard is not None
            with lock:
                if event["event"] == "log":
                    shown.log(f"shard {shard.shard.index + 1} of {shard.shard.of}: {event['message']}")
                elif event["event"] == "progress":
                    done[shard.shard.index] = event["done"], event["total"]
                    units, total = (sum(counts) for counts in zip(*done.values(), strict=True))
                    attempt.progress(units, total, event["unit"], shown.progress(units, total, event["unit"], {}))

        def make_one(shard: Build) -> Artifact:
            on_wait = _report_wait(context, build)
            return make_shard(shard, context.home, lambda event: follow(shard, event), check, on_wait)

        made = context.pool(shards, make_one, stopped.set, check)
    store = context.store
    made = [replace(part, path=store.path(part.stage, part.key)) for part in made]  # another host has another home
    for part in made:
        store.fetch(part)
        store.verify_once(part)
    return made


def make_shard(
    build: Build,
    home: Path,
    follow: Callable[[Event], None] = _ignore,
    check: Callable[[], None] = _ignore,
    on_wait: OnWait = _ignore,
) -> Artifact:
    """Return a shard's artifact: from the store, or made by a stage process on one device of this host.

    Raises the same errors as `make`.
    """
    store, waiting = open_store(home), build.config.stages.lock_wait(check)
    inputs = {name: replace(made, path=store.path(made.stage, made.key)) for name, made in build.inputs.items()}
    build = replace(build, inputs=inputs)  # as they are on this host
    if (made := store.find(build.stage, build.key)) is not None:
        store.verify_once(made, and_elsewhere=False)
        return made
    run = build.config.name
    with store.claim(build.stage, build.key, run=run, node=str(build), wait=waiting) as attempt:
        if not isinstance(attempt, Attempt):
            return attempt
        try:
            compute = build.node.stage.compute_for(build.node.config)
            with lock_devices(compute, run, waiting, on_wait, one=True) as device:
                made_from = run_attempt(build, attempt, home, device, follow, check)
            return attempt.commit(made_from)
        except Exception as error:
            attempt.failed(error)
            raise


# -- one attempt -------------------------------------------------------------------------------------------------


def run_attempt(
    build: Build,
    attempt: Attempt,
    home: Path,
    device: Device,
    follow: Callable[[Event], None] = _ignore,
    check: Callable[[], None] = _ignore,
    *,
    shards: Sequence[Artifact] = (),
    earlier: Path | None = None,
) -> PendingManifest:
    """Run the stage of a build as a process. Return what the artifact is made from, with its metrics and seconds.

    follow: called with each event. check: called often; what it raises ends the attempt. shards: artifacts of all
    shards of the node, which the process joins; empty: it does all the work. earlier: the inconclusive artifact that
    this one replaces.

    Raises the stage's own `DraftsmithError`, or an error of `unchanged`.
    """
    node, options = build.node, build.config.stages

    def follow_locked(event: Event) -> None:
        attempt.lock.check_periodically()
        follow(event)

    with unchanged(open_store(home), build, attempt):
        made_from = build.manifest()
        request = StageRequest(
            stage=build.stage,
            module=node.module,
            config=made_from.config,
            inputs={name: made.path for name, made in build.inputs.items()},
            out=attempt.out,
            work=attempt.work,
            seed=build.seed,
            threads=options.threads,
            listing=node.config.listing,
            shard=build.shard,
            shards=[made.path for made in shards],
            earlier=earlier,
        )
        began = time.monotonic()
        summary = run_stage(
            request,
            home / "logs" / f"{build.stage}-{build.key[:16]}-{time.strftime('%Y%m%d-%H%M%S')}.log",
            node=node.name,
            limit_s=options.time_limit_s(node.name),
            grace_s=GRACE_S,
            follow=follow_locked,
            check=check,
            # The locks live as long as the process that writes and computes, even if we are killed.
            descriptors=(attempt.lock.fd, *device.locks),
            environment=device.environment,
        )
        seconds = time.monotonic() - began
    return made_from.model_copy(update={"metrics": summary, "duration_s": seconds})


@contextmanager
def unchanged(store: Store, build: Build, attempt: Attempt) -> Iterator[None]:
    """Check that the build is what its key says: its code before the body, inputs and files before and after it.

    Raises OutdatedPlanError for other code: a stage may wait for hours, and a shard may be made on another host. Raises
    DraftsmithError if an input or file is damaged or has changed. If that is found after the body, however it ended,
    the attempt's files are discarded.
    """
    if build.pipeline.code_digest(build.node.module) != build.code:
        raise OutdatedPlanError(
            f"{build.name}: the code here is not the code of its cache key. It changed while the stage waited, or this "
            "host has another version. Run the same command again, with one version everywhere."
        )
    _check_inputs(store, build, after=False)
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    try:
        _check_inputs(store, build, after=True)
    except RetryableError:  # a bucket that does not answer proves no damage, and must not hide the stage's error
        if failed is None:
            raise
    except DraftsmithError:
        attempt.discard()
        raise
    if failed is not None:
        raise failed


def _check_inputs(store: Store, build: Build, *, after: bool) -> None:
    """Compare inputs and files with the key. after: the stage has read them, so a damaged copy is not repaired."""
    node = build.node
    if not after:
        _check_content(store, build)
    for name, made in build.inputs.items():
        try:
            if not after:
                store.fetch(made)
            store.verify_once(made, read=after)
        except DraftsmithError as error:
            alone = f" (`draftsmith stage {node.inputs[name]} CONFIG --force` makes only this)"
            hint = alone if "--force" in str(error) else ""
            raise type(error)(f"{node.name}: its input {name}: {error}{hint}") from error
    if after:  # last, as it may ask a bucket
        _check_content(store, build)
    now = external_digests(node.config)  # of the listed files only: those that arrived later are not read
    if changed := [path for path in sorted({*now, *build.external}) if now.get(path) != build.external.get(path)]:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise DraftsmithError(
            f"{node.name}: {changed[0]}{more} changed while it was read, so the output was discarded. Run the same "
            "command again to read what is there now."
        )


def _check_content(store: Store, build: Build) -> None:
    for name, made in build.inputs.items():
        now = store.manifest_at(made.stage, made.key)
        if now is not None and now.content_id != made.content_id:
            raise DraftsmithError(
                f"{build.name}: its input {name} ({made.path}) was made again by another run, with other content. "
                "Run the same command again to start from the new one."
            )
