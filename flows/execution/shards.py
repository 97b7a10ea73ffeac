"""A node that is built in shards: each is an artifact and a separate process, on this host or another.

A lost shard is built again alone. The node's artifact is joined from all shards, and does not depend on their number.
The shards' keys follow from the node's key, which does not mention shards.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from draftsmith.artifacts.store.local import Claim
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.flows.execution.attempt import NO_WATCH, AttemptNote, StageJob, Watch, run_attempt
from draftsmith.flows.execution.display import StageDisplay
from draftsmith.flows.execution.machine import gpu_names, lock_devices
from draftsmith.flows.execution.process import Event
from draftsmith.flows.planning.inputs import external_digests
from draftsmith.stages.runtime.stage import Shard


def shard_jobs(job: StageJob, claim: Claim) -> list[StageJob]:
    """Return one job for each shard of a node that is to be built; none if one process does all the work."""
    count = job.config.stages.shards
    if not job.node.stage.sharded or count == 1:
        return []
    return [replace(job, shard=Shard(i, count), forced_attempt=claim.forced) for i in range(count)]


def build_shard(job: StageJob, home: Path, watch: Watch = NO_WATCH) -> Artifact:
    """Return a shard's artifact: from the store, or built by a stage process on one device of this host.

    Raises as `node.build_node` does.
    """
    store, wait, node = open_store(home), job.config.stages.lock_wait(watch.check), job.node
    inputs = {name: replace(ref, path=store.path(ref.stage, ref.key)) for name, ref in job.inputs.items()}
    job = replace(job, inputs=inputs, external=external_digests(node.config))  # as they are on this host
    if (ref := store.find(job.stage, job.key)) is not None:
        store.verify_once(ref, and_elsewhere=False)
        return ref
    with store.claim(job.stage, job.key, run=job.config.name, wait=wait) as claim:
        if not isinstance(claim, Claim):
            return claim
        note = AttemptNote(claim.out.parent, job.config.name, str(job))
        try:
            compute = node.stage.compute_for(node.config)
            with lock_devices(compute, job.config.name, wait, watch.on_wait, one=True) as device:
                summary, seconds, made_from = run_attempt(job, claim, home, device, watch)
            made_from = made_from.model_copy(update={"modules": {}})  # the node's manifest has them
            return store.commit(claim, made_from, metrics=summary, duration_s=seconds)
        except Exception as error:
            note.failed(error)
            raise


BuildShard = Callable[[StageJob], Artifact]
# Given jobs, a function that builds one, one that stops all that are being built here (called if the pool itself is
# ended), and one that raises if the run is to end: builds all, in order. Raises the first error when all have ended.
ShardPool = Callable[[Sequence[StageJob], BuildShard, Callable[[], None], Callable[[], None]], list[Artifact]]


def run_locally(
    jobs: Sequence[StageJob], build: BuildShard, stop: Callable[[], None], _check: Callable[[], None]
) -> list[Artifact]:
    """Build the shards on this machine. A `ShardPool`; every shard checks whether the run is to end."""
    with ThreadPoolExecutor(local_parallelism(jobs)) as pool:
        futures = [pool.submit(build, job) for job in jobs]
        try:
            wait(futures)
        except BaseException:  # a signal
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise
    return [future.result() for future in futures]


def local_parallelism(jobs: Sequence[StageJob]) -> int:
    """Return how many shards this machine builds at a time: one a GPU, or one a core."""
    return min(len(jobs), len(gpu_names()) or os.cpu_count() or 1)


class ShardProgress:
    """The progress of all shards of a node as one."""

    def __init__(self, shown: StageDisplay, progress: Callable[[int, int, str, float | None], None]) -> None:
        self._shown, self._progress, self._lock = shown, progress, threading.Lock()
        self._last: dict[int, tuple[int, int]] = {}  # index of the shard -> units done, units in all

    def follow(self, job: StageJob, event: Event) -> None:
        """Handle an event of a shard's process."""
        assert job.shard is not None
        with self._lock, contextlib.suppress(KeyError):
            if event["event"] == "log":
                self._shown.log(f"shard {job.shard.index + 1} of {job.shard.of}: {event['message']}")
            elif event["event"] == "progress":
                self._last[job.shard.index] = event["done"], event["total"]
                done, total = (sum(counts) for counts in zip(*self._last.values(), strict=True))
                self._progress(done, total, event["unit"], self._shown.progress(done, total, event["unit"], {}))
