"""The body of a flow without Prefect: its conclusion, and the description of its run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from draftsmith.artifacts.errors import EXIT_RETRYABLE, DraftsmithError, RetryableError
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME
from draftsmith.artifacts.tracking.registry import TRACKERS_FILE
from draftsmith.artifacts.tracking.runs import NOTE
from draftsmith.flows.config.options import StageOptions
from draftsmith.flows.orchestration.run import Run
from draftsmith.flows.planning.graph import Selection
from draftsmith.flows.planning.plan import Build, Conclusion, EarlyEnd, OutdatedPlanError
from draftsmith.stages.runtime.invocation import COMMAND
from tests.flows.toy import TOY, ToyConfig, ToyPipeline
from tests.flows.toy_flow import make_and_conclude
from tests.testbed.artifacts import fake_artifact

Body = Callable[[Run], Conclusion | None]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a new home, and make no nodes."""
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Run, "make", lambda *_: None)
    return tmp_path / "home"


def ended(
    pipeline: ToyPipeline, *force: str, until: tuple[str, ...] = (), body: Body = make_and_conclude, **options: Any
) -> Run:
    """Return a run that has ended."""
    config = ToyConfig(name="t", verdict="promoted", stages=StageOptions(**options))
    run = Run(pipeline, config, Selection(force, until=until))
    with run._recorded():
        run.conclusion = body(run)
    return run


def mlflow_runs(home: Path) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    return {str(each.info.run_name): each for each in runs}


@pytest.mark.parametrize(("until", "concludes"), [((), True), (("total",), False)])
def test_a_run_until_a_node_never_concludes(until: tuple[str, ...], concludes: bool, home: Path) -> None:
    """Even if it makes every node: it lets a person look before a promotion."""
    run = ended(TOY, "combine", until=until)
    assert (run.conclusion is not None) == concludes
    assert run.asked == {"left", "right", "total"}, "--force takes a stage's name too"
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
    monkeypatch.setenv(COMMAND, json.dumps({"config": "my run.yaml", "overrides": ["seed=1"]}))
    calls: list[object] = []

    class Sticky(ToyPipeline):
        def sticky_force(self, _config: object, _asked: object) -> Collection[str]:
            return sticky

    def conclude_late() -> Conclusion:
        calls.append(True)
        raise raised

    def body(run: Run) -> Conclusion | None:
        run.refresh_run()
        run.made["left"] = fake_artifact("combine", "k" * 64, "c" * 64, home)
        if until:  # nothing is concluded then
            raise raised
        return run.retry(conclude_late)

    monkeypatch.setattr(Run, "_metrics_and_tags", lambda *_: ({}, {NOTE: "what was measured"}))
    with pytest.raises(type(raised)) as caught:
        ended(Sticky(), "left", until=until, body=body)
    logged, command = mlflow_runs(home)["t"], f"draftsmith run 'my run.yaml' --set seed=1{options}"
    noted = f"{note} To continue: `{command}`.\n\nwhat was measured"
    assert (logged.info.status, logged.data.tags[NOTE]) == (status, noted)
    assert caught.value.__notes__[-1] == command
    assert OUTCOME not in logged.data.tags and len(calls) == (not until), "an outdated plan is not retried"
    assert OutdatedPlanError.exit_code == EXIT_RETRYABLE


@pytest.mark.parametrize("certain", [True, False])
def test_nothing_is_checked_if_the_run_certainly_ends_with_what_is_reused(certain: bool) -> None:
    checked: list[int] = []

    class Ends(ToyPipeline):
        def early_end(self, *_: object) -> EarlyEnd:
            return EarlyEnd("target", "not made", certain=certain)

        def check(self, builds: Sequence[Build]) -> list[str]:
            checked.append(len(builds))
            return []

    ended(Ends())
    assert checked == [0 if certain else 4]


def test_the_conclusion_waits_until_mlflow_has_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promoted drafter is uploaded into the run."""
    create, asked = MlflowClient.create_run, list[bool]()

    def lost_twice(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
        asked.append(True)
        if len(asked) <= 2:
            raise ConnectionError("connection refused")
        return create(client, *arguments, **named)

    def body(run: Run) -> Conclusion | None:
        def conclude() -> Conclusion:
            if run.mlflow_id is None:
                raise RetryableError("MLflow has no run")
            return Conclusion("Promoted", "it is")

        run.show_comparison()
        return run.retry(conclude)

    monkeypatch.setattr(MlflowClient, "create_run", lost_twice)
    run = ended(TOY, body=body, retries=1, retry_delay_seconds=0)
    assert run.conclusion is not None and run.conclusion.name == "Promoted"
