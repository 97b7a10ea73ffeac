"""A run whose plan no longer holds when it ends: planned again, a few times."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.flows.pipeline import registered, run
from draftsmith.flows.pipeline.cancellation import Cancellation
from draftsmith.flows.pipeline.graph import Conclusion, PlanAgain
from draftsmith.flows.pipeline.node import Workshop
from draftsmith.flows.pipeline.options import StageOptions
from draftsmith.flows.pipeline.part import Part
from tests.flows.pipeline.toy import TOY, ToyConfig, ToyCourse, toy_course


@pytest.mark.parametrize("moves", [0, 1, 2, 9])
def test_what_a_run_is_planned_from_is_looked_up_again(moves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was forced is not made once more."""
    looked_up: list[int] = []
    planned: list[tuple[int, list[str]]] = []

    def resolve(config: ToyConfig) -> ToyConfig:
        looked_up.append(len(looked_up))
        return config.model_copy(update={"seed": len(looked_up)})

    def once(config: ToyConfig, _pipeline: object, force: Any, *_rest: object) -> tuple[dict[str, Any], Conclusion]:
        planned.append((config.seed, list(force)))
        if len(planned) <= moves:
            raise PlanAgain("another one was faster")
        return {}, Conclusion("Promoted", "it is")

    monkeypatch.setattr(run, "_run_once", once)
    pipeline = dataclasses.replace(TOY, resolve=resolve)
    arguments: Any = (ToyConfig(name="t"), pipeline, ["target"], Part(), Cancellation())
    if moves < 3:
        made, conclusion = run._run(*arguments)
        assert (made, conclusion and conclusion.name) == ({}, "Promoted")
    else:
        with pytest.raises(
            DraftsmithError, match="another one was faster; planned 3 times: run the same command again"
        ):
            run._run(*arguments)
    assert planned == [(1, ["target"]), (2, []), (3, [])][: moves + 1]


def test_what_decides_how_far_it_goes_is_forced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[list[str]] = []

    def once(_config: object, _pipeline: object, force: Any, *_rest: object) -> tuple[dict[str, Any], None]:
        forced.append(list(force))
        if len(forced) == 1:
            raise PlanAgain("another one was faster", ("left",))
        return {}, None

    monkeypatch.setattr(run, "_run_once", once)
    run._run(ToyConfig(name="t"), TOY, ["target"], Part(), Cancellation())
    assert forced == [["target"], ["left"]]
    made: Any = {name: SimpleNamespace(reused=False) for name in ("target", "right")}
    assert run._still_forced({"target"}, made, ()) == "target: made again and complete; go on without --force"
    said = run._still_forced({"target", "total"}, made, {"left"})
    assert said == "target: made again and complete; go on with --force left --force total only"
    assert run._still_forced({"total"}, made, {"left"}) is None, "nothing is done: the same command goes on"


@pytest.mark.parametrize(("until", "concludes"), [((), True), (("total",), False)])
def test_a_part_concludes_nothing_even_if_it_needs_every_node(
    until: tuple[str, ...], concludes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who stops at the last node looks at it before anything follows from it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    nodes: list[list[str]] = []

    def made(_workshop: object, named: Any, *_rest: object) -> None:
        nodes.append([node.name for node in named])

    def course(config: ToyConfig, force: Collection[str]) -> ToyCourse | None:
        assert set(force) == {"left", "right", "total"}, "nodes, by whatever name they were forced"
        return toy_course(config, force)

    monkeypatch.setattr(run, "_make_all", made)
    monkeypatch.setattr(run.RunRecord, "settle", lambda *_: None)
    pipeline, config = dataclasses.replace(TOY, course=course), ToyConfig(name="t", verdict="promoted")
    _, conclusion = run._run_once(config, pipeline, ("combine",), Part(until=until), Cancellation())
    assert len(nodes[0]) == 4
    assert (conclusion is not None) == concludes
    assert (tmp_path / "home" / registered.NOTE).is_file() == concludes, "where versions are registered is known later"


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (PlanAgain("another one was faster"), "KILLED", "**Planned again.** another one was faster"),
        (DraftsmithError("the disk is full"), "FAILED", "**Failed.** the disk is full"),
        (SystemExit(143), "KILLED", "**Stopped.** The same command goes on."),
    ],
)
def test_mlflow_says_why_a_run_has_ended_early(
    raised: BaseException,
    status: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And one that is planned again has not failed."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    closed: list[tuple[str, str]] = []

    class Late(ToyCourse):
        def finish(self, *_: object) -> Conclusion:
            raise raised

    def made_left(_workshop: object, _nodes: object, _forced: object, made: dict[str, Any], *_rest: object) -> None:
        made["left"] = SimpleNamespace(reused=False, ref=None)

    def close(
        _: object, status: str, _made: object, _figures: object, _files: object, tags: Any, *__: Any, **___: Any
    ) -> None:
        closed.append((status, tags[run.NOTE]))

    monkeypatch.setattr(run, "_make_all", made_left)
    monkeypatch.setattr(run, "_reviewed", lambda *_, **__: ({}, {run.NOTE: "what was measured"}))
    monkeypatch.setattr(run, "_report", lambda *_: None)
    monkeypatch.setattr(run.RunRecord, "settle", lambda *_: None)
    monkeypatch.setattr(run.RunRecord, "close", close)
    pipeline = dataclasses.replace(TOY, course=lambda *_: Late("promoted"))
    with pytest.raises(type(raised)):
        run._run_once(ToyConfig(name="t"), pipeline, ("left",), Part(), Cancellation())
    assert closed == [(status, f"{said}\n\nwhat was measured")]
    assert ("without --force" in capsys.readouterr().out) == (not isinstance(raised, PlanAgain))


def test_a_stage_that_ended_while_mlflow_was_away_is_ended_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was shown as running until the next run."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))

    def made(workshop: Workshop, *_: object) -> None:
        tracked = workshop.tracking.stage_run(workshop.refresh_run(), "collect", "ab" * 32)
        with monkeypatch.context() as lost:
            lost.setattr(MlflowClient, "set_terminated", lambda *_: (_ for _ in ()).throw(ConnectionError("refused")))
            tracked.close("FAILED")

    monkeypatch.setattr(run, "_make_all", made)
    run._run_once(ToyConfig(name="t"), TOY, (), Part(), Cancellation())
    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    found = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert {run.info.run_name: run.info.status for run in found} == {"t": "FINISHED", "collect": "KILLED"}


def test_what_follows_from_a_run_waits_until_mlflow_has_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafter is uploaded into it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    create, asked = MlflowClient.create_run, list[bool]()

    def lost_twice(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
        asked.append(True)
        if len(asked) <= 2:
            raise ConnectionError("connection refused")
        return create(client, *arguments, **named)

    class Uploads(ToyCourse):
        def finish(self, made: Mapping[str, ArtifactRef], run_id: str | None) -> Conclusion:
            if run_id is None:
                raise RetryableError("MLflow has no run")
            return super().finish(made, run_id)

    monkeypatch.setattr(MlflowClient, "create_run", lost_twice)
    monkeypatch.setattr(run, "_make_all", lambda *_: None)
    pipeline = dataclasses.replace(TOY, course=lambda *_: Uploads("promoted"))
    config = ToyConfig(name="t", stages=StageOptions(retries=1, retry_delay_seconds=0))
    _, conclusion = run._run_once(config, pipeline, (), Part(), Cancellation())
    assert conclusion is not None and conclusion.name == "Promoted"
