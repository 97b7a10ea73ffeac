"""An evaluation as rows: what every drawing of it shows."""

from __future__ import annotations

from draftsmith.stages.reporting import rows
from draftsmith.stages.reporting.names import ABSENT
from tests.stages.reporting.sample_report import EVALUATION, SERVED


def flat(table: rows.Table | None) -> list[list[str]]:
    assert table is not None
    assert all(len(row) == len(table.head) for row in table.rows)
    return [[cell.replace("\n", " ") for cell in row] for row in table.rows]


def test_the_headline_has_a_row_an_arm_and_a_column_for_everything_compared_with() -> None:
    table = rows.headline(EVALUATION)
    assert table is not None
    assert list(table.head) == [
        "decoding", "tau [95 %]", "tau minus SFT's [95 %]", "tau minus SFT continued's [95 %]", "tokens/s",
        "speed-up [95 %]", "block", "tau served", "draft/verify", "identical outputs",
    ]  # fmt: skip
    plain, sft, opd, control = flat(table)
    assert plain == ["plain decoding", *[ABSENT] * 3, "61.3", *[ABSENT] * 5]
    assert sft[:4] == ["SFT", "3.412 [3.301, 3.520]", ABSENT, ABSENT]
    assert opd == [
        "SFT + OPD", "3.543 [3.432, 3.651]", "+0.131 [+0.082, +0.180]", "+0.113 [+0.066, +0.160]", "91.7",
        "1.496 [1.456, 1.546]", "6", "3.31", "20%/70%", "98.0%",
    ]  # fmt: skip
    assert control[2:4] == ["+0.018 [-0.031, +0.067]", ABSENT]


def test_the_caption_says_what_intervals_are_of() -> None:
    table = rows.headline(EVALUATION)
    assert table is not None
    assert table.caption == (
        "tau: tokens committed per verify step, the correction or bonus token counted (+1). In brackets: single 95 % "
        "intervals, of tau over 40 prompts, of speed-ups over 5 turns of the same 6 prompts. Each drafter decodes with "
        "its own fastest block, of candidates that decoded 3 validation prompts once."
    )


def test_a_figure_without_an_interval_stands_alone() -> None:
    assert rows.interval(1.5, None, None, ".1f") == "1.5"
    assert rows.interval(None, 1.0, 2.0, ".1f") == ABSENT
    assert rows.interval(float("nan"), 1.0, 2.0, ".1f") == ABSENT
    assert rows.interval(0.0, -1.0, 1.0, "+.1f") == "+0.0\n[-1.0, +1.0]"
    assert (rows.number(True, ".1f"), rows.number("3", ".1f")) == (ABSENT, ABSENT)


def test_nothing_measured_is_no_table() -> None:
    assert rows.headline({}) is None
    assert rows.by_setting(EVALUATION) is None
    assert rows.exactness({}) == rows.repetitions({}) == []


def test_one_setting_with_latencies_and_several_settings_have_a_table_of_their_own() -> None:
    found = flat(rows.by_setting(SERVED))
    assert len(found) == 2 * 4
    assert found[0] == ["0", "1", "plain decoding", "61.3", ABSENT, ABSENT, "61.3", "0.021 (0.043)", ABSENT]
    assert found[6][:5] == ["0", "16", "SFT + OPD", "1467.2", "1.496 [1.456, 1.546]"]
    one = {**SERVED, "speed_by_setting": SERVED["speed_by_setting"][1:]}
    assert len(flat(rows.by_setting(one))) == 4
    without = [{**s, "arms": {"plain": {"tokens_per_s": 1.0}}} for s in one["speed_by_setting"]]
    assert rows.by_setting({**one, "speed_by_setting": without}) is None


def test_sentences_on_exactness_and_parity() -> None:
    assert rows.exactness(EVALUATION) == [
        "In fp32, 50 of 50 outputs of speculative decoding equal plain decoding, token for token.",
        "In bfloat16, 98.0% of the outputs of speculative decoding equal plain decoding.",
        "Where they part, the worse token lies 0.031 logits below the target's best (median).",
    ]
    assert rows.exactness(SERVED)[1:] == [
        "SFT: 3 of 52 verify steps that the engine served differ from replay.",
        "SFT + OPD: tau is 3.310 as served and 3.320 in replay of the same answers.",
    ]


def test_answers_that_repeat_themselves_are_told() -> None:
    assert rows.repetitions(EVALUATION) == [
        "7.0% of the held-out answers repeat some six tokens three times or more.",
        "tau without them: SFT 3.21, SFT + OPD 3.35, SFT continued 3.22.",
    ]
    assert rows.repetitions({"loop_share": 1.0, "tau_without_loops": {"sft": None}})[1:] == []
