"""The target's log-probs of proposals against one plain forward a block, on the draft-induced prefix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from draftsmith.stages.replay.chains import replay_chains
from draftsmith.stages.replay.scoring import StepScores, score_traces
from draftsmith.stages.replay.trace import Trace, Trajectory, pad_tokens
from draftsmith.stages.targets.slots import SlotCache
from tests.stages.bench import Bench

TOLERANCE = 3e-4  # nats, float32; the trees are other matrix shapes than one block
DRAFTERS = ["trained", "untrained"]


@dataclass(frozen=True)
class Replayed:
    trajectories: list[Trajectory]
    traces: list[Trace]
    cache: SlotCache
    hidden: torch.Tensor


def replayed(bench: Bench, name: str, *, count: int = 6, tokens: int = 40, free: int = 600) -> Replayed:
    """Trajectories of different lengths, read into a cache with free entries behind them."""
    drafter = bench.drafters[name]
    trajectories = [
        Trajectory(p.prompt_id, p.token_ids + bench.greedy[p.prompt_id][: tokens - 5 * i], len(p.token_ids))
        for i, p in enumerate(bench.prompts[:count])
    ]
    ids = pad_tokens(trajectories, bench.target.device)
    positions = torch.arange(ids.shape[1]).expand(count, -1)
    cache = bench.target.new_cache(count, ids.shape[1] + free)
    out = bench.target.step(ids, positions, cache, slice(0, count), layer_ids=drafter.target_layer_ids)
    assert out.features is not None
    with torch.no_grad():
        context = drafter.encode(out.features, ids, positions)
    head = drafter.drafting_head(bench.target.head_weight, None)
    traces = replay_chains(drafter, context, trajectories, drafter.block_size, head)
    return Replayed(trajectories, traces, cache, out.hidden)


def plainly(bench: Bench, trajectory: Trajectory, trace: Trace, top_k: int) -> StepScores:
    """One forward over prefix and block for every step."""
    S, K = trace.proposed.shape
    logprobs = np.full((S, K), np.nan, dtype=np.float32)
    ids, best = np.full((S, top_k), -1), np.full((S, top_k), np.nan, dtype=np.float32)
    for s, anchor in enumerate(trace.anchors.tolist()):
        block = trace.proposed[s].tolist()
        out = bench.target.read(torch.tensor([trajectory.tokens[: anchor + 1] + block]))
        law = torch.log_softmax(bench.target.logits(out.hidden[0, anchor:]), -1)  # row k-1 predicts offset k
        for k in range(1, K + 1):
            if anchor + k < len(trajectory.tokens):
                logprobs[s, k - 1] = law[k - 1, block[k - 1]]
        if rejected := int(trace.rejected_offset[s]):
            top = law[rejected - 1].topk(top_k)
            ids[s], best[s] = top.indices.numpy(), top.values.numpy()
    return StepScores(logprobs, ids, best)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(("tree_tokens", "positions_per_chunk"), [(512, 1024), (8, 7), (20, 1)])
def test_scores_equal_one_plain_forward_a_block(
    drafter: str, tree_tokens: int, positions_per_chunk: int, bench: Bench
) -> None:
    r = replayed(bench, drafter)
    scores = score_traces(
        bench.target, r.cache, r.hidden, r.traces, top_k=5, tree_tokens=tree_tokens,
        positions_per_chunk=positions_per_chunk,
    )  # fmt: skip
    rejected_behind = 0
    for trajectory, trace, score in zip(r.trajectories, r.traces, scores, strict=True):
        expected = plainly(bench, trajectory, trace, 5)
        np.testing.assert_array_equal(np.isnan(score.target_logprobs), np.isnan(expected.target_logprobs))
        np.testing.assert_allclose(score.target_logprobs, expected.target_logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(score.top_logprobs, expected.top_logprobs, atol=TOLERANCE)
        clear = np.abs(np.diff(expected.top_logprobs)).min(-1, initial=1) > 10 * TOLERANCE
        np.testing.assert_array_equal(score.top_ids[clear], expected.top_ids[clear])
        rejected_behind += int((trace.judged - trace.rejected_offset)[trace.rejected_offset > 0].sum())
    assert rejected_behind > 5  # how many there are depends on the processor that trained the drafter


def test_one_proposal_a_block_has_nothing_behind_its_rejection(bench: Bench) -> None:
    r = replayed(bench, "trained")
    whole = score_traces(bench.target, r.cache, r.hidden, r.traces)
    alone = [
        replace(
            t,
            proposed=t.proposed[:, :1],
            accepted=np.minimum(t.accepted, 1),
            drafter_logprobs=t.drafter_logprobs[:, :1],
        )
        for t in r.traces
    ]
    for first, score in zip(score_traces(bench.target, r.cache, r.hidden, alone), whole, strict=True):
        np.testing.assert_allclose(first.target_logprobs, score.target_logprobs[:, :1], atol=TOLERANCE)


def test_the_rejected_suffix_is_scored_on_the_draft_induced_prefix(bench: Bench) -> None:
    """Not on the trajectory's: behind a rejection the two prefixes tell some proposals clearly apart."""
    r = replayed(bench, "trained")
    scores = score_traces(bench.target, r.cache, r.hidden, r.traces)
    differences = []
    for b, (trajectory, trace) in enumerate(zip(r.trajectories, r.traces, strict=True)):
        law = torch.log_softmax(bench.target.logits(r.hidden[b]), -1)
        for s, first in enumerate(trace.rejected_offset.tolist()):
            for k in range(first + 1, int(trace.judged[s]) + 1) if first else ():
                on_trajectory = float(law[trace.anchors[s] + k - 1, trace.proposed[s, k - 1]])
                differences.append(abs(on_trajectory - scores[b].target_logprobs[s, k - 1]))
                assert trace.anchors[s] + k < len(trajectory.tokens)
    assert np.max(differences) > 0.5 > 100 * TOLERANCE


def test_nan_is_exactly_what_lies_beyond_the_end(bench: Bench) -> None:
    r = replayed(bench, "trained")
    beyond = 0
    for trace, score in zip(r.traces, score_traces(bench.target, r.cache, r.hidden, r.traces), strict=True):
        K = trace.proposed.shape[1]
        outside = trace.anchors[:, None] + np.arange(1, K + 1) >= trace.length
        np.testing.assert_array_equal(np.isnan(score.target_logprobs), outside)
        beyond += int(outside.sum())
    assert beyond > 0


def test_what_greedy_text_accepted_is_the_targets_best_and_what_it_rejected_is_not(bench: Bench) -> None:
    r = replayed(bench, "trained")
    for t, trace, score in zip(
        r.trajectories, r.traces, score_traces(bench.target, r.cache, r.hidden, r.traces), strict=True
    ):
        for s, rejected in enumerate(trace.rejected_offset.tolist()):
            if not rejected:
                assert (score.top_ids[s] == -1).all() and np.isnan(score.top_logprobs[s]).all()
                continue
            assert score.top_ids[s, 0] == t.tokens[trace.anchors[s] + rejected]
            assert score.top_logprobs[s, 0] > score.target_logprobs[s, rejected - 1]
            assert (np.diff(score.top_logprobs[s]) <= 0).all()


def test_scoring_leaves_the_trajectories_in_the_cache_alone(bench: Bench) -> None:
    r = replayed(bench, "trained", free=16)
    T = r.hidden.shape[1]
    before = [slots.read(slice(0, 6), T)[0].clone() for slots in r.cache.slots]
    first = score_traces(bench.target, r.cache, r.hidden, r.traces, tree_tokens=16)
    for slots, keys in zip(r.cache.slots, before, strict=True):
        assert torch.equal(slots.read(slice(0, 6), T)[0], keys)
    again = score_traces(bench.target, r.cache, r.hidden, r.traces, tree_tokens=16)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.target_logprobs, b.target_logprobs)
