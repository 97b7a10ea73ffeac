"""The refresh benchmark: what is shipped is unchanged, an arm is what the bars say, intervals include all errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.training.config import OpdConfig
from draftsmith.stages.training.opd.body import MinedData
from draftsmith.stages.training.opd.verify_steps import load_mined
from tests.lab.benchmark import LABS, MAIN, Row, append, chosen_rate, compare, lines_of, mine, read_rows, run_stage
from tests.lab.rivals import ChosenAnswers, repeated
from tests.lab.seasons import INDEX, PROCEDURAL, SEASONS, Season, checksum, rounded
from tests.testbed.refresh import load_config


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
        learned = ["train"] * week.trained + ["validation"] * week.validation
        assert [row["split"] for row in rows] == learned + ["heldout"] * (len(rows) - len(learned))
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


@pytest.mark.parametrize("lab", LABS)
def test_arms_share_everything_but_anchors_and_loss(lab: str) -> None:
    shared = ("steps", "learning_rate", "sequences_per_step", "anchors_per_sequence", "compute_dtype", "head_tokens")
    arms = LABS[lab].arms(7, 0.5)
    assert {json.dumps([config.get(name) for name in shared]) for _, config in arms.values()} == {
        json.dumps([arms["sft"][1].get(name) for name in shared])
    }


def test_answers_with_many_mined_errors_are_trained_more_often(tmp_path: Path) -> None:
    assert repeated(np.array([0.1, 0.5, 0.3, 0.2, 0.6, 0.0])) == [0, 1, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5]
    lab, target = LABS["dflash"], PROCEDURAL.target(0)
    inputs = {"target": PROCEDURAL.target_artifact(0), "trajectories": PROCEDURAL.answers(0) / "train"}
    run_stage("sft", lab.sft(2), tmp_path / "first", inputs)
    inputs["drafter"] = tmp_path / "first"
    _, config = lab.arms(2)["chosen"]
    mine(lab, config, tmp_path / "mined", inputs)
    drafter = load_drafter(tmp_path / "first" / DRAFTER_FOLDER, target, torch.float32)
    stored = load_trajectories(inputs["trajectories"])
    table = load_mined(inputs["mined"], stored.trajectories, drafter.block_size, whole=True)
    data = MinedData(trajectories=stored.trajectories, sampling=stored.sampling, mined=table)
    usable = ChosenAnswers(drafter, target, data, OpdConfig.model_validate(config)).usable
    assert len(usable) == 2 * len(stored.trajectories) and set(usable) == set(range(len(stored.trajectories)))
    run_stage("chosen", config, tmp_path / "out", inputs)
    load_drafter(tmp_path / "out" / DRAFTER_FOLDER, target)


def test_the_rate_of_an_arm_is_the_best_on_average_over_champions(tmp_path: Path) -> None:
    path = tmp_path / "rates.jsonl"
    for champion, rate, value in ((0, 0.5, 2.0), (1, 0.5, 2.0), (0, 1.0, 2.5), (1, 1.0, 1.7), (0, 2.0, 1.0)):
        append(path, {"lab": "dflash", "arm": "chains", "rate": rate, "champion": champion, "tau": value})
    append(path, {"lab": "dflash", "arm": "sft", "rate": 2.0, "champion": 0, "tau": 3.0})
    assert chosen_rate(read_rows(path), "dflash", "chains") == 1.0
    with pytest.raises(SystemExit, match="paper of dflash has no learning rate yet"):
        chosen_rate(read_rows(path), "dflash", "paper")


def _line(tau: float, noise: np.ndarray) -> Row:
    return {"committed": (10 * tau + noise).tolist(), "verify_steps": [10] * len(noise)}


def _lines(taus: dict[tuple[int, int], float], noise: np.ndarray) -> dict[tuple[int, int], list[Row]]:
    return {key: [_line(tau, noise)] for key, tau in taus.items()}


def test_an_interval_includes_answers_seeds_and_champions() -> None:
    noise = np.random.default_rng(0).normal(0, 1, 160)
    keys = [(champion, seed) for champion in (0, 1) for seed in (0, 1, 2)]
    base = _lines(dict.fromkeys(keys, 2.0), np.zeros(160))
    same = compare(_lines(dict.fromkeys(keys, 2.1), np.zeros(160)), base)
    assert same.difference == pytest.approx(0.1) and same.verdict == "wins"
    assert (same.of_answers, same.of_lines) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
    of_answers = compare(_lines(dict.fromkeys(keys, 2.1), noise), base)
    assert of_answers.of_answers == pytest.approx(noise.std(ddof=1) / 10 / 160**0.5, rel=0.01)
    seeds = dict(zip(keys, (2.0, 2.1, 2.2) * 2, strict=True))
    assert compare(_lines(seeds, np.zeros(160)), base).of_lines == pytest.approx(
        np.std([0, 0.1, 0.2] * 2, ddof=1) / 6**0.5
    )
    champions = compare(_lines({key: 2.05 + 0.1 * key[0] for key in keys}, np.zeros(160)), base)
    assert champions.of_lines == pytest.approx(0.05)  # and not that of six lines
    most = (2.01505 * 0.05 - 0.1) / 2  # Student's t of five degrees of freedom
    assert champions.verdict == "ties" and champions.most_lost == pytest.approx(most, rel=1e-3)


def test_an_arm_is_compared_on_lines_that_have_all_weeks() -> None:
    def row(arm: str, seed: int, week: int) -> dict[str, Any]:
        about = {"lab": "dflash", "steps": 150, "arm": arm, "champion": 0, "seed": seed, "week": week}
        return {**about, **_line(2.0, np.zeros(4))}

    rows = [row(arm, seed, week) for arm in MAIN for seed in (0, 1) for week in (1, 2)]
    rows.remove(row("chains", 1, 2))
    found = lines_of(rows, [1, 2])[("dflash", 150)]
    assert {arm: len(lines) for arm, lines in found.items()} == dict.fromkeys(MAIN, 2) | {"chains": 1}
    assert compare(found["chains"], found["sft"]).lines == 1
