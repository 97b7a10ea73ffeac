"""The stage `sft` on a random target: golden losses, repeatability, resuming, and what it starts from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.sft.stage import STAGE
from tests.testbed import random_target
from tests.testbed.context import RecordingContext, StoppingContext

GOLDEN = Path(__file__).parent / "golden" / "sft_losses.json"
# Float32 sums in another order (another processor, another release of torch) differ by far less; a step of training
# that is wrong by one label, offset or weight differs by far more.
GOLDEN_TOLERANCE = 1e-3
FIRST_LOSS_TOLERANCE = 1.0  # nats; logits of unit variance cost half a nat, a naive start was seen at 51
CHECKPOINT = ("config.json", "model.safetensors", "frequent_tokens.npy", "drafter.json")
SETTINGS: dict[str, Any] = {
    "drafter": {"num_layers": 2, "block_size": 5, "target_layer_ids": [1, 3]},
    "steps": 20,
    "learning_rate": 5e-3,
    "gamma": 4.0,
    "sequences_per_step": 4,
    "anchors_per_sequence": 6,
    "positions_per_chunk": 32,
    "compute_dtype": "float32",
    "head_tokens": 8,
    "head_negatives": 4,
}


@pytest.fixture(scope="module")
def inputs(plain_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trajectories")
    stored = random_target.write_trajectories(folder, random_target.trajectories(16, seed=2))
    return {"target": plain_artifact, "trajectories": stored}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, inputs: dict[str, Path], seed: int = 0, **settings: Any) -> RecordingContext:
    context = RecordingContext.under(folder, inputs, seed)
    STAGE.run(context, SftConfig.model_validate({**SETTINGS, **settings}))
    return context


def losses(context: RecordingContext) -> list[float]:
    assert [step for step, _ in context.measured] == list(range(len(context.measured)))
    return [values["loss"] for _, values in context.measured]


def checkpoint(context: RecordingContext) -> dict[str, bytes]:
    return {name: (context.out / DRAFTER_FOLDER / name).read_bytes() for name in CHECKPOINT}


def test_twenty_seeded_steps_have_the_golden_losses(tmp_path: Path, inputs: dict[str, Path]) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["settings"] == SETTINGS
    assert losses(run(tmp_path, inputs)) == pytest.approx(golden["losses"], rel=GOLDEN_TOLERANCE)


def test_training_lowers_the_loss_from_that_of_a_uniform_guess(tmp_path: Path, inputs: dict[str, Path]) -> None:
    curve = losses(run(tmp_path, inputs, head_tokens=None, steps=60))
    assert curve[0] == pytest.approx(math.log(random_target.VOCAB_SIZE), abs=FIRST_LOSS_TOLERANCE)
    assert sum(curve[-5:]) / 5 < 0.75 * curve[0]


def test_the_same_config_and_seed_give_the_same_bytes(tmp_path: Path, inputs: dict[str, Path]) -> None:
    first, second = (run(tmp_path / name, inputs, steps=6) for name in "ab")
    assert checkpoint(first).keys() == checkpoint(second).keys()
    for name, content in checkpoint(first).items():
        assert content == checkpoint(second)[name], name
    assert checkpoint(run(tmp_path / "c", inputs, seed=1, steps=6)) != checkpoint(first)


@pytest.mark.parametrize(
    ("stop_after", "dtype"),
    [(1, "bfloat16"), (5, "float32")],  # 5: at a regular checkpoint
)
def test_interrupted_training_ends_like_uninterrupted_training(
    stop_after: int, dtype: str, tmp_path: Path, inputs: dict[str, Path]
) -> None:
    settings: dict[str, Any] = {"steps": 9, "checkpoint_every": 5, "compute_dtype": dtype}
    whole = run(tmp_path / "whole", inputs, **settings)
    context = StoppingContext.under(tmp_path / "parts", inputs, stop_after=stop_after)
    config = SftConfig.model_validate({**SETTINGS, **settings})
    with pytest.raises(StageInterrupted):
        STAGE.run(context, config)
    assert len(context.measured) == stop_after
    context.stop = False
    STAGE.run(context, config)
    assert any(f"step {stop_after}" in line for line in context.logs)
    assert losses(context) == losses(whole)
    assert checkpoint(context) == checkpoint(whole)


def test_killed_training_repeats_what_its_last_checkpoint_lacks(tmp_path: Path, inputs: dict[str, Path]) -> None:
    def kill() -> None:
        raise KeyboardInterrupt

    config = SftConfig.model_validate({**SETTINGS, "steps": 9, "checkpoint_every": 3})
    killed = StoppingContext.under(tmp_path / "killed", inputs, stop_after=7, act=kill)
    with pytest.raises(KeyboardInterrupt):
        STAGE.run(killed, config)
    resumed = RecordingContext.under(tmp_path / "killed", inputs)
    resumed.measured = list(killed.measured)
    STAGE.run(resumed, config)
    whole = run(tmp_path / "whole", inputs, steps=9, checkpoint_every=3)
    assert losses(resumed) == losses(whole)  # rewound to step 6, nothing twice
    assert checkpoint(resumed) == checkpoint(whole)


@pytest.mark.parametrize("drafter", ["dflash", 3, None, [], {"kind": "medusa"}], ids=str)
def test_a_drafter_section_without_a_known_kind_is_a_config_error(drafter: Any) -> None:
    with pytest.raises(ValidationError, match="dspark"):
        SftConfig.model_validate({"drafter": drafter})


def test_preflight_refuses_a_start_that_is_not_there(plain_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert STAGE.preflight is not None
    with pytest.raises(DraftsmithError, match="init_from"):
        STAGE.preflight(SftConfig.model_validate({**SETTINGS, "init_from": "/no/such/folder"}), plain_artifact)
