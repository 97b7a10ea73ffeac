"""Decoding is lossless in float32: without a drafter, with one, and by transformers it gives the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.sampling import sampling_distribution as distribution
from draftsmith.stages.drafters.sampling import uniform
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.info import model_path
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.bench import GREEDY_TOKENS, Bench, step_rows
from tests.testbed.drafter import DrafterArtifacts

SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, top_k=20)


def tokens_of(answers: dict[str, Completion]) -> dict[str, list[int]]:
    return {name: completion.response_ids for name, completion in answers.items()}


@dataclass(frozen=True)
class Sampled:
    """Sampled requests, and their answers without a drafter."""

    requests: list[Request]
    answers: dict[str, list[int]]

    def of(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        return {request.request_id: self.answers[request.request_id] for request in requests}


@pytest.fixture(scope="module")
def sampled(bench: Bench) -> Sampled:
    requests = bench.requests(None, 32, SAMPLED, seed=7)
    answers = bench.answers(requests, slots=16)
    requests = bench.clearly_drawn(requests, answers)
    assert len(requests) > 40
    return Sampled(requests, {request.request_id: answers[request.request_id].response_ids for request in requests})


def test_greedy_decoding_equals_generate_of_transformers(bench: Bench, tiny_drafter: DrafterArtifacts) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(tiny_drafter.target), dtype=torch.float32)
    prompts = [p.token_ids for p in bench.prompts]
    width = max(map(len, prompts))
    out = model.generate(
        input_ids=torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts]),
        attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]),
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        eos_token_id=sorted(bench.target.eos_ids),
        pad_token_id=0,
    )
    for prompt, row in zip(bench.prompts, out[:, width:].tolist(), strict=True):
        ours = bench.greedy[prompt.prompt_id]
        assert row[: len(ours)] == ours
        assert ours[-1] in bench.target.eos_ids or len(ours) == GREEDY_TOKENS


@pytest.mark.parametrize(
    ("drafter", "slots", "block_size", "head_tokens"),
    [
        ("trained", 3, 5, None),
        ("trained", 8, 2, None),
        ("trained", 8, None, 150),
        ("untrained", 8, None, None),
        ("untrained", 8, 4, 60),
    ],
)
def test_greedy_decoding_with_a_drafter_equals_that_without(
    drafter: str, slots: int, block_size: int | None, head_tokens: int | None, bench: Bench
) -> None:
    requests = bench.requests(12)
    answers = bench.answers(requests, drafter, slots, block_size=block_size, head_tokens=head_tokens)
    assert tokens_of(answers) == {request.request_id: bench.greedy[request.request_id] for request in requests}
    proposals = (block_size or bench.drafters[drafter].block_size) - 1
    for completion in answers.values():
        assert completion.steps is not None and completion.steps.proposed.shape == (completion.verify_steps, proposals)
        stopped = completion.response_ids[-1] in bench.target.eos_ids
        assert completion.finish_reason == ("stop" if stopped else "length")


@pytest.mark.parametrize(
    ("drafter", "slots", "block_size", "head_tokens"),
    [("trained", 1, None, None), ("trained", 8, 4, None), ("trained", 3, None, 150), ("untrained", 8, None, None)],
)
def test_sampling_with_a_drafter_gives_the_tokens_of_sampling_without(
    drafter: str,
    slots: int,
    block_size: int | None,
    head_tokens: int | None,
    bench: Bench,
    sampled: Sampled,
) -> None:
    requests = sampled.requests[:20]
    answers = bench.answers(requests, drafter, slots, block_size=block_size, head_tokens=head_tokens)
    assert tokens_of(answers) == sampled.of(requests)
    assert sum(tokens != bench.greedy[name][:32] for name, tokens in sampled.answers.items()) > 20


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_batch(bench: Bench, sampled: Sampled) -> None:
    requests = sampled.requests
    assert tokens_of(bench.answers(requests[::-1], slots=11)) == sampled.answers
    assert tokens_of(bench.answers(requests[3:4], slots=2)) == sampled.of(requests[3:4])
    other = tokens_of(bench.answers([replace(request, seed=request.seed + 1000) for request in requests], slots=16))
    assert sum(other[name] != sampled.answers[name] for name in other) > 20


def test_every_sampled_token_inverts_the_targets_distribution_at_its_own_position(
    bench: Bench, sampled: Sampled
) -> None:
    for request in sampled.requests[:10]:
        answer, start = sampled.answers[request.request_id], len(request.prompt_ids)
        hidden = bench.target.read(torch.tensor([request.prompt_ids + answer])).hidden[0, start - 1 : -1]
        p = distribution(bench.target.logits(hidden), SAMPLED)
        for j, token in enumerate(answer):
            u = uniform(request.seed, start + j)
            assert float(p[j, :token].sum()) - 1e-5 <= u <= float(p[j, : token + 1].sum()) + 1e-5


def test_rows_of_answers_that_end_immediately_are_refilled(bench: Bench) -> None:
    """Limits start at one token, so that rows finish at prefill, within a step, and at its end."""
    requests = [Request(r.request_id, r.prompt_ids, 1 + i % 9, seed=r.seed) for i, r in enumerate(bench.requests(40))]
    for drafter in (None, "trained"):
        answers = bench.answers(requests, drafter, slots=3)
        assert len(answers) == 40
        for i, request in enumerate(requests):
            completion = answers[request.request_id]
            assert completion.response_ids == bench.greedy[request.request_id][: 1 + i % 9]
            assert completion.finish_reason == "length"
            assert bool(step_rows(completion.steps)) == (drafter is not None and i % 9 > 0)


def test_an_engine_generates_twice_and_an_abandoned_answer_leaves_nothing(bench: Bench) -> None:
    engine = bench.engine("trained", slots=4)
    running = engine.generate(bench.requests(12))
    next(running)
    del running  # which closes the generator
    again = {c.request.request_id: c.response_ids for c in engine.generate(bench.requests(12))}
    assert again == {p.prompt_id: bench.greedy[p.prompt_id] for p in bench.prompts[:12]}


@pytest.mark.parametrize("spare", [-1, 0])
def test_the_capacity_holds_prompt_answer_and_a_block_of_proposals(spare: int, bench: Bench) -> None:
    request = bench.requests(1, 12)[0]
    drafter = bench.drafters["trained"]
    needed = len(request.prompt_ids) + 12 + drafter.block_size - 1
    engine = EmbeddedEngine(bench.target, drafter, slots=1, capacity=needed + spare)
    if spare < 0:
        with pytest.raises(DraftsmithError, match="capacity"):
            list(engine.generate([request]))
    else:
        (completion,) = engine.generate([request])
        assert completion.response_ids == bench.greedy[request.request_id][:12]


def test_a_block_larger_than_the_trained_one_is_refused(bench: Bench) -> None:
    with pytest.raises(DraftsmithError, match=r"drafting\.block_size: 9 is larger than the trained 8"):
        bench.engine("trained", block_size=9)


def test_shares_of_the_work_add_up_to_at_most_the_latency(bench: Bench) -> None:
    for completion in bench.answers(bench.requests(6), "trained", slots=2).values():
        assert completion.draft_seconds > 0
        assert completion.draft_seconds + completion.verify_seconds < completion.seconds
