"""The body of a flow without Prefect: its conclusion, and the description of its run in MLflow."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from draftsmith.artifacts.errors import EXIT_RETRYABLE, DraftsmithError, RetryableError
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME
from draftsmith.artifacts.tracking.registry import TRACKERS_FILE
from draftsmith.flows.config.options import StageOptions
from draftsmith.flows.execution.make import RunContext
from draftsmith.flows.orchestration import run
from draftsmith.flows.orchestration.flow_run import Cancellation
from draftsmith.flows.planning.graph import Selection
from draftsmith.flows.planning.plan import Conclusion, OutdatedPlanError
from tests.flows.toy import TOY, ToyConfig, ToyPolicy, toy_policy
from tests.testbed.artifacts import fake_artifact


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a new home, and make no nodes."""
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run, "_make_nodes", lambda *_: None)
    return tmp_path / "home"


def ended(
    policy: Callable[..., ToyPolicy | None] | None, *force: str, until: tuple[str, ...] = (), **options: Any
) -> Conclusion | None:
    pipeline = TOY if policy is None else dataclasses.replace(TOY, policy=policy)
    config = ToyConfig(name="t", verdict="promoted", stages=StageOptions(**options))
    return run._run(config, pipeline, Selection(force, until=until), Cancellation())[1]


def mlflow_runs(home: Path) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return {str(each.info.run_name): each for each in runs}


@pytest.mark.parametrize(("until", "concludes"), [((), True), (("total",), False)])
def test_a_run_until_a_node_never_concludes(until: tuple[str, ...], concludes: bool, home: Path) -> None:
    """Even if it makes every node: it lets a person look before a promotion."""
    forced: list[Collection[str]] = []

    def policy(config: ToyConfig, force: Collection[str]) -> ToyPolicy | None:
        forced.append(force)
        return toy_policy(config, force)

    assert (ended(policy, "combine", until=until) is not None) == concludes
    assert set(forced[0]) == {"left", "right", "total"}, "--force takes a stage's name too"
    assert (home / TRACKERS_FILE).is_file() == concludes, "it is noted before a version is registered"


@pytest.mark.parametrize(
    ("raised", "status", "note"),
    [
        (OutdatedPlanError("another one was faster"), "FAILED", "**Failed.** another one was faster"),
        (DraftsmithError("the disk is full"), "FAILED", "**Failed.** the disk is full"),
        (SystemExit(143), "KILLED", "**Stopped.**"),
    ],
)
@pytest.mark.parametrize(
    ("sticky", "until", "options"),
    [((), (), ""), (("drift",), (), " --force drift"), ((), ("total",), " --until total")],
    ids=["forced", "drift", "until"],
)
def test_a_run_that_did_not_finish_ends_with_the_command_that_continues_it(
    sticky: tuple[str, ...],
    until: tuple[str, ...],
    options: str,
    raised: BaseException,
    status: str,
    note: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In MLflow too. What it forced and is complete is not forced again."""
    monkeypatch.setenv(run.COMMAND, json.dumps({"config": "my run.yaml", "overrides": ["seed=1"]}))
    calls: list[object] = []

    class Late(ToyPolicy):
        def conclude(self, *_: object) -> Conclusion:
            calls.append(_)
            raise raised

    def made_left(context: RunContext, _nodes: object, _forced: object, made: dict[str, Any], *_rest: object) -> None:
        context.refresh_run()
        made["left"] = fake_artifact("combine", "k" * 64, "c" * 64, home)
        if until:  # nothing is concluded then
            raise raised

    monkeypatch.setattr(run, "_make_nodes", made_left)
    monkeypatch.setattr(run, "_metrics_and_tags", lambda *_, **__: ({}, {run.NOTE: "what was measured"}))
    monkeypatch.setattr(run, "_report", lambda *_: [])
    with pytest.raises(type(raised)) as caught:
        ended(lambda *_: Late("promoted", sticky_force=sticky), "left", until=until)
    logged, command = mlflow_runs(home)["t"], f"draftsmith run 'my run.yaml' --set seed=1{options}"
    noted = f"{note} To continue: `{command}`.\n\nwhat was measured"
    assert (logged.info.status, logged.data.tags[run.NOTE]) == (status, noted)
    assert caught.value.__notes__[-1] == command
    assert OUTCOME not in logged.data.tags and len(calls) == (not until), "an outdated plan is not retried"
    assert OutdatedPlanError.exit_code == EXIT_RETRYABLE


def test_the_conclusion_waits_until_mlflow_has_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promoted drafter is uploaded into the run."""
    create, asked = MlflowClient.create_run, list[bool]()

    def lost_twice(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
        asked.append(True)
        if len(asked) <= 2:
            raise ConnectionError("connection refused")
        return create(client, *arguments, **named)

    class Uploads(ToyPolicy):
        def conclude(self, folders: Mapping[str, Path], run_id: str | None) -> Conclusion:
            if run_id is None:
                raise RetryableError("MLflow has no run")
            return super().conclude(folders, run_id)

    monkeypatch.setattr(MlflowClient, "create_run", lost_twice)
    conclusion = ended(lambda *_: Uploads("promoted"), retries=1, retry_delay_seconds=0)
    assert conclusion is not None and conclusion.name == "Promoted"
