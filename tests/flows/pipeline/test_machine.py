"""A home that can be written, with room on its disk."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.pipeline.machine import _query, accelerators, check_home, gpus
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


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, ["GPU-a1", "GPU-b2"]),
        ("1", ["GPU-b2"]),
        ("GPU-a1,GPU-b2", ["GPU-a1", "GPU-b2"]),
        ("MIG-7f/1/0", ["MIG-7f_1_0"]),
        ("", [f"{platform.node()}.cpu"]),
    ],
)
def test_accelerators_are_told_apart_by_what_no_other_machine_has(
    visible: str | None, seen: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in *uuid) echo '0, GPU-a1'; echo '1, GPU-b2';; *) echo 81559; echo 81559;; esac\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _query.cache_clear()
    try:
        assert accelerators() == seen
        assert gpus() == (81559 * 2**20,) * (0 if seen[0].endswith(".cpu") else len(seen))
    finally:
        _query.cache_clear()
