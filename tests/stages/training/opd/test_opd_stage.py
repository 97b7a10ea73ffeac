"""The stage `opd` on real mined steps: every loss trains, what was learned shows on the trained text, runs resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter, read_info
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.training.config import OpdConfig
from draftsmith.stages.training.opd.stage import STAGE
from draftsmith.stages.training.opd.verify_steps import load_mined
from tests.stages.bench import Bench
from tests.stages.training.answers import mined_answers
from tests.testbed.context import StoppingContext
from tests.testbed.drafter import DrafterArtifacts

CONFIG = {
    "steps": 30, "learning_rate": 3e-4, "sequences_per_step": 4, "anchors_per_sequence": 6, "compute_dtype": "float32",
}  # fmt: skip


Answers = dict[str, Path]  # with what was mined on them: the inputs of a training


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts) -> Answers:
    made = tiny_drafter
    return mined_answers(tmp_path_factory.mktemp("greedy"), made.target, made.prompts, made.drafter)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts) -> Answers:
    made = tiny_drafter
    return mined_answers(tmp_path_factory.mktemp("sampled"), made.target, made.prompts, made.drafter, temperature=1.0)


@pytest.fixture(params=["greedy", "sampled"])
def answers(request: pytest.FixtureRequest) -> Answers:
    """Both, where the loss or the trace depends on the sampling."""
    answers: Answers = request.getfixturevalue(request.param)
    return answers


def train(folder: Path, answers: Answers, stop_after: int | None = None, **fields: Any) -> StoppingContext:
    return StoppingContext.under(folder, answers, stop_after=stop_after).run(STAGE, **CONFIG | fields)


@torch.no_grad()
def committed_nll(bench: Bench, drafter: Drafter, answers: Answers) -> float:
    """Return the mean -log q of the tokens that the mined steps committed."""
    trajectories = load_trajectories(answers["trajectories"]).trajectories
    table = load_mined(answers["mined"], trajectories, drafter.block_size)
    total, count = 0.0, 0
    for index, trajectory in enumerate(trajectories):
        steps = table.steps_of(index)
        _, context = bench.read([trajectory], drafter)
        tokens = torch.tensor(trajectory.tokens)
        anchors, committed = (torch.as_tensor(column).long() for column in (steps.anchors, steps.committed))
        blocks = tokens[anchors][None, :, None].expand(-1, -1, drafter.block_size - 1)
        hidden = drafter.block_hidden(context, blocks, anchors[None])[0]
        distribution = torch.log_softmax(bench.target.logits(hidden), -1)  # [steps, block_size - 1, vocabulary]
        for k in range(distribution.shape[1]):
            reaching = committed > k
            total -= float(distribution[reaching, k, tokens[anchors[reaching] + 1 + k]].sum())
            count += int(reaching.sum())
    return total / count


@pytest.mark.parametrize(
    ("anchors", "answers"),
    [
        ("errors", "sampled"),
        ("visited", "greedy"),
        ("successors", "sampled"),
        ("chains", "greedy"),
        ("random", "greedy"),
    ],
    indirect=["answers"],
)
def test_matched_opd_raises_the_likelihood_of_committed_tokens(
    anchors: str, answers: Answers, bench: Bench, tmp_path: Path
) -> None:
    ctx = train(tmp_path, answers, anchors=anchors, steps=40)
    before = committed_nll(bench, bench.drafters["trained"], answers)
    after = committed_nll(bench, load_drafter(ctx.out / DRAFTER_FOLDER, bench.target), answers)
    assert after < before
    losses = [values["loss"] for _, values in ctx.measured]
    assert len(losses) == 40 and np.isfinite(losses).all()
    if anchors in ("errors", "visited"):  # the others train other positions at every step
        assert np.mean(losses[-8:]) < np.mean(losses[:8])
    assert ("mined_steps" in ctx.summaries) == (anchors in ("errors", "visited"))
    assert ctx.summaries["blocks"] == 40 * 4 * 6
    steps = read_table(answers["mined"] / "verify_steps.parquet", VERIFY_STEPS).to_pylist()
    trained = {row["trajectory_id"] for row in steps if row["rejected_offset"] or anchors != "errors"}
    assert ctx.summaries["passes"] == 40 * 4 / len(trained)

    info, before_it = read_info(ctx.out / DRAFTER_FOLDER), drafter_digest(answers["drafter"] / DRAFTER_FOLDER)
    assert (info.parents, info.target_digest) == ((before_it,), bench.target.info.digest)
    assert (info.training["stage"], info.training["steps"]) == ("opd", 40)
    assert ctx.json("drafter/drafter.json")["digest"] == drafter_digest(ctx.out / DRAFTER_FOLDER) != before_it


def test_the_papers_pair_trains_both_streams(answers: Answers, bench: Bench, tmp_path: Path) -> None:
    ctx = train(tmp_path, answers, loss="paper", anchors="errors", remine_every=0)
    assert len(ctx.measured) == 30
    for _, values in ctx.measured:
        means = sorted((values["loss_response"], values["loss_rejected"]))
        assert 0 <= means[0] < values["loss"] < means[1], "tokens of both streams are pooled"
    rejected = [values["loss_rejected"] for _, values in ctx.measured]
    assert np.mean(rejected[-8:]) < np.mean(rejected[:8])
    load_drafter(ctx.out / DRAFTER_FOLDER, bench.target)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"anchors": "random", "remine_every": 5}, "remine_every"),
        ({"loss": "papers"}, "papers"),
        ({"loss": {"temperature": 0.5}}, "loss.response.loss"),
        ({"loss": {"response": {"weight": 0}}}, "weight 0"),
        ({"loss": {"response": {"scope": "block", "beyond": 1}}}, "beyond"),
        ({"loss": {"rejected": {"positions": {"kind": "d_pace"}}}}, "loss.rejected"),
        ({"loss": {"response": {"positions": {"gamma": 2}}}}, "loss.response.positions.kind"),
        ({"loss": {"preset": "paper", "response": {"positions": {"kind": "d_pace"}}}}, "response.positions"),
    ],
)
def test_fields_that_contradict_each_other_are_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named.replace(".", r"\.")):
        OpdConfig.model_validate(fields)


def test_a_preset_is_a_name_for_streams() -> None:
    paper = OpdConfig.model_validate({"loss": "paper"})
    assert paper.loss.response.loss == "bernoulli_kl"
    assert (paper.loss.rejected.loss, paper.loss.rejected.positions.kind) == ("k3", "power")
    assert (
        paper.loss.pooled and not OpdConfig.model_validate({"loss": {"preset": "paper", "pooled": False}}).loss.pooled
    )
    assert OpdConfig.model_validate({"loss": "matched"}) == OpdConfig()
    assert OpdConfig.model_validate(paper.model_dump(mode="json")) == paper
    changed = OpdConfig.model_validate({"loss": {"preset": "paper", "rejected": {"weight": 0.1}}})
    assert (changed.loss.rejected.loss, changed.loss.rejected.weight) == ("k3", 0.1)
    assert changed.loss.response == paper.loss.response


def test_the_loss_follows_the_answers_sampling(answers: Answers, tmp_path: Path) -> None:
    losses = {}
    for loss in ("auto", "cross_entropy", "forward_kl"):
        ctx = train(tmp_path / loss, answers, steps=1, loss={"response": {"loss": loss}})
        losses[loss] = ctx.measured[0][1]["loss"]
    sampled = load_trajectories(answers["trajectories"]).sampling.temperature > 0
    assert losses["auto"] == losses["forward_kl" if sampled else "cross_entropy"]
    assert losses["forward_kl"] != losses["cross_entropy"]


@pytest.mark.parametrize(
    "fields",
    [
        {"anchors": "successors"},
        {"anchors": "chains"},
        {"anchors": "random", "loss": "paper"},
        {"anchors": "visited", "remine_every": 3, "loss": "paper", "compute_dtype": "bfloat16"},
        {"anchors": "visited", "remine_every": 3, "lora": {"rank": 4}, "compute_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_an_interrupted_run_ends_with_the_same_bits(fields: dict[str, Any], sampled: Answers, tmp_path: Path) -> None:
    """What was mined again depends on the weights of earlier steps."""
    fields = {"steps": 8, "learning_rate": 3e-3} | fields
    whole = train(tmp_path / "whole", sampled, **fields)
    with pytest.raises(StageInterrupted):
        train(tmp_path / "cut", sampled, 6, **fields)
    last = train(tmp_path / "cut", sampled, **fields)
    assert last.measured[0][0] == 6
    name = f"{DRAFTER_FOLDER}/model.safetensors"
    assert (last.out / name).read_bytes() == (whole.out / name).read_bytes()
    assert last.measured == whole.measured[6:]


def test_anchors_of_the_table_need_every_trajectory_mined(
    greedy: Answers, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    with pytest.raises(DraftsmithError, match="was not mined"):
        train(tmp_path, greedy | {"trajectories": tiny_drafter.rollout}, anchors="visited")


@pytest.mark.parametrize("anchors", ["successors", "random"])
def test_other_anchors_read_nothing_of_the_table(anchors: str, sampled: Answers, tmp_path: Path) -> None:
    """They train the same bits without it."""
    alone = {name: folder for name, folder in sampled.items() if name != "mined"}
    fields: dict[str, Any] = {"anchors": anchors, "steps": 4, "loss": "paper"}
    ours, theirs = train(tmp_path / "alone", alone, **fields), train(tmp_path / "mined", sampled, **fields)
    name = f"{DRAFTER_FOLDER}/model.safetensors"
    assert (ours.out / name).read_bytes() == (theirs.out / name).read_bytes()
