"""Replay of drawn proposals behind targets that are not plain: soft caps, sinks and windows, recurrent states."""

from __future__ import annotations

import pytest
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.corpus import mine, replay_all
from draftsmith.stages.replay.trace import Trajectory
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.bench import trajectory_of
from tests.stages.replay.test_drawn import LAW, Plainly
from tests.testbed.dspark import random_dspark
from tests.testbed.families import write_family


@pytest.fixture(scope="module", params=["Gemma 2", "gpt-oss", "Qwen3.5 with images"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("family")
    write_family(folder, request.param)
    return Target.of(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def drafter(target: Target) -> Drafter:
    return random_dspark(target)


@pytest.fixture(scope="module")
def texts(target: Target, drafter: Drafter) -> list[Trajectory]:
    """Answers that were decoded with the drafter, in rows that others take over."""
    params = SamplingParams(12, LAW.temperature, LAW.top_p, LAW.top_k)
    requests = [Request(str(i), [5 + i, 3, 9, 1][: 3 + i % 2], params, i) for i in range(6)]
    answers = EmbeddedEngine(target, drafter, slots=2, capacity=32).generate(requests)
    return [trajectory_of(answer) for answer in answers if len(answer.response_ids) > 4][:3]


def test_replay_equals_the_plain_reference(texts: list[Trajectory], drafter: Drafter, target: Target) -> None:
    expected = [Plainly(target, drafter, text).trace() for text in texts]
    assert len({accepted for trace in expected for _, accepted, _ in trace}) > 2
    for chains in (1, None):
        traces = replay_all(target, {"it": drafter}, texts, law=LAW, chains=chains)["it"]
        found = [list(zip(t.anchors.tolist(), t.accepted.tolist(), t.proposed.tolist(), strict=True)) for t in traces]
        assert found == expected


def test_what_was_drawn_is_scored_on_the_prefix_that_it_was_made_on(
    texts: list[Trajectory], drafter: Drafter, target: Target
) -> None:
    behind_rejections = 0
    for group in mine(target, drafter, texts, law=LAW):
        for text, trace, scores in zip(group.trajectories, group.traces, group.scores, strict=True):
            for anchor, kept, row, found in zip(
                trace.anchors.tolist(), trace.accepted, trace.proposed.tolist(), scores.target_logprobs, strict=True
            ):
                judged = min(len(row), len(text.tokens) - 1 - anchor)
                hidden = target.read(torch.tensor([text.tokens[: anchor + 1] + row])).hidden[
                    0, anchor : anchor + judged
                ]
                law = target.logits(hidden).log_softmax(-1)
                expected = law.gather(1, torch.tensor(row[:judged])[:, None])[:, 0]
                torch.testing.assert_close(torch.from_numpy(found[:judged]), expected, atol=2e-4, rtol=2e-4)
                behind_rejections += max(0, judged - int(kept) - 1)
    assert behind_rejections > 4
