"""Runs a node, and its shards, as Prefect tasks. Prefect shows and retries them; the store decides what is computed.

Shards run on this machine or on the hosts of a Ray cluster. Such a host needs this version of Draftsmith, the
environment of the stages, and the store: a shared home under the same path, or the same bucket with its own
`DRAFTSMITH_HOME`. Ray gives a shard its GPU. The lock of the device is taken as well, for processes that use the
machine outside the cluster.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import partial
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.client.schemas.objects import TaskRun as PrefectTaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.futures import PrefectFuture
from prefect.states import Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from prefect.tasks import Task

from draftsmith.artifacts.errors import RetryableError, StageInterrupted
from draftsmith.artifacts.home import home, protect_home
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.store.mirror import STORE_VARIABLE
from draftsmith.flows.config.options import RETRY_JITTER, StageOptions
from draftsmith.flows.execution.make import MakeShard, RunContext, local_parallelism, log, make, make_shard
from draftsmith.flows.execution.retry import retry_notice, with_retries
from draftsmith.flows.planning.plan import Build


def run_node(
    run: RunContext, build: Build, upstream: Sequence[State[Any] | None], *, force: bool
) -> tuple[Artifact, State[Any] | None]:
    """Make the node's artifact as a task of the current flow run, and return it with the task's state.

    Outside of a flow it is a plain call with the same retries, and there is no state. upstream: states of the tasks
    that Prefect shows as its inputs. Raises the error of the last attempt.
    """
    node, options = build.node, run.config.stages
    work = partial(make, run, build, force=force)  # Prefect looks for futures in whatever else a task is given
    if FlowRunContext.get() is None:
        return with_retries(work, options, run.display.line), None
    configured: Task[..., Any] = stage_task.with_options(
        name=node.stage.name,
        task_run_name=node.name,
        description=f"Stage {node.stage.name}: reused from the store, or run in a separate process.",
        retries=options.retries,
        retry_delay_seconds=options.retry_delays,
        retry_jitter_factor=RETRY_JITTER,
        retry_condition_fn=_is_retryable,
    )
    state: State[Any] = configured(work, return_state=True, wait_for=list(upstream))
    result: Artifact = state.result()
    return result, state


@task(cache_policy=NO_CACHE, persist_result=False)
def stage_task(work: Callable[[], Artifact]) -> State[Any]:
    """Make or reuse a node's artifact, and return a state with the name Completed or Reused."""
    try:
        result = work()
    except asyncio.CancelledError as error:  # Prefect raises it in the thread of a flow whose lease it lost
        raise RetryableError(
            "The run lost its deployment's concurrency slot in Prefect. It continues without the slot."
        ) from error
    where = f"{result.stage}/{result.key[:16]}, content {result.content_id[:16]}"
    return Completed(name="Reused" if result.reused else "Completed", message=where, data=result)


def _is_retryable(task: Task[..., Any], run: PrefectTaskRun, state: State[Any]) -> bool:
    """Return whether another attempt may succeed, as after the loss of an engine or a service.

    Prefect calls this only while retries are left.
    """
    error = state.result(raise_on_failure=False)
    if not isinstance(error, RetryableError):
        return False
    assert isinstance(task.retry_delay_seconds, list)
    log.warning("%s: %s", run.name, retry_notice(error, run.run_count, task.retry_delay_seconds))
    return True


_POLL_S = 0.5
_HOME = "DRAFTSMITH_HOME"
# set on this host, whichever run it works for
_HOST_SETTINGS = {name: os.environ[name] for name in (_HOME, STORE_VARIABLE) if name in os.environ}


def run_shards(
    shards: Sequence[Build], make_one: MakeShard, stop: Callable[[], None], check: Callable[[], None]
) -> list[Artifact]:
    """Run each shard as a task on the config's runner, and return the artifacts in the order of the builds.

    stop: called on a signal or a cancellation. check: called while waiting; it may raise.
    """
    options = shards[0].config.stages
    runner, resources = _runner(options, shards)
    settings = {STORE_VARIABLE: os.environ[STORE_VARIABLE]} if STORE_VARIABLE in os.environ else {}
    settings |= {_HOME: str(home())}
    elsewhere = options.runner != "local"
    if elsewhere:
        make_one = partial(make_on_host, settings)
    with runner:
        try:
            # in a copied context: the node task's context has locks, which cannot be sent to a host
            futures = copy_context().run(_submit, runner, resources, shards, make_one, elsewhere=elsewhere)
            ends = [_end(future, shard, check) for future, shard in zip(futures, shards, strict=True)]
        except BaseException:  # a signal, or the run was cancelled
            stop()
            raise
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    return [end for end in ends if isinstance(end, Artifact)]


def _submit(
    runner: TaskRunner[Any],
    resources: Callable[[], AbstractContextManager[Any]],
    shards: Sequence[Build],
    make_one: MakeShard,
    *,
    elsewhere: bool,
) -> list[PrefectFuture[Any]]:
    """Submit a task for each shard."""
    if elsewhere:
        TaskRunContext.__var__.set(None)  # type: ignore[arg-type]
    with resources():
        tasks = [shard_task.with_options(name=shard.stage, task_run_name=str(shard)) for shard in shards]
        return [
            runner.submit(task, {"shard": shard, "make_one": make_one})
            for task, shard in zip(tasks, shards, strict=True)
        ]


def _end(future: PrefectFuture[Any], shard: Build, check: Callable[[], None]) -> Artifact | BaseException:
    """Wait for a task and return its artifact or its error."""
    while True:
        try:
            result: Artifact | BaseException = future.result(timeout=_POLL_S, raise_on_failure=False)
            return result
        except TimeoutError:
            check()
        except StageInterrupted:
            raise
        except Exception as error:  # Ray's: a worker was killed, or a host is gone
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            return RetryableError(
                f"{shard}: lost with its worker ({reason}). Run the same command again, which makes only this shard."
            )


@task(cache_policy=NO_CACHE, persist_result=False)
def shard_task(shard: Build, make_one: MakeShard) -> Artifact:
    """Make or reuse one shard in its own stage process."""
    return make_one(shard)


def make_on_host(settings: Mapping[str, str], shard: Build) -> Artifact:
    """Make a shard on a cluster's host, with the settings of the run's host where that host has none."""
    for name in (_HOME, STORE_VARIABLE):  # a worker outlives a run, so an earlier run may have set them
        value = _HOST_SETTINGS.get(name, settings.get(name))
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    protect_home(home(), group_may_read=shard.config.stages.group_may_read)
    return make_shard(shard, home())


def _runner(
    options: StageOptions, shards: Sequence[Build]
) -> tuple[TaskRunner[Any], Callable[[], AbstractContextManager[Any]]]:
    """Return the task runner, and the context in which tasks are submitted with their resources."""
    if options.runner == "ray":
        return _ray(options)
    return ThreadPoolTaskRunner(max_workers=local_parallelism(shards)), nullcontext


def _ray(options: StageOptions) -> tuple[TaskRunner[Any], Callable[[], AbstractContextManager[Any]]]:
    # optional dependencies
    import prefect_ray.context
    import ray

    def resources() -> AbstractContextManager[Any]:
        """Request one GPU for each shard if the cluster has any."""
        gpus = 1 if ray.cluster_resources().get("GPU", 0) > 0 else 0
        context: AbstractContextManager[Any] = prefect_ray.context.remote_options(
            num_cpus=options.threads or 1, num_gpus=gpus, max_retries=0
        )
        return context

    # Ray itself reads the address of a running cluster
    local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    return prefect_ray.RayTaskRunner(init_kwargs={"log_to_driver": False, **local}), resources
