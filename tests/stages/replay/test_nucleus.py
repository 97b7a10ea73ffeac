"""Answers replayed under a top-p or top-k that cannot produce them: counted, reported, verified before truncation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.sampling import is_truncated, probabilities, truncation_mask
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.sampled import ExpectedCommits, TargetSampler, truncation_warning
from draftsmith.stages.replay.trace import AcceptanceStats
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import SamplingParams
from tests.testbed.dspark import random_dspark
from tests.testbed.random_target import random_drafter

WIDE, NARROW = SamplingParams(1.0), SamplingParams(1.0, 0.9)
NARROWER = [NARROW, SamplingParams(1.0, 0.95, 12)]
COUNT, LENGTH = 60, 24


def sample_answers(target: Target, sampling: SamplingParams) -> list[Trajectory]:
    requests = [Request(str(i), [5, 3, 9, 1], LENGTH, sampling, i) for i in range(COUNT)]
    answers = EmbeddedEngine(target, slots=COUNT, capacity=LENGTH + 8).generate(requests)
    return [answer.trajectory() for answer in answers if len(answer.response_ids) > 1]  # as they are loaded


@pytest.fixture(scope="module")
def wide(plain_target: Target) -> list[Trajectory]:
    return sample_answers(plain_target, WIDE)


def distributions(target: Target, text: Trajectory) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distributions [n, V] before truncation, and tokens [n], of the positions that verify steps commit."""
    logits = target.logits(target.read(torch.tensor([text.tokens])).hidden[0, text.first_anchor : -1])
    return probabilities(logits, 1.0), torch.tensor(text.tokens[text.first_anchor + 1 :])


@pytest.mark.parametrize("narrow", NARROWER, ids=str)
def test_the_share_outside_the_nucleus_is_counted_and_reported(
    narrow: SamplingParams, wide: list[Trajectory], plain_target: Target, tmp_path: Path
) -> None:
    drafters: dict[str, Drafter] = {"samples": random_dspark(plain_target), "argmax": random_drafter(plain_target)}

    def replayed(texts: list[Trajectory], sampling: SamplingParams) -> dict[str, AcceptanceStats]:
        replayer = Replayer(plain_target, ReplayOptions(sampling=sampling))
        return replayer.acceptance(drafters, texts, cache=tmp_path / f"{sampling.truncates}{texts is wide}")

    count = total = 0
    for text in wide:
        whole, tokens = distributions(plain_target, text)
        count += int(truncation_mask(whole, narrow).gather(1, tokens[:, None]).sum())
        total += len(tokens)
    for _ in range(2):  # the second time from the cache
        found = replayed(wide, narrow)
        assert found["samples"].outside_nucleus_share == count / total > 0.05
        assert found["argmax"].outside_nucleus_share is None
    assert truncation_warning(found["samples"].outside_nucleus_share, narrow) is not None

    assert replayed(wide, WIDE)["samples"].outside_nucleus_share == 0
    own = replayed(sample_answers(plain_target, narrow), narrow)["samples"].outside_nucleus_share
    assert own == 0 and truncation_warning(own, narrow) is None and truncation_warning(None, narrow) is None

    groups = Replayer(plain_target, ReplayOptions(sampling=narrow)).mine(drafters["samples"], wide)
    traces = [trace for group in groups for trace in group.traces]
    assert sum(trace.outside_nucleus for trace in traces) == count


@pytest.mark.parametrize("narrow", NARROWER, ids=str)
def test_a_token_outside_is_verified_by_the_distribution_before_truncation(
    narrow: SamplingParams, wide: list[Trajectory], plain_target: Target
) -> None:
    """It is accepted with q/p of the p before truncation, not for certain, as with a p of 0."""
    for number, text in enumerate(wide):
        whole, tokens = distributions(plain_target, text)
        indices = torch.nonzero(is_truncated(whole, tokens, narrow))[:, 0]
        hidden = plain_target.read(torch.tensor([text.tokens])).hidden
        sampled = TargetSampler.for_trajectories(plain_target, hidden, [text], narrow, 4)
        for index in indices[indices < len(tokens) - 1].tolist():
            anchor, y = torch.tensor([[text.first_anchor + index]]), tokens[index]
            assert sampled.distribution_at(torch.tensor([0]), anchor[0])[0, y] == 0
            found = ExpectedCommits(sampled, anchor)
            found.take(
                0.4 * whole[index, y][None, None], sampled.answer_probability(anchor, y[None, None]), y[None, None]
            )
            assert float(found.committed) == pytest.approx(1.4)
        if number >= 10:
            break


def test_tau_is_close_to_that_of_the_true_sampling(wide: list[Trajectory], plain_target: Target) -> None:
    """A fifth of the tokens are outside: if all of them were accepted, tau would be a tenth higher."""
    drafter = {"it": random_dspark(plain_target)}
    true, stated = (
        Replayer(plain_target, ReplayOptions(sampling=sampling)).acceptance(drafter, wide)["it"].tau
        for sampling in (WIDE, SamplingParams(1.0, 0.8))
    )
    assert stated == pytest.approx(true, rel=0.05)


def test_truncation_without_sorting_equals_truncation_with_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(3 * torch.randn(50, 40, generator=generator, dtype=torch.float64), -1)
    for sampling in [
        *(SamplingParams(1.0, top_p, top_k) for top_p in (0.3, 0.9, 0.99) for top_k in (0, 5)),
        SamplingParams(1.0, top_k=5),
    ]:
        expected = truncation_mask(p, sampling)
        found = torch.stack([is_truncated(p, torch.full((50,), token), sampling) for token in range(40)], -1)
        assert np.array_equal(found.numpy(), expected.numpy()) and expected.any()
