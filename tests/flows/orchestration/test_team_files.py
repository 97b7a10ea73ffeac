"""The files of a team's set-up without containers: services, variables, commands, copied files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.config.options import StageOptions
from draftsmith.flows.execution.machine import DEFAULT_FOLDER, FOLDER
from tests.flows.processes import ROOT
from tests.testbed.compose import TEAM, compose, secret_names

SECRETS = dict.fromkeys(secret_names(), "secret")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    file = compose(SECRETS)
    volumes, configs, found = file["volumes"], file["configs"], file["services"]
    for name, service in found.items():
        assert {"image", "build"} & service.keys(), name
        assert set(service.get("depends_on", ())) <= found.keys(), name
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in volumes or source.startswith("/"), name
        assert {each["source"] for each in service.get("configs", ())} <= configs.keys(), name
    return dict(found)


def test_every_secret_comes_from_the_file_that_the_readme_writes() -> None:
    """Compose starts nothing while one of them is missing."""
    text = (TEAM / "compose.yaml").read_text()
    required, used = (set(re.findall(rf"\$\{{(\w+){rest}", text)) for rest in (r":\?", r"(?:\}|:\?)"))
    assert required == used == set(SECRETS)
    for name in SECRETS:
        with pytest.raises(KeyError, match=name):
            compose({other: "secret" for other in SECRETS if other != name})


def test_the_file_of_secrets_is_in_no_commit_and_no_image() -> None:
    assert "**/.env" in (TEAM / "Dockerfile.dockerignore").read_text().splitlines()
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()


def test_ports_are_published_to_this_host_only(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert published == {"prefect": ["127.0.0.1:4200:4200"], "mlflow": ["127.0.0.1:5000:5000"]}


def test_no_secret_is_an_argument_of_a_command(services: dict[str, Any]) -> None:
    """Every user of a host sees the arguments of its processes, those in containers too."""
    assert not [name for name, service in services.items() if "secret" in str(service.get("command", ""))]


def test_mlflows_image_has_the_server_with_users(services: dict[str, Any]) -> None:
    assert "mlflow[auth]" in services["mlflow"]["build"]["dockerfile_inline"]


def test_mlflows_command_exists_in_the_installed_release(services: dict[str, Any]) -> None:
    from mlflow.cli import cli

    words = shlex.split(services["mlflow"]["command"])
    assert words[:2] == ["mlflow", "server"]
    command = cli.commands["server"]
    given = command.make_context("server", words[2:], resilient_parsing=True).params
    assert given["app_name"] == "basic-auth"
    (stores,) = (option for option in command.params if option.name == "backend_store_uri")
    assert services["mlflow"]["environment"][stores.envvar].endswith("@postgres:5432/mlflow")
    assert given["artifacts_destination"] == "s3://mlflow"
    assert (given["host"], given["port"]) == ("0.0.0.0", 5000)
    assert "mlflow:5000" in given["allowed_hosts"], "the name that the worker uses"
    options = {word for word in words if word.startswith("--")}
    assert options <= {option for parameter in command.params for option in parameter.opts}


# in one process, since importing Prefect takes seconds
HELP = """
import contextlib, runpy, sys
for words in sys.argv[1:]:
    sys.argv = [*words.split(), "--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_module("prefect", run_name="__main__", alter_sys=True)
    print("\\f")
"""


def test_prefects_commands_exist_in_the_installed_release(services: dict[str, Any]) -> None:
    commands = [shlex.split(services[service]["command"]) for service in ("prefect", "worker")]
    called = [sys.executable, "-c", HELP, *(" ".join(words[:3]) for words in commands)]
    result = subprocess.run(called, capture_output=True, text=True, timeout=120, check=True)
    for words, shown in zip(commands, result.stdout.split("\f"), strict=False):
        assert words[0] == "prefect"
        options = {word for word in words if word.startswith("--")}
        assert options and options <= set(re.findall(r"--[a-z-]+", shown))


def test_a_stages_time_limit_is_below_that_of_its_slurm_job() -> None:
    pool = json.loads((TEAM / "pools" / "slurm.json").read_text())
    days, _, clock = pool["variables"]["properties"]["time"]["default"].partition("-")
    hours, minutes, seconds = map(int, clock.split(":"))
    assert int(days) * 1440 + hours * 60 + minutes + seconds / 60 > StageOptions().time_limit_s("sft") / 60


def test_the_image_copies_the_whole_package() -> None:
    import tomllib

    copied = set()
    for line in (TEAM / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            copied |= set(line.split()[1:-1])
    assert all((ROOT / each).exists() for each in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {project["project"]["readme"], *project["project"]["license-files"]}
    folders = set(project["tool"]["setuptools"]["package-dir"].values())
    tops = {Path(folder).parts[0] for folder in folders}
    assert copied >= needed | tops | {"pyproject.toml", "configs"}


def test_the_image_has_a_compiler_for_triton_and_sglang() -> None:
    """g++ brings gcc and the C library's headers; the image of Python has its own."""
    text = (TEAM / "Dockerfile").read_text()
    (packages,) = re.findall(r"apt-get install -y --no-install-recommends ([\w+ -]+) &&", text)
    assert "g++" in packages.split()
    assert text.index("apt-get install") < text.index("COPY ")


def test_containers_of_a_host_share_its_device_locks() -> None:
    """With a separate folder a container would take a GPU that another one uses."""
    pool = json.loads((TEAM / "pools" / "docker.json").read_text())["variables"]["properties"]
    assert FOLDER not in pool["env"]["default"]
    assert f"{DEFAULT_FOLDER}:{DEFAULT_FOLDER}" in pool["volumes"]["default"]
