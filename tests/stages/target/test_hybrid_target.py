"""A trained target with recurrent layers and a good drafter, from answers to tau."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_prompts
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.trace import tau
from draftsmith.stages.target.causal_lm import Target
from tests.stages.bench import Bench
from tests.testbed.drafter import DrafterArtifacts, DrafterRecipe, drafter_artifacts
from tests.testbed.procedural.training import ShapeConfig, TrainingTextConfig
from tests.testbed.target import target_folder

SHAPE = ShapeConfig(hidden_size=96, layers=3, heads=3, kv_heads=1, intermediate_size=192, full_attention_every=3)
TAUGHT = TrainingTextConfig(documents=2000, steps=300, rows_per_step=5, learning_rate=8e-3)
RECIPE = DrafterRecipe(name="hybrid", answers=96, validation=1, heldout=8, spare=24, max_new_tokens=128, steps=200)


@pytest.fixture(scope="module")
def made(tiny_prompts: Path) -> DrafterArtifacts:
    return drafter_artifacts(target_folder("target-hybrid", TAUGHT, SHAPE), tiny_prompts, RECIPE)


@pytest.fixture(scope="module")
def hybrid(made: DrafterArtifacts) -> Bench:
    """Return a bench with only the prompts without near-ties of target and drafter."""
    target = Target.load(made.target)
    bench = Bench(target, {}, list(load_prompts(made.prompts, ["heldout"])), {})
    bench.greedy.update({name: answer.response_ids for name, answer in bench.answers(bench.requests()).items()})
    return bench.with_drafters({"trained": load_drafter(made.drafter / DRAFTER_FOLDER, target)})


def test_answers_are_the_same_with_a_drafter_and_replay_finds_their_verify_steps(hybrid: Bench) -> None:
    assert not hybrid.target.info.rewindable and len(hybrid.prompts) >= 8
    eos = hybrid.target.eos_ids
    assert any(answer[-1] in eos for answer in hybrid.greedy.values()), "it has learned how an answer ends"
    drafted = hybrid.answers(hybrid.requests(), "trained", slots=4)
    assert {name: answer.response_ids for name, answer in drafted.items()} == hybrid.greedy
    texts = [drafted[prompt.prompt_id].trajectory() for prompt in hybrid.prompts]
    traces = Replayer(hybrid.target).traces(hybrid.drafters, texts)["trained"]
    sequential = hybrid.sequential_traces(texts, "trained")
    for each, trace, plain in zip(texts, traces, sequential, strict=True):
        assert drafted[each.trajectory_id].verify_steps == len(trace.anchors)
        for name in ("anchors", "accepted", "proposed"):
            assert np.array_equal(getattr(trace, name), getattr(plain, name)), name
    assert tau(traces) > 2
