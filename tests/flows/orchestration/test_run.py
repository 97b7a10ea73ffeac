"""Runs with a real temporary Prefect server, real stage processes and MLflow on SQLite."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import RefusedError
from tests.flows.processes import assert_gone, pid_in, processes_of, run_toy, toy_command, wait_until
from tests.flows.toy import write_config

pytestmark = pytest.mark.integration


def task_runs(home: Path) -> list[tuple[str, str, list[str]]]:
    """Return (name, name of its state, names of the tasks before it) in the order of their creation."""
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        rows = database.execute("select id, name, state_name, task_inputs from task_run order by created").fetchall()
    names = {row[0].replace("-", ""): row[1] for row in rows}
    return [
        (name, state, sorted(names[each["id"].replace("-", "")] for each in json.loads(inputs).get("wait_for", [])))
        for _, name, state, inputs in rows
    ]


def flow_states(home: Path) -> list[str]:
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:
        return [row[0] for row in database.execute("select state_name from flow_run order by created")]


def mlflow_runs(home: Path) -> list[tuple[str, str]]:
    with sqlite3.connect(home / "mlflow.db") as database:
        return database.execute("select name, status from runs order by start_time, rowid").fetchall()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Run a config four times in one home: a failure, the rerun, unchanged, and with a changed field."""
    folder = tmp_path_factory.mktemp("story")
    home, allow, starts = folder / "home", folder / "allow", folder / "starts"
    lost = folder / "lost"
    target = {"count": 6, "fail_at": 4, "allow": str(allow), "note_start": str(starts), "lose_engine_until": str(lost)}
    config = write_config(folder / "toy.yaml", target=target)
    results: dict[str, Any] = {"home": home, "starts": starts}
    results["failed"] = run_toy(home, "run", config)
    results["failed_tasks"] = task_runs(home)
    allow.touch()
    nowhere = "http://127.0.0.1:9"  # a proxy that does not answer
    results["rerun"] = run_toy(home, "run", config, http_proxy=nowhere, HTTP_PROXY=nowhere, all_proxy=nowhere)
    results["unchanged"] = run_toy(home, "run", config)
    results["changed"] = run_toy(
        home, "run", config, "--set", "left.factor=3", "--from", "left", "--set", "verdict=refused"
    )
    results["tasks"], results["flows"], results["runs"] = task_runs(home), flow_states(home), mlflow_runs(home)
    results["shards"] = run_toy(home, "run", config, *in_shards(2))
    results["shard_tasks"] = task_runs(home)[len(results["tasks"]) :]
    results["config"] = config
    yield results


def in_shards(count: int, **more: str) -> list[str]:
    """Return the options of a run that makes the node `squares` in shards."""
    fields = {"squares.numbers": 7, "stages.shards": count, **more}
    return ["--until", "squares", *(word for name, value in fields.items() for word in ("--set", f"{name}={value}"))]


def lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.endswith(": reused") or ": done in " in line]


def names(output: str, ending: str) -> list[str]:
    return [line.partition(":")[0] for line in lines(output) if ending in line]


def test_a_lost_engine_is_retried_and_a_bad_number_is_not(story: dict[str, Any]) -> None:
    failed = story["failed"]
    assert failed.returncode == 2
    errors = [line for line in failed.stderr.splitlines() if line.startswith("draftsmith: error: ")]
    assert len(errors) == 1
    assert "stage collect: number 4 is bad: remove it (log: " in errors[0]
    assert "Traceback" not in failed.stderr
    notices = [line for line in failed.stderr.splitlines() if "Trying again" in line]
    assert ["(1 of 5)" in notices[0], "(2 of 5)" in notices[1]] == [True, True]
    assert ["Ctrl-C" in line for line in notices] == [True, False], "how to stop is printed once"
    # two lost engines, then the attempt that met the bad number; the fourth start is the rerun
    assert story["starts"].read_text() == "started\n" * 4
    assert story["failed_tasks"] == [("target", "Failed", [])]


def test_the_rerun_continues_from_what_the_failed_stage_saved(story: dict[str, Any]) -> None:
    rerun = story["rerun"]
    assert rerun.returncode == 0, rerun.stderr
    assert "resumes" in rerun.stdout
    assert "target: going on from 4" in rerun.stdout
    assert names(rerun.stdout, "done in") == ["target", "left", "right", "total"]


def test_an_unchanged_run_reuses_everything(story: dict[str, Any]) -> None:
    assert story["unchanged"].returncode == 0
    assert names(story["unchanged"].stdout, "reused") == ["target", "left", "right", "total"]
    assert names(story["unchanged"].stdout, "done in") == []
    assert f"mlflow ui --backend-store-uri sqlite:///{story['home']}/mlflow.db" in story["unchanged"].stdout
    assert story["rerun"].stderr == story["unchanged"].stderr == "", "no library prints anything"


def test_a_changed_field_reruns_later_nodes_and_a_refusal_has_its_own_exit_code(story: dict[str, Any]) -> None:
    changed = story["changed"]
    assert names(changed.stdout, "reused") == ["target", "right"]
    assert names(changed.stdout, "done in") == ["left", "total"]
    assert changed.returncode == RefusedError.exit_code
    assert changed.stderr.strip() == 'draftsmith: the sum is "refused"'
    assert "4 nodes; MLflow: " in changed.stdout


def test_each_shard_is_a_task(story: dict[str, Any]) -> None:
    assert story["shards"].returncode == 0, story["shards"].stderr
    assert names(story["shards"].stdout, "done in") == ["squares"]
    tasks = [(name, state) for name, state, _ in story["shard_tasks"]]
    assert sorted(tasks) == [
        ("squares", "Completed"),
        ("squares, shard 1 of 2", "Completed"),
        ("squares, shard 2 of 2", "Completed"),
        ("target", "Reused"),
    ]


def test_shards_on_a_ray_cluster_have_the_same_content(story: dict[str, Any]) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'draftsmith[ray]'")
    pytest.importorskip("prefect_ray", reason="prefect-ray is not installed: pip install 'draftsmith[ray]'")
    (before,) = (story["home"] / "store" / "squares").glob("[!.]*/manifest.json")
    content = json.loads(before.read_text())["content_id"]
    by_ray = in_shards(3, **{"stages.runner": "ray"})
    found = run_toy(story["home"], "run", story["config"], *by_ray, "--force", "squares")
    assert found.returncode == 0, found.stderr
    (after,) = (story["home"] / "store" / "squares").glob("[!.]*/manifest.json")
    assert json.loads(after.read_text())["content_id"] == content
    assert len(list((story["home"] / "store" / "squares.shard").glob("[!.]*"))) == 5  # two from before, three by Ray


def test_prefect_shows_nodes_states_and_edges(story: dict[str, Any]) -> None:
    edges = {"target": [], "left": ["target"], "right": ["target"], "total": ["left", "right"]}
    assert story["flows"] == ["Failed", "Completed", "Completed", "Refused"]
    runs = story["tasks"][1:]
    assert [(name, before) for name, _, before in runs] == [*edges.items()] * 3
    assert [state for _, state, _ in runs[:8]] == ["Completed"] * 4 + ["Reused"] * 4
    assert [state for _, state, _ in runs[8:]] == ["Reused", "Completed", "Reused", "Completed"]


def test_mlflow_has_a_run_for_each_refresh_and_each_executed_stage(story: dict[str, Any]) -> None:
    runs = story["runs"]
    assert sorted(runs) == sorted(
        [
            *[("toy", "FAILED"), ("toy", "FINISHED"), ("toy", "FINISHED")],
            *[("target", "FINISHED"), ("left", "FINISHED"), ("right", "FINISHED"), ("total", "FINISHED")],
            *[("left", "FINISHED"), ("total", "FINISHED")],
        ]
    )
    with sqlite3.connect(story["home"] / "mlflow.db") as database:
        steps = database.execute("select step, value from metrics where key = 'train/value' order by step").fetchall()
        reused = database.execute("select value from tags where key = 'reused'").fetchall()
    assert steps == [(step, float(step - 1)) for step in range(1, 7)]
    assert [text.split()[0] for (text,) in reused] == ["1"], "the run that made the artifacts is tagged"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_stopped_refresh_leaves_no_process_and_continues(tmp_path: Path, number: signal.Signals, code: int) -> None:
    home, worker_file = tmp_path / "home", tmp_path / "worker"
    target = {"count": 30, "seconds_each": 0.1, "worker": str(worker_file)}
    config = write_config(tmp_path / "toy.yaml", target=target)
    command = toy_command(home, "run", config)
    worker = pid_in(worker_file)
    saved = wait_for_saved(home)
    os.kill(command.pid, number)
    _, err = command.communicate(timeout=60)
    assert command.returncode == code, err
    assert_gone(worker)
    wait_until(lambda: not processes_of(home), "no stage and no Prefect server is left", limit_s=10)
    if number is not signal.SIGKILL:
        *_, said, continues = err.strip().splitlines()
        assert said.startswith("draftsmith: error: ") and continues == f"draftsmith run {config}"
    if number is signal.SIGINT:
        assert flow_states(home) == ["Crashed"]
        assert {status for _, status in mlflow_runs(home)} == {"KILLED"}

    again = run_toy(home, "run", config, "--until", "target")
    assert again.returncode == 0, again.stderr
    assert names(again.stdout, "done in") == ["target"]
    assert again.stdout.splitlines()[-1].startswith(f"target: {home}/store/collect/")
    continued = next(line for line in again.stdout.splitlines() if "going on from" in line)
    assert int(continued.split()[-1]) >= saved
    assert not any(status == "RUNNING" for _, status in mlflow_runs(home))


def prefect_of(home: Path) -> tuple[int, str, tuple[str, str]]:
    """Return process id, address, and user with password of the command's temporary server."""
    for pid in processes_of(home):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if "prefect.server.api.server:create_app" in words and "--port" in words:
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            (user,) = [
                each.partition("=")[2] for each in variables if each.startswith("PREFECT_SERVER_API_AUTH_STRING=")
            ]
            name, _, password = user.partition(":")
            return pid, f"http://127.0.0.1:{words[words.index('--port') + 1]}/api", (name, password)
    raise AssertionError("no server")


def test_a_run_succeeds_although_its_prefect_server_dies(tmp_path: Path) -> None:
    home = tmp_path / "home"
    config = write_config(tmp_path / "toy.yaml", target={"count": 15, "seconds_each": 0.1})
    command = toy_command(home, "run", config, PREFECT_CLIENT_MAX_RETRIES="1")
    wait_for_saved(home)
    for pid in processes_of(home):
        if "uvicorn" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    out, err = command.communicate(timeout=120)
    assert command.returncode == 0, err
    assert "Traceback" not in err and "draftsmith: error" not in err  # Prefect may log the loss
    assert names(out, "done in") == ["target", "left", "right", "total"]
    assert "warning: Prefect does not know that the run succeeded" in out
    assert "4 nodes; MLflow: " in out
    assert {status for _, status in mlflow_runs(home)} == {"FINISHED"}
    wait_until(lambda: not processes_of(home), "nothing is left", limit_s=10)


def test_a_stage_continues_after_prefect_interrupts_it_for_a_lost_lease(tmp_path: Path) -> None:
    home, starts = tmp_path / "home", tmp_path / "starts"
    target = {"count": 40, "seconds_each": 0.1, "note_start": str(starts)}
    config = write_config(tmp_path / "toy.yaml", target=target)
    ended = run_toy(home, "run", config, TOY_FLOW="tests.flows.orchestration.leased_flow:leased_toy")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (notice,) = [line for line in ended.stderr.splitlines() if "concurrency slot" in line]
    assert "Trying again" in notice and "(1 of " in notice and "Ctrl-C" in notice
    assert starts.read_text() == "started\n" * 2
    first, continued = (line for line in ended.stdout.splitlines() if line.startswith("target: going on from "))
    assert first.endswith(" 0") and not continued.endswith(" 0")
    assert names(ended.stdout, "done in") == ["target", "left", "right", "total"]


def test_a_run_that_is_cancelled_in_prefect_saves_its_stage(tmp_path: Path) -> None:
    import httpx

    home = tmp_path / "home"
    config = write_config(tmp_path / "toy.yaml", target={"count": 999, "seconds_each": 0.1, "seconds_to_save": 2})
    command = toy_command(home, "run", config)
    wait_for_saved(home)
    _, url, user = prefect_of(home)
    api = httpx.Client(base_url=url, auth=user, trust_env=False)
    (flow,) = api.post("/flow_runs/filter", json={}).json()
    asked = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    assert api.post(f"/flow_runs/{flow['id']}/set_state", json=asked).json()["status"] == "ACCEPT"
    out, err = command.communicate(timeout=60)
    assert command.returncode == 130, err
    assert "target: saved" in out
    assert list(home.glob("store/collect/.partial-*/work/saved-when-asked"))
    line, continues = err.splitlines()
    assert line.startswith("draftsmith: error: cancelled in Prefect") and continues == f"draftsmith run {config}"
    assert flow_states(home) == ["Cancelled"]
    assert {status for _, status in mlflow_runs(home)} == {"KILLED"}


def wait_for_saved(home: Path) -> int:
    pattern = "store/collect/.partial-*/work/saved.json"
    wait_until(
        lambda: any(path.stat().st_size > 8 for path in home.glob(pattern)), "some numbers are saved", limit_s=180
    )
    return 3


def test_two_concurrent_refreshes_in_a_new_home_make_every_artifact_once(tmp_path: Path) -> None:
    home, starts = tmp_path / "home", tmp_path / "starts"
    noted = {"note_start": str(starts)}
    config = write_config(
        tmp_path / "toy.yaml",
        target={"count": 10, "seconds_each": 0.1, **noted},
        left=noted,
        right={"factor": 2, **noted},
        total=noted,
    )
    racers = [toy_command(home, "run", config) for _ in range(2)]
    outputs = [racer.communicate(timeout=600) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    assert starts.read_text() == "started\n" * 4
    both = outputs[0][0] + outputs[1][0]
    assert len(names(both, "done in")) == 4
    assert len(names(both, "reused")) == 4
    assert flow_states(home) == ["Completed", "Completed"]
