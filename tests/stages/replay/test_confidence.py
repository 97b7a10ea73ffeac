"""The confidence of replayed proposals, against blocks that are drafted one by one from the proposals themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.replay import chains
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from tests.testbed.dspark import random_dspark


def answered(target: Target, drafter: Drafter, length: int) -> Trajectory:
    """Return a text that continues with the drafter's own best block now and then, so that proposals are accepted."""
    head = drafter.drafting_head(target.head_weight, None)
    tokens = [5, 3, 9, 1]
    while len(tokens) < length:
        ids = torch.tensor([tokens])
        context = drafter.encode(target.features(ids, drafter.target_layer_ids), ids, torch.arange(len(tokens))[None])
        anchor = len(tokens) - 1
        block = drafter.propose(context, ids[:, -1:], torch.tensor([[anchor]]), drafter.block_size, head)[0, 0]
        tokens += [*block[: len(tokens) % drafter.block_size].tolist(), 7 + len(tokens) % 5]
    return Trajectory(f"t{length}", tokens[:length], 4)


def plain_confidence(
    target: Target, drafter: Drafter, text: Trajectory, anchor: int, proposed: np.ndarray
) -> list[float]:
    """Return the confidence in each proposal of a block, after the proposals before it."""
    ids = torch.tensor([text.tokens])
    with torch.no_grad():
        features = target.features(ids, drafter.target_layer_ids)
        context = drafter.encode(features, ids, torch.arange(ids.shape[1])[None])
        before = torch.tensor([[[text.tokens[anchor], *proposed[:-1].tolist()]]])
        logits: list[float] = drafter.confidence(drafter.block_hidden(context, before, torch.tensor([[anchor]])))[
            0, 0
        ].tolist()
    return logits


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.5)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("reads_token", [True, False])
def test_the_confidence_is_that_of_blocks_drafted_one_by_one(
    reads_token: bool, sampling: SamplingParams, plain_target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of greedy and of sampled proposals, in float32 within 2e-4; also from the cache of an interrupted replay."""
    monkeypatch.setitem(chains.BLOCKS_PER_ROUND, "cpu", 3)  # several chunks of an answer
    drafter = random_dspark(plain_target, confidence_reads_token=reads_token)
    texts = [answered(plain_target, drafter, length) for length in (31, 40, 5)]
    replayer = Replayer(plain_target, ReplayOptions(sampling=sampling, with_confidence=True))
    traces = replayer.traces({"it": drafter}, texts, cache=tmp_path)["it"]
    accepted = 0
    for text, trace in zip(texts, traces, strict=True):
        assert trace.confidence is not None and trace.confidence.shape == trace.proposed.shape
        for step, anchor in enumerate(trace.anchors):
            reached = int(trace.on_trajectory[step])
            expected = plain_confidence(plain_target, drafter, text, int(anchor), trace.proposed[step])
            np.testing.assert_allclose(trace.confidence[step, :reached], expected[:reached], atol=2e-4)
            accepted += int(trace.accepted[step])
    assert accepted > 10
    for again, trace in zip(replayer.traces({"it": drafter}, texts, cache=tmp_path)["it"], traces, strict=True):
        np.testing.assert_array_equal(again.confidence, trace.confidence)


def test_only_a_confidence_that_is_there_and_asked_for_is_computed(
    plain_target: Target, plain_drafter: DFlashDrafter, tmp_path: Path
) -> None:
    headless, drafter = random_dspark(plain_target, confidence_head=False), random_dspark(plain_target)
    texts = [answered(plain_target, drafter, 20)]
    arms = {"dflash": plain_drafter, "headless": headless, "dspark": drafter}

    def found(*, asked: bool) -> dict[str, Steps]:
        replayer = Replayer(plain_target, ReplayOptions(with_confidence=asked))
        return {arm: traces[0] for arm, traces in replayer.traces(arms, texts, cache=tmp_path / str(asked)).items()}

    assert {arm: each.confidence is not None for arm, each in found(asked=True).items()} == {
        "dflash": False, "headless": False, "dspark": True,
    }  # fmt: skip
    assert all(each.confidence is None for each in found(asked=False).values())
    for arm, each in found(asked=True).items():
        np.testing.assert_array_equal(each.proposed, found(asked=False)[arm].proposed)
