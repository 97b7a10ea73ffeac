"""A home that can be written, with room on its disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.pipeline.machine import check_home
from draftsmith.flows.pipeline.options import StageOptions
from tests.flows.pipeline.toy import ToyConfig


def test_too_little_disk_is_an_error_that_names_the_field(tmp_path: Path) -> None:
    config = ToyConfig(name="t", stages=StageOptions(min_free_gb=1e9))
    with pytest.raises(DraftsmithError, match=r"GB free, 1e\+09 GB wanted \(stages\.min_free_gb\)"):
        check_home(tmp_path, config)


def test_a_home_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DraftsmithError, match="preparing"):
        check_home(tmp_path / "file" / "home", ToyConfig(name="t"))
    with pytest.raises(DraftsmithError, match="preparing"):
        check_home(Path("/proc/draftsmith"), ToyConfig(name="t"))
