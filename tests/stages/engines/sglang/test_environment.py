"""The checks of an SGLang environment: real interpreters, metadata as pip writes it, real sockets."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from draftsmith.stages.engines.config import ServerEngineConfig, SGLangEngineConfig, VLLMEngineConfig
from draftsmith.stages.engines.environment import PLUGIN_GROUPS, health_problem, inspect_environment
from draftsmith.stages.engines.sglang import server as sglang_server
from draftsmith.stages.engines.sglang.server import build_problems, build_tools, environment_warnings
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from tests.stages.engines.http_server import serving


def interpreter(folder: Path, version: str, *, plugin: bool = False, kind: str = "sglang", group: str = "") -> Path:
    """Return a copy of this Python with the metadata of an engine, and of our plug-in in the engine's group.

    group: of the plug-in instead.
    """
    packages, entry = folder / "packages", f"[{group or PLUGIN_GROUPS[kind]}]\ndraftsmith = a.module:activate\n"
    for name, release, points in (
        (kind, version, ""),
        *([("draftsmith", "0.1", entry)] if plugin else []),
    ):
        info = packages / f"{name}-{release}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n")
        (info / "entry_points.txt").write_text(points)
    folder.mkdir(exist_ok=True)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return path


def program(path: Path, script: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def cuda_environment(folder: Path, tools: Sequence[str] = ("ninja", "nvcc", "c++")) -> Path:
    """Write an environment as pip builds one on a GPU node, with these of the tools; return its interpreter."""
    cuda = folder / "lib" / "python3.11" / "site-packages" / "nvidia" / "cu13"
    folders = {"ninja": folder / "bin", "nvcc": cuda / "bin", "c++": folder / "bin"}
    for tool in tools:
        program(folders[tool] / tool, f"echo {tool} of the environment")
    (cuda / "lib").mkdir(parents=True, exist_ok=True)
    (cuda / "lib" / "libcudart.so.13").touch()
    return program(folder / "bin" / "python")


def config(python: Path | None = None, **fields: object) -> SGLangEngineConfig:
    return SGLangEngineConfig.model_validate(
        {"kind": "sglang", "python": python, **({"launch": {}} if python else {}), **fields}
    )


@pytest.mark.parametrize(
    ("version", "plugin", "said"),
    [
        ("0.5.20", True, []),
        ("0.5.23.post1", True, []),
        ("0.5.19", True, ["sglang 0.5.19 is outside the tested >=0.5.20,<0.5.24"]),
        ("0.5.24", True, ["sglang 0.5.24 is outside the tested"]),
        ("0.5.22", False, ["is not installed next to sglang"]),
    ],
)
def test_version_and_plugin_are_read_from_the_other_environment(
    tmp_path: Path, version: str, plugin: bool, said: list[str]
) -> None:
    python = interpreter(tmp_path, version, plugin=plugin)
    found = inspect_environment(config(python))
    assert found.version == version
    warnings = environment_warnings(config(python), found)
    assert len(warnings) == len(said)
    assert all(part in warning for part, warning in zip(said, warnings, strict=True))


@pytest.mark.parametrize("kind", PLUGIN_GROUPS)
def test_the_plugin_is_looked_for_among_those_of_the_engine(tmp_path: Path, kind: str) -> None:
    sections: dict[str, type[ServerEngineConfig]] = {"sglang": SGLangEngineConfig, "vllm": VLLMEngineConfig}

    def found(folder: Path, *, plugin: bool = True, group: str = "") -> bool:
        python = interpreter(folder, "1.0", plugin=plugin, kind=kind, group=group)
        fields = {"kind": kind, "python": python, "launch": {}}
        return inspect_environment(sections[kind].model_validate(fields)).plugin

    assert found(tmp_path / "with it")
    assert not found(tmp_path / "without it", plugin=False)
    (other,) = PLUGIN_GROUPS.keys() - {kind}
    assert not found(tmp_path / "for the other", group=PLUGIN_GROUPS[other])


def test_a_stage_that_launches_servers_knows_their_version(tmp_path: Path) -> None:
    def programs(**engine: object) -> dict[str, str]:
        config = RolloutConfig.model_validate({"engine": engine})
        assert config.programs() == EvaluationConfig(engine=config.engine).programs()
        return config.programs()

    launched = {"kind": "sglang", "launch": {}}
    assert programs(**launched, python=interpreter(tmp_path, "0.5.21")) == {"sglang": "0.5.21"}
    assert programs(**launched, python=tmp_path / "none") == programs(kind="embedded") == {}
    assert RolloutConfig.model_validate({"engine": {"kind": "sglang", "urls": ["http://h"]}}).programs() == {}


def test_this_interpreter_has_sglang_where_none_is_named() -> None:
    assert SGLangEngineConfig.model_validate({"kind": "sglang", "launch": {}}).interpreter == Path(sys.executable)
    named = SGLangEngineConfig.model_validate({"kind": "sglang", "launch": {}, "python": "env/bin/python"})
    assert named.interpreter == Path.cwd() / "env/bin/python"


@pytest.mark.parametrize("missing", ["ninja", "nvcc", "c++", None])
def test_tools_that_sglang_compiles_with_are_looked_for_where_it_looks(
    missing: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_server, "_SYSTEM_NVCC", "/nonexistent")
    monkeypatch.setenv("PATH", "")
    for variable in ("CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    python = cuda_environment(tmp_path / "env", [tool for tool in ("ninja", "nvcc", "c++") if tool != missing])
    problems = build_problems(config(python), None)
    assert [problem.partition(",")[0] for problem in problems] == ([missing] if missing else [])
    monkeypatch.setenv("PATH", os.fspath(program(tmp_path / "system" / str(missing)).parent))
    assert build_problems(config(python), None) == []


def test_a_cuda_home_that_is_set_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python, other = cuda_environment(tmp_path / "env"), tmp_path / "cuda-12"
    assert build_tools(python, {})["CUDA_HOME"].endswith("site-packages/nvidia/cu13")
    assert "CUDA_HOME" not in build_tools(python, {"CUDA_HOME": "/cuda"})
    assert "CUDA_HOME" not in build_tools(cuda_environment(tmp_path / "bare", ["ninja"]), {})
    monkeypatch.setenv("CUDA_HOME", os.fspath(other))
    (problem,) = build_problems(config(python), None)
    assert problem.startswith(f"CUDA_HOME: {other} ")
    program(other / "bin" / "nvcc")
    assert build_problems(config(python), None) == []


@pytest.mark.parametrize(("driver", "runs"), [(("535.104.05", 12), False), (("580.65.06", 13), True), (None, True)])
def test_a_driver_older_than_the_environments_cuda_is_an_error(
    driver: tuple[str, int] | None, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    problems = build_problems(config(cuda_environment(tmp_path)), driver)
    assert bool(problems) == (not runs)
    assert all("535.104.05" in problem for problem in problems)


def test_a_failed_health_check_names_its_reason() -> None:
    with serving(lambda _: {}, health=lambda _: {}) as server:
        assert health_problem(server.url) is None
        assert health_problem(server.url + "/elsewhere") == "HTTP 404"
    assert "ConnectError" in str(health_problem("http://127.0.0.1:9"))
