"""The report: one page with all metrics, which needs no network."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from draftsmith.artifacts.results.evaluation import PLAIN, AnswerContext, EvaluationResult, TargetDifference
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.stages.report.metrics import report_metrics
from draftsmith.stages.report.page import ReportData, render_report
from draftsmith.stages.report.review import ABSENT
from draftsmith.stages.report.tables import by_offset, confidence
from tests.stages.report.sample_report import (
    CONTEXTS,
    DECISION,
    EVALUATION,
    HOSTILE,
    OF_A_LINE,
    SERVED,
    SETS,
    entry,
    load_point,
    of_a_line,
    rule,
    sample,
)

CONFIDENCE = {
    "scale": 0.8321, "shift": -0.21, "fitted_on": 400, "decisions": 1234, "confidence": 0.712, "accepted": 0.64,
    "error": 0.0721, "error_calibrated": 0.0112,
}  # fmt: skip
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


def test_a_plot_of_one_point_is_a_sentence(tmp_path: Path) -> None:
    """One number of requests in flight, and blocks of one proposal."""
    found = {
        **EVALUATION,
        "drafters": {arm: {"tau": 1.5, "acceptance_by_offset": [0.52]} for arm in EVALUATION["drafters"]},
        "load": [load_point(arm, PLAIN, 1, 1.25, 60.0) for arm in EVALUATION["drafters"]],
        "sets": {},
        "comparisons": [],
    }
    page = render(tmp_path, sample(evaluation=found, history=[]))
    assert "svg" not in [tag for tag, _ in page.tags]
    assert "Speed-up with 1 request in flight: SFT 1.25 [" in page.text
    assert "A block has one proposal. Share accepted: SFT 52%" in page.text


def test_every_part_of_a_refresh_of_a_line_is_there_and_the_verdict_is_first(tmp_path: Path) -> None:
    page = render(tmp_path, of_a_line())
    sections = [attributes.get("class") or attributes.get("id") for tag, attributes in page.tags if tag == "section"]
    assert sections == [
        "verdict inconclusive", "drafters", "speed-by-load", "by-slice", "gate", "trend", "contexts", "details",
    ]  # fmt: skip
    assert [tag for tag, _ in page.tags].count("svg") == 4
    regions = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "region"]
    assert regions == [
        "Drafters", "Speed by setting", "Speed by load", "By slice", "Acceptance by offset and slice", "Gate", "Stages",
    ]  # fmt: skip
    for text in ("0123456789ab", "draftsmith run weekly.yaml", "about 2 min", "450 s"):
        assert text in page.text, "commit, next step, cost"
    assert page.text.index("7%") < page.text.index("draftsmith run"), "warnings on the data are above"
    assert "n.s." in page.text and "learning_rate" in page.text and "smollm2@3" in page.text


def test_the_cost_is_that_of_all_devices(tmp_path: Path) -> None:
    trained = entry("opd", 600.0, {"parallel": {"processes": 8}})
    assert "10 min (600 s) of stages and 80 min of device time" in render(tmp_path, of_a_line(lineage=[trained])).text


def test_two_worst_and_two_typical_contexts_are_open(tmp_path: Path) -> None:
    page = render(tmp_path, of_a_line())
    assert sum(attributes.get("class") == "context" for _, attributes in page.tags) == len(CONTEXTS) == 12
    before, _, after = page.text.partition("More contexts")
    assert (before.count("Worst:"), before.count("Typical:")) == (2, 2)
    assert (after.count("Worst:"), after.count("Typical:")) == (8, 0)


def test_each_slice_has_its_gain_and_its_worst_contexts(tmp_path: Path) -> None:
    small = {"units": 2, "degrees": 0.7, "value": -0.3, "error": 0.01}
    compared = [{**each, "gain": small} if each.get("set") == "chat" else each for each in OF_A_LINE["comparisons"]]
    of_slices = [{**CONTEXTS[0], "slice": name} for name in ("chat", "depth:4k-16k")]
    contexts = [AnswerContext.model_validate(each) for each in [*CONTEXTS, *of_slices]]
    page = render(tmp_path, of_a_line(evaluation={**OF_A_LINE, "comparisons": compared}, contexts=contexts))
    assert "chat (inconclusive)" in page.text and "-30.0% inconclusive: 2 prompts, 4 are needed" in page.text
    before, _, after = page.text.partition("Worst contexts of each slice")
    assert before.count("Worst:") == 10 and after.count("Worst:") == 2 and "depth:4k-16k" in after


def test_without_a_champion_acceptance_lengths_are_drawn_by_slice(tmp_path: Path) -> None:
    sets = {name: {arm: of for arm, of in arms.items() if arm != "champion"} for name, arms in SETS.items()}
    sets["chat"]["opd"] = {"tau": 3.0, "prompts": 2}  # too few for an interval
    page = render(tmp_path, sample(evaluation=EVALUATION | {"sets": {**sets, "empty": {}}}))
    drawn = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert "Acceptance length of each drafter by slice" in drawn and "Gain of" not in " ".join(map(str, drawn))
    figure = page.text.partition("By slice")[2].partition("With 95 % intervals of each single slice")[0]
    assert all(text in figure for text in ("code & math", "SFT + OPD", "acceptance length"))
    assert "empty" not in figure and HOSTILE not in page.text
    with_champion = render(tmp_path, of_a_line())
    assert "With 95 % intervals of each single slice" not in with_champion.text


def test_acceptance_by_offset_and_slice_is_a_table() -> None:
    found = by_offset(EvaluationResult.model_validate(OF_A_LINE))
    assert not by_offset(EvaluationResult.model_validate(EVALUATION)).rows
    assert found.head == ["slice", "", "1", "2", "3"]
    assert found.rows == [
        ["chat", "champion", "0.750", "0.500", "0.375"],
        ["chat", "SFT + OPD", "0.500", "0.250", ABSENT],
    ]


def test_a_calibrated_confidence_is_a_row() -> None:
    of_opd = {**EVALUATION["drafters"]["opd"], "confidence": CONFIDENCE}
    found = confidence(EvaluationResult.model_validate({**EVALUATION, "drafters": {"opd": of_opd}}))
    assert not confidence(EvaluationResult.model_validate(EVALUATION)).rows
    assert found.rows == [["SFT + OPD", "0.712", "0.640", "0.0721", "0.0112", "1,234", "0.832", "-0.210"]]
    metrics = report_metrics(EvaluationResult.model_validate({**EVALUATION, "drafters": {"opd": of_opd}}))
    assert (metrics["confidence.challenger.error"], metrics["confidence.opd.scale"]) == (0.0721, 0.8321)


def test_the_page_needs_no_network_and_every_reference_has_its_target(tmp_path: Path) -> None:
    page = render(tmp_path, sample())
    content = (tmp_path / "report.html").read_bytes()
    render(tmp_path, sample())
    assert (tmp_path / "report.html").read_bytes() == content, "the same data gives the same bytes"
    text = content.decode()
    assert not re.search(r"https?:|//[a-z]|@import|<script|<link|<img|<iframe", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {attributes["href"] or "" for _, attributes in page.tags if "href" in attributes}
    assert links and all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} | set(re.findall(r"url\(#([^)]+)", text)) <= set(ids)


def test_any_arm_is_shown_and_unset_metrics_as_absent(tmp_path: Path) -> None:
    """Arms of any name are shown, and arms that were not measured are not."""
    speed = {"plain": {"tokens_per_s": 10.0}, "eagle3 opd": {"tokens_per_s": 12.34}}
    evaluation = {"drafters": {"eagle3 opd": {"tau": 2.0}}, "speed": speed, "exactness": {}}
    page = render(tmp_path, ReportData("Report", EvaluationResult.model_validate(evaluation)))
    assert "eagle3 opd" in page.text and "12.3" in page.text
    assert "None" not in page.text and "SFT continued" not in page.text


def test_speed_on_a_server_is_shown_by_setting(tmp_path: Path) -> None:
    page = render(tmp_path, sample(evaluation=SERVED))
    for text in ("Speed by setting", "980.8", "1,467.2", "0.688", "3 of 52", "3.320 in replay"):
        assert text in page.text, text


def test_tau_as_served_stands_beside_that_of_replay_and_the_targets_difference(tmp_path: Path) -> None:
    data = of_a_line()
    assert "by replay under transformers" not in render(tmp_path, data).text
    evaluation = data.evaluation
    drafters = {arm: each.model_copy(update={"tau_replayed": 4.321}) for arm, each in evaluation.drafters.items()}
    difference = TargetDifference(settings=["quantization fp8"], tokens=107, mean=0.123, largest=0.912)
    served = evaluation.model_copy(update={"drafters": drafters, "target_difference": difference})
    text = render(tmp_path, replace(data, evaluation=served)).text
    assert "by replay under transformers" in text and "4.321" in text
    assert "quantization fp8: log-probs of 107 fixed tokens are 0.12 nats from transformers' on average" in text


def test_block_sizes_by_load_are_given_as_vllm_takes_them(tmp_path: Path) -> None:
    points = [(1, 8, 0.5), (2, 8, 0.3), (4, 4, 0.1), (8, 4, -0.1), (16, 2, -0.2)]
    curve = [load_point("opd", PLAIN, n, math.exp(value), 1.0) | {"block_size": width} for n, width, value in points]
    steps = [{"arm": PLAIN, "concurrency": 1, "block_size": 1, "ms": 9.0}]
    page = render(tmp_path, of_a_line(evaluation=OF_A_LINE | {"load": curve, "step_times": steps}))
    assert "num_speculative_tokens_per_batch_size: [[1, 3, 7], [4, 15, 3], [16, 16, 1]]" in page.text
    assert "Predicted, each drafter at its fastest block size, with 95 % intervals." in page.text
    of_servers = render(tmp_path, of_a_line(evaluation=OF_A_LINE | {"load": curve})).text
    assert "num_speculative_tokens" not in of_servers, "they decode with one block size"
    assert "Measured, with 95 % intervals." in of_servers and "Measured on servers at temperature 0" in of_servers


def test_the_speed_at_the_teams_load_and_what_it_saves_come_first(tmp_path: Path) -> None:
    at_load = rule("speed at your load", said="1.6", value=1.6, end=1.5, wanted=0.98, tokens_per_s=800.0)
    decision = GateDecision.model_validate(DECISION | {"rules": [*DECISION["rules"], at_load]})
    text = render(tmp_path, of_a_line(decision=decision)).text
    assert "at your load, measured: 500 → 800 tokens/s (+60% over the champion)" in text
    hours = sum(each.manifest.duration_s * each.devices for each in of_a_line().lineage) / 3600
    assert "37.5% less device time than with the champion" in text and "63.0 h a week" in text
    assert f"{hours / 0.375:.2g} device hours of such traffic" in text


def test_texts_of_models_and_files_are_never_markup(tmp_path: Path) -> None:
    page = render(tmp_path, of_a_line())
    assert not [tag for tag, _ in page.tags if tag in ("script", "img")]
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\u202e" not in text and "\x1b" not in text
    assert page.text.count("\\u202e\\x1b[2J") >= 2, "written out: in a context, in a table of sets"
    assert HOSTILE not in page.text
