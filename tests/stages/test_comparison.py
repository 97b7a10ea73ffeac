"""The comparison of an experiment's drafters, against figures worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.comparison import BASE, ComparisonConfig, Entry, arm_table

COST = {"positions": 700.0, "blocks": 100.0, "seconds": 2.0}


def table(sums: dict[str, tuple[list[float], list[float]]]) -> dict[tuple[str, int], dict[str, object]]:
    entries = {name: Entry.of_input(name, Path()) for name in sums}
    arrays = {name: (np.array(c), np.array(v)) for name, (c, v) in sums.items()}
    config = ComparisonConfig(control="sft", bootstrap_samples=400)
    rows = arm_table(entries, arrays, dict.fromkeys(sums, COST), config, seed=0)
    return {(row["arm"], row["steps"]): row for row in rows}


def test_tau_is_a_ratio_of_sums_for_each_seed_and_a_mean_over_seeds() -> None:
    rows = table(
        {
            "drafter:base:0:0": ([4.0, 8.0], [2.0, 2.0]),
            "drafter:sft:5:0": ([6.0, 6.0], [2.0, 2.0]),
            "drafter:sft:5:1": ([2.0, 10.0], [2.0, 2.0]),
            "drafter:opd:5:0": ([8.0, 8.0], [2.0, 2.0]),
            "drafter:opd:5:1": ([6.0, 10.0], [2.0, 2.0]),
        }
    )
    assert list(rows) == [(BASE, 0), ("opd", 5), ("sft", 5)]
    assert rows[BASE, 0]["tau"] == 3.0
    assert rows["opd", 5]["tau_of_seeds"] == [4.0, 4.0]
    assert rows["opd", 5]["difference_of_seeds"] == [1.0, 1.0]
    assert rows["opd", 5]["difference"] == 1.0
    assert rows["opd", 5]["gain"] == pytest.approx(1 / 3)
    assert rows["opd", 5]["positions"] == 700
    assert "difference" not in rows["sft", 5]


def test_the_interval_is_over_trajectories_and_covers_what_they_show() -> None:
    rng = np.random.default_rng(0)
    verified = rng.integers(5, 20, size=200).astype(float)
    gains = rng.normal(0.3, 0.2, size=200)
    sums = {}
    for seed in (0, 1, 2):
        sums[f"drafter:sft:5:{seed}"] = (list(2.0 * verified), list(verified))
        sums[f"drafter:opd:5:{seed}"] = (list((2.0 + gains) * verified), list(verified))
    row = table(sums)["opd", 5]
    mean = float((gains * verified).sum() / verified.sum())
    low, high = row["difference_low"], row["difference_high"]
    assert isinstance(low, float)
    assert isinstance(high, float)
    assert row["difference"] == pytest.approx(mean)
    # the error of a mean of 200 draws of spread 0.2 is 0.014 (0.015 with these weights): 95 % is 4 of them wide
    assert low < mean < high
    assert 0.04 < high - low < 0.08


def test_arms_with_other_steps_than_the_control_are_not_compared() -> None:
    rows = table({"drafter:sft:5:0": ([4.0], [2.0]), "drafter:opd:9:0": ([5.0], [2.0])})
    assert "difference" not in rows["opd", 9]
