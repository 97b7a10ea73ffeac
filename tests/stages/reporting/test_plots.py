"""Figures whose labels anyone may make long."""

from __future__ import annotations

from typing import Any

import pytest

from draftsmith.stages.reporting import plots

NAMES = {"champion": "the champion", "sft": "SFT", "control": "SFT continued", "opd": "SFT + OPD"}


def test_the_legend_of_sets_with_long_names_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def keep(figure: Any, *_: str) -> str:
        drawn.append(figure)
        return ""

    monkeypatch.setattr(plots, "_svg", keep)
    taus = {arm: {"tau": 2.0, "low": 1.8, "high": 2.2} for arm in NAMES}
    plots.tau_by_set({"HuggingFaceH4/ultrachat_200k": taus, "openai/gsm8k": taus}, NAMES)
    (figure,) = drawn
    figure.draw_without_rendering()
    (legend,) = figure.legends
    extent = legend.get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1
    assert [text.get_text() for text in legend.get_texts()] == list(NAMES.values())
