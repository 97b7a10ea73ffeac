"""A node whose work is made in shards: each an artifact of its own, in a process of its own, on this host or another.

A lost shard is made again alone; the node's own artifact is made of all of them, and is the same however many there
were: its key says nothing of shards, and theirs follow from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from draftsmith.artifacts.store.local import Claim
from draftsmith.artifacts.store.manifest import SHARD, ArtifactRef, Provenance
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.attempt import AttemptNote
from draftsmith.flows.execution.devices import OnWait, lock_one_device
from draftsmith.flows.execution.display import StageDisplay
from draftsmith.flows.execution.input_guard import inputs_unchanged, snapshot_code
from draftsmith.flows.execution.machine import gpu_names
from draftsmith.flows.execution.process import Event, run_stage
from draftsmith.flows.planning.graph import Node, Pipeline, node_seed
from draftsmith.flows.planning.inputs import external_digests
from draftsmith.stages.runtime.stage import Shard, StageRequest


def _nobody_waits(_device: str, _holder: object) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class ShardJob:
    """One shard of a node, as it travels to whoever makes it."""

    config: RunOptions
    pipeline: Pipeline
    node: Node
    inputs: Mapping[str, ArtifactRef]
    whole: str  # key of the node's artifact
    shard: Shard
    attempt: str = ""  # of a forced one: its shards are made again too, each once

    @property
    def stage(self) -> str:
        return f"{self.node.stage.name}{SHARD}"

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.whole}{self.attempt} {self.shard.index}/{self.shard.of}".encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.node.name}, shard {self.shard.index + 1} of {self.shard.of}"


def shard_jobs(
    config: RunOptions, pipeline: Pipeline, node: Node, inputs: Mapping[str, ArtifactRef], claim: Claim
) -> list[ShardJob]:
    """Of a node that is to be made: one for each shard, none if one process does all."""
    count = config.stages.shards
    if not node.stage.sharded or count == 1:
        return []
    return [ShardJob(config, pipeline, node, inputs, claim.key, Shard(i, count), claim.forced) for i in range(count)]


def build_shard(
    order: ShardJob,
    home: Path,
    *,
    on_event: Callable[[Event], None] = lambda _event: None,
    waiting: OnWait = _nobody_waits,
    check: Callable[[], None] = lambda: None,
) -> ArtifactRef:
    """The shard's artifact: found, or made by a stage process on one device of this host. As `node.make`."""
    store, options, node = open_store(home), order.config.stages, order.node
    inputs = {name: replace(ref, path=store.path(ref.stage, ref.key)) for name, ref in order.inputs.items()}
    limit_s, external = 60 * options.lock_wait_minutes, external_digests(order.node.config)
    if (ref := store.find(order.stage, order.key)) is not None:
        store.verify_once(ref, and_elsewhere=False)
        return ref
    run, logs = order.config.name, home / "logs"
    with store.claim(order.stage, order.key, run=run, wait=options.lock_wait(check)) as claim:
        if not isinstance(claim, Claim):
            return claim
        config = node.config.model_dump(mode="json")
        note = AttemptNote(claim.out.parent, run, str(order))

        def follow(event: Event) -> None:
            claim.lock.check_periodically()
            on_event(event)

        try:
            with (
                lock_one_device(
                    node.stage.compute_for(node.config), run=run, limit_s=limit_s, waiting=waiting, check=check
                ) as device,
                inputs_unchanged(store, node, inputs, claim, external),
            ):
                seed = node_seed(node, order.config)
                code_digest, _ = snapshot_code(node, inputs, seed, order.pipeline, external, order.whole)
                request = StageRequest(
                    stage=order.stage,
                    module=node.module,
                    config=config,
                    inputs={name: ref.path for name, ref in inputs.items()},
                    out=claim.out,
                    work=claim.work,
                    seed=seed,
                    threads=options.threads,
                    shard=order.shard,
                )
                outcome = run_stage(
                    request,
                    log_path=logs / f"{order.stage}-{order.key[:16]}-{time.strftime('%Y%m%d-%H%M%S')}.log",
                    limit=options.time_limit(node.name),
                    grace_s=options.grace_seconds,
                    on_event=follow,
                    pass_fds=(claim.lock_fd, *device.locks),
                    check=check,
                    environment=device.environment,
                )
            ref = store.commit(
                claim,
                Provenance(config, inputs, code_digest, seed, external=external),
                metrics=outcome.summary,
                volatile=node.stage.volatile,
                duration_s=outcome.duration_s,
            )
        except Exception as error:
            note.failed(error)
            raise
    return ref


BuildShard = Callable[[ShardJob], ArtifactRef]
# Given orders, what makes one, what tells all that are made here to stop (called where the pool is ended itself), and
# what raises if the run is to end: makes all of them, in order. When all have ended, raises the first error.
ShardPool = Callable[[Sequence[ShardJob], BuildShard, Callable[[], None], Callable[[], None]], list[ArtifactRef]]


def run_locally(
    orders: Sequence[ShardJob], make: BuildShard, stop: Callable[[], None], _check: Callable[[], None]
) -> list[ArtifactRef]:
    """A `Pool` on this machine, where every shard checks for itself."""
    with ThreadPoolExecutor(local_parallelism(orders)) as pool:
        futures = [pool.submit(make, order) for order in orders]
        try:
            wait(futures)
        except BaseException:  # a signal
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise
    return [future.result() for future in futures]


def local_parallelism(orders: Sequence[ShardJob]) -> int:
    """Shards that this machine makes at a time: one a GPU, or one a core."""
    return min(len(orders), len(gpu_names()) or os.cpu_count() or 1)


class ShardProgress:
    """The progress of all shards of a node as one."""

    def __init__(self, shown: StageDisplay, progress: Callable[[int, int, str], None]) -> None:
        self._shown, self._progress, self._lock = shown, progress, threading.Lock()
        self._last: dict[int, tuple[int, int]] = {}

    def follow(self, order: ShardJob, event: Event) -> None:
        """An event of a shard's process."""
        with self._lock, contextlib.suppress(KeyError):
            if event["event"] == "log":
                self._shown.log(f"shard {order.shard.index + 1} of {order.shard.of}: {event['message']}")
            elif event["event"] == "progress":
                self._last[order.shard.index] = event["done"], event["total"]
                done, total = (sum(each) for each in zip(*self._last.values(), strict=True))
                self._shown.progress(done, total, event["unit"], {})
                self._progress(done, total, event["unit"])
