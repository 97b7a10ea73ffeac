"""Looks at the speeds: they share one error rate, decode prompts of their own, and add to what was measured."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from draftsmith.artifacts.results.evaluation import PLAIN, EvaluationResult, Look
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import REQUESTS
from draftsmith.stages.data.stored_prompts import load_prompts
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.looks import MOST_LOOKS, decides, level_of, needs_another, open_look, prompts_wanted
from draftsmith.stages.evaluation.speed_embedded import Decoder, EmbeddedSpeedTest
from draftsmith.stages.evaluation.stage import STAGE
from draftsmith.stages.runtime.stage import INCONCLUSIVE
from draftsmith.stages.runtime.statistics import Estimate, mean_estimate
from tests.stages.evaluation.test_error_rates import allowed
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts


@pytest.mark.parametrize("of", [1, 2, 3])
def test_looks_spend_the_error_rate_as_the_spending_function_says(of: int) -> None:
    """On 400,000 lines of normal sums, whose rates have a standard error of at most 0.035 %; the seed is fixed."""
    sums = np.random.default_rng(0).normal(size=(400_000, of)).cumsum(axis=1)
    levels = [level_of(Look(number=number, of=of)) for number in range(1, of + 1)]
    passed = np.maximum.accumulate(sums / np.sqrt(np.arange(1, of + 1)) > stats.norm.ppf(levels), axis=1).mean(axis=0)
    assert passed == pytest.approx([0.05 * (number / of) ** (1 / 3) for number in range(1, of + 1)], abs=0.0015)
    assert levels[0] == pytest.approx(1 - 0.05 * (1 / of) ** (1 / 3), abs=1e-5)


def test_drafters_without_a_gain_pass_in_five_percent_of_all_looks_together() -> None:
    """4,000 lines of 18, 36 and 54 prompts, at the threshold: a true rate of 5 % is seen as at most 6 % (`allowed`)."""
    rng, passed, decided = np.random.default_rng(0), 0, 0
    for _ in range(4000):
        gains = rng.normal(0, 0.2, 54)
        found = [
            decides(mean_estimate(gains[: 18 * number]), 0.0, level_of(Look(number=number, of=3)))
            for number in (1, 2, 3)
        ]
        result = next((better for better in found if better is not None), None)
        passed += result is True
        decided += result is not None
    assert 0.02 < passed / 4000 <= allowed(4000)
    assert decided / 4000 <= 2 * allowed(4000), "most end without a measurable difference"


def test_more_prompts_decide_more_often() -> None:
    """1,000 lines that are half a bound above the threshold; the seed is fixed."""
    rng, passed = np.random.default_rng(1), np.zeros(3)
    for _ in range(1000):
        gains = rng.normal(0.06, 0.2, 54)
        found = [
            decides(mean_estimate(gains[: 18 * number]), 0.0, level_of(Look(number=number, of=3)))
            for number in (1, 2, 3)
        ]
        passed += np.maximum.accumulate([better is True for better in found])
    assert passed[0] < passed[1] < passed[2]


def test_the_interval_decides() -> None:
    estimate = Estimate(0.2, 0.1, 10, 9.0)
    margin = float(stats.t.ppf(0.95, 9)) * 0.1
    assert decides(estimate, 0.2 - margin - 0.01, 0.95) is True
    assert decides(estimate, 0.2 + margin + 0.01, 0.95) is False
    assert decides(estimate, 0.2, 0.95) is decides(estimate, 0.2 - margin + 0.01, 0.95) is None
    assert decides(Estimate(0.2, math.nan, 1, 0.0), 0.0, 0.95) is None


def test_the_number_of_prompts_that_would_decide() -> None:
    """At twice the distance a quarter of the prompts; with as many as there are, the bound is at the threshold."""
    estimate = Estimate(0.2, 0.1, 40, 39.0)
    far, near = prompts_wanted(estimate, 0.0, 0.95), prompts_wanted(estimate, 0.1, 0.95)
    assert near == pytest.approx(4 * far)
    assert prompts_wanted(estimate, 0.2, 0.95) == math.inf
    at_bound = estimate.upper(0.05)
    assert prompts_wanted(estimate, at_bound, 0.95) == pytest.approx(40)


def test_a_look_has_prompts_of_its_own(tiny_drafter: DrafterArtifacts) -> None:
    heldout = load_prompts(tiny_drafter.prompts, ["heldout"])
    config = EvaluationConfig(speed_prompts=20)
    assert open_look(config, heldout, None).of == 1, "no gate judges the speed"
    judged = config.model_copy(update={"min_speedup": 1.0})
    look = open_look(judged, heldout, None)
    assert (look.number, look.of, list(look.prompts)) == (1, MOST_LOOKS, list(heldout[:20]))
    assert open_look(judged.model_copy(update={"speed_prompts": 25}), heldout, None).of == 2, "as the prompts suffice"
    assert open_look(judged.model_copy(update={"speed_prompts": 100}), heldout, None).of == 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers with a drafter take 0.5 and 1.5 times as long in turn, by a clock of the test: as long in all."""
    decode, factors = EmbeddedSpeedTest.decode, itertools.cycle([0.5, 1.5])

    def timed(self: EmbeddedSpeedTest, target: Any, decoder: Decoder, *rest: Any, **more: Any) -> Any:
        answers, _ = decode(self, target, decoder, *rest, **more)
        factor = next(factors) if decoder.drafter is not None else 1.0
        for answer in answers:
            answer.seconds = factor * len(answer.response_ids)
        return answers, sum(answer.seconds for answer in answers)

    monkeypatch.setattr(EmbeddedSpeedTest, "decode", timed)


@pytest.mark.usefixtures("clock")
def test_an_undecided_evaluation_is_added_to(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    config = {
        "sampling": {"max_new_tokens": 8}, "speed_prompts": 20, "rounds": 1, "exactness_prompts": 0, "min_speedup": 1.0,
        "block_sizes": [4, 8],
    }  # fmt: skip
    folders: list[Path] = []
    for number in (1, 2, 3):
        ctx = RecordingContext.under(tmp_path / str(number), tiny_drafter.to_evaluate())
        ctx.earlier = folders[-1] if folders else None
        folders.append(ctx.run(STAGE, **config).out)
        found = EvaluationResult.read(ctx.out)
        assert (found.look.number, found.look.of, found.look.prompts) == (number, 3, 20)
        assert found.speed["sft"].prompts == 20 * number
        (over_plain,) = found.compared("speed", "sft", PLAIN)
        assert over_plain.units == 20 * number
        assert ctx.summaries.get(INCONCLUSIVE) == (1.0 if number < 3 else None), "the last look is an end"
        assert needs_another(found, 1.0) is (number < 3)
    columns = ["round", "prompt_id", "arm", "response_ids", "latency_seconds", "identical"]
    rows = [read_table(folder / "requests.parquet", REQUESTS, columns).to_pylist() for folder in folders]
    for before, after in itertools.pairwise(rows):
        assert after[: len(before)] == before, "what was measured stays"
        new = after[len(before) :]
        assert not {row["prompt_id"] for row in new} & {row["prompt_id"] for row in before}
        assert not {row["round"] for row in new} & {row["round"] for row in before}
    for name in ("acceptance.json", "contexts.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    results = [EvaluationResult.read(folder) for folder in folders]
    assert len({(each.speed["sft"].block_size, str(each.block_size_candidates)) for each in results}) == 1


@pytest.mark.usefixtures("clock")
def test_a_look_that_the_machine_spoilt_is_taken_again(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    """Two rounds of the same prompts differ three-fold, which is a warning of noise."""
    config = {
        "sampling": {"max_new_tokens": 8}, "speed_prompts": 5, "rounds": 2, "exactness_prompts": 0, "min_speedup": 1.0,
    }  # fmt: skip
    first = RecordingContext.under(tmp_path / "first", tiny_drafter.to_evaluate()).run(STAGE, **config)
    assert "noise" in [each.kind for each in EvaluationResult.read(first.out).speed_warnings]  # and load on a busy one
    heldout = load_prompts(tiny_drafter.prompts, ["heldout"])
    look = open_look(EvaluationConfig.model_validate(config), heldout, first.out)
    assert (look.number, look.requests, look.first_round) == (1, [], 0)
