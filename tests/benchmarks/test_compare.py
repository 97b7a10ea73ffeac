"""What a comparison with the baseline says: the ratios of the reports, and what got slower."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from tests.benchmarks import compare
from tests.benchmarks.decode import OURS, THEIRS


def written(folder: Path, decode_speed: float) -> Path:
    """Reports as the benchmarks write them."""
    theirs = {"batch": 8, "prefill_tokens_per_s": 100.0, "decode_tokens_per_s": 50.0, "prefill_share": 0.5}
    ours = {**theirs, "decode_tokens_per_s": decode_speed}
    figures = {
        "decode": [{"arm": OURS, **ours}, {"arm": THEIRS, **theirs}],
        "speculative": [{"batch": 1, "of_bound": 0.9}],
        "sft_step": [{"step": "SFT, head full", "times_sft": 1.0, "matmul_share": 0.6}],
        "replay": [{"method": "sequential replay", "times_one_request": 5.0}],
    }
    folder.mkdir()
    for name, rows in figures.items():
        (folder / f"{name}.json").write_text(json.dumps({"conditions": {"threads": 2}, "rows": rows}))
    return folder


def test_it_names_what_got_slower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "baseline.json"

    def run(folder: Path, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["compare", str(folder), "--baseline", str(baseline), *options])
        compare.main()
        return capsys.readouterr().out

    before = written(tmp_path / "before", decode_speed=75.0)
    assert "7 ratios kept" in run(before)
    assert json.loads(baseline.read_text())["ratios"]["decode: decode, batch 8: times generate"] == 1.5
    with pytest.raises(SystemExit, match="0"):
        run(before)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="1"):
        run(written(tmp_path / "after", decode_speed=60.0))
    said = capsys.readouterr().out
    assert "-20.0%" in said and said.endswith("slower: decode: decode, batch 8: times generate\n")


def test_a_report_that_is_not_there_is_named(tmp_path: Path) -> None:
    (written(tmp_path / "reports", 60.0) / "replay.json").unlink()
    with pytest.raises(DraftsmithError, match=r"replay\.json: .*`make bench` writes it"):
        compare.ratios_of(tmp_path / "reports")
