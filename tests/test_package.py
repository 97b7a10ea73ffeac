"""The distribution: every folder of code is a package under our own name, and the rules of imports bite."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import yaml

from tests.testbed.refresh import small_refresh

ROOT = Path(__file__).parents[1]
FOLDERS = ("artifacts", "flows", "stages")


def packages() -> list[str]:
    folders = [path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py")]
    names = ["draftsmith." + ".".join(folder.relative_to(ROOT).parts) for folder in folders]
    return sorted("draftsmith" if name == "draftsmith.flows.package" else name for name in names)


def test_every_folder_is_a_package_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert sorted(project["tool"]["setuptools"]["packages"]) == packages()


def test_nothing_but_our_own_name_is_installed() -> None:
    """A user's own folder `stages`, or another distribution's module, is not ours."""
    names = importlib.metadata.distribution("draftsmith").read_text("top_level.txt") or ""
    assert names.split() == ["draftsmith"]


def built(kind: str, source: Path, out: Path) -> Path:
    """The wheel or sdist of a folder."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = out.iterdir()
    return made


def test_the_wheel_of_the_sdist_holds_the_configs_and_runs_a_refresh_from_an_empty_folder(
    tmp_path: Path, tiny_target: Path, tiny_prompts: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*FOLDERS, "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    with tarfile.open(built("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = built("wheel", unpacked, tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    package = tmp_path / "installed" / "draftsmith"
    configs = [path for pattern in ("*.yaml", "scale/*.yaml") for path in (ROOT / "configs").glob(pattern)]
    assert sorted(path.relative_to(package) for path in (package / "configs").rglob("*.yaml")) == sorted(
        path.relative_to(ROOT) for path in configs
    )
    config, empty = tmp_path / "small.yaml", tmp_path / "empty"
    config.write_text(yaml.safe_dump(small_refresh("small", tiny_target, tiny_prompts, 16, sft={"steps": 2})))
    empty.mkdir()
    code = "import draftsmith, runpy; print(draftsmith.__file__); runpy.run_module('draftsmith.flows', alter_sys=True)"
    environment = os.environ | {"PYTHONPATH": str(package.parent), "DRAFTSMITH_HOME": str(tmp_path / "home")}
    for words in (["--help"], ["run", str(config), "--until", "sft"]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *words], cwd=empty, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == str(package / "__init__.py")
    (made,) = (tmp_path / "home" / "store" / "sft").glob("*/drafter/model.safetensors")
    assert made.stat().st_size > 0


def test_an_import_that_breaks_a_rule_is_refused(tmp_path: Path) -> None:
    """On a copy of the code in which a line is added to each of three modules."""
    package = tmp_path / "draftsmith"
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            copy = package / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    rules = {
        "know a stage only by its declaration": (
            "flows/planning/graph.py",
            "import draftsmith.stages.training.sft.stage",
        ),
        "know neither Prefect nor MLflow": ("stages/replay/chains.py", "import mlflow"),
        "No circle of imports": ("stages/targets/config.py", "import draftsmith.stages.targets.info"),
    }
    for module, line in rules.values():
        broken = package / module
        broken.write_text(f"{broken.read_text()}\n\ndef _later() -> None:\n    {line}  # noqa\n")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    broken_rules = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    for contract in rules:
        assert any(contract in rule for rule in broken_rules), done.stdout
