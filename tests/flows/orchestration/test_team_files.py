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
import yaml

from draftsmith.flows.config.options import StageOptions
from tests.flows.processes import ROOT

TEAM = ROOT / "configs" / "team"
GIVEN = re.search(r"printf '(.*)' \"", (TEAM / "README.md").read_text())  # what the README writes into .env


def variables() -> dict[str, str]:
    assert GIVEN is not None
    return {line.partition("=")[0]: "secret" for line in GIVEN[1].split("\\n") if line}


def filled(text: str, known: dict[str, str]) -> str:
    """Interpolate like Compose: `$$` is a dollar sign, and a variable without value or default is an error."""

    def value(found: re.Match[str]) -> str:
        if found[0] == "$$":
            return "$"
        name, _, rest = found[1].partition(":")
        if name not in known and not rest.startswith("-"):
            raise KeyError(name)
        return known.get(name, rest[1:])

    return re.sub(r"\$\$|\$\{([^}]*)\}", value, text)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    compose = yaml.safe_load(filled((TEAM / "compose.yaml").read_text(), variables()))
    volumes, configs, found = compose["volumes"], compose["configs"], compose["services"]
    for name, service in found.items():
        assert {"image", "build"} & service.keys(), name
        assert set(service.get("depends_on", ())) <= found.keys(), name
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in volumes or source.startswith("/"), name
        assert {each["source"] for each in service.get("configs", ())} <= configs.keys(), name
    return dict(found)


def test_every_secret_comes_from_the_file_that_the_readme_writes() -> None:
    text = (TEAM / "compose.yaml").read_text()
    without_default = set(re.findall(r"\$\{(\w+)(?:\}|:\?)", text))
    assert without_default == set(variables())
    with pytest.raises(KeyError):
        filled(text, {})


def test_mlflows_command_exists_in_the_installed_release(services: dict[str, Any]) -> None:
    from mlflow.cli import cli

    words = shlex.split(services["mlflow"]["command"])
    assert words[:2] == ["mlflow", "server"]
    command = cli.commands["server"]
    given = command.make_context("server", words[2:], resilient_parsing=True).params
    assert given["backend_store_uri"].endswith("@postgres:5432/mlflow")
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
    assert int(days) * 1440 + hours * 60 + minutes + seconds / 60 > StageOptions().time_limit("sft").seconds / 60


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
