"""What a person sees: rate and time left, plain lines without a terminal, the results table."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from draftsmith.flows.pipeline import display as module
from draftsmith.flows.pipeline.display import Display, Rate, duration

EVALUATION: dict[str, Any] = {
    "definition_of_tau": "tokens committed a verify step, with the +1",
    "drafters": {
        "sft": {"tau": 1.7, "tau_low": 1.65, "tau_high": 1.75, "block_size": 8},
        "opd": {"tau": 1.8, "tau_low": 1.7, "tau_high": 1.9, "diff_to_sft": 0.1, "diff_low": 0.05, "diff_high": 0.15},
    },
    "speed": {
        "plain": {"tokens_per_s": 20.0},
        "opd": {
            "tokens_per_s": 25.0,
            "speedup": 1.25,
            "speedup_low": 1.2,
            "speedup_high": 1.3,
            "block_size": 4,
            "draft_share": 0.25,
            "verify_share": 0.75,
            "identical_share": 0.9,
        },
    },
    "exactness": {
        "fp32_prompts": 50,
        "fp32_identical": 49,
        "serving_dtype": "bfloat16",
        "identical_share": 0.875,
        "median_margin": 0.0312,
    },
}


def plain() -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    return Display(Console(file=stream, width=160)), stream


def test_rate_and_time_left_count_only_the_work_of_this_attempt() -> None:
    rate = Rate()
    assert rate.update(100, 200, "steps", now=0.0) == (None, None)  # an earlier attempt made 100
    assert rate.update(120, 200, "steps", now=10.0) == (2.0, 40.0)


def test_the_rate_follows_the_last_half_minute_and_begins_anew_with_another_phase() -> None:
    rate = Rate()
    rate.update(0, 1000, "steps", now=0.0)
    rate.update(600, 1000, "steps", now=60.0)
    assert rate.update(630, 1000, "steps", now=90.0)[0] == pytest.approx(1.0)
    assert rate.update(0, 50, "prompts", now=91.0) == (None, None)


def test_without_a_terminal_progress_is_a_plain_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    display, stream = plain()
    with display.stage("sft") as shown:
        for step in range(1, 41):
            clock[0] = float(step)
            shown.progress(step, 400, "steps", {"loss": 2.125})
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft: started"
    assert len(lines) == 5
    assert lines[1] == "sft: 10/400 steps  1 steps/s  6 min 30 s left  loss=2.125"


def test_on_a_terminal_a_bar_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    display = Display(Console(file=stream, width=160, force_terminal=True))
    with display.stage("sft") as shown:
        shown.progress(3, 400, "steps", {"loss": 2.125})
    assert "3/400 steps" in stream.getvalue()
    assert capsys.readouterr().out == ""


def test_the_results_say_what_was_found_with_intervals_and_where_to_look(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    display, stream = plain()
    paths = {"evaluation": tmp_path, "report": Path("/r"), "sft": Path("/s"), "opd": Path("/o")}
    display.results(paths, "mlflow ui --backend-store-uri sqlite:///m.db")
    lines = stream.getvalue().splitlines()
    rows = {line.split()[0]: " ".join(line.split()) for line in lines if line.strip()}
    assert rows["plain"] == "plain - - 20.0 - - - -"
    assert rows["sft"] == "sft 1.700 [1.650, 1.750] - - - 8 - -"
    assert rows["opd"] == "opd 1.800 [1.700, 1.900] +0.100 [+0.050, +0.150] 25.0 1.25 [1.20, 1.30] 4 25%/75% 90.0%"
    text = stream.getvalue()
    assert "with the +1" in text
    assert "49 of 50 outputs identical" in text
    assert "(bfloat16): 87.5% identical; median logit margin at the first difference 0.0312" in text
    assert "mlflow ui --backend-store-uri sqlite:///m.db" in text
    assert "/r/report.html" in text
    assert "/o  (opd)" in text


def test_several_settings_have_a_table_of_their_own(tmp_path: Path) -> None:
    at = {"tokens_per_s": 100.0, "request_tokens_per_s_median": 30.5, "first_token_s_median": 0.02}
    sft = {**at, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1, "tau_served": 3.25, "identical_share": 1.0}
    served = {
        **EVALUATION,
        "engine": "sglang 0.5.20",
        "speed_by_setting": [
            {"temperature": 0.0, "concurrency": 1, "arms": {"plain": at}},
            {"temperature": 0.7, "concurrency": 16, "arms": {"plain": at, "sft": {**sft, "first_token_s_p95": 0.09}}},
        ],
        "parity": {"sft": {"served_steps": 52, "different_steps": 1}, "opd": {"served_tau": 3.0, "replayed_tau": 3.5}},
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(served))
    display, stream = plain()
    display.results({"evaluation": tmp_path}, "mlflow ui")
    lines = [" ".join(line.split()) for line in stream.getvalue().splitlines()]
    assert "Speed on sglang 0.5.20" in lines
    assert "0 1 plain 100.0 - - 30.5 0.020 (-) -" in lines
    assert "0.7 16 sft 100.0 2.00 [1.90, 2.10] 3.25 30.5 0.020 (0.090) 100.0%" in lines
    assert "Parity of sft: 1 of 52 served verify steps differ from replay." in lines
    assert "Parity of opd: tau 3.000 as served, 3.500 in replay." in lines


@pytest.mark.parametrize(("seconds", "text"), [(8.4, "8 s"), (125, "2 min 05 s"), (12000, "3 h 20 min")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
