"""The numerical stages run where only torch, transformers and the packages of tests/versions/packages.txt are."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

from draftsmith.stages.catalog import STAGES

ROOT = Path(__file__).parents[2]
NUMERICAL = ("target", "rollout", "sft", "mining", "opd", "evaluation", "gate")
WITH_TORCH = {"fsspec", "huggingface-hub", "jinja2", "numpy", "pyyaml", "safetensors", "torch", "transformers"}


def test_numerical_stages_import_no_other_package() -> None:
    listed = (ROOT / "tests/versions/packages.txt").read_text().partition("\n\n")[0].splitlines()
    needed = WITH_TORCH | {line for line in listed if not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {requirement.partition(">")[0] for requirement in project["dependencies"]}
    assert needed <= declared
    absent = [name.replace("-", "_") for name in sorted(declared - needed)]
    bodies = [import_module(STAGES[name]).STAGE.body for name in NUMERICAL]
    code = f"""
import importlib, sys
from importlib.machinery import PathFinder

class Present(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in {absent} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Present
for body in {bodies}:
    importlib.import_module(body)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
