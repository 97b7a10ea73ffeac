"""Runs a node as a Prefect task. Prefect shows and retries it; the store decides whether it has to be computed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.client.schemas.objects import TaskRun as PrefectTaskRun
from prefect.states import Completed
from prefect.tasks import Task

from draftsmith.artifacts.errors import RetryableError
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.flows.config.options import RETRY_JITTER
from draftsmith.flows.execution.node import NodeResult, RunContext, build_node, log
from draftsmith.flows.execution.retry import retry_notice
from draftsmith.flows.orchestration.task_runners import run_shards
from draftsmith.flows.planning.graph import Node


def run_node(
    context: RunContext, node: Node, inputs: Mapping[str, ArtifactRef], upstream: Sequence[State[Any]], *, force: bool
) -> tuple[NodeResult, State[Any]]:
    """Make the node's artifact as a task of the current flow run, and return it with the task's state.

    upstream: states of the tasks that Prefect shows as its inputs. Raises the error of the last attempt.
    """
    options = context.config.stages
    configured: Task[..., Any] = stage_task.with_options(
        name=node.stage.name,
        task_run_name=node.name,
        description=f"Stage {node.stage.name}: reused from the store, or run in a process of its own.",
        retries=options.retries,
        retry_delay_seconds=options.retry_delays,
        retry_jitter_factor=RETRY_JITTER,
        retry_condition_fn=_is_retryable,
    )
    state: State[Any] = configured(context, node, inputs, force, return_state=True, wait_for=list(upstream))
    result: NodeResult = state.result()
    return result, state


@task(cache_policy=NO_CACHE, persist_result=False)
def stage_task(context: RunContext, node: Node, inputs: Mapping[str, ArtifactRef], force: bool) -> State[Any]:
    """Make or reuse a node's artifact, and return a state with the name Completed or Reused."""
    try:
        result = build_node(replace(context, pool=run_shards), node, inputs, force=force)
    except asyncio.CancelledError as error:  # Prefect raises it in the thread of a flow whose lease it lost
        raise RetryableError(
            "Prefect's server no longer keeps the slot of this run's deployment. The run continues without it."
        ) from error
    where = f"{result.ref.stage}/{result.ref.key[:16]}, content {result.ref.content_id[:16]}"
    return Completed(name="Reused" if result.reused else "Completed", message=where, data=result)


def _is_retryable(task: Task[..., Any], run: PrefectTaskRun, state: State[Any]) -> bool:
    """Return whether another attempt may succeed, which is so after the loss of an engine or a service.

    Prefect calls this only while retries are left.
    """
    error = state.result(raise_on_failure=False)
    if not isinstance(error, RetryableError):
        return False
    assert isinstance(task.retry_delay_seconds, list)
    log.warning("%s: %s", run.name, retry_notice(error, run.run_count, task.retry_delay_seconds))
    return True
