"""Decoding with blocks that the drafter's confidence cuts: lossless, its steps are replay's, and less is verified."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import upgraded
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.drafters.dspark.shape import DSparkConfig
from draftsmith.stages.engines import embedded, verification
from draftsmith.stages.engines.base import SamplingParams
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.corpus import replay_all
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.bench import CAPACITY, Bench, trajectory_of
from tests.stages.engines import test_drawn_proposals as of_law
from tests.testbed import random_target, ties
from tests.testbed.dspark import random_dspark

law = of_law.law  # the fixture
THRESHOLD = 0.6
CUT = DraftingConfig(confidence=THRESHOLD)


@pytest.fixture(scope="module")
def drafter(bench: Bench) -> DSparkDrafter:
    """The test bed's, as a DSpark that proposes the same, with a confidence of random weights around 0.8."""
    made = upgraded(bench.drafters["trained"], DSparkConfig(kind="dspark", markov_rank=8), bench.target, seed=0)
    assert isinstance(made, DSparkDrafter) and made.confidence_head is not None
    proj = made.confidence_head.proj
    proj.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    prompt = bench.prompts[0]
    text = torch.tensor([prompt.token_ids + bench.greedy[prompt.prompt_id]])
    context = made.encode(bench.target.features(text, made.target_layer_ids), text, torch.arange(text.shape[1])[None])
    anchors = torch.arange(len(prompt.token_ids), text.shape[1])[None]
    head = made.drafting_head(bench.target.head_weight, None)
    said = made.propose(context, text.gather(1, anchors), anchors, made.block_size, head).confidence
    assert said is not None
    proj.weight.data /= said.std()
    proj.bias.data.fill_(1.5 - float(said.mean() / said.std()))
    return made


@pytest.mark.parametrize("slots", [1, 5])
def test_greedy_answers_are_plain_decodings_and_their_steps_are_those_of_replay(
    slots: int, drafter: DSparkDrafter, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    step = Target.step

    def counted(self: Target, ids: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        read.append(ids.shape[1])
        return step(self, ids, *arguments, **named)

    monkeypatch.setattr(Target, "step", counted)
    requests = bench.requests(8)

    def decoded(drafting: DraftingConfig) -> tuple[list[Any], float]:
        """Answers in the order of the requests, and tokens a row of the forwards that verify, in the mean."""
        read.clear()
        engine = EmbeddedEngine(bench.target, drafter, slots=slots, capacity=CAPACITY, drafting=drafting)
        found = {answer.request.request_id: answer for answer in engine.generate(requests)}
        return [found[r.request_id] for r in requests], float(np.mean([w for w in read if w <= drafter.block_size]))

    answers, width = decoded(CUT)
    whole, width_of_whole = decoded(DraftingConfig())
    assert width_of_whole == drafter.block_size
    assert width < (0.75 if slots == 1 else 0.95) * width_of_whole
    assert sum(len(a.steps) for a in answers) > sum(len(a.steps) for a in whole)
    for answer in answers:
        assert answer.response_ids == bench.greedy[answer.request.request_id]

    texts = [trajectory_of(answer) for answer in answers]
    clear = [ties.cut_margin(bench.target, drafter, text, THRESHOLD) > ties.CUT_TIE for text in texts]
    assert sum(clear) > 4
    traces = replay_all(bench.target, {"it": drafter}, texts, CUT)["it"]
    for answer, trace, compared in zip(answers, traces, clear, strict=True):
        if compared:
            steps = [(s.anchor, s.accepted, s.proposed) for s in answer.steps]
            assert steps == list(
                zip(trace.anchors.tolist(), trace.accepted.tolist(), trace.proposed.tolist(), strict=True)
            )


def test_sampled_answers_follow_the_target(
    law: np.ndarray, plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut that looks at the proposals themselves is seen."""
    drafter, cut = random_dspark(plain_target), DraftingConfig(confidence=0.7)
    found = of_law.answers(plain_target, drafter, drafting=cut)
    accepted = [step.accepted for answer in found for step in answer.steps]
    assert min(accepted.count(n) for n in (0, 1, 2)) > 10
    assert of_law.p_value(found, law) > of_law.ALARM
    few = of_law.answers(plain_target, drafter, 40, slots=7, drafting=cut)
    for answer, other in zip(found, few, strict=False):  # whatever the batch, whose rows are cut at other places
        assert answer.response_ids == other.response_ids

    def by_their_tokens(*arguments: Any) -> verification.Drafted:
        drafted = verification.draft(*arguments)
        small = (drafted.tokens % of_law.CLASSES < 3).long().cumprod(1).sum(1)
        return replace(drafted, verified=small.tolist())

    monkeypatch.setattr(embedded, "draft", by_their_tokens)
    found = of_law.answers(plain_target, drafter, 2 * of_law.ANSWERS, drafting=cut)
    assert of_law.p_value(found, law) < of_law.ALARM


def test_greedy_and_sampled_requests_share_a_batch(plain_target: Target) -> None:
    drafter = random_dspark(plain_target)
    texts = random_target.trajectories(6, seed=9)
    params = [SamplingParams(14, temperature=1.0 * (i % 2)) for i in range(6)]
    requests = [of_law.Request(str(i), t.tokens[: 4 + i], params[i], seed=i) for i, t in enumerate(texts)]
    plain, cut = (
        {a.request.request_id: a.response_ids for a in engine.generate(requests)}
        for engine in (
            EmbeddedEngine(plain_target, slots=3, capacity=64),
            EmbeddedEngine(plain_target, drafter, slots=3, capacity=64, drafting=CUT),
        )
    )
    assert all(cut[str(i)] == plain[str(i)] for i in (0, 2, 4))


def test_a_drafter_without_a_confidence_is_refused(plain_target: Target) -> None:
    without = random_dspark(plain_target, confidence_head=False)
    with pytest.raises(DraftsmithError, match=r"drafting\.confidence: this dspark has no confidence head"):
        EmbeddedEngine(plain_target, without, drafting=CUT)
