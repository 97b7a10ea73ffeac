"""Checks before any long work."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifacts.errors import DraftsmithError
from flows.options import StageOptions
from flows.preflight import check_home, check_target
from tests.flows.toy import ToyConfig, toy_nodes
from tests.flows.toy_stages.combine import CombineConfig


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


def test_every_stage_checks_its_config_against_the_target(tmp_path: Path) -> None:
    check_target(toy_nodes(ToyConfig(name="t")), tmp_path)
    bad = ToyConfig(name="t", total=CombineConfig(factor=0))
    with pytest.raises(DraftsmithError, match="total: factor: 0 makes every sum 0"):
        check_target(toy_nodes(bad), tmp_path)
