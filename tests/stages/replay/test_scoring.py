"""The target's log-probs of proposals against one forward per block, on the draft-induced prefix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import Trajectory, pad_tokens
from draftsmith.stages.replay import scoring
from draftsmith.stages.replay.groups import EncodedGroup, encode_group
from draftsmith.stages.replay.scoring import score_traces
from draftsmith.stages.replay.steps import Steps
from tests.stages.bench import Bench

TOLERANCE = 3e-4  # nats, float32; the trees are other matrix shapes than one block


@dataclass(frozen=True)
class Replayed:
    trajectories: list[Trajectory]
    traces: list[Steps]
    group: EncodedGroup


def replayed(bench: Bench, name: str, *, count: int = 6, tokens: int = 40, free: int = 600) -> Replayed:
    """Replay trajectories of different lengths, read into a cache with free entries after them."""
    drafter = bench.drafters[name]
    trajectories = [
        Trajectory(p.prompt_id, p.token_ids + bench.greedy[p.prompt_id][: tokens - 5 * i], len(p.token_ids))
        for i, p in enumerate(bench.prompts[:count])
    ]
    ids = pad_tokens(trajectories, bench.target.device)
    group = encode_group(bench.target, ids, drafter.target_layer_ids, free)
    return Replayed(trajectories, bench.replay(trajectories, name, None), group)


def plainly(bench: Bench, trajectory: Trajectory, trace: Steps) -> Steps:
    """Score with one forward over prefix and block for every step."""
    S, K = trace.proposed.shape
    logprobs, best = np.full((S, K), np.nan, dtype=np.float32), np.full(S, np.nan, dtype=np.float32)
    for s, anchor in enumerate(trace.anchors.tolist()):
        block = trace.proposed[s].tolist()
        out = bench.target.read(torch.tensor([trajectory.tokens[: anchor + 1] + block]))
        sampling = torch.log_softmax(bench.target.logits(out.hidden[0, anchor:]), -1)  # row k-1 predicts offset k
        for k in range(1, K + 1):
            if anchor + k < len(trajectory.tokens):
                logprobs[s, k - 1] = sampling[k - 1, block[k - 1]]
        if rejected := int(trace.rejected_offset[s]):
            best[s] = sampling[rejected - 1].max()
    return replace(trace, target_logprobs=logprobs, best_logprob=best)


@pytest.mark.parametrize(
    ("where", "drafter"), [("bench", "trained"), ("bench", "untrained"), ("eagle_bench", "trained")]
)
@pytest.mark.parametrize(("tree_tokens", "positions_per_chunk"), [(512, 1024), (8, 7), (20, 1)])
def test_scores_equal_one_forward_per_block(
    where: str, drafter: str, tree_tokens: int, positions_per_chunk: int, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Scores without later proposals are the same up to the first rejection."""
    monkeypatch.setattr(scoring, "POSITIONS_PER_CHUNK", positions_per_chunk)
    bench: Bench = request.getfixturevalue(where)
    r = replayed(bench, drafter)
    group, uncached = replace(r.group, tree_tokens=tree_tokens), replace(r.group, cache=None)
    scores = score_traces(bench.target, group, r.traces)
    without = score_traces(bench.target, uncached, r.traces)
    only = score_traces(bench.target, group, r.traces, rejected_only=True)
    limited = [score_traces(bench.target, group, r.traces, rejected_only=True, offsets=limit) for limit in (1, 3)]
    after_rejections = 0
    for i, (trajectory, trace) in enumerate(zip(r.trajectories, r.traces, strict=True)):
        expected = plainly(bench, trajectory, trace)
        np.testing.assert_allclose(scores[i].logprobs, expected.logprobs, atol=TOLERANCE)
        offsets = np.arange(1, trace.proposed.shape[1] + 1)
        up_to = np.where(offsets <= trace.on_trajectory[:, None], expected.logprobs, np.nan)
        np.testing.assert_allclose(without[i].logprobs, up_to, atol=TOLERANCE)
        rejected = np.where(offsets > trace.accepted[:, None], expected.logprobs, np.nan)
        np.testing.assert_allclose(only[i].logprobs, rejected, atol=TOLERANCE)
        for limit, of_limit in zip((1, 3), limited, strict=True):
            first = np.where(offsets <= trace.accepted[:, None] + limit, rejected, np.nan)
            np.testing.assert_allclose(of_limit[i].logprobs, first, atol=TOLERANCE)
        assert expected.best_logprob is not None
        for found in (scores[i], without[i]):
            assert found.best_logprob is not None
            np.testing.assert_allclose(found.best_logprob, expected.best_logprob, atol=TOLERANCE)
        after_rejections += int((trace.judged - trace.rejected_offset)[trace.rejected_offset > 0].sum())
    assert after_rejections > 5  # how many there are depends on the processor that trained the drafter


def test_scoring_does_not_change_the_trajectories_in_the_cache(bench: Bench) -> None:
    r = replayed(bench, "trained", free=16)
    group = replace(r.group, tree_tokens=16)
    assert group.cache is not None
    T = group.ids.shape[1]
    before = [slots.read(slice(0, 6), T)[0].clone() for slots in group.cache.slots]
    first = score_traces(bench.target, group, r.traces)
    for slots, keys in zip(group.cache.slots, before, strict=True):
        assert torch.equal(slots.read(slice(0, 6), T)[0], keys)
    again = score_traces(bench.target, group, r.traces)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
