"""The comparison of an experiment's drafters, against figures worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.artifacts.parquet import read_table
from draftsmith.artifacts.schemas import ACCEPTANCE
from draftsmith.artifacts.store import Claim, Store
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.experiments.comparison import (
    BASE,
    STAGE,
    ComparisonConfig,
    Entry,
    Spent,
    arm_table,
    cost_to_reach,
    figures,
)
from draftsmith.stages.replay.trace import Trajectory
from draftsmith.stages.stored import DRAFTER_FOLDER
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.dspark import random_dspark
from tests.testbed.random_target import trajectories, write_trajectories

COST = {"positions": 700.0, "blocks": 100.0, "seconds": 2.0}


def table(
    sums: dict[str, tuple[list[float], list[float]]], prompts: list[str] | None = None
) -> dict[tuple[str, int], dict[str, object]]:
    """prompts: of the trajectories; left out: each has its own."""
    entries = {name: Entry.of_input(name, {name: Path()}) for name in sums}
    arrays = {name: (np.array(c), np.array(v)) for name, (c, v) in sums.items()}
    prompts = prompts or [str(i) for i in range(len(next(iter(arrays.values()))[0]))]
    rows = arm_table(entries, arrays, prompts, dict.fromkeys(sums, COST), "sft")
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


def test_answers_to_one_prompt_are_one_observation() -> None:
    rng = np.random.default_rng(0)
    gains = rng.normal(0.3, 0.2, size=50)
    sums = {
        "drafter:sft:5:0": ([20.0] * 200, [10.0] * 200),
        "drafter:opd:5:0": (list(10 * np.tile(2.0 + gains, 4)), [10.0] * 200),
    }
    alone = table(sums)["opd", 5]
    together = table(sums, [str(i) for i in range(50)] * 4)["opd", 5]
    assert together["difference"] == alone["difference"]
    widths = [float(row["difference_high"]) - float(row["difference_low"]) for row in (alone, together)]  # type: ignore[arg-type]
    assert 1.9 < widths[1] / widths[0] < 2.1


def test_one_prompt_has_no_interval() -> None:
    row = table({"drafter:sft:5:0": ([4.0], [2.0]), "drafter:opd:5:0": ([5.0], [2.0])})["opd", 5]
    assert (row["difference"], row["difference_low"], row["difference_high"]) == (0.5, None, None)


def test_arms_with_other_steps_than_the_control_are_not_compared() -> None:
    rows = table({"drafter:sft:5:0": ([4.0], [2.0]), "drafter:opd:9:0": ([5.0], [2.0])})
    assert "difference" not in rows["opd", 9]


def test_the_cost_of_a_level_is_read_off_the_line_between_two_budgets() -> None:
    rows = [
        {"seconds": 100.0, "seconds_of_seeds": [90.0, 100.0, 110.0], "tau_of_seeds": [2.0, 3.5, 1.0]},
        {"seconds": 300.0, "seconds_of_seeds": [310.0, 290.0, 300.0], "tau_of_seeds": [4.0, 5.0, 2.0]},
    ]
    assert cost_to_reach(rows, 3.0, "seconds") == [Spent(200.0), Spent(100.0, at_most=True), None]
    assert cost_to_reach(rows[::-1], 3.5, "seconds") == [Spent(255.0), Spent(100.0), None]


def test_curves_are_drawn_for_several_budgets_and_differences_for_each() -> None:
    rows = table(
        {
            "drafter:base:0:0": ([4.0, 8.0], [2.0, 2.0]),
            **{f"drafter:{arm}:{steps}:0": ([6.0, 7.0], [2.0, 2.0]) for arm in ("sft", "opd") for steps in (5, 9)},
        }
    )
    drawn = figures(list(rows.values()), "sft")
    assert sorted(drawn) == ["differences-5.svg", "differences-9.svg", "tau.svg"]
    assert all(svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"') for svg in drawn.values())
    assert "before training" in drawn["tau.svg"]
    assert sorted(figures([row for row in rows.values() if row["steps"] in (0, 5)], "sft")) == ["differences-5.svg"]


def test_seeds_that_ended_alike_are_drawn_without_a_bar() -> None:
    """The mean of three times 0.1 lies an ulp above it."""
    rows = table({f"drafter:sft:{steps}:{seed}": ([1.0], [10.0]) for steps in (5, 9) for seed in range(3)})
    assert rows["sft", 5]["tau"] == np.nextafter(0.1, 1)
    assert list(figures(list(rows.values()), "sft")) == ["tau.svg"]


@pytest.mark.parametrize(("unit", "stop_after"), [("trajectories", 20), ("ceilings", 9)])
def test_an_interrupted_comparison_goes_on_with_what_is_missing(
    unit: str, stop_after: int, tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Store(tmp_path / "store").claim("sft", "ab" * 32) as claim:
        assert isinstance(claim, Claim)
        shutil.copytree(tiny_drafter.drafter / DRAFTER_FOLDER, claim.out / DRAFTER_FOLDER)
        made = Store(tmp_path / "store").commit(claim, config={}, inputs={}, code_digest="c", seed=0)
    inputs = {
        "target": tiny_drafter.target,
        "prompts": tiny_drafter.prompts,
        "trajectories": tiny_drafter.heldout,
        "drafter:base:0:0": made.path,
        "drafter:sft:5:0": made.path,
    }
    config = ComparisonConfig(control="sft", splits=("heldout",), tokens_per_target_forward=600)
    read: list[int] = []
    features, whole_read = Target.features, Target.read

    def counted(self: Target, ids: Any, *arguments: Any) -> Any:
        read.append(len(ids))
        return features(self, ids, *arguments)

    def counted_whole(self: Target, ids: Any, *arguments: Any) -> Any:
        read.append(len(ids))
        return whole_read(self, ids, *arguments)

    monkeypatch.setattr(Target, "features", counted)
    monkeypatch.setattr(Target, "read", counted_whole)
    monkeypatch.setattr("draftsmith.stages.targets.causal_lm.check_agreement", lambda *_: None)  # reads at every load
    whole = RecordingContext.under(tmp_path / "whole", inputs)
    STAGE.run(whole, config)
    all_read = sum(read)
    read.clear()
    with pytest.raises(StageInterrupted):
        STAGE.run(StoppingContext.under(tmp_path / "cut", inputs, stop_after=stop_after, unit=unit), config)
    assert 0 < sum(read) < all_read
    again = RecordingContext.under(tmp_path / "cut", inputs)
    STAGE.run(again, config)
    assert sum(read) == all_read  # nothing was read twice
    for name in ("results.json", "acceptance.parquet"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes()


def compared(folder: Path, artifact: Path, target: Target, answers: list[Trajectory], temperature: float) -> Path:
    """What the stage writes of a drafter that draws its proposals, on these answers."""
    with Store(folder / "store").claim("sft", "ab" * 32) as claim:
        assert isinstance(claim, Claim)
        save_drafter(random_dspark(target), claim.out / DRAFTER_FOLDER, torch.float32)
        made = Store(folder / "store").commit(claim, config={}, inputs={}, code_digest="c", seed=0)
    written = write_trajectories(folder / "answers", answers, temperature, "heldout")
    prompts = folder / "prompts"  # whose summary says nothing of conversations
    inputs = {"target": artifact, "prompts": prompts, "trajectories": written, "drafter:base:0:0": made.path}
    context = RecordingContext.under(folder, inputs)
    STAGE.run(context, ComparisonConfig(control="sft", splits=("heldout",)))
    return context.out


@pytest.mark.parametrize(("temperature", "ceiling"), [(1.0, 4.0), (0.0, 1.0)])
def test_no_drafter_passes_the_ceiling_also_where_proposals_are_drawn(
    temperature: float, ceiling: float, tmp_path: Path, plain_artifact: Path, plain_target: Target
) -> None:
    """Whatever is drawn from the target's own law is kept; a best token is not, if another one was drawn."""
    unlikely = []
    for place in range(3):
        tokens = [3, 1, 4, place]
        for _ in range(16):  # 4 blocks of 5
            tokens.append(int(plain_target.logits(plain_target.read(torch.tensor([tokens])).hidden[0, -1]).argmin()))
        unlikely.append(Trajectory(f"p{place}/0", tokens, 3))
    out = compared(tmp_path, plain_artifact, plain_target, unlikely, temperature)
    figures = json.loads((out / "results.json").read_text())["heldout"]
    assert figures["ceiling"] == ceiling
    assert figures["arms"][0]["tau"] <= ceiling


def test_the_rows_of_drawn_proposals_add_up_to_their_tau(
    tmp_path: Path, plain_artifact: Path, plain_target: Target
) -> None:
    """What they commit on average is no whole number."""
    out = compared(tmp_path, plain_artifact, plain_target, trajectories(6), 1.5)
    (arm,) = json.loads((out / "results.json").read_text())["heldout"]["arms"]
    rows = read_table(out / "acceptance.parquet", ACCEPTANCE).to_pandas()
    assert rows.committed.sum() / rows.verify_steps.sum() == pytest.approx(arm["tau"])
