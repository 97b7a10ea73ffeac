"""Secrets of the environment stay there: a refresh of a line writes none of them, and sends each only to its server.

Searched are the home, the databases and files of a team's servers, all logs and output, and what ports received.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import boto3
import pytest
import yaml

from tests.flows.processes import ROOT
from tests.testbed.recorder import Recorder, recorder
from tests.testbed.refresh import small_refresh
from tests.testbed.target import prompts_file, target_folder
from tests.testbed.team import BUCKET, Team, postgres_programs, team

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(postgres_programs() is None, reason="no PostgreSQL here: apt-get install postgresql"),
]
LINE = "secretive"
MARK = "Zk9xCanary"
CANARIES = {
    "SGLANG_API_KEY": f"sgl-{MARK}1",
    "VLLM_API_KEY": f"vllm-{MARK}2",
    "HF_TOKEN": f"hf_{MARK}3AbCdEfGhIjKlMnOp",
    "AWS_ACCESS_KEY_ID": f"AKIA{MARK.upper()}4",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}5/with+signs",
    "SOME_SERVICE_PASSWORD": f"{MARK}6",
}


class Story:
    """A refresh that promotes, two commands that look at its line, and two runs whose servers do not answer."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, servers = folder / "run", folder / "team"
        for each in (self.folder, servers):
            each.mkdir()
        self.team: Team = stack.enter_context(team(servers))
        fronts = (self.team.mlflow, self.team.prefect)
        self.mlflow, self.prefect = (stack.enter_context(recorder(url.removeprefix("http://"))) for url in fronts)
        self.engine, self.proxy = (stack.enter_context(recorder()) for _ in range(2))
        given, proxies = self.team.environment, ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
        user = f"{given['MLFLOW_TRACKING_USERNAME']}:{given['MLFLOW_TRACKING_PASSWORD']}"
        self.environment = {
            **given,
            **CANARIES,
            "DRAFTSMITH_HOME": str(self.folder / "home"),
            "MLFLOW_TRACKING_URI": f"http://{user}@{self.mlflow.address}",
            "PREFECT_API_URL": f"http://{self.prefect.address}/api",
            **dict.fromkeys(proxies, f"http://{self.proxy.address}"),
        }
        config = self._config()
        self.run("run", config, "--restart")  # its server drafts already
        self.run("champions", LINE)
        self.run("status", LINE, "--url", f"http://{self.engine.address}")
        self.run("run", config, DRAFTSMITH_DEBUG="1", MLFLOW_TRACKING_URI=f"http://{user}@127.0.0.1:9")
        self.run("run", config, DRAFTSMITH_DEBUG="1", PREFECT_API_URL="http://127.0.0.1:9/api")

    def _config(self) -> Path:
        content = small_refresh(
            "secretive", target_folder(), prompts_file(), 24,
            stages={"threads": 1, "min_free_gb": 0.01, "retries": 0, "retry_delay_seconds": 0},
            registry={"name": LINE, "upload": True, "servers": [f"http://{self.engine.address}"]},
            prompts={"train": 24, "validation": 4, "heldout": 12},
            rollout={"prompts": 16, "engine": {"slots": 16}},
            sft={"steps": 40},
            assisted={"skip": 16, "engine": {"slots": 8}},
            opd={"steps": 4},
            heldout={"engine": {"slots": 16}},
            evaluation={"speed_prompts": 2, "validation_prompts": 2, "exactness_prompts": 2, "rounds": 1},
            gate={"judge_speed": False},
            refresh={"control": False},
            report={"contexts": False},
        )  # fmt: skip
        path = self.folder / "secretive.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    def run(self, *arguments: str | Path, **variables: str) -> None:
        """Run the command, and add what it prints to a file."""
        with (self.folder / "output").open("a") as output:
            command = [sys.executable, "-m", "draftsmith.flows", *map(str, arguments)]
            environment = {**self.environment, **variables}
            subprocess.call(command, cwd=ROOT, env=environment, stdout=output, stderr=output, timeout=600)

    @property
    def secrets(self) -> dict[str, str]:
        """Return all secrets by name: those of the environment, and those of the servers."""
        return CANARIES | self.team.secrets

    def written(self) -> Iterator[tuple[str, bytes]]:
        """Yield all that was written, by place."""
        kept = {"databases", "users", "mlflow-auth.ini"}  # Compose's own copies of its configs
        for path in self.folder.parent.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name not in kept:
                yield str(path.relative_to(self.folder.parent)), path.read_bytes()
        for database in ("mlflow", "prefect"):
            yield f"database {database}", self._dump(database)
        storage = boto3.client("s3", endpoint_url=self.team.s3)
        for each in storage.list_objects_v2(Bucket=BUCKET)["Contents"]:
            yield f"s3://{BUCKET}/{each['Key']}", storage.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read()

    def _dump(self, database: str) -> bytes:
        programs = postgres_programs()
        assert programs is not None
        host, _, port = self.team.postgres.partition(":")
        password = self.team.secrets["POSTGRES_PASSWORD"]
        environment = {**os.environ, "PGHOST": host, "PGPORT": port, "PGUSER": "team", "PGPASSWORD": password}
        command: list[str | Path] = [programs / "pg_dump", "--data-only", "--inserts", database]
        return subprocess.run(command, env=environment, capture_output=True, check=True).stdout


def forms(secret: str) -> set[bytes]:
    """Return a secret as it is, in a URL, in JSON, and as the password of an Authorization header."""
    basic = base64.b64encode(f"draftsmith:{secret}".encode()).decode()
    return {text.encode() for text in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], basic)}


def found(secrets: dict[str, str], content: bytes) -> set[str]:
    return {name for name, secret in secrets.items() if any(form in content for form in forms(secret))}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with ExitStack() as stack:
        yield Story(tmp_path_factory.mktemp("secrets"), stack)


def test_nothing_that_is_written_has_a_secret(story: Story) -> None:
    output = (story.folder / "output").read_text()
    assert "promoted" in output.lower(), output
    places, holding = [], {}
    for place, content in story.written():
        places.append(place)
        if names := found(story.secrets, content):
            holding[place] = names
    assert holding == {}
    for wanted in ("run/home/logs/", "run/home/store/report/", "team/worker.log", "s3://"):
        assert any(place.startswith(wanted) for place in places), wanted
    assert any(place.endswith("report.html") and place.startswith("s3://") for place in places)
    assert any(place.endswith("model.safetensors") and place.startswith("s3://") for place in places)


def test_texts_of_users_stay_in_the_store(story: Story) -> None:
    """With `report.contexts: false`, prompts and answers are neither in MLflow nor in Prefect nor in a log."""
    rows = map(json.loads, prompts_file().read_text().splitlines())
    texts = [message["content"].encode() for row in rows for message in row["messages"]]
    (evaluated,) = (story.folder / "home" / "store" / "evaluation").glob("*/contexts.json")
    for contexts in json.loads(evaluated.read_text()).values():
        texts += [each["before"].encode() for each in contexts if len(each["before"]) > 20]
    holding = {place for place, content in story.written() if any(text in content for text in texts)}
    assert str(evaluated.relative_to(story.folder.parent)) in holding
    assert [place for place in holding if not place.startswith("run/home/store/")] == []


def test_each_secret_is_sent_to_its_own_server_only(story: Story) -> None:
    received: dict[str, Recorder] = {name: getattr(story, name) for name in ("mlflow", "prefect", "engine", "proxy")}
    assert {name: found(story.secrets, bytes(each.received)) for name, each in received.items()} == {
        "mlflow": {"MLFLOW_PASSWORD"},
        "prefect": {"PREFECT_PASSWORD"},
        "engine": {"SGLANG_API_KEY"},
        "proxy": set(),
    }
    assert bytes(story.proxy.received) == b"", "nothing leaves the machine"
