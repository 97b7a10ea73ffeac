"""The refresh benchmark: what is shipped is unchanged, a rival trains as its paper says, scores follow the bars."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.base import PreparedDrafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.replay.chains import committed_tokens, draft
from draftsmith.stages.training.batches import FeatureSource
from draftsmith.stages.training.drafted_blocks import DraftingView, encode_batch, tokens_at
from tests.lab.benchmark import (
    Benchmark,
    arm_in,
    compare,
    compare_offsets,
    half,
    promotes,
    run_stage,
    stats_of,
    write_results,
)
from tests.lab.rivals import ShuffledAnchors, hidden_after_prefix
from tests.lab.seasons import INDEX, PROCEDURAL, SEASONS, Season, checksum, rounded
from tests.testbed.refresh import load_config

PROCEDURAL_ARMS = Benchmark.of_procedural()


@pytest.mark.parametrize("season", SEASONS.values(), ids=list(SEASONS))
def test_a_season_is_what_its_content_ids_say(season: Season) -> None:
    index = json.loads((season.folder / INDEX).read_text())
    shipped = [path for path in season.folder.rglob("*") if path.suffix in (".parquet", ".safetensors")]
    assert sum(path.stat().st_size for path in shipped) < 10e6
    assert {str(path.relative_to(season.folder)): checksum(path) for path in shipped} == {
        name: fields["sha256"] for name, fields in index["files"].items()
    }


@pytest.mark.parametrize("season", SEASONS.values(), ids=list(SEASONS))
def test_weeks_are_split_by_time_and_share_no_prompt(season: Season) -> None:
    seen: set[tuple[int, ...]] = set()
    latest = ""
    for number, week in enumerate(season.weeks):
        rows = season.rows(number)
        times = [row["timestamp"] for row in rows]
        assert latest < times[0] and times == sorted(times)
        latest = times[-1]
        assert [row["split"] for row in rows] == ["train"] * week.trained + ["heldout"] * (len(rows) - week.trained)
        prompts = {tuple(row["prompt_token_ids"]) for row in rows}
        assert len(prompts) == len(rows) and not prompts & seen
        seen |= prompts


def test_rounded_weights_are_on_a_grid_of_their_row() -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    whole = rounded({"q_proj.weight": weight, "norm.weight": weight}, bits=4)
    assert torch.equal(whole["norm.weight"], weight)
    scale = weight.abs().amax(-1, keepdim=True) / 7
    torch.testing.assert_close(whole["q_proj.weight"], (weight / scale).round() * scale)
    halves = rounded({"q_proj.weight": weight}, bits=4, group=4)["q_proj.weight"]
    torch.testing.assert_close(halves[:, :4], rounded({"q_proj.weight": weight[:, :4]}, bits=4)["q_proj.weight"])


def test_the_config_for_any_drafter_is_valid() -> None:
    config = load_config(PROCEDURAL.folder.with_name("season.yaml"))
    assert config.heldout.answers is not None and config.prompts.prompt_count("heldout") == 480


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The inputs of a training: a drafter that has learned next to nothing."""
    folder = tmp_path_factory.mktemp("first") / "out"
    inputs = {"target": PROCEDURAL.target_artifact(0), "trajectories": PROCEDURAL.answers(0) / "train"}
    run_stage("sft", PROCEDURAL_ARMS.first.model_copy(update={"steps": 2}).model_dump(), folder, inputs)
    return inputs | {"drafter": folder}


def test_the_rival_trains_a_checkpoint_that_loads(start: dict[str, Path], tmp_path: Path) -> None:
    trainer, config = PROCEDURAL_ARMS.arms["visible-prefix"]
    run_stage(trainer, {**config, "steps": 2}, tmp_path / "out", start)
    target = PROCEDURAL.target(0)
    before, after = (load_drafter(folder / DRAFTER_FOLDER, target) for folder in (start["drafter"], tmp_path / "out"))
    weights = dict(after.named_parameters())
    assert weights.keys() == dict(before.named_parameters()).keys()
    assert any(not torch.equal(parameter, weights[name]) for name, parameter in before.named_parameters())


def test_with_one_visible_token_a_block_is_drafted_as_it_is_served(start: dict[str, Path]) -> None:
    target = PROCEDURAL.target(0)
    drafter = load_drafter(start["drafter"] / DRAFTER_FOLDER, target)
    assert isinstance(drafter, DFlashDrafter)
    trajectories = load_trajectories(start["trajectories"]).trajectories[:2]
    features = FeatureSource(target, drafter.target_layer_ids, trajectories, PROCEDURAL_ARMS.first, with_hidden=False)
    batch = features.batch([0, 1])
    anchors = torch.tensor([[t.first_anchor, t.first_anchor + 3] for t in trajectories], device=target.device)
    context = encode_batch(drafter, batch)
    served = drafter.block_hidden(context, tokens_at(batch, anchors, 0, drafter.block_size - 1), anchors)
    one, two = (
        hidden_after_prefix(drafter, context, batch, anchors, torch.full_like(anchors, visible)) for visible in (1, 2)
    )
    torch.testing.assert_close(one, served)
    assert not torch.allclose(two, served)


def test_shuffled_steps_are_those_of_the_other_blocks(start: dict[str, Path]) -> None:
    target = PROCEDURAL.target(0)
    drafter = load_drafter(start["drafter"] / DRAFTER_FOLDER, target, torch.float32)
    trajectories = load_trajectories(start["trajectories"]).trajectories[:4]
    batch = FeatureSource(
        target, drafter.target_layer_ids, trajectories, PROCEDURAL_ARMS.first, with_hidden=False
    ).batch(range(4))
    context, head = encode_batch(drafter, batch), drafter.drafting_head(target.head_weight, None)
    view = DraftingView(batch, context, head, None)
    found = ShuffledAnchors(drafter, 16).sample(0, range(4), view, np.full((4, 1), 0.5))
    assert found.steps is not None
    tokens = committed_tokens(trajectories, 7, target.device)
    own = draft(PreparedDrafter(drafter, head, 8), context, tokens, found.anchors).accepted + 1
    assert found.steps.committed.flatten().sort().values.equal(own.flatten().sort().values)
    assert not found.steps.committed.equal(own)


def test_an_arm_goes_on_as_another_one() -> None:
    assert [arm_in("plateau-then-frozen", number) for number in (1, 2, 3)] == ["plateau", "frozen", "frozen"]
    assert arm_in("opd", 3) == "opd"


def test_results_of_other_arms_and_of_more_seeds_stay(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for week, arm, seeds in (("1", "sft", [0, 1]), ("2", "sft", [0, 1]), ("1", "opd", [0]), ("1", "sft", [0])):
        row = {"taus": [2.0] * len(seeds)}
        write_results(path, {"seeds": seeds, "weeks": {week: {"change": "nothing", "arms": {arm: row}}}})
    found = json.loads(path.read_text())
    rows = {(n, arm): len(row["taus"]) for n, week in found["weeks"].items() for arm, row in week["arms"].items()}
    assert rows == {("1", "sft"): 2, ("1", "opd"): 1, ("2", "sft"): 2}
    assert found["seeds"] == [0, 1]


def test_verdicts_and_gate_follow_the_measured_difference() -> None:
    steps, noise = np.full(80, 10.0), np.random.default_rng(0).normal(0, 1, 80)
    base, better = stats_of(30 + noise, steps), stats_of(33 + noise, steps)
    families = [("record",)] * 80
    assert compare([better], [base])["verdict"] == "wins" and compare([base], [better])["verdict"] == "loses"
    assert compare([base], [base])["verdict"] == "ties"
    assert compare([stats_of(30.1 + noise, steps)], [base])["verdict"] == "ties"  # measurable, and below 1 %
    assert promotes(better, base, families)
    assert not promotes(base, base, families) and not promotes(base, better, families)


def test_offsets_are_the_first_proposal_and_what_follows_it() -> None:
    base = [stats_of(np.ones(4), np.ones(4), np.array([[5, 3, 2]] * 4))]
    better = [stats_of(np.ones(4), np.ones(4), np.array([[5, 1, 4]] * 4))]
    found = compare_offsets(better, base)
    assert found["first"]["gain"] == pytest.approx(0)
    assert found["accepted_then"]["gain"] == pytest.approx((9 / 5) / (7 / 5) - 1)


def test_both_halves_have_equal_shares_of_each_family() -> None:
    for season in SEASONS.values():
        for number in range(len(season.weeks)):
            families = season.families(number)
            halves = [Counter(families[i] for i in half(families, which)) for which in (0, 1)]
            assert halves[0] == halves[1] and sum(halves[0].values()) == len(families) / 2
