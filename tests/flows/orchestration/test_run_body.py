"""The body of a flow, without Prefect: what a run comes to, and what MLflow says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from draftsmith.artifacts.errors import EXIT_RETRYABLE, DraftsmithError, RetryableError
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.artifacts.tracking import registry_homes as registered
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME
from draftsmith.flows.config.options import StageOptions
from draftsmith.flows.execution.node import RunContext
from draftsmith.flows.orchestration import run
from draftsmith.flows.orchestration.flow_lifecycle import Cancellation
from draftsmith.flows.planning.graph import Conclusion, OutdatedPlanError, Selection
from tests.flows.toy import TOY, ToyConfig, ToyPolicy, toy_policy


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs here make no node, unless a test says which."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run, "_make_all", lambda *_: None)
    return tmp_path / "home"


def ended(
    course: Callable[..., ToyPolicy | None] | None, *force: str, until: tuple[str, ...] = (), **options: Any
) -> Conclusion | None:
    pipeline = TOY if course is None else dataclasses.replace(TOY, policy=course)
    config = ToyConfig(name="t", verdict="promoted", stages=StageOptions(**options))
    return run._run(config, pipeline, Selection(force, until=until), Cancellation())[1]


def mlflow_runs(home: Path) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return {str(each.info.run_name): each for each in found}


@pytest.mark.parametrize(("until", "concludes"), [((), True), (("total",), False)])
def test_a_part_concludes_nothing_even_if_it_needs_every_node(
    until: tuple[str, ...], concludes: bool, home: Path
) -> None:
    """Who stops at the last node looks at it before anything follows from it."""
    forced: list[Collection[str]] = []

    def course(config: ToyConfig, force: Collection[str]) -> ToyPolicy | None:
        forced.append(force)
        return toy_policy(config, force)

    assert (ended(course, "combine", until=until) is not None) == concludes
    assert set(forced[0]) == {"left", "right", "total"}, "nodes, by whatever name they were forced"
    assert (home / registered.NOTE).is_file() == concludes, "where versions are registered is known later"


@pytest.mark.parametrize(
    ("raised", "status", "note"),
    [
        (OutdatedPlanError("another one was faster"), "FAILED", "**Failed.** another one was faster"),
        (DraftsmithError("the disk is full"), "FAILED", "**Failed.** the disk is full"),
        (SystemExit(143), "KILLED", "**Stopped.** The same command goes on."),
    ],
)
def test_mlflow_says_why_a_run_has_ended_early_and_the_screen_what_to_force(
    raised: BaseException,
    status: str,
    note: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[object] = []

    class Late(ToyPolicy):
        def conclude(self, *_: object) -> Conclusion:
            asked.append(_)
            raise raised

    def made_left(context: RunContext, _nodes: object, _forced: object, made: dict[str, Any], *_rest: object) -> None:
        context.refresh_run()
        made["left"] = SimpleNamespace(reused=False, ref=ArtifactRef("combine", "k" * 64, "c" * 64, home))

    monkeypatch.setattr(run, "_make_all", made_left)
    monkeypatch.setattr(run, "_reviewed", lambda *_, **__: ({}, {run.NOTE: "what was measured"}))
    monkeypatch.setattr(run, "_report", lambda *_: [])
    with pytest.raises(type(raised)):
        ended(lambda *_: Late("promoted"), "left")
    found = mlflow_runs(home)["t"]
    assert (found.info.status, found.data.tags[run.NOTE]) == (status, f"{note}\n\nwhat was measured")
    assert OUTCOME not in found.data.tags and len(asked) == 1, "an outdated plan is not asked for again"
    assert "without --force" in capsys.readouterr().out
    assert OutdatedPlanError.exit_code == EXIT_RETRYABLE


def test_what_follows_from_a_run_waits_until_mlflow_has_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter is uploaded into it."""
    create, asked = MlflowClient.create_run, list[bool]()

    def lost_twice(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
        asked.append(True)
        if len(asked) <= 2:
            raise ConnectionError("connection refused")
        return create(client, *arguments, **named)

    class Uploads(ToyPolicy):
        def conclude(self, made: Mapping[str, ArtifactRef], run_id: str | None) -> Conclusion:
            if run_id is None:
                raise RetryableError("MLflow has no run")
            return super().conclude(made, run_id)

    monkeypatch.setattr(MlflowClient, "create_run", lost_twice)
    conclusion = ended(lambda *_: Uploads("promoted"), retries=1, retry_delay_seconds=0)
    assert conclusion is not None and conclusion.name == "Promoted"
