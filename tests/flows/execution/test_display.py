"""The terminal: rate and time left, lines without a terminal, tables."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from draftsmith.flows.execution import display as module
from draftsmith.flows.execution.display import Display


def plain() -> tuple[Display, io.StringIO]:
    stream = io.StringIO()
    return Display(Console(file=stream, width=160)), stream


def test_the_rate_covers_the_last_minutes_of_this_attempt_and_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    display, _ = plain()
    with display.stage("sft") as shown:
        assert shown.progress(100, 1000, "steps", {}) is None  # an earlier attempt made 100
        clock[0] = 10.0
        assert shown.progress(120, 1000, "steps", {}) == 440.0
        clock[0] = 400.0
        shown.progress(600, 1000, "steps", {})
        clock[0] = 430.0
        assert shown.progress(630, 1000, "steps", {}) == 370.0  # the first minutes count no longer
        clock[0] = 431.0
        assert shown.progress(0, 630, "prompts", {}) is None
        for clock[0], done in ((441.0, 10), (451.0, 20)):
            left = shown.progress(done, 630, "prompts", {})
        assert left == 610.0


def test_without_a_terminal_progress_is_an_occasional_line(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_cells_are_wrapped_and_not_cut_on_a_narrow_terminal() -> None:
    stream = io.StringIO()
    Display(Console(file=stream, width=16)).table(["key", "tau"], [["6b633f734bf9770b", "1.3333"]])
    _, *lines = [line.split() for line in stream.getvalue().splitlines()]
    assert "".join(line[0] for line in lines) == "6b633f734bf9770b"
    assert "".join(line[1] for line in lines if len(line) > 1) == "1.3333"
