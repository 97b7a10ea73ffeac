"""A team's servers: a schedule fires, a failed stage is retried alone, the webhook is called, the config is a form."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.tracking.runs import Tracking
from tests.artifacts.tracking import test_logged_models
from tests.flows.processes import ROOT, wait_until
from tests.flows.toy import write_config
from tests.testbed import chromium
from tests.testbed.team import BUCKET, POOL, Team, postgres_programs, team

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(postgres_programs() is None, reason="no PostgreSQL here: apt-get install postgresql"),
]
LIMIT_S = 600.0
HELP = "The numbers to collect, and how to fail."


def deploy(servers: Team, config: Path, *options: str) -> str:
    """The deployment's id."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.flows.toy_command", "deploy", config, "--pool", POOL, *options],
        env=servers.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("/")[2]


def start(servers: Team, deployment: str, **config: Any) -> str:
    """Start a run, and return its id. config: sections in place of the deployment's."""
    parameters = servers.api(f"deployments/{deployment}")["parameters"]
    body = {"parameters": {**parameters, "config": {**parameters["config"], **config}}}
    return str(servers.api(f"deployments/{deployment}/create_flow_run", body)["id"])


def state(servers: Team, run: str) -> str:
    return str(servers.api(f"flow_runs/{run}")["state"]["name"])


def ends(servers: Team, run: str, name: str) -> None:
    wait_until(lambda: state(servers, run) == name, f"the run is {name}\n{servers.worker_log[-3000:]}", LIMIT_S)


def tasks(servers: Team, run: str) -> dict[str, str]:
    """Latest state of every stage of a run."""
    body = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
    return {each["name"]: each["state"]["name"] for each in servers.api("task_runs/filter", body)}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A schedule of every minute whose runs the gate refuses; beside it a run that is cancelled, and one that fails, is
    retried and promotes; at last one that is killed. One team's servers for it all."""
    folder = tmp_path_factory.mktemp("team")
    allow, starts = folder / "allow", folder / "starts"
    with team(folder) as servers:
        story: dict[str, Any] = {"servers": servers, "starts": starts}
        slow = {"seconds_each": 0.3}
        nightly = write_config(folder / "nightly.yaml", name="nightly", target={**slow, "count": 4}, verdict="refused")
        by_minute = deploy(servers, nightly, "--cron", "* * * * *", "--webhook", servers.webhook)
        noted = {"note_start": str(starts)}
        toy = write_config(
            folder / "toy.yaml", target={**slow, **noted}, right={"allow": str(allow), **noted}, verdict="promoted"
        )
        deployment = deploy(servers, toy, "--webhook", servers.webhook)
        busy = start(servers, by_minute, name="busy", target={"count": 999, "seconds_each": 0.3})
        process_of(servers, "busy")
        run = start(servers, deployment)
        story["form"] = form(servers, by_minute, folder)
        servers.api(f"flow_runs/{busy}/set_state", {"state": {"type": "CANCELLING"}, "force": True})
        ends(servers, busy, "Cancelled")
        ends(servers, run, "Failed")
        story["failed"], story["failed_starts"] = tasks(servers, run), starts.read_text()
        allow.touch()
        again = {"type": "SCHEDULED", "name": "AwaitingRetry"}  # what the button Retry of the UI sends
        servers.api(f"flow_runs/{run}/set_state", {"state": again, "force": True})
        ends(servers, run, "Promoted")
        story["retried"] = tasks(servers, run)
        story["scheduled"] = fired(servers, by_minute)
        story["killed"] = killed(servers, deployment)
        never = write_config(folder / "never.yaml", name="never")
        deploy(servers, never, "--webhook", servers.webhook, "--silent-after", "0.0002")  # 17 s
        causes = {"failed", "promoted", "refused", "crashed", "silent"}
        wait_until(
            lambda: {each["cause"] for each in servers.called} >= causes, "the webhook is called for all five", LIMIT_S
        )
        yield story


def form(servers: Team, deployment: str, folder: Path) -> str:
    """The text of the page on which a run of the deployment is started, with the contents of its fields."""
    if chromium.PROGRAM is None:
        return ""
    with chromium.browser(folder / "browser") as page:
        page.open(f"{servers.prefect}/deployments/deployment/{deployment}/run", width=1280)
        fields = "[...document.querySelectorAll('input, textarea')].map(each => each.value).join('\\n')"
        text = ""
        for _ in range(200):
            text = str(page.evaluate(f"document.body.innerText + '\\n' + {fields}"))
            if "Seconds Each" in text and HELP in text:
                break
            time.sleep(0.1)
    return text


def fired(servers: Team, deployment: str) -> dict[str, Any]:
    """The first run that the schedule has started, when it has ended; no further one comes."""
    wanted = {
        "deployments": {"id": {"any_": [deployment]}},
        "flow_runs": {"tags": {"all_": ["auto-scheduled"]}},
        "sort": "EXPECTED_START_TIME_ASC",
        "limit": 1,
    }

    def first() -> dict[str, Any]:
        run: dict[str, Any] = servers.api("flow_runs/filter", wanted)[0]
        return run

    what = f"the schedule fires\n{servers.worker_log[-3000:]}"
    wait_until(lambda: first()["state"]["name"] == "Refused", what, LIMIT_S)
    servers.api(f"deployments/{deployment}/pause_deployment", {})
    return first()


def process_of(servers: Team, name: str) -> int:
    """The id of the process of the run called so, once a stage of it works."""
    store = servers.folder / "home" / "store"

    def process() -> int | None:
        noted = [json.loads(path.read_text()) for path in store.glob("*/.partial-*/attempt.json")]
        return next((each["pid"] for each in noted if each["run"] == name), None)

    wait_until(lambda: process() is not None, f"the run works\n{servers.worker_log[-3000:]}", LIMIT_S)
    pid = process()
    assert pid is not None
    return pid


def killed(servers: Team, deployment: str) -> str:
    """A run whose process is killed in its first stage."""
    run = start(servers, deployment, name="killed", target={"count": 100, "seconds_each": 1})
    os.kill(process_of(servers, "killed"), signal.SIGKILL)
    ends(servers, run, "Crashed")
    return run


def test_a_schedule_fires(story: dict[str, Any]) -> None:
    assert story["scheduled"]["auto_scheduled"] and story["scheduled"]["created_by"]["type"] == "SCHEDULE"


def test_a_failed_stage_is_retried_and_only_it_runs(story: dict[str, Any]) -> None:
    assert story["failed"] == {"target": "Completed", "left": "Completed", "right": "Failed"}
    assert story["failed_starts"] == "started\n" * 2  # target, right
    made = {"right": "Completed", "total": "Completed", "promotion": "Completed"}
    assert story["retried"] == {"target": "Reused", "left": "Reused", **made}
    assert story["starts"].read_text() == "started\n" * 3


def test_the_webhook_is_called_after_failure_crash_promotion_refusal_and_silence(story: dict[str, Any]) -> None:
    calls = {(each["cause"], each["deployment"]): each for each in story["servers"].called}
    assert set(calls) == {
        ("failed", "toy"), ("promoted", "toy"), ("crashed", "toy"), ("refused", "nightly"),
        ("silent", "never"),
    }  # fmt: skip
    assert "right" not in calls["promoted", "toy"]["message"]
    assert calls["promoted", "toy"]["message"] == 'the sum is "promoted"'
    assert "allow is missing: make it" in calls["failed", "toy"]["message"]
    assert calls["failed", "toy"]["url"].startswith(story["servers"].prefect)


@pytest.mark.skipif(chromium.PROGRAM is None, reason=chromium.ABSENT)
def test_the_config_is_a_form(story: dict[str, Any]) -> None:
    lines = story["form"].splitlines()
    for label in ("Count (Optional)", "Seconds Each (Optional)", HELP):
        assert label in lines, story["form"]
    assert "0.3" in lines and "nightly" in lines  # the fields have the values of the file


def test_mlflow_keeps_runs_in_postgresql_and_files_in_s3_without_keys_at_the_client(
    story: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: Team = story["servers"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    from mlflow import MlflowClient

    client = MlflowClient(servers.mlflow, registry_uri=servers.mlflow)
    experiment = client.get_experiment_by_name("draftsmith").experiment_id
    stage, *_ = client.search_runs([experiment], "attributes.run_name = 'total'")
    assert stage.info.status == "FINISHED"
    manifest = client.download_artifacts(stage.info.run_id, "manifest.json", str(tmp_path))
    assert json.loads(Path(manifest).read_text())["stage"] == "combine"
    with urllib.request.urlopen(f"{servers.s3}/{BUCKET}?list-type=2") as listing:
        assert f"{stage.info.run_id}/artifacts/manifest.json" in listing.read().decode()


def test_drafters_are_logged_models_of_a_server(
    story: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", story["servers"].mlflow)
    tracking = Tracking(tmp_path / "home", "my-line")
    test_logged_models.test_drafters_of_a_line_are_ranked_on_one_prompt_set(tracking)
    run_id = tracking.open_refresh("weekly", {})
    assert f"{story['servers'].mlflow}/#/experiments/" in tracking.link(run_id)
    tracking.close_refresh("FINISHED")
