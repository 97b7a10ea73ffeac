"""What the fixtures of all tests do to a run of pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_libraries_report_no_leaks_behind_the_last_test() -> None:
    """triton, which comes with torch, would list its objects if they were still there."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/testbed"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert "test_shipped.py" in ended.stdout and ended.stderr == ""
