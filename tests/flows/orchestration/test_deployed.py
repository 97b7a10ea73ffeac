"""Deployments, verdicts and events on a real Prefect server, one for all tests."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.flows.processes import ROOT, beside_server
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
    from draftsmith.flows.config.load import read_config
    from draftsmith.flows.orchestration.flow_run import show_verdict
    from tests.flows.toy import ASSET, TOY
    from draftsmith.flows.refresh.config import RefreshConfig
    from draftsmith.flows.refresh.flow import watch
    from draftsmith.flows.refresh.versions import registry
    from tests.flows.refresh.watched import DIGEST, promoted, server_below_its_promise
    from tests.flows.toy_flow import toy_refresh

    @flow
    def refresh():
        show_verdict("My_line", "**Refused.** Too slow.", print)

    def executed():
        known = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_LOGGING_")}
        settings = client.read_deployment(run.deployment_id).job_variables["env"]
        variables = known | settings | {"PREFECT__FLOW_RUN_ID": str(run.id)}
        engine = [sys.executable, "-m", "prefect.engine"]
        log = subprocess.run(engine, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        print("told", log.count("target: going on from "), log.count(f"/runs/flow-run/{run.id}"))
        print(log, file=sys.stderr)
        return client.read_flow_run(run.id).state.name

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="pool", type="process"))
        for path in sorted([*Path("configs").glob("*.yaml"), *Path("configs/scale").glob("*.yaml")]):
            code = main(["deploy", str(path), "--pool", "pool", "--from", "target", "--until", "target"])
            deployment = client.read_deployment_by_name(f"refresh/{path.stem}")
            sent = deployment.parameters
            client.create_flow_run_from_deployment(deployment.id, parameters=sent)  # as the form does
            same = RefreshConfig.model_validate(sent["config"]) == read_config(path, [], RefreshConfig)
            print("ours", code, same, *sent["start"], *sent["until"], path.stem)
            if path.stem == "weekly":
                print("since", sent["config"]["logs"]["since"], sent["config"]["prompts"]["sources"][0]["since"])
                client.delete_deployment(deployment.id)
        for words in json.loads(os.environ["DEPLOYED"]):
            code = main(["deploy", *words, "--pool", "pool"])
            deployment = client.read_deployment_by_name("refresh/weekly")
            line = deployment.parameters["config"]["registry"]["name"]
            print("deployed", code, line, *(each.schedule.cron for each in deployment.schedules))
        assert main(["deploy", os.environ["OTHER"], "--pool", "pool"]) == 0
        words = [json.loads(os.environ["DEPLOYED"])[0][0], "--pool", "pool", "--watch", "refresh"]
        assert main(["deploy", *words, "--set", "registry.servers=[http://gpu1]"]) == 0
        watching = client.read_deployment_by_name("watch/weekly-watch").parameters
        print("watching", watching["then"], *watching["config"]["registry"]["servers"])
        with server_below_its_promise("a-line") as url:
            watching["config"]["registry"]["servers"] = [url]
            config = RefreshConfig(**watching["config"])
            print("watched", *(watch(config, 0.001, watching["then"], return_state=True).name for _ in range(2)))
            watch(config, 0.001, "refresh/other", return_state=True)
            promoted("a-line", "b", DIGEST, 4.0)
            state = watch(config, 0.001, "rollback", return_state=True)
            pages = {each.key: each.data for each in client.read_artifacts()}
            print("rolled back", state.name, registry().champion("a-line").number, pages["a-line-rollback"])
        for name in ("weekly", "other"):
            refreshes = DeploymentFilterId(any_=[client.read_deployment_by_name(f"refresh/{name}").id])
            runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id=refreshes))
            print("refreshes of", name, len(runs))
        weekly = client.read_deployment_by_name("refresh/weekly")
        weekly.parameters["config"]["registry"]["restart"] = True
        run = client.create_flow_run_from_deployment(weekly.id, parameters=weekly.parameters)
        print("restarted", executed(), client.read_flow_run(run.id).state.message)
        code = main(["deploy", json.loads(os.environ["DEPLOYED"])[0][0], "--pool", "pool", "--force", "drift"])
        print("forced", code, *client.read_deployment_by_name("refresh/weekly").parameters["force"])
        main(["status", "a-line"])
        refresh()
        (artifact,) = (each for each in client.read_artifacts() if each.key == "my-line-verdict")
        print("verdict", artifact.key, artifact.type, artifact.data, artifact.flow_run_id is not None, sep="|")
        assert main(["deploy", os.environ["CONFIG"], "--pool", "pool", "--force", "right"], TOY) == 0
        triggered_id = RunnerDeployment.from_flow(
            toy_refresh,
            name="triggered",
            parameters={"config": {"name": "triggered"}},
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
        its_runs = DeploymentFilter(id=DeploymentFilterId(any_=[triggered_id]))
        for _ in range(300):
            if triggered := client.read_flow_runs(deployment_filter=its_runs):
                break
            time.sleep(0.1)
        print("triggered", len(triggered))
        wanted = {"filter": {"event": {"prefix": ["prefect.asset.materialization"]}}}
        for _ in range(300):  # the server keeps events a moment later than it acts on them
            if events := client.request("POST", "/events/filter", json=wanted).json()["events"]:
                break
            time.sleep(0.1)
        print("events", json.dumps([[each["resource"]["prefect.resource.id"], each["payload"]] for each in events]))
    """
)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file that gets a line for each start of the node `right`."""
    return tmp_path_factory.mktemp("starts") / "starts"


@pytest.fixture(scope="module")
def ended(starts: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """Run the program and return its result."""
    folder = tmp_path_factory.mktemp("announcements")

    def config(line: str, name: str = "weekly") -> str:
        logs = {"paths": ["answers.jsonl"], "temperature": 0}
        given = {"name": name, "registry": {"name": line}, "target": {"source": "nowhere"}, "logs": logs}
        (path := folder / f"{line}.yaml").write_text(yaml.safe_dump(given))
        return str(path)

    first, copied = config("a-line"), config("b-line")
    deployed = [[first, "--cron", "0 3 * * 1"], [first, "--cron", "0 4 * * 1"], [copied], [first]]
    toy = write_config(folder / "toy.yaml", verdict="promoted", approve=True, right={"note_start": str(starts)})
    other = config("c-line", "other")
    done = beside_server(folder / "home", PROGRAM, CONFIG=str(toy), DEPLOYED=json.dumps(deployed), OTHER=other)
    assert done.returncode == 0, done.stderr
    return done


def printed(ended: subprocess.CompletedProcess[str], what: str) -> list[str]:
    return [line.removeprefix(what).lstrip() for line in ended.stdout.splitlines() if line.startswith(what)]


def test_every_config_of_ours_is_deployed_as_it_is(ended: subprocess.CompletedProcess[str]) -> None:
    files = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "scale").glob("*.yaml")])
    assert printed(ended, "ours") == [f"0 True target target {path.stem}" for path in files], ended.stderr
    assert printed(ended, "since") == ["7d 7d"]


def test_a_deployment_forces_the_drift_check_of_a_line_with_a_champion(
    ended: subprocess.CompletedProcess[str],
) -> None:
    assert printed(ended, "forced") == ["0 drift"], ended.stderr


def test_a_workers_log_tells_a_stages_lines_and_the_runs_page_once(ended: subprocess.CompletedProcess[str]) -> None:
    assert printed(ended, "told") == ["0 1", "1 1", "0 1"], ended.stderr


def test_the_page_of_a_line_has_the_next_run_and_how_the_last_one_ended(
    ended: subprocess.CompletedProcess[str],
) -> None:
    (runs,) = printed(ended, "next run: ")
    weekly = next(text for text in runs.split("; ") if "deployment weekly-watch" not in text)
    assert weekly.startswith("20") and "deployment weekly (its last run: Failed, http://" in weekly


def test_a_deployment_is_never_changed_by_another_line(ended: subprocess.CompletedProcess[str]) -> None:
    assert printed(ended, "deployed") == ["0 a-line 0 3 * * 1", "0 a-line 0 4 * * 1", "2 a-line 0 4 * * 1", "0 a-line"]
    (error,) = (line for line in ended.stderr.splitlines() if line.startswith("draftsmith: error: "))
    assert "a-line" in error and "b-line" in error


def test_a_deployment_that_watches_starts_a_refresh(ended: subprocess.CompletedProcess[str]) -> None:
    assert printed(ended, "watching") == ["refresh/weekly http://gpu1"]
    assert printed(ended, "watched") == ["Below Below"], ended.stderr
    assert printed(ended, "refreshes of") == ["weekly 1", "other 1"], "one a day, of each line"


def test_a_deployment_does_not_start_a_line_again(ended: subprocess.CompletedProcess[str]) -> None:
    (state,) = printed(ended, "restarted")
    assert (
        state.startswith("Failed ")
        and "registry.restart: every run of a deployment would start the line again" in state
    )


def test_a_rollback_whose_swap_fails_is_a_failed_task(ended: subprocess.CompletedProcess[str]) -> None:
    (page,) = printed(ended, "rolled back")
    assert page.startswith("Failed 1 rollback failed: ")
    assert r"\`draftsmith swap a-line" in page, "a server's text is in it, so its Markdown and HTML are escaped"


def test_the_flow_runs_page_shows_the_verdict(ended: subprocess.CompletedProcess[str]) -> None:
    assert printed(ended, "verdict") == ["|my-line-verdict|markdown|**Refused.** Too slow.|True"]


def test_an_approved_promotion_triggers_another_deployment(
    ended: subprocess.CompletedProcess[str], starts: Path
) -> None:
    assert printed(ended, "states") == ["Suspended Promoted"], ended.stderr
    assert printed(ended, "triggered") == ["1"]
    (events,) = printed(ended, "events")
    assert json.loads(events) == [[ASSET, {"version": 1, "tau": 2.5}]]
    assert starts.read_text() == "started\n", "a resumed run does not make forced nodes again"
