"""The steps of the hour (`hour.sh`) in their smallest form on a CPU, each on a separate machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import check

SCRIPT = Path(__file__).with_name("hour.sh")
LARGEST = 50_000_000  # bytes of an archive
RESULTS = {  # that the archive has after each step
    1: ["rates.jsonl", "rates.log"],
    2: ["tests.jsonl"],
    3: ["gpu-check-tiny.json", "check.log"],
    4: ["refresh-tiny.json", "refresh-tiny.log"],
}


def hour(step: int, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a step on a machine that has the archive of the step before and nothing else."""
    archive = folder / "out" / "hour.tar.gz"
    places = {"WORK": folder / f"work-{step}", "OUT": archive.parent, "BACK": archive, "WHEELS": folder / "none"}
    environment = {**os.environ, "PYTHON": sys.executable, **{name: str(path) for name, path in places.items()}}
    command = [str(SCRIPT), str(step), "--dry"]
    return subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, cwd=folder)


class Collected:
    """A plug-in that keeps the names of collected tests."""

    names: Sequence[str] = ()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.nodeid for item in session.items]


def test_every_step_runs_and_leaves_what_the_next_takes_back(tmp_path: Path) -> None:
    expected = set()
    for step, names in RESULTS.items():
        ended = hour(step, tmp_path)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert ("taken back" in ended.stdout) == (step > 1)
        archive = tmp_path / "out" / "hour.tar.gz"
        assert archive.stat().st_size < LARGEST
        expected |= {f"results/{name}" for name in names}
        with tarfile.open(archive) as packed:
            assert expected <= set(packed.getnames())
    rates = [json.loads(line) for line in (tmp_path / "work-1" / "results" / "rates.jsonl").read_text().splitlines()]
    assert (rates[0]["what"], rates[-1]["what"]) == ("here", "rate") and rates[-1]["share"] > 0
    assert "GpuModel(" in (tmp_path / "work-1" / "results" / "rates.log").read_text()
    tests = [json.loads(line) for line in (tmp_path / "work-2" / "results" / "tests.jsonl").read_text().splitlines()]
    assert tests and all(row["outcome"] == "passed" and float(row["deviation"]) < 1e-4 for row in tests)


def test_a_step_whose_time_is_over_leaves_its_archive(tmp_path: Path) -> None:
    ended = hour(3, tmp_path, MINUTES="0")
    assert ended.returncode == 1 and "no time is left" in ended.stdout
    with tarfile.open(tmp_path / "out" / "hour.tar.gz") as packed:
        assert "results/check.log" in packed.getnames()


def test_a_step_has_a_number(tmp_path: Path) -> None:
    for arguments in ([], ["5"], ["1", "--wet"]):
        ended = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode == 2 and ended.stderr.startswith("usage")


def test_the_second_step_runs_every_test_of_a_gpu_once() -> None:
    """Its processes share them by words of their names."""
    files = re.search(r"tests/gpu/test_\{(.*)\}\.py", SCRIPT.read_text())
    assert files is not None
    collected = Collected()
    named = [str(SCRIPT.with_name(f"test_{name}.py")) for name in files[1].split(",")]
    assert pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu", *named], [collected]) == 0
    tests = [name.partition("tests/gpu/test_")[2] for name in collected.names]
    assert len(tests) > 20
    parts = re.findall(r'^    "(.*)"$', SCRIPT.read_text(), re.MULTILINE)
    conditions = [[re.fullmatch(r"(not )?(\w+)", term) for term in part.split(" and ")] for part in parts]
    for test in tests:
        having = [part for part in conditions if all(term and bool(term[1]) != (term[2] in test) for term in part)]
        assert len(having) == 1, test


def test_rows_of_trainings_are_kept_when_a_later_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*_: Any) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, float]]]]:
        yield {"training": "SFT", "step_s": 1.0}, {"a kernel": {"share": 1.0, "calls": 3}}
        raise TimeoutError

    monkeypatch.setattr(check, "measure", measured)
    with pytest.raises(TimeoutError):
        check.main(["--device", "cpu", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [row["training"] for row in results["rows"]] == ["SFT"]
