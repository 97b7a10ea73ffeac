"""A deployment at a real Prefect server: made, changed, and not taken over by another line of drafters."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import yaml

from tests.flows.pipeline.processes import beside_server

PROGRAM = textwrap.dedent(
    """
    import json
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from draftsmith.flows.cli import main

    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="pool", type="process"))
        for words in json.loads(os.environ["TOLD"]):
            code = main(["deploy", *words, "--pool", "pool"])
            deployment = client.read_deployment_by_name("refresh/weekly")
            line = deployment.parameters["config"]["registry"]["name"]
            print(code, line, *(each.schedule.cron for each in deployment.schedules))
    """
)


@pytest.mark.integration
def test_a_deployment_is_changed_by_its_own_line_alone(tmp_path: Path) -> None:
    def config(line: str, **more: object) -> str:
        logs = {"paths": ["answers.jsonl"], "temperature": 0}
        given = {"name": "weekly", "registry": {"name": line}, "target": {"source": "nowhere"}, "logs": logs, **more}
        (path := tmp_path / f"{line}.yaml").write_text(yaml.safe_dump(given))
        return str(path)

    first, copied = config("a-line"), config("b-line")
    hook = ["--webhook", "https://hooks.example/draftsmith", "--silent-after", "8"]
    told = [[first, "--cron", "0 3 * * 1"], [first, "--cron", "0 4 * * 1", *hook], [copied], [first]]
    ended = beside_server(tmp_path / "home", PROGRAM, TOLD=json.dumps(told))
    assert ended.returncode == 0, ended.stderr
    said = ended.stdout.splitlines()
    assert said[0].startswith("refresh/weekly: created, in work pool pool, 0 3 * * 1 (UTC), without a webhook: http://")
    assert said[2].startswith("refresh/weekly: changed, in work pool pool, 0 4 * * 1 (UTC), with its webhook: http://")
    assert said[5].startswith("refresh/weekly: changed, in work pool pool, when it is asked to, with the webhook that")
    assert [said[index] for index in (1, 3, 4, 6)] == [
        "0 a-line 0 3 * * 1",
        "0 a-line 0 4 * * 1",
        "2 a-line 0 4 * * 1",
        "0 a-line",
    ]
    (error,) = (line for line in ended.stderr.splitlines() if line.startswith("draftsmith: error: "))
    assert "the deployment refresh/weekly is of the line a-line, and this config is of b-line: " in error
