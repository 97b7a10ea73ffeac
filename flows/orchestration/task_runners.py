"""The shards of a node as mapped Prefect tasks: on this machine, or on the hosts of a Ray cluster.

A host of a cluster needs this version of Draftsmith, the store (a shared home under the same path, or the same bucket
with a home of its own in its `DRAFTSMITH_HOME`), and what every stage needs of the environment. Its own scheduler gives
a shard its GPU; the lock of the device is taken as well, for those who use the machine beside the cluster.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from draftsmith.artifacts.errors import RetryableError, StageInterrupted
from draftsmith.artifacts.home import home, protect_home
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.artifacts.store.mirror import STORE_VARIABLE
from draftsmith.flows.config.options import StageOptions
from draftsmith.flows.execution.attempt import StageJob
from draftsmith.flows.execution.shards import BuildShard, build_shard, local_parallelism

_POLL_S = 0.5
_HOME = "DRAFTSMITH_HOME"
# of this host, whoever's run it serves
_OWN = {name: os.environ[name] for name in (_HOME, STORE_VARIABLE) if name in os.environ}


def run_shards(
    orders: Sequence[StageJob], make: BuildShard, stop: Callable[[], None], check: Callable[[], None]
) -> list[ArtifactRef]:
    """A `shards.Pool`: a task a shard, on the config's runner."""
    options = orders[0].config.stages
    runner, resources = _runner(options, orders)
    places = {STORE_VARIABLE: os.environ[STORE_VARIABLE]} if STORE_VARIABLE in os.environ else {}
    places |= {_HOME: str(home())}
    if options.runner != "local":
        make = _OnClusterHost(places)
    with runner:
        try:
            futures = copy_context().run(_submit, runner, resources, orders, make)
            ends = [_end(future, order, check) for future, order in zip(futures, orders, strict=True)]
        except BaseException:  # a signal, or a run that was cancelled
            stop()
            raise
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    return [end for end in ends if isinstance(end, ArtifactRef)]


def _submit(
    runner: TaskRunner[Any],
    resources: Callable[[], AbstractContextManager[Any]],
    orders: Sequence[StageJob],
    make: BuildShard,
) -> list[PrefectFuture[Any]]:
    """In a context of its own: what the node's task was given (locks, a terminal) cannot travel with a shard's."""
    if isinstance(make, _OnClusterHost):
        TaskRunContext.__var__.set(None)  # type: ignore[arg-type]
    with resources():
        tasks = [shard_task.with_options(name=order.stage, task_run_name=str(order)) for order in orders]
        return [runner.submit(each, {"order": order, "make": make}) for each, order in zip(tasks, orders, strict=True)]


def _end(future: PrefectFuture[Any], order: StageJob, check: Callable[[], None]) -> ArtifactRef | BaseException:
    """What a task came to, after waiting for it."""
    while True:
        try:
            found: ArtifactRef | BaseException = future.result(timeout=_POLL_S, raise_on_failure=False)
            return found
        except TimeoutError:
            check()
        except StageInterrupted:
            raise
        except Exception as error:  # of the cluster: a worker that was killed, a host that is gone
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return RetryableError(f"{order}: lost with its worker ({reason}): the same command makes it again, alone")


@task(cache_policy=NO_CACHE, persist_result=False)
def shard_task(order: StageJob, make: BuildShard) -> ArtifactRef:
    """One shard: found in the store, or made by a stage process of its own."""
    return make(order)


class _OnClusterHost:
    """Makes a shard on a host of a cluster, where nothing of the run is but what travels. places: of the run's host."""

    def __init__(self, places: dict[str, str]) -> None:
        self._places = places

    def __call__(self, order: StageJob) -> ArtifactRef:
        for name in (_HOME, STORE_VARIABLE):  # a worker outlives a run: what the one before has set is no host's own
            place = _OWN.get(name, self._places.get(name))
            if place is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = place
        protect_home(home(), group_may_read=order.config.stages.group_may_read)
        return build_shard(order, home())


def _runner(
    options: StageOptions, orders: Sequence[StageJob]
) -> tuple[TaskRunner[Any], Callable[[], AbstractContextManager[Any]]]:
    """The task runner, and a context in which tasks are submitted: what a shard asks of the cluster's resources."""
    if options.runner == "ray":
        return _ray(options)
    return ThreadPoolTaskRunner(max_workers=local_parallelism(orders)), nullcontext


def _ray(options: StageOptions) -> tuple[TaskRunner[Any], Callable[[], AbstractContextManager[Any]]]:
    import ray
    from prefect_ray import RayTaskRunner
    from prefect_ray.context import remote_options

    def resources() -> AbstractContextManager[Any]:
        """One GPU a shard where the cluster has any."""
        gpus = 1 if ray.cluster_resources().get("GPU", 0) > 0 else 0
        found: AbstractContextManager[Any] = remote_options(num_cpus=options.threads or 1, num_gpus=gpus, max_retries=0)
        return found

    own = {} if options.runner_address else {"include_dashboard": False}
    return RayTaskRunner(address=options.runner_address, init_kwargs={"log_to_driver": False, **own}), resources
