"""Intervals over prompts: they cover, pairing narrows them, and the tables are ratios of sums."""

from __future__ import annotations

import numpy as np
import pytest

from draftsmith.stages.measure.acceptance import acceptance_table, has_loop
from draftsmith.stages.measure.bootstrap import interval, ratio, ratio_difference
from draftsmith.stages.replay.trace import Trace


def prompts(rng: np.random.Generator, count: int, gain: float = 0.0) -> tuple[np.ndarray, ...]:
    """Committed tokens and steps of two drafters on prompts of different difficulty; the second is `gain` better."""
    steps = rng.integers(10, 60, count).astype(float)
    difficulty = rng.normal(2.5, 0.6, count)
    first = steps * difficulty
    second = steps * (difficulty + gain + rng.normal(0, 0.05, count))
    return first, steps, second, steps


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(150):
        committed, steps, _, _ = prompts(rng, 60)
        low, high = interval(ratio, (committed, steps), 400, trial)
        covered += low <= 2.5 <= high
    assert 0.89 <= covered / 150 <= 0.99


def test_a_paired_difference_is_narrower_than_an_unpaired_one_and_finds_a_small_gain() -> None:
    first, steps, second, same = prompts(np.random.default_rng(1), 60, gain=0.1)
    low, high = interval(ratio_difference, (second, same, first, steps), 1000, 0)
    order = np.random.default_rng(2).permutation(60)
    loose = interval(ratio_difference, (second, same, first[order], steps[order]), 1000, 0)
    assert 0 < low < 0.1 < high
    assert high - low < (loose[1] - loose[0]) / 3
    assert loose[0] < 0


def test_a_ratio_is_of_sums() -> None:
    assert ratio(np.array([1.0, 9.0]), np.array([1.0, 3.0])) == 10 / 4


def test_one_prompt_has_no_spread_and_the_seed_decides_the_rest() -> None:
    one = (np.array([6.0]), np.array([2.0]))
    assert interval(ratio, one, 100, 0) == (3.0, 3.0)
    sample = prompts(np.random.default_rng(3), 20)[:2]
    assert interval(ratio, sample, 500, 4) == interval(ratio, sample, 500, 4)


def trace(length: int, anchors: list[int], accepted: list[int]) -> Trace:
    shape = (len(anchors), 3)
    return Trace(length, np.array(anchors), np.array(accepted), np.zeros(shape, int), np.zeros(shape), len(anchors))


def test_acceptance_table_by_hand() -> None:
    """Two trajectories, K = 3. The last step of the first one is cut: one of its proposals is judged."""
    sft = [trace(13, [4, 6, 10, 11], [1, 3, 0, 1]), trace(8, [4, 5, 6], [0, 0, 0])]
    opd = [trace(13, [4, 8], [3, 3]), trace(8, [4], [3])]
    table = acceptance_table({"sft": sft, "opd": opd}, [False, True], 200, 0)
    assert table["sft"]["tau"] == (8 + 3) / 7
    assert table["opd"]["tau"] == (4 + 4 + 3) / 3
    assert table["opd"]["diff_to_sft"] == pytest.approx(11 / 3 - 11 / 7)
    assert table["opd"]["diff_low"] <= table["opd"]["diff_to_sft"] <= table["opd"]["diff_high"]
    assert table["sft"]["tau_without_loops"] == 2
    assert table["sft"]["accepted_histogram"] == [4, 2, 0, 1]
    # judged: offset 1 seven times, offset 2 in 2+1+2 steps (not at 11, 6), offset 3 in 2+1 steps
    assert table["sft"]["acceptance_by_offset"] == [3 / 7, 1 / 5, 1 / 3]
    assert (table["sft"]["verify_steps"], table["sft"]["block_size"]) == (7, 4)
    assert "diff_to_sft" not in table["sft"] and "diff_to_control" not in table["opd"]
    with_control = acceptance_table({"sft": sft, "control": sft, "opd": opd}, [False, False], 200, 0)
    assert with_control["opd"]["diff_to_control"] == with_control["opd"]["diff_to_sft"]
    assert with_control["control"]["diff_to_sft"] == 0 == with_control["control"]["diff_high"]
    assert acceptance_table({"sft": sft}, [True, True], 100, 0)["sft"]["tau_without_loops"] is None


def test_a_loop_is_an_n_gram_that_comes_three_times() -> None:
    assert not has_loop([])
    assert not has_loop(list(range(100)))
    gram = [1, 2, 3, 4, 5, 6]
    assert not has_loop(gram + gram)
    assert has_loop([*gram, 9, *gram, 8, *gram])
    assert not has_loop([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5, 8, 1, 2, 3, 4, 5, 7])
    assert has_loop([0] * 8) and not has_loop([0] * 7)
    assert has_loop([1, 2, 1, 2, 1, 2], n=2)
