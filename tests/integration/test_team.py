"""A team's servers: a schedule fires, only a failed stage is retried, a webhook is called, the config is a form."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.artifacts.tracking.refresh_runs import RefreshRun
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.targets.causal_lm import Target
from tests.artifacts.tracking import test_logged_models
from tests.flows.processes import ROOT, wait_until
from tests.flows.toy import write_config
from tests.testbed import chromium
from tests.testbed.compose import TEAM
from tests.testbed.random_target import random_drafter
from tests.testbed.team import BUCKET, POOL, Team, ask, postgres_programs, team

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(postgres_programs() is None, reason="no PostgreSQL here: apt-get install postgresql"),
]
LIMIT_S = 600.0
HELP = "The numbers to collect, and how to fail."


def deploy(servers: Team, config: Path, *options: str) -> str:
    """The deployment's id."""
    done = deploys(servers, config, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("/")[2]


def deploys(servers: Team, config: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.flows.toy_command", "deploy", config, "--pool", POOL, *options],
        env={**servers.environment, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def automate(servers: Team, name: str, silent_s: str = "691200") -> None:
    """Create a deployment's automations, as the page of configs/team does."""
    made = f"""
from prefect.blocks.webhook import Webhook
headers = {{"Content-Type": "application/json"}}
print(Webhook(url={servers.webhook!r}, headers=headers).save("draftsmith", overwrite=True))
"""
    options: dict[str, Any] = {"env": servers.environment, "check": True, "timeout": LIMIT_S, "text": True}
    block = subprocess.run([sys.executable, "-c", made], stdout=subprocess.PIPE, **options).stdout.strip()
    text = (ROOT / "configs" / "team" / "automations.yaml").read_text()
    for given, value in (("my-model", name), ("BLOCK", block), ("691200", silent_s)):
        assert given in text
        text = text.replace(given, value)
    (file := servers.folder / f"{name}-automations.yaml").write_text(text)
    subprocess.run([sys.executable, "-m", "prefect", "automation", "create", "--from-file", file], **options)


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
    """A schedule of every minute whose runs the gate refuses; besides, a run that is cancelled, and one that fails, is
    retried and promotes; at last one that is killed. One team's servers for it all."""
    folder = tmp_path_factory.mktemp("team")
    allow, starts = folder / "allow", folder / "starts"
    with team(folder) as servers:
        story: dict[str, Any] = {"servers": servers, "starts": starts}
        slow = {"seconds_each": 0.3}
        nightly = write_config(folder / "nightly.yaml", name="nightly", target={**slow, "count": 4}, verdict="refused")
        by_minute = deploy(servers, nightly, "--cron", "* * * * *")
        for name in ("nightly", "toy"):
            automate(servers, name)
        noted = {"note_start": str(starts)}
        toy = write_config(
            folder / "toy.yaml", target={**slow, **noted}, right={"allow": str(allow), **noted}, verdict="promoted"
        )
        deployment = deploy(servers, toy)
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
        deploy(servers, never)
        automate(servers, "never", silent_s="17")
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
        page.open(servers.prefect, width=1280)  # asks for the password, and keeps it like this
        page.evaluate(f"localStorage.setItem('prefect-password', btoa('{servers.user}'))")
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


def log_in(servers: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this process the variables of MLflow that the README gives to every client."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, servers.environment[name])


def test_both_servers_refuse_whoever_has_no_password(story: dict[str, Any], tmp_path: Path) -> None:
    servers: Team = story["servers"]
    addresses = [f"{servers.prefect}/api/flow_runs/filter", f"{servers.prefect}/api/variables/"]
    addresses += [f"{servers.mlflow}/{api}/2.0/mlflow/experiments/create" for api in ("api", "ajax-api")]
    for url, user in product(addresses, (None, "draftsmith:wrong")):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(url, {"name": "a", "value": 1}, user=user)
    refused = deploys(servers, write_config(tmp_path / "toy.yaml"), PREFECT_API_AUTH_STRING="draftsmith:wrong")
    assert refused.returncode == 2
    assert "refuses this user. Set PREFECT_API_AUTH_STRING" in refused.stderr


def test_people_with_an_account_read_and_change_nothing(story: dict[str, Any]) -> None:
    servers: Team = story["servers"]
    administrator = ":".join(servers.environment[f"MLFLOW_TRACKING_{name}"] for name in ("USERNAME", "PASSWORD"))
    api, anna = f"{servers.mlflow}/api/2.0/mlflow", "anna:anna's own password"
    name, _, password = anna.partition(":")
    ask(f"{api}/users/create", {"username": name, "password": password}, user=administrator)
    by_name = f"{api}/experiments/get-by-name?experiment_name=draftsmith"
    experiment = ask(by_name, user=anna)["experiment"]["experiment_id"]
    (run,) = ask(f"{api}/runs/search", {"experiment_ids": [experiment], "max_results": 1}, user=anna)["runs"]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask(f"{api}/runs/set-tag", {"run_id": run["info"]["run_id"], "key": "a", "value": "b"}, user=anna)


READ = """
import json, sys
from draftsmith.stages.engines.servers.drafter_files import read_drafter, wanted_drafter
print(*read_drafter(wanted_drafter(json.loads(sys.argv[1]))))
"""


def test_a_servers_plug_in_fetches_an_upload_as_the_user_of_its_own_environment(
    story: dict[str, Any], plain_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers: Team = story["servers"]
    log_in(servers, monkeypatch)
    save_drafter(random_drafter(plain_target), tmp_path / "drafter", torch.float32)
    client, experiment = Tracking(tmp_path / "home", "uploads").connect()
    run = client.create_run(experiment).info.run_id
    client.log_artifacts(run, str(tmp_path / "drafter"), "drafter")
    wanted = {"drafter": drafter_digest(tmp_path / "drafter"), "folder": "/nowhere", "upload": f"runs:/{run}/drafter"}
    its_own = {name: servers.environment[name] for name in ("PATH", "HOME", "PYTHONPATH", "no_proxy")}
    user = {name: value for name, value in servers.environment.items() if name.startswith("MLFLOW_")}

    def server(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", READ, json.dumps(wanted)]
        return subprocess.run(command, env=its_own | environment, capture_output=True, text=True, timeout=LIMIT_S)

    done = server(**user)
    assert "model.safetensors" in done.stdout, done.stderr
    assert "401" in server(MLFLOW_TRACKING_URI=servers.mlflow).stderr


TEMPLATE = """
import asyncio, json, sys
from prefect.blocks.system import Secret
from prefect.workers.base import BaseJobConfiguration

Secret(value="from the block").save("mlflow-password")
for path in sys.argv[1:]:
    job = BaseJobConfiguration.from_template_and_values(json.load(open(path)), {"env": {"A": "1"}})
    print(json.dumps(asyncio.run(job).env))
"""


def test_the_jobs_of_pools_of_containers_get_the_password_from_a_block(story: dict[str, Any]) -> None:
    pools = [TEAM / "pools" / f"{name}.json" for name in ("docker", "kubernetes")]
    command: list[str | Path] = [sys.executable, "-c", TEMPLATE, *pools]
    environment = story["servers"].environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    environments = list(map(json.loads, done.stdout.splitlines()))
    assert len(environments) == len(pools)
    for given in environments:
        assert given["MLFLOW_TRACKING_USERNAME"] == "draftsmith" and given["A"] == "1"
        assert given["MLFLOW_TRACKING_PASSWORD"] == "from the block"


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
    log_in(servers, monkeypatch)
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
    log_in(story["servers"], monkeypatch)
    tracking = Tracking(tmp_path / "home", "my-line")
    test_logged_models.test_drafters_of_a_line_are_ranked_on_one_prompt_set(tracking)
    refresh = RefreshRun(tracking, "weekly", {})
    run_id = refresh.open()
    assert f"{story['servers'].mlflow}/#/experiments/" in tracking.link(run_id)
    refresh.close("FINISHED")
