"""Deployments and what a run's end shows, at a real Prefect server: one server for all of it."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.flows.processes import beside_server
from tests.flows.toy import ASSET, write_config

pytestmark = pytest.mark.integration

PROGRAM = textwrap.dedent(
    """
    import json, subprocess, sys, time
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.deployments.runner import EntrypointType, RunnerDeployment
    from prefect.events import DeploymentEventTrigger
    from draftsmith.flows.cli.main import main
    from draftsmith.flows.orchestration.announcements import show_verdict
    from tests.flows.toy import ASSET, TOY
    from tests.flows.toy_flow import toy_refresh

    @flow
    def refresh():
        show_verdict("My_line", "**Refused.** Too slow.", print)

    def executed():
        engine = [sys.executable, "-m", "prefect.engine"]
        subprocess.run(engine, env=os.environ | {"PREFECT__FLOW_RUN_ID": str(run.id)}, check=False, stdout=sys.stderr)
        return client.read_flow_run(run.id).state.name

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="pool", type="process"))
        for words in json.loads(os.environ["DEPLOYED"]):
            code = main(["deploy", *words, "--pool", "pool"])
            deployment = client.read_deployment_by_name("refresh/weekly")
            line = deployment.parameters["config"]["registry"]["name"]
            print("deployed", code, line, *(each.schedule.cron for each in deployment.schedules))
        refresh()
        (found,) = client.read_artifacts()
        print("verdict", found.key, found.type, found.data, found.flow_run_id is not None, sep="|")
        assert main(["deploy", os.environ["CONFIG"], "--pool", "pool", "--force", "right"], TOY) == 0
        behind = RunnerDeployment.from_flow(
            toy_refresh,
            name="behind",
            parameters={"config": {"name": "behind"}},
            triggers=[
                DeploymentEventTrigger(
                    expect={"prefect.asset.materialization.succeeded"}, match={"prefect.resource.id": ASSET}
                )
            ],
            entrypoint_type=EntrypointType.MODULE_PATH,
        ).apply(work_pool_name="pool")
        run = client.create_flow_run_from_deployment(client.read_deployment_by_name("toy-refresh/toy").id)
        states = [executed()]
        client.resume_flow_run(run.id)
        states.append(executed())
        print("states", *states)
        of_it = DeploymentFilter(id=DeploymentFilterId(any_=[behind]))
        for _ in range(300):
            if triggered := client.read_flow_runs(deployment_filter=of_it):
                break
            time.sleep(0.1)
        print("triggered", len(triggered))
        wanted = {"filter": {"event": {"prefix": ["prefect.asset.materialization"]}}}
        events = client.request("POST", "/events/filter", json=wanted).json()["events"]
        print("events", json.dumps([[each["resource"]["prefect.resource.id"], each["payload"]] for each in events]))
    """
)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a line for each start of the node `right`."""
    return tmp_path_factory.mktemp("starts") / "starts"


@pytest.fixture(scope="module")
def ended(starts: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The program's end."""
    folder = tmp_path_factory.mktemp("announcements")

    def config(line: str) -> str:
        logs = {"paths": ["answers.jsonl"], "temperature": 0}
        given = {"name": "weekly", "registry": {"name": line}, "target": {"source": "nowhere"}, "logs": logs}
        (path := folder / f"{line}.yaml").write_text(yaml.safe_dump(given))
        return str(path)

    first, copied = config("a-line"), config("b-line")
    hook = ["--webhook", "https://hooks.example/draftsmith", "--silent-after", "8"]
    deployed = [[first, "--cron", "0 3 * * 1"], [first, "--cron", "0 4 * * 1", *hook], [copied], [first]]
    toy = write_config(folder / "toy.yaml", verdict="promoted", approve=True, right={"note_start": str(starts)})
    done = beside_server(folder / "home", PROGRAM, CONFIG=str(toy), DEPLOYED=json.dumps(deployed))
    assert done.returncode == 0, done.stderr
    return done


def printed(ended: subprocess.CompletedProcess[str], what: str) -> list[str]:
    return [line.removeprefix(what).lstrip() for line in ended.stdout.splitlines() if line.startswith(what)]


def test_a_deployment_is_changed_by_its_own_line_alone(ended: subprocess.CompletedProcess[str]) -> None:
    assert printed(ended, "deployed") == ["0 a-line 0 3 * * 1", "0 a-line 0 4 * * 1", "2 a-line 0 4 * * 1", "0 a-line"]
    told = printed(ended, "refresh/weekly: ")
    webhooks = ("without a webhook", "with its webhook", "with the webhook that")
    assert len(told) == 3 and all(webhook in line for line, webhook in zip(told, webhooks, strict=True))
    (error,) = (line for line in ended.stderr.splitlines() if line.startswith("draftsmith: error: "))
    assert "a-line" in error and "b-line" in error


def test_the_verdict_is_on_the_page_of_the_flow_run(ended: subprocess.CompletedProcess[str]) -> None:
    assert printed(ended, "verdict") == ["|my-line-verdict|markdown|**Refused.** Too slow.|True"]


def test_a_deployments_run_waits_for_a_person_and_its_promotion_triggers_another_deployment(
    ended: subprocess.CompletedProcess[str], starts: Path
) -> None:
    assert printed(ended, "states") == ["Suspended Promoted"], ended.stderr
    assert printed(ended, "triggered") == ["1"]
    (events,) = printed(ended, "events")
    assert json.loads(events) == [[ASSET, {"version": 1, "tau": 2.5}]]
    assert starts.read_text() == "started\n", "what was forced is not made again when the run is resumed"
