"""EAGLE-3 in the engine, in replay and in scoring: one trace, whoever computes it, and the target's own text.

An autoregressive drafter is the harder case: behind a rejection its context holds tokens and features that must not
be read, and a chain depends on the tokens that it proposed itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.replay.chains import replay_chains
from draftsmith.stages.replay.scoring import score_traces
from draftsmith.stages.replay.trace import pad_tokens, tau
from tests.stages.bench import GREEDY, Bench, assert_recorded, assert_same, trajectory_of

SAMPLED = SamplingParams(48, temperature=1.0, top_p=0.9)
SCORE_TOLERANCE = 3e-4


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("drafter", "drafting"),
    [("trained", {}), ("trained", {"block_size": 4, "head_tokens": 60}), ("untrained", {"block_size": 5})],
)
def test_replay_equals_the_reference_and_what_the_engine_recorded(
    drafter: str, drafting: dict[str, int], sampling: SamplingParams, eagle_bench: Bench
) -> None:
    sampling = replace(sampling, max_new_tokens=40 if drafter == "trained" else 24)  # the reference takes step by step
    answers = eagle_bench.answers(eagle_bench.requests(16, sampling, seed=3), drafter, slots=5, **drafting)
    trajectories = [trajectory_of(c) for c in answers.values() if len(c.response_ids) > 1]
    trajectories = eagle_bench.clear(trajectories, eagle_bench.drafters[drafter], **drafting)
    assert len(trajectories) >= 10
    served = [answers[t.trajectory_id] for t in trajectories]
    reference = eagle_bench.sequential_traces(trajectories, drafter, **drafting)
    assert_recorded(reference, served)
    for chains in (1, 16, None):
        assert_same(eagle_bench.replay(trajectories, drafter, chains, **drafting), reference)


def test_a_trace_does_not_depend_on_who_generated_the_text(eagle_bench: Bench) -> None:
    """Replayed on plain greedy text: what the engine records with that drafter in the loop."""
    served = eagle_bench.answers(eagle_bench.requests(), "trained")
    traces = eagle_bench.replay(eagle_bench.answered(), "trained", 7)
    assert_recorded(traces, [served[p.prompt_id] for p in eagle_bench.prompts])
    assert sum(len(trace.anchors) for trace in traces) > 1000
    kept = np.concatenate([trace.accepted for trace in traces])
    assert set(kept.tolist()) == {0, 1, 2, 3, 4}, "nothing, parts and whole chains are kept"


@pytest.mark.parametrize(
    ("drafter", "slots", "block_size", "head_tokens"),
    [
        ("trained", 1, None, None),
        ("trained", 8, 2, None),
        ("trained", 8, None, 60),
        ("untrained", 8, None, None),
    ],
)
def test_speculative_greedy_equals_plain_greedy(
    drafter: str, slots: int, block_size: int | None, head_tokens: int | None, eagle_bench: Bench
) -> None:
    count = 24 if drafter == "trained" and slots > 1 else 8
    answers = eagle_bench.answers(
        eagle_bench.requests(count), drafter, slots, block_size=block_size, head_tokens=head_tokens
    )
    assert {name: answer.response_ids for name, answer in answers.items()} == {
        p.prompt_id: eagle_bench.greedy[p.prompt_id] for p in eagle_bench.prompts[:count]
    }
    proposals = (block_size or eagle_bench.drafters[drafter].block_size) - 1
    assert all(len(step.proposed) == proposals for answer in answers.values() for step in answer.steps)


def test_speculative_sampling_draws_the_tokens_of_plain_sampling(eagle_bench: Bench) -> None:
    requests = eagle_bench.requests(24, SAMPLED, seed=7)
    plain = eagle_bench.answers(requests, slots=16)
    requests = eagle_bench.clearly_drawn(requests, plain)
    assert len(requests) > 16
    for drafter, slots, count in (("trained", 3, 24), ("untrained", 8, 8)):
        answers = eagle_bench.answers(requests[:count], drafter, slots)
        assert len(answers) == len(requests[:count])
        for name, answer in answers.items():
            assert answer.response_ids == plain[name].response_ids
    assert sum(answer.response_ids != eagle_bench.greedy[name][:48] for name, answer in plain.items()) > 15


def test_rows_that_finish_and_are_refilled_leave_nothing_behind(eagle_bench: Bench) -> None:
    """Length limits from one token on, so that rows move and are taken over by longer and shorter prompts."""
    requests = [
        Request(r.request_id, r.prompt_ids, SamplingParams(max_new_tokens=1 + i % 9), r.seed)
        for i, r in enumerate(eagle_bench.requests(40))
    ]
    answers = eagle_bench.answers(requests, "trained", slots=3)
    for i, request in enumerate(requests):
        assert answers[request.request_id].response_ids == eagle_bench.greedy[request.request_id][: 1 + i % 9]
    served = [answers[request.request_id] for i, request in enumerate(requests) if i % 9]
    assert_recorded(eagle_bench.replay([trajectory_of(c) for c in served], "trained", 4), served)


def test_the_trained_drafter_saves_steps_and_an_untrained_one_does_not(eagle_bench: Bench) -> None:
    trajectories = eagle_bench.answered(24)
    trained, untrained = (tau(eagle_bench.replay(trajectories, name, None)) for name in ("trained", "untrained"))
    assert untrained < 1.3
    assert trained > 2.5


def test_proposals_are_of_the_draft_vocabulary(eagle_bench: Bench) -> None:
    """Tokens of the answers lie outside it too, so that chains are cut there."""
    trajectories = eagle_bench.answered()
    drafter = eagle_bench.drafters["trained"]
    vocabulary = drafter.head_over(eagle_bench.target.head_weight, None).token_ids
    assert vocabulary is not None and vocabulary.numel() < eagle_bench.target.info.vocab_size
    allowed = set(vocabulary.tolist())
    for trace in eagle_bench.replay(trajectories, "trained", 4):
        assert set(trace.proposed.flatten().tolist()) <= allowed
    assert any(set(t.tokens[t.prompt_length :]) - allowed for t in trajectories)


def test_scores_equal_one_plain_forward_a_chain(eagle_bench: Bench) -> None:
    """Also behind a rejection, on the prefix that the drafter made for itself."""
    bench, drafter = eagle_bench, eagle_bench.drafters["trained"]
    trajectories = bench.answered(6)
    ids = pad_tokens(trajectories, bench.target.device)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    cache = bench.target.new_cache(len(ids), ids.shape[1] + 600)
    out = bench.target.step(ids, positions, cache, slice(0, len(ids)), layer_ids=drafter.target_layer_ids)
    assert out.features is not None
    with torch.no_grad():
        context = drafter.encode(out.features, ids, positions)
    head = drafter.drafting_head(bench.target.head_weight, None)
    traces = replay_chains(drafter, context, trajectories, drafter.block_size, head)
    scores = score_traces(bench.target, cache, out.hidden, traces, tree_tokens=20)
    behind = 0
    for trajectory, trace, score in zip(trajectories, traces, scores, strict=True):
        for s, anchor in enumerate(trace.anchors.tolist()):
            block = trace.proposed[s].tolist()
            hidden = bench.target.read(torch.tensor([trajectory.tokens[: anchor + 1] + block])).hidden[0, anchor:-1]
            law = torch.log_softmax(bench.target.logits(hidden), -1)
            expected = law.gather(1, torch.tensor(block)[:, None])[:, 0].numpy()
            judged = int(trace.judged[s])
            np.testing.assert_allclose(score.target_logprobs[s, :judged], expected[:judged], atol=SCORE_TOLERANCE)
            assert np.isnan(score.target_logprobs[s, judged:]).all()
            behind += judged - trace.rejected_offset[s] if trace.rejected_offset[s] else 0
    assert behind > 20
