"""A DFlash drafter that continues as DSpark, on sampled answers, through every stage that reads a drafter."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TRAJECTORIES, VERIFY_STEPS
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.evaluation.drift import STAGE as DRIFT
from draftsmith.stages.evaluation.stage import STAGE as EVALUATION
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.stage import STAGE as MINING
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.opd.stage import STAGE as OPD
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.stages.training.answers import mined_answers
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.make import DFLASH

TRAINING = {"sequences_per_step": 4, "anchors_per_sequence": 6, "compute_dtype": "float32", "learning_rate": 1e-3}
SAMPLING = {"max_new_tokens": 40, "temperature": 1.0}


@dataclass(frozen=True)
class Chain:
    """The artifacts of one chain of stages."""

    target: Path
    prompts: Path
    sft: Path
    rollout: Path  # with the drafter in the loop
    mining: Path
    losses: list[float]  # of SFT

    def inputs(self, *names: str) -> dict[str, Path]:
        named = {"target": self.target, "drafter": self.sft, "trajectories": self.rollout, "mined": self.mining}
        return {name: named[name] for name in names}


SHAPE = {"kind": "dspark"}


def losses(ctx: RecordingContext) -> list[float]:
    return [values["loss"] for _, values in ctx.measured]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts) -> Chain:
    folder, made = tmp_path_factory.mktemp("dspark"), tiny_drafter
    sft = RecordingContext.under(folder / "sft", {"target": made.target, "trajectories": made.rollout})
    sft.run(SFT, **TRAINING, steps=12, init_from=str(made.drafter / DRAFTER_FOLDER), drafter=SHAPE)
    found = mined_answers(folder, made.target, made.prompts, sft.out, 24, **SAMPLING)
    return Chain(made.target, made.prompts, sft.out, found["trajectories"], found["mined"], losses(sft))


@pytest.fixture(scope="module")
def target(chain: Chain) -> Target:
    return Target.load(chain.target, device="cpu")


def test_sft_continues_from_dflash_as_dspark(
    chain: Chain, tiny_drafter: DrafterArtifacts, target: Target, tmp_path: Path
) -> None:
    """Without steps it proposes the same. Few steps may cost acceptance, but begin at a trained drafter's loss."""
    inputs, start = {"target": chain.target, "trajectories": tiny_drafter.rollout}, tiny_drafter.drafter
    taken = RecordingContext.under(tmp_path / "taken", inputs)
    taken.run(SFT, **TRAINING, steps=0, init_from=str(start / DRAFTER_FOLDER), drafter=SHAPE)
    fresh = RecordingContext.under(tmp_path / "fresh", inputs)
    fresh.run(SFT, **TRAINING, steps=1, drafter=DFLASH | SHAPE)
    assert np.mean(chain.losses) < 0.5 * losses(fresh)[0]
    drafter = load_drafter(chain.sft / DRAFTER_FOLDER, target)
    before, same = (load_drafter(artifact / DRAFTER_FOLDER, target) for artifact in (start, taken.out))
    assert (drafter.kind, drafter.block_size) == ("dspark", before.block_size)
    assert len(drafter.info.parents) == 1
    answers = load_trajectories(tiny_drafter.heldout, ["validation"]).trajectories
    traces = Replayer(target).traces({"before": before, "same": same}, answers)
    assert [t.proposed.tolist() for t in traces["same"]] == [t.proposed.tolist() for t in traces["before"]]


def restated(chain: Chain, folder: Path, **sampling: float) -> Path:
    """Write the rollout's answers to `folder`, as if sampled with another top-p or top-k."""
    folder.mkdir()
    table = read_table(chain.rollout / "trajectories.parquet", TRAJECTORIES)
    for name, value in sampling.items():
        at = table.schema.get_field_index(name)
        field = table.schema.field(at)
        table = table.set_column(at, field, pa.array([value] * len(table), field.type))
    pq.write_table(table, folder / "trajectories.parquet")
    return folder


def test_mining_samples_steps_with_the_taus_of_the_answers(chain: Chain) -> None:
    summary = json.loads((chain.mining / "summary.json").read_text())
    parity = summary["parity"]
    assert "mismatch_share" not in parity  # steps are those served in distribution, not one by one
    assert abs(parity["tau_difference"]) < 0.25  # its error over these answers is 1 to 3 %
    steps = read_table(chain.mining / "verify_steps.parquet", VERIFY_STEPS).to_pylist()
    assert 0 < summary["error_positions"] < summary["steps"] == len(steps)
    for step in steps:
        if step["rejected_offset"] == 0:
            continue
        # a rejected proposal may be the committed token only where it is not: max(q - p, 0) has none of it
        assert step["proposed_ids"][step["accepted"]] != step["committed_id"]
        assert np.isfinite(step["target_logprobs"][: step["rejected_offset"]]).all()


def test_answers_that_the_stated_sampling_cannot_produce_are_counted_and_logged(chain: Chain, tmp_path: Path) -> None:
    assert json.loads((chain.mining / "summary.json").read_text())["outside_nucleus_share"] == 0  # of all tokens
    answers = restated(chain, tmp_path / "rollout", top_p=0.8, top_k=40)
    inputs = {"target": chain.target, "trajectories": answers}
    mining = RecordingContext.under(tmp_path / "mining", inputs | {"drafter": chain.sft})
    share = mining.run(MINING, max_parity_mismatch=1).json("summary.json")["outside_nucleus_share"]
    assert share == mining.summaries["outside_nucleus_share"] > 0

    inputs |= {"prompts": chain.prompts, "sft": chain.sft}
    evaluation = RecordingContext.under(tmp_path / "evaluation", inputs)
    evaluation.run(EVALUATION, sampling=SAMPLING, speed_prompts=1, exactness_prompts=0, rounds=1)
    assert evaluation.json("acceptance.json")["outside_nucleus_share"] == share
    for ctx in (mining, evaluation):
        assert len([line for line in ctx.logs if f"warning: {share:.1%}" in line]) == 1


@pytest.mark.parametrize(
    ("anchors", "response", "logged"),
    [
        ("successors", {}, "ce_l1 on block"),
        ("visited", {"loss": "forward_kl", "scope": "committed"}, "forward_kl on committed"),
    ],
)
def test_opd_trains_on_sampled_verification(
    anchors: str, response: dict[str, Any], logged: str, chain: Chain, target: Target, tmp_path: Path
) -> None:
    ctx = RecordingContext.under(tmp_path, chain.inputs("target", "drafter", "trajectories", "mined"))
    loss = {"response": response, "rejected": {"loss": "k3", "weight": 0.3}}
    ctx.run(OPD, **TRAINING, steps=6, anchors=anchors, loss=loss)
    assert any(f"verification sampled: {logged}" in line for line in ctx.logs)
    for _, values in ctx.measured:
        assert values["loss"] == pytest.approx(values["loss_response"] + 0.3 * values["loss_rejected"], rel=1e-5)
        assert values["loss_rejected"] > 0
    assert load_drafter(ctx.out / DRAFTER_FOLDER, target).kind == "dspark"


def test_an_evaluation_compares_it_with_dflash(chain: Chain, tiny_drafter: DrafterArtifacts, tmp_path: Path) -> None:
    inputs = {"target": chain.target, "prompts": chain.prompts, "trajectories": chain.rollout}
    inputs |= {"champion": tiny_drafter.drafter, "sft": chain.sft}
    ctx = RecordingContext.under(tmp_path, inputs)
    found = ctx.run(EVALUATION, sampling=SAMPLING, speed_prompts=3, exactness_prompts=2, rounds=2).json(
        "evaluation.json"
    )
    assert (found["exactness"]["fp32_prompts"], found["exactness"]["fp32_identical"]) == (2, 2)  # greedy ones
    assert found["exactness"]["identical_share"] is None  # sampled ones only have the same distribution
    metrics = found["drafters"]["sft"]
    histogram = np.array(metrics["accepted_histogram"])
    sampled = float((histogram * np.arange(1, len(histogram) + 1)).sum() / histogram.sum())
    assert 1 < metrics["tau"] < 8 and metrics["tau"] != sampled  # averaged over what is sampled
    assert metrics["differences"]["champion"]["value"] != 0

    answers = read_table(ctx.out / "requests.parquet", REQUESTS).to_pylist()
    for arm in ("plain", "champion", "sft"):
        first, second = ([a["response_ids"] for a in answers if (a["arm"], a["round"]) == (arm, n)] for n in (0, 1))
        assert first != second, "other answers in every round: luck with answers counts as an error of the speed"
    drift = RecordingContext.under(tmp_path / "drift", inputs | {"champion": chain.sft})
    assert drift.run(DRIFT).json("drift.json")["all"]["tau"] == pytest.approx(metrics["tau"])


def test_an_evaluation_calibrates_its_confidence_on_validation_answers(
    chain: Chain, tiny_drafter: DrafterArtifacts, target: Target, tmp_path: Path
) -> None:
    inputs = {"target": chain.target, "prompts": chain.prompts, "trajectories": tiny_drafter.heldout}
    ctx = RecordingContext.under(tmp_path, inputs | {"champion": tiny_drafter.drafter, "sft": chain.sft})
    ctx.run(EVALUATION, sampling={"max_new_tokens": 8}, speed_prompts=1, exactness_prompts=0, rounds=1)
    result = EvaluationResult.read(ctx.out)
    found = result.drafters["sft"].confidence
    assert found is not None and "confidence" not in result.drafters["champion"].to_json(), "DFlash has none"
    assert ctx.json("acceptance.json")["drafters"]["sft"]["confidence"] == found.to_json()
    drafter = load_drafter(chain.sft / DRAFTER_FOLDER, target)
    stored = load_trajectories(tiny_drafter.heldout, ["heldout"]).trajectories
    traces = Replayer(target).traces({"sft": drafter}, stored)["sft"]
    assert found.decisions == sum(int(trace.on_trajectory.sum()) for trace in traces)
    assert found.accepted == pytest.approx(sum(int(trace.accepted.sum()) for trace in traces) / found.decisions)
    assert 0 < found.error_calibrated < found.error < 1
