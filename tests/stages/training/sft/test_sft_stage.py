"""The stage `sft`: from random weights, from an artifact, from a folder; what it writes and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter, read_info
from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.trace import tau
from draftsmith.stages.training.batches import token_counts
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.sft.stage import STAGE, preflight
from tests.stages.bench import Bench
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.target import MASK

SHAPE = {"num_layers": 1, "block_size": 6, "target_layer_ids": [0, 2], "mask_token": MASK}
CONFIG = {
    "drafter": SHAPE, "steps": 30, "learning_rate": 3e-3, "sequences_per_step": 4, "anchors_per_sequence": 8,
    "gamma": 4.0, "compute_dtype": "float32", "checkpoint_every": 10,
}  # fmt: skip


def train(
    folder: Path,
    made: DrafterArtifacts,
    stop_after: int | None = None,
    *,
    drafter: Path | None = None,
    shape: dict[str, Any] | None = None,
    **fields: Any,
) -> StoppingContext:
    """Run the stage. drafter: an artifact to continue from. shape: of a new drafter."""
    inputs = {"target": made.target, "trajectories": made.rollout, **({"drafter": drafter} if drafter else {})}
    ctx = StoppingContext.under(folder, inputs, stop_after=stop_after)
    STAGE.run(ctx, SftConfig.model_validate({**CONFIG, **({"drafter": shape} if shape else {}), **fields}))
    return ctx


def losses(ctx: RecordingContext) -> list[float]:
    return [values["loss"] for _, values in ctx.measured]


@pytest.mark.parametrize(
    "fields",
    [{"compute_dtype": "bfloat16"}, {"head_tokens": 200, "head_negatives": 50}],
    ids=["bfloat16", "reduced head"],
)
def test_a_few_steps_lower_the_loss(
    fields: dict[str, Any], tmp_path: Path, bench: Bench, tiny_drafter: DrafterArtifacts
) -> None:
    ctx = train(tmp_path, tiny_drafter, **fields)
    assert losses(ctx)[0] < 1.5 * np.log(900)  # sane from the first step on
    assert np.mean(losses(ctx)[-5:]) < 0.75 * losses(ctx)[0]
    drafter = load_drafter(ctx.out / DRAFTER_FOLDER, bench.target)
    assert (drafter.block_size, len(drafter.target_layer_ids)) == (6, 2)
    assert drafter.frequent_tokens is not None and len(drafter.frequent_tokens) == 900
    assert ctx.summaries["trajectories"] > 300
    assert ctx.summaries["passes"] == 30 * 4 / ctx.summaries["trajectories"]
    assert ctx.progressed[-1] == (30, 30, "steps")


def test_without_steps_a_checkpoint_is_taken_as_it_is(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    source = tiny_drafter.drafter / DRAFTER_FOLDER
    ctx = train(tmp_path, tiny_drafter, steps=0, init_from=str(source))
    taken, before = load_file(ctx.out / DRAFTER_FOLDER / "model.safetensors"), load_file(source / "model.safetensors")
    assert taken.keys() == before.keys()
    assert all(taken[name].equal(before[name]) for name in before)
    assert read_info(ctx.out / DRAFTER_FOLDER).training["steps"] == 0
    with pytest.raises(ValueError, match="init_from"):
        SftConfig(steps=0)


def test_a_dflash_drafter_continues_as_dflash2(tmp_path: Path, bench: Bench, tiny_drafter: DrafterArtifacts) -> None:
    """Without steps it proposes the same; with steps, selector and convolutions are trained with the rest."""
    shape = {"kind": "dflash2", "selector_rank": 16, "selector_top_k": 8}
    source, by_steps = str(tiny_drafter.drafter / DRAFTER_FOLDER), {}
    for steps in (0, 8):
        fields: dict[str, Any] = {"init_from": source, "learning_rate": 1e-3, "steps": steps}
        ctx = train(tmp_path / str(steps), tiny_drafter, shape=shape, **fields)
        by_steps[steps] = load_drafter(ctx.out / DRAFTER_FOLDER, bench.target)
    answers = bench.answered(8)
    drafters = {"plain": bench.drafters["trained"], "taken": by_steps[0], "trained": by_steps[8]}
    traces = Replayer(bench.target).traces(drafters, answers)
    assert isinstance(by_steps[0], DFlash2Drafter)
    assert [t.proposed.tolist() for t in traces["taken"]] == [t.proposed.tolist() for t in traces["plain"]]
    assert tau(traces["trained"]) > 0.9 * tau(traces["plain"])
    start, moved = by_steps[0].state_dict(), by_steps[8].state_dict()
    assert [name for name in start if start[name].equal(moved[name])] == []


def test_control_continues_from_a_drafter_at_its_loss(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    continued = train(tmp_path / "a", tiny_drafter, drafter=tiny_drafter.drafter, learning_rate=1e-4, steps=10)
    fresh = train(tmp_path / "fresh", tiny_drafter, steps=1)
    assert np.mean(losses(continued)) < 0.5 * losses(fresh)[0]
    assert read_info(continued.out / DRAFTER_FOLDER).training["stage"] == "sft"
    from_folder = train(
        tmp_path / "b", tiny_drafter, init_from=str(tiny_drafter.drafter / DRAFTER_FOLDER), learning_rate=1e-4, steps=10
    )
    assert losses(from_folder) == losses(continued)
    parents = (drafter_digest(tiny_drafter.drafter / DRAFTER_FOLDER),)
    for ctx in (continued, from_folder):
        assert read_info(ctx.out / DRAFTER_FOLDER).parents == parents


def test_an_adapter_needs_a_drafter_that_it_adapts(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    lora, source = {"rank": 4}, tiny_drafter.drafter / DRAFTER_FOLDER
    continued = train(tmp_path / "continued", tiny_drafter, drafter=tiny_drafter.drafter, lora=lora, steps=3)
    assert (
        losses(continued)[0] == losses(train(tmp_path / "all", tiny_drafter, drafter=tiny_drafter.drafter, steps=1))[0]
    )
    info = read_info(continued.out / DRAFTER_FOLDER)
    assert info.training["lora"] == {"rank": 4, "base": drafter_digest(source)}
    assert continued.summaries["parameters"] == sum(t.numel() for t in load_file(source / "model.safetensors").values())
    with pytest.raises(DraftsmithError, match=r"sft\.lora: random weights .* sft\.init_from"):
        train(tmp_path / "random", tiny_drafter, lora=lora)
    shape = {"kind": "dflash2", "selector_rank": 16, "selector_top_k": 8}
    with pytest.raises(DraftsmithError, match=r"a dflash that becomes a dflash2 .* sft\.drafter\.kind to dflash"):
        train(tmp_path / "upgraded", tiny_drafter, init_from=str(source), shape=shape, lora=lora)


def test_frequent_tokens_are_those_of_the_answers_that_were_trained_on_last(
    tmp_path: Path, bench: Bench, tiny_drafter: DrafterArtifacts
) -> None:
    """A line continues from its champion week after week, while the traffic changes."""
    champion = Path(shutil.copytree(tiny_drafter.drafter, tmp_path / "champion"))
    file = champion / DRAFTER_FOLDER / "frequent_tokens.npy"
    ours = np.load(file)  # of the very answers that are trained on below
    np.save(file, np.flip(ours))
    taken, trained = (
        train(tmp_path / str(steps), tiny_drafter, drafter=champion, steps=steps, adopt=not steps) for steps in (0, 2)
    )
    assert np.load(taken.out / DRAFTER_FOLDER / "frequent_tokens.npy").tolist() == np.flip(ours).tolist()
    counts = token_counts(load_trajectories(tiny_drafter.rollout).trajectories, bench.target.info.vocab_size).numpy()
    found = np.load(trained.out / DRAFTER_FOLDER / "frequent_tokens.npy")
    assert counts[found].tolist() == counts[ours].tolist() == sorted(counts, reverse=True)


def test_a_drafter_that_cannot_be_continued_is_refused_before_work(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    good = tiny_drafter.drafter / DRAFTER_FOLDER
    preflight(SftConfig(init_from=str(good)), tiny_drafter.target)
    other = Path(shutil.copytree(good, tmp_path / "other"))
    info = (other / "drafter.json").read_text()
    (other / "drafter.json").write_text(info.replace(read_info(good).target_digest, "0" * 64))
    with pytest.raises(DraftsmithError, match="adopt"):
        preflight(SftConfig(init_from=str(other)), tiny_drafter.target)
    whole = Path(shutil.copytree(good, tmp_path / "without weights"))
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    with pytest.raises(DraftsmithError, match=r"model\.safetensors"):
        preflight(SftConfig(init_from=str(whole)), tiny_drafter.target)
    with pytest.raises(DraftsmithError, match="<absent>"):
        preflight(SftConfig.model_validate({"drafter": {**SHAPE, "mask_token": "<absent>"}}), tiny_drafter.target)
    with pytest.raises(DraftsmithError, match="layer"):
        shape = {"num_layers": 1, "block_size": 6, "target_layer_ids": [1, 4], "mask_token": MASK}
        preflight(SftConfig.model_validate({"drafter": shape}), tiny_drafter.target)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    with pytest.raises(DraftsmithError, match="learning_rate"):
        train(tmp_path, tiny_drafter, learning_rate=1e30, clip_norm=1e30)
