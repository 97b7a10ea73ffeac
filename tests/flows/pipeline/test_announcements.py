"""What a real Prefect server shows of a run's end: a verdict, an asset that triggers a deployment, a person's yes."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest

from tests.flows.pipeline.processes import beside_server, run_toy
from tests.flows.pipeline.toy import ASSET, write_config

pytestmark = pytest.mark.integration

SUSPENDED = textwrap.dedent(
    """
    import json, subprocess, sys, time
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
    from prefect.deployments.runner import EntrypointType, RunnerDeployment
    from prefect.events import DeploymentEventTrigger
    from draftsmith.flows.cli import main
    from tests.flows.pipeline.toy import ASSET, TOY
    from tests.flows.pipeline.toy_flow import toy_refresh

    def executed():
        engine = [sys.executable, "-m", "prefect.engine"]
        subprocess.run(engine, env=os.environ | {"PREFECT__FLOW_RUN_ID": str(run.id)}, check=False, stdout=sys.stderr)
        return client.read_flow_run(run.id).state.name

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="pool", type="process"))
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
        print(json.dumps([[each["resource"]["prefect.resource.id"], each["payload"]] for each in events]))
    """
)


def test_a_deployments_run_waits_for_a_person_and_its_promotion_triggers_another_deployment(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    config = write_config(
        tmp_path / "toy.yaml", verdict="promoted", approve=True, right={"note_start": str(starts)}, name="toy"
    )
    ended = beside_server(tmp_path / "home", SUSPENDED, CONFIG=str(config))
    assert ended.returncode == 0, ended.stderr
    states, triggered, events = ended.stdout.splitlines()[-3:]
    assert states == "states Suspended Promoted", ended.stderr
    assert triggered == "triggered 1"
    assert json.loads(events) == [[ASSET, {"version": 1, "tau": 2.5}]]
    assert starts.read_text() == "started\n", "what was forced is not made again when the run is resumed"


def test_a_run_without_a_deployment_ends_and_promotes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path / "toy.yaml", verdict="promoted", approve=True)
    ended = run_toy(tmp_path / "home", "run", config)
    assert ended.returncode == 3, ended.stderr


VERDICT = textwrap.dedent(
    """
    from prefect import flow
    from prefect.client.orchestration import get_client
    from draftsmith.flows.pipeline.announcements import show_verdict

    @flow
    def refresh():
        show_verdict("My_line", "**Refused.** Too slow.", print)

    refresh()
    with get_client(sync_client=True) as client:
        (found,) = client.read_artifacts()
        print(found.key, found.type, found.data, found.flow_run_id is not None, sep="|")
    """
)


def test_the_verdict_is_on_the_page_of_the_flow_run(tmp_path: Path) -> None:
    ended = beside_server(tmp_path / "home", VERDICT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "my-line-verdict|markdown|**Refused.** Too slow.|True"
