"""The report: one page that holds its figures, needs no network, and says what was found."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from draftsmith.stages.reporting.page import ReportData, render_report
from tests.stages.reporting.sample_report import EVALUATION, HOSTILE, SERVED, of_a_line, sample

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags, texts and attributes of a page; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "br":
            self.text += " "
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def render(tmp_path: Path, data: ReportData) -> Page:
    render_report(tmp_path / "report.html", data)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_the_page_parses_and_holds_all_figures_and_tables(tmp_path: Path) -> None:
    page = render(tmp_path, sample())
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert labels == [
        "Share of proposals accepted at each offset",
        "Histogram of accepted lengths",
        "Time spent on drafting and verifying",
        "Acceptance length of the line's drafters over time",
        "Training loss over steps",
    ]
    assert sum(tag == "path" for tag, _ in page.tags) > 50
    for text in (
        "3.412 [3.301, 3.520]",
        "+0.131 [+0.082, +0.180]",
        "+0.113 [+0.066, +0.160]",
        "This drafter of SFT + OPD (one training, seed 0) has a measurably higher tau than that of SFT:",
        "These 4 verdicts hold together at 95 %",
        "single 95 % intervals, of tau over 40 prompts.",
        "single 95 % intervals, of speed-ups over 5 turns of the same 6 prompts.",
        "98.0%",
        "50 of 50",
        "Most rejected tokens",
    ):
        assert text in page.text
    assert "0123456789abcdef" in page.text  # lineage
    assert "learning_rate" in page.text  # config


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    render_report(tmp_path / "report.html", sample())
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|<iframe", text)
    targets = [attributes.get("href") for _, attributes in Page(text).tags if attributes.get("href")]
    assert targets
    assert all(target is not None and target.startswith("#") for target in targets)


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path) -> None:
    page = render(tmp_path, sample())
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    references = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    assert references
    assert references <= set(ids)


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        render_report(tmp_path / name, sample())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_arm_is_shown(tmp_path: Path) -> None:
    """Not only those of a refresh."""
    evaluation = {"speed": {"plain": {"tokens_per_s": 10.0}, "eagle3 opd": {"tokens_per_s": 12.34}}}
    page = render(tmp_path, ReportData("Report", evaluation))
    assert "eagle3 opd" in page.text and "12.3" in page.text


@pytest.mark.parametrize("absent", ["control", "speed", "exactness", "drafters", "everything"])
def test_absent_parts_are_left_out(tmp_path: Path, absent: str) -> None:
    evaluation: dict[str, Any] = {name: value for name, value in EVALUATION.items() if name != absent}
    for part in ("drafters", "speed", "tau_without_loops"):
        evaluation[part] = {
            arm: dict(value) if isinstance(value, dict) else value
            for arm, value in evaluation.get(part, {}).items()
            if arm != "control"
        }
    for figures in evaluation["drafters"].values():
        figures["differences"] = {other: of for other, of in figures["differences"].items() if other != "control"}
    evaluation["verdicts"] = [v for v in EVALUATION["verdicts"] if "control" not in (v["arm"], v["other"])]
    data = ReportData("Report") if absent == "everything" else sample(evaluation=evaluation, curves={})
    page = render(tmp_path, data)
    assert "SFT continued" not in page.text
    assert "None" not in page.text


def test_speed_on_a_server_is_shown_by_setting(tmp_path: Path) -> None:
    assert "By setting" not in render(tmp_path, sample()).text
    page = render(tmp_path, sample(evaluation=SERVED))
    for text in (
        "By setting", "Engine: sglang 0.5.20", "980.8", "1467.2", "0.336 (0.688)",
        "In float32, 100.0% of the outputs", "SFT: 3 of 52 verify steps", "SFT + OPD: tau is 3.310 as served and 3.320",
    ):  # fmt: skip
        assert text in page.text, text


def test_exactness_that_was_not_measured_is_not_told(tmp_path: Path) -> None:
    exactness = {"fp32_prompts": 0, "fp32_identical": 0, "identical_share": 0.3}
    assert "In fp32" not in render(tmp_path, sample(evaluation={"exactness": exactness})).text
    exactness["fp32_prompts"] = 2
    page = render(tmp_path, sample(evaluation={"exactness": exactness})).text
    assert "In fp32, 0 of 2 outputs of speculative decoding" in page


def test_unset_figures_are_shown_as_absent(tmp_path: Path) -> None:
    evaluation = {"drafters": {"sft": {"tau": None}}, "speed": {"sft": {"tokens_per_s": None}}, "exactness": {}}
    assert "None" not in render(tmp_path, ReportData("Report", evaluation)).text


def test_how_certain_the_target_was_where_it_rejected_is_said(tmp_path: Path) -> None:
    mining = {"most_rejected": [{"token": "a", "count": 3}], "certain_errors": {"at_least": 0.9, "share": 0.576}}
    said = "In 58% of all cases its best token had a probability of at least 0.9."
    assert said in render(tmp_path, ReportData("R", mining=mining)).text
    mining["certain_errors"] = {"at_least": 0.9, "share": None}  # nothing was rejected
    assert "of all cases" not in render(tmp_path, ReportData("R", mining=mining)).text


def test_text_is_escaped(tmp_path: Path) -> None:
    rejected = [{"token": "<script>alert(1)</script>", "rejected": 3}]
    page = render(tmp_path, ReportData("<b>Title</b>", mining={"most_rejected": rejected}))
    assert not [tag for tag, _ in page.tags if tag in ("script", "b")]
    assert "<b>Title</b>" in page.text


def test_every_part_of_a_refresh_of_a_line_is_there_and_the_verdict_is_first(tmp_path: Path) -> None:
    page = render(tmp_path, of_a_line())
    assert "engine: sglang 0.5.20 · 2 × NVIDIA H100, 16 cores of AMD EPYC 9B14, 128 GB" in page.text  # noqa: RUF001
    main = page.text[page.text.index("Not promoted: inconclusive") :]
    ordered = (
        "Not promoted: inconclusive",
        "What was measured does not say whether SFT + OPD is better than version 3 (tau 3.54 against 3.30).",
        "speed-up: 1.496 times, not judged: load",
        "+7.3%", "95 %: +6.0% to +8.5%",
        "Not to be relied on", "Other processes took between 2% and 48%",
        "By prompt set", "speed-up of SFT + OPD", "code & math", "+6.1% [+3.0%, +9.1%]", "1.400 [1.300, 1.500]",
        "By setting", "Gate", "The challenger is SFT + OPD, chosen by tau on the validation split alone: SFT 3.400, "
        "SFT + OPD 3.500, SFT continued 3.420.", "not judged", "The line over time",
        "Worst contexts of SFT + OPD", "tau 1.00 over 3 verify steps",
        "Staleness of the mined trace", "9,000 logged answers are used, of 12,000 rows", "Set aside", "not drawn",
        "device time", "all together", "Lineage and config", "champion (smollm2 version 3)",
    )  # fmt: skip
    place = 0
    for text in ordered:
        place = main.index(text, place) + len(text)
    assert main.count("the champion 3.300") == 1


def test_what_models_and_files_say_is_nowhere_markup(tmp_path: Path) -> None:
    page = render(tmp_path, of_a_line())
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\u202e" not in text and "\x1b" not in text
    assert page.text.count("\\u202e\\x1b[2J") >= 3, "written out: in a context, in a table of sets, in one of prompts"
    assert HOSTILE not in page.text


def test_marks_of_a_context_say_what_they_are(tmp_path: Path) -> None:
    page = render(tmp_path, of_a_line())
    marks = [(tag, attributes.get("class"), attributes.get("title")) for tag, attributes in page.tags]
    assert ("del", None, "proposed, rejected") in marks
    assert ("del", "dropped", "proposed behind it") in marks
    assert ("span", "chosen", "the target's choice") in marks
    assert "␣times" in page.text and "⏎" in page.text
