"""Servers that these tests share; a failed test shows what they logged meanwhile."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from draftsmith.stages.runtime.child_process import last_lines
from tests.sglang_cpu.fixtures import dflash_url, plain_url, served_mlflow, serving_target, sglang_env, sglang_logs

__all__ = ["dflash_url", "plain_url", "served_mlflow", "serving_target", "sglang_env", "sglang_logs"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    logs = getattr(item, "funcargs", {}).get("sglang_logs")
    if report.failed and logs is not None:
        report.sections += [(path.name, last_lines(path)) for path in sorted(logs.glob("*.log"))]
    return report
