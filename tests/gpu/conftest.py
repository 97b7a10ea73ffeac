"""Every test here runs on the CPU, which shows that it works, and on a GPU if there is one (marked `gpu`)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

ROWS = "DRAFTSMITH_GPU_ROWS"  # environment variable: file that gets a JSON line for each test as it ends


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Return the device to compute on."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return name


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a test's line, which a later end of this process cannot lose."""
    if (path := os.environ.get(ROWS)) and (report.when == "call" or not report.passed):
        values = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        with Path(path).open("a") as file:
            file.write(json.dumps({**values, **dict(report.user_properties)}) + "\n")
