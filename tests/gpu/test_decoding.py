"""The target's forwards, decoding, replay and mining on the device, in float32, against the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.registry import DrafterConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.chains import replay_sequentially
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.self_check import check_agreement
from tests.gpu.world import EAGLE3, TINY, make_drafter, make_target, make_trajectories
from tests.testbed import ties

NEW_TOKENS = 24
LOGPROBS = 1e-3  # nats


@pytest.fixture(scope="module")
def reference() -> Target:
    """Return the target on the CPU."""
    return make_target(TINY, "cpu", "float32", alike=True)


@pytest.fixture(scope="module")
def target(device: str) -> Target:
    return make_target(TINY, device, "float32", alike=True)


@pytest.fixture(scope="module")
def answers(reference: Target) -> list[Trajectory]:
    """Return greedy answers of the CPU without near-ties, to random prompts."""
    prompts = [t.tokens for t in make_trajectories(TINY, equally_long=False)]
    greedy = [
        Trajectory(name, prompts[int(name)] + ids, len(prompts[int(name)]))
        for name, ids in answered(reference, None, prompts).items()
    ]
    clear = [answer for answer in greedy if ties.target_margin(reference, answer) > ties.TARGET_TIE]
    assert len(clear) >= 3
    return clear


def answered(target: Target, drafter: Drafter | None, prompts: list[list[int]]) -> dict[str, list[int]]:
    """Return greedy answers by the index of their prompt."""
    engine = EmbeddedEngine(target, drafter, slots=4, capacity=TINY.longest + 2 * NEW_TOKENS)
    requests = [Request(str(i), ids, NEW_TOKENS) for i, ids in enumerate(prompts)]
    return {done.request.request_id: done.response_ids for done in engine.generate(requests)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_forwards_of_a_target_agree(dtype: str, device: str) -> None:
    check_agreement(make_target(TINY, device, dtype, alike=True), "random weights")


def test_features_equal_the_cpus(target: Target, reference: Target, answers: list[Trajectory]) -> None:
    ids = torch.tensor([answers[0].tokens])
    ours = target.features(ids.to(target.device), (0, 3)).cpu()
    expected = reference.read(ids, (0, 3)).features
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [TINY.drafter, EAGLE3], ids=["dflash", "eagle3"])
def test_answers_traces_and_scores_equal_sequential_drafting_on_the_cpu(
    shape: DrafterConfig, target: Target, reference: Target, answers: list[Trajectory]
) -> None:
    drafter = make_drafter(shape, target, alike=True).eval()
    on_cpu = make_drafter(shape, reference, alike=True).eval()
    clear = [answer for answer in answers if ties.draft_margin(reference, on_cpu, answer) > ties.DRAFT_TIE]
    assert len(clear) >= 2
    drafted = answered(target, drafter, [answer.tokens[: answer.prompt_length] for answer in clear])
    assert list(dict(sorted(drafted.items())).values()) == [a.tokens[a.prompt_length :] for a in clear]

    by_chains = Replayer(target, ReplayOptions(chains=4)).traces({"": drafter}, clear)[""]
    ours, expected = mined(target, drafter, clear), mined(reference, on_cpu, clear)
    head = on_cpu.drafting_head(reference.head_weight, None)
    for answer, chained in zip(clear, by_chains, strict=True):
        trace = replay_sequentially(on_cpu, context_of(on_cpu, reference, answer), answer, on_cpu.block_size, head)
        of_mining = ours[answer.trajectory_id]
        for replayed in (chained, of_mining):
            np.testing.assert_array_equal(replayed.anchors, trace.anchors)
            np.testing.assert_array_equal(replayed.accepted, trace.accepted)
            np.testing.assert_array_equal(replayed.proposed, trace.proposed)
        theirs = expected[answer.trajectory_id]
        np.testing.assert_allclose(of_mining.logprobs, theirs.logprobs, atol=LOGPROBS)


def mined(target: Target, drafter: Drafter, answers: list[Trajectory]) -> dict[str, Steps]:
    """Return scored traces by trajectory id."""
    return {answer.trajectory_id: trace for group in Replayer(target).mine(drafter, answers) for answer, trace in group}


@torch.no_grad()
def context_of(drafter: Drafter, target: Target, answer: Trajectory) -> Context:
    """Return the drafter's context of one answer on the CPU."""
    tokens = torch.tensor([answer.tokens])
    features = target.read(tokens, drafter.target_layer_ids).features
    assert features is not None
    return drafter.encode(features, tokens, torch.arange(tokens.shape[1])[None])
