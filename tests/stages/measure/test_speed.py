"""The speed table and the comparison with plain decoding, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.stages.engines.base import Completion, Request, SamplingParams, VerifyStep
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.measure.config import EvaluationConfig
from draftsmith.stages.measure.requests import (
    Setting,
    candidate_sizes,
    compare_with_plain,
    equality,
    fastest,
    first_difference,
    requests_for,
    row_of,
    settings_of,
)
from draftsmith.stages.measure.served import Served
from draftsmith.stages.measure.speed import speed_by_setting, speed_table
from draftsmith.stages.stored import Prompt
from tests.testbed.context import RecordingContext

GREEDY = Setting(0.0, 2)


def row(
    arm: str, prompt: str, tokens: int, seconds: float, steps: int = 0, *, first: float = float("nan"),
    accepted: list[int] | None = None, round: int = 0, setting: Setting = GREEDY,
) -> dict[str, Any]:  # fmt: skip
    """The draft takes a quarter of the time, verification a half; the request itself ran twice its share."""
    answer = Completion(
        Request(prompt, [1], SamplingParams(99)),
        [7] * tokens,
        "length",
        [VerifyStep(i, n, [0, 0, 0]) for i, n in enumerate(accepted or [])],
        verify_steps=steps,
        seconds=2 * seconds,
        first_token_seconds=first,
        draft_seconds=seconds / 4 if steps else 0.0,
        verify_seconds=seconds / 2 if steps else 0.0,
    )
    return row_of("embedded", round, arm, 4, setting, answer, seconds)


def test_speed_table_by_hand() -> None:
    rows = [
        row("plain", "a", 10, 2.0), row("plain", "b", 30, 2.0),
        row("sft", "a", 11, 1.0, 2, accepted=[3, 3]), row("sft", "b", 10, 0.5, 3, accepted=[1, 0, 3]),
    ]  # fmt: skip
    compare_with_plain(rows, sampled=False)
    table = speed_table(rows, 200, 0)
    assert table["plain"] == {"tokens_per_s": 10.0, "prompts": 2, "request_tokens_per_s_median": (2.5 + 7.5) / 2}
    sft = table["sft"]
    assert sft["tokens_per_s"] == 14.0
    assert sft["speedup"] == pytest.approx(1.4)
    assert sft["tau_served"] == (21 - 2) / 5
    assert (sft["draft_share"], sft["verify_share"], sft["identical_share"]) == (0.25, 0.5, 0.0)
    assert sft["speedup_low"] <= sft["speedup"] <= sft["speedup_high"]
    assert sft["accepted_histogram"] == [1, 1, 0, 3]
    assert "first_token_s_median" not in sft


def test_rounds_are_repetitions_of_a_prompt_and_not_more_prompts() -> None:
    once = [
        row(arm, prompt, tokens, seconds * (1 if arm == "plain" else 0.4), steps)
        for prompt, tokens, seconds in (("a", 10, 2.0), ("b", 30, 1.0), ("c", 20, 3.0))
        for arm, steps in (("plain", 0), ("sft", 5))
    ]
    twice = once + [{**r, "round": 1} for r in reversed(once)]
    first, second = (speed_table(rows, 500, 0) for rows in (once, twice))
    assert second["plain"]["prompts"] == 3
    for name in ("tokens_per_s", "speedup", "speedup_low", "speedup_high", "tau_served"):
        assert second["sft"][name] == pytest.approx(first["sft"][name]), name


def test_latencies_are_quantiles_over_requests() -> None:
    rows = [row("plain", str(i), 10, 1.0, first=0.1 * (i + 1)) for i in range(21)]
    found = speed_table(rows, 100, 0)["plain"]
    assert found["first_token_s_median"] == pytest.approx(1.1)
    assert found["first_token_s_p95"] == pytest.approx(2.0)
    assert found["request_tokens_per_s_median"] == 5.0


def test_settings_do_not_mix() -> None:
    settings = [GREEDY, Setting(0.7, 2), Setting(0.7, 16)]
    rows = [
        row(arm, "a", 10, seconds / (i + 1), setting=setting)
        for i, setting in enumerate(settings)
        for arm, seconds in (("plain", 1.0), ("sft", 0.5 - 0.1 * i))
    ]
    found = speed_by_setting(rows, settings, 100, 0)
    assert [(f["temperature"], f["concurrency"]) for f in found] == [(0.0, 2), (0.7, 2), (0.7, 16)]
    assert [f["arms"]["plain"]["tokens_per_s"] for f in found] == pytest.approx([10, 20, 30])
    assert [f["arms"]["sft"]["speedup"] for f in found] == pytest.approx([2, 2.5, 10 / 3])


def test_outputs_are_compared_with_plain_decoding_of_the_same_round_and_setting() -> None:
    hot = Setting(1.0, 2)
    rows = [
        row("plain", "a", 5, 1.0), row("sft", "a", 5, 1.0), row("opd", "a", 4, 1.0),
        row("plain", "a", 3, 1.0, round=1), row("sft", "a", 5, 1.0, round=1),
        row("plain", "a", 5, 1.0, setting=hot), row("sft", "a", 5, 1.0, setting=hot),
    ]  # fmt: skip
    compare_with_plain(rows, sampled=False)
    assert [r["identical"] for r in rows] == [None, True, False, None, False, None, None]
    assert [r["first_difference"] for r in rows] == [-1, -1, 4, -1, 3, -1, -1]
    rows[2]["margin"], rows[4]["margin"] = 0.5, np.nan
    assert equality(rows) == {
        "identical_share": 1 / 3, "compared_outputs": 3, "median_margin": 0.5, "largest_margin": 0.5,
    }  # fmt: skip
    compare_with_plain(rows, sampled=True)
    assert rows[-1]["identical"] is True
    assert equality([])["identical_share"] is None


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) == -1
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([], [1]) == 0


def test_every_arm_gets_the_same_requests_at_every_setting() -> None:
    config = EvaluationConfig.model_validate(
        {"concurrency": [1, 16], "temperatures": [0, 0.7], "sampling": {"max_new_tokens": 9, "top_p": 0.9}}
    )
    settings = settings_of(config)
    assert settings == [Setting(0, 1), Setting(0, 16), Setting(0.7, 1), Setting(0.7, 16)]
    prompts = [Prompt("a", "heldout", [1, 2]), Prompt("b", "heldout", [3])]
    (a, b), (_, hot) = requests_for(prompts, config, settings[0], 5), requests_for(prompts, config, settings[2], 5)
    assert (a.prompt_ids, a.sampling) == ([1, 2], SamplingParams(9, 0.0, 0.9))
    assert hot == Request("b", [3], SamplingParams(9, 0.7, 0.9), b.seed) and a.seed != b.seed
    assert requests_for(prompts, config, settings[0], 5, max_new=4)[0].sampling.max_new_tokens == 4
    assert settings_of(EvaluationConfig()) == [Setting(0.0, 1)]


def test_every_served_drafter_drafts_no_more_than_it_was_trained_on() -> None:
    engine = SGLangEngineConfig(kind="sglang", urls=("http://nowhere",))
    trained = {"wide": 16, "narrow": 8}
    served = Served(RecordingContext(Path(), Path()), EvaluationConfig(), engine, {}, trained, 99, "float32")
    assert [served.block_size(arm, 12) for arm in ("plain", "wide", "narrow")] == [12, 12, 8]


def test_block_sizes_are_no_larger_than_the_trained_one() -> None:
    config = EvaluationConfig(block_sizes=(16, 3, 8))
    assert candidate_sizes(config, 8) == [3, 8]
    assert candidate_sizes(EvaluationConfig(), 8) == [8]
    assert fastest({3: 1.0, 8: 2.0}) == 8 and fastest({3: 2.0, 8: 2.0}) == 3
