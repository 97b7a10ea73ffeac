"""Stages `sft` and `opd` with a target's own head: taken as it is, trained, and interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.chains import replay_sequentially
from draftsmith.stages.runtime.stage import Stage
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.opd.stage import STAGE as OPD
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.stages.bench import tau
from tests.stages.drafters.mtp.test_checkpoint import edited
from tests.testbed import random_target
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.mtp import native_head, target_with_head

NATIVE = {"kind": "mtp", "block_size": 5}


def test_the_stage_writes_the_targets_own_head(tmp_path: Path) -> None:
    target = target_with_head(tmp_path / "target", "mimo")
    answers = random_target.write_trajectories(tmp_path / "answers", random_target.trajectories(8))
    inputs = {"target": tmp_path / "target" / "out", "trajectories": answers}
    ctx = RecordingContext.under(tmp_path / "sft", inputs)
    ctx.run(SFT, drafter=NATIVE, steps=0)
    written = load_drafter(ctx.out / DRAFTER_FOLDER, target)
    assert (written.kind, written.block_size) == ("mtp", 5)
    expected = native_head(target, block_size=5).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.state_dict().items())


# ---- trained


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the inputs of a training: a target of random weights with a head, and its greedy answers."""
    folder = tmp_path_factory.mktemp("mimo")
    target = target_with_head(folder / "target", "mimo")
    return {
        "target": folder / "target" / "out",
        "trajectories": random_target.write_trajectories(folder / "answers", answers(target, 24, seed=3)),
    }


def answers(target: Target, count: int, seed: int) -> list[Trajectory]:
    prompts = [t.tokens[:4] for t in random_target.trajectories(count, seed)]
    requests = [Request(f"p{i}/0", prompt, 24) for i, prompt in enumerate(prompts)]
    done = EmbeddedEngine(target, slots=8, capacity=64).generate(requests)
    return sorted((c.trajectory() for c in done), key=lambda t: int(t.trajectory_id[1:-2]))


def tau_of(target: Target, drafter: Drafter, seed: int = 4) -> float:
    """Return the acceptance length on answers that no training has read."""
    head, traces = drafter.head_over(target.head_weight, None), []
    for trajectory in answers(target, 12, seed):
        tokens = torch.tensor([trajectory.tokens])
        features = target.read(tokens, drafter.target_layer_ids).features
        assert features is not None
        with torch.no_grad():
            context = drafter.encode(features, tokens, torch.arange(tokens.shape[1])[None])
        traces.append(replay_sequentially(drafter, context, trajectory, drafter.block_size, head))
    return tau(traces)


TRAINING: dict[str, Any] = {
    "sequences_per_step": 6, "anchors_per_sequence": 8, "compute_dtype": "float32", "learning_rate": 3e-3,
}  # fmt: skip


def test_sft_and_then_opd_raise_tau(world: dict[str, Path], tmp_path: Path) -> None:
    target = Target.load(world["target"], device="cpu")
    sft = RecordingContext.under(tmp_path / "sft", world).run(SFT, **TRAINING, drafter=NATIVE, steps=80)
    assert sft.logs[0] == "starts from the target's own" and sft.summaries["tflop"] > 0
    opd = RecordingContext.under(tmp_path / "opd", {**world, "drafter": sft.out})
    opd.run(OPD, **TRAINING, anchors="chains", steps=40)
    assert sft.measured[-1][1]["loss"] < 0.8 * sft.measured[0][1]["loss"]
    taus = [
        tau_of(target, drafter)
        for drafter in (
            native_head(target, block_size=5),
            *(load_drafter(each.out / DRAFTER_FOLDER, target) for each in (sft, opd)),
        )
    ]
    assert taus[0] < 1.1 and taus[1] > taus[0] + 0.1 and taus[2] > taus[0] + 0.1, taus
    changed = load_drafter(opd.out / DRAFTER_FOLDER, target).state_dict()
    assert not any(torch.equal(changed[name], value) for name, value in native_head(target).state_dict().items())


CASES: dict[str, tuple[Stage, dict[str, Any]]] = {
    "sft": (SFT, {"drafter": NATIVE}),
    "sft, adapter": (SFT, {"drafter": NATIVE, "lora": {"rank": 2}}),
    "opd in chains": (OPD, {"anchors": "chains"}),
    "opd at successors": (OPD, {"anchors": "successors"}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_training_ends_with_the_same_bits(case: str, world: dict[str, Path], tmp_path: Path) -> None:
    stage, fields = CASES[case]
    inputs = dict(world)
    if stage is OPD:
        inputs["drafter"] = RecordingContext.under(tmp_path / "own", world).run(SFT, drafter=NATIVE, steps=0).out

    def run(folder: Path, stop_after: int | None = None) -> StoppingContext:
        ctx = StoppingContext.under(folder, inputs, stop_after=stop_after)
        return ctx.run(stage, **TRAINING | {"compute_dtype": "bfloat16", "steps": 5}, **fields)

    whole = run(tmp_path / "whole")
    with pytest.raises(StageInterrupted):
        run(tmp_path / "cut", 3)
    last = run(tmp_path / "cut")
    assert last.measured == whole.measured[3:]
    name = f"{DRAFTER_FOLDER}/model.safetensors"
    assert (last.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_without_steps_a_target_needs_a_head(tmp_path: Path) -> None:
    target = target_with_head(tmp_path / "target", "mimo")
    assert target.folder is not None
    edited(lambda tensors: [tensors.pop(name) for name in [*tensors] if "mtp_layers" in name])(target.folder)
    inputs = {
        "target": tmp_path / "target" / "out",
        "trajectories": random_target.write_trajectories(tmp_path / "answers", random_target.trajectories(8)),
    }
    with pytest.raises(DraftsmithError, match="has no MTP head"):
        RecordingContext.under(tmp_path / "as it is", inputs).run(SFT, drafter=NATIVE, steps=0)
    ctx = RecordingContext.under(tmp_path / "trained", inputs).run(SFT, **TRAINING, drafter=NATIVE, steps=2)
    assert ctx.logs[0] == "starts from the target's last layer, as a head"
    assert load_drafter(ctx.out / DRAFTER_FOLDER, target).kind == "mtp"
