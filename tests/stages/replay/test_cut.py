"""Replay of blocks that are cut by the drafter's confidence, against plain references and sampled decoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.law import GREEDY, Law
from draftsmith.stages.replay.corpus import context_of, groups_of, mine, replay_all
from draftsmith.stages.replay.kept import KeptTraces
from draftsmith.stages.replay.sequential import replay_sequentially
from draftsmith.stages.replay.tally import Tally
from draftsmith.stages.replay.trace import Trace, Trajectory
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.bench import trajectory_of
from tests.stages.replay.test_drawn import ALARM, LAW, LENGTH, Plainly, decoded, first_steps, same_law
from tests.testbed import random_target
from tests.testbed.dspark import random_dspark

THRESHOLD = 0.5
CUT = DraftingConfig(confidence=THRESHOLD)


@pytest.fixture(scope="module")
def drafter(plain_target: Target) -> Drafter:
    return random_dspark(plain_target)


@pytest.fixture(scope="module")
def texts(drafter: Drafter, plain_target: Target) -> list[Trajectory]:
    """Of the drafter's own proposals: so many of a block as a generator says, then a token of its own."""
    rng = np.random.default_rng(0)
    head, K = drafter.drafting_head(plain_target.head_weight, None), drafter.block_size - 1
    made = []
    for name in range(4):
        tokens = rng.integers(0, 60, 4 + name).tolist()
        prompt = len(tokens)
        tokens.append(int(rng.integers(0, 60)))
        while len(tokens) < 40:
            (group,) = groups_of([Trajectory("", tokens, prompt)], 1, plain_target.device)
            context = context_of(drafter, plain_target.features(group.ids, drafter.target_layer_ids), group)
            at = torch.tensor([[tokens[-1]]]), torch.tensor([[len(tokens) - 1]])
            block = drafter.propose(context, *at, K + 1, head)
            tokens += [*block.tokens[0, 0, : rng.integers(0, K + 1)].tolist(), int(rng.integers(0, 60))]
        made.append(Trajectory(str(name), tokens, prompt))
    return made


def replayed(
    target: Target, drafter: Drafter, drafting: DraftingConfig, texts: list[Trajectory], law: Law = GREEDY
) -> list[Trace]:
    return replay_all(target, {"it": drafter}, texts, drafting, law=law)["it"]


def cuts(traces: list[Trace]) -> np.ndarray:
    """[steps] proposals in front of the cut."""
    found = [trace.verified for trace in traces]
    return np.concatenate([each for each in found if each is not None])


def test_parallel_replay_is_sequential_decoding_with_the_cut(
    drafter: Drafter, texts: list[Trajectory], plain_target: Target
) -> None:
    head = drafter.drafting_head(plain_target.head_weight, None)
    expected = []
    for group in groups_of(texts, 1, plain_target.device):  # each alone
        context = context_of(drafter, plain_target.features(group.ids, drafter.target_layer_ids), group)
        trace = replay_sequentially(drafter, context, group.trajectories[0], 5, head, THRESHOLD)
        expected.append((group.indices[0], trace))
    for chains in (1, 3, None):
        traces = replay_all(plain_target, {"it": drafter}, texts, CUT, chains=chains)["it"]
        for place, trace in expected:
            for name in ("anchors", "accepted", "proposed", "verified"):
                np.testing.assert_array_equal(getattr(traces[place], name), getattr(trace, name), err_msg=name)
    assert set(cuts(traces)) == {0, 1, 2, 3, 4}


def test_what_is_in_front_of_the_cut_is_what_it_was(
    drafter: Drafter, texts: list[Trajectory], plain_target: Target
) -> None:
    """Behind the same anchor: fewer proposals are verified, and none of them is another one."""
    whole, cut = (replayed(plain_target, drafter, drafting, texts) for drafting in (DraftingConfig(), CUT))
    assert all(trace.verified is None for trace in whole)
    shorter = 0
    for before, after in zip(whole, cut, strict=True):
        _, a, b = np.intersect1d(before.anchors, after.anchors, return_indices=True)
        assert after.verified is not None
        np.testing.assert_array_equal(np.minimum(before.accepted[a], after.verified[b]), after.accepted[b])
        np.testing.assert_array_equal(before.proposed[a], after.proposed[b])
        shorter += int((after.accepted[b] < before.accepted[a]).sum())
    assert shorter
    tallies = [Tally.of(traces) for traces in (whole, cut)]
    assert tallies[1].tau < tallies[0].tau
    assert tallies[1].judged_per_step < 0.8 * tallies[0].judged_per_step
    # so low that nothing is cut
    low = replayed(plain_target, drafter, DraftingConfig(confidence=1e-30), texts)
    assert [trace.accepted.tolist() for trace in low] == [trace.accepted.tolist() for trace in whole]


@pytest.mark.parametrize("law", [GREEDY, LAW])
def test_mined_steps_judge_what_was_verified(
    law: Law, drafter: Drafter, texts: list[Trajectory], plain_target: Target
) -> None:
    undecided = 0
    for group in mine(plain_target, drafter, texts, CUT, law=law):
        for trace, scores in zip(group.traces, group.scores, strict=True):
            assert trace.verified is not None
            judged = np.arange(4) < np.minimum(trace.verified, trace.length - 1 - trace.anchors)[:, None]
            np.testing.assert_array_equal(~np.isnan(scores.target_logprobs), judged)
            kept_whole = trace.accepted == trace.verified
            assert not trace.rejected_offset[kept_whole].any()
            inside = trace.anchors + trace.accepted + 1 < trace.length
            assert (trace.committed[inside] == trace.accepted[inside] + 1).all()
            undecided += int(kept_whole.sum())
    assert undecided


def test_drawn_replay_with_the_cut_equals_the_plain_reference(
    drafter: Drafter, texts: list[Trajectory], plain_target: Target
) -> None:
    some = [trajectory_of(a) for a in decoded(plain_target, None, 0)[:6]] + texts[:2]
    traces = replayed(plain_target, drafter, CUT, some, LAW)
    for text, trace in zip(some, traces, strict=True):
        plain = Plainly(plain_target, drafter, text, THRESHOLD)
        steps = list(zip(trace.anchors.tolist(), trace.accepted.tolist(), trace.proposed.tolist(), strict=True))
        assert steps == plain.trace()
        for anchor, averaged in zip(trace.anchors.tolist(), trace.expected_committed, strict=True):
            assert averaged == pytest.approx(expected(plain, anchor), rel=1e-4)
    assert len(set(cuts(traces))) > 2


def expected(plain: Plainly, anchor: int) -> float:
    """Tokens that a step commits on average: the cut is decided by the text in front of it, as all else is."""
    tokens, total, kept, confident = plain.text.tokens, 1.0, 1.0, 1.0
    for k in range(1, plain.drafter.block_size):
        at, chain = anchor + k, tokens[anchor : anchor + k]
        confident *= plain.kept(anchor, chain, k)
        if at >= len(tokens) - 1 or confident < THRESHOLD:
            break
        kept *= min(1.0, plain.q(anchor, chain, k)[tokens[at]] / plain.of_text(at))
        total += kept
    return total


def test_accepted_lengths_have_the_law_of_sampled_decoding_with_the_cut(drafter: Drafter, plain_target: Target) -> None:
    cut, law = DraftingConfig(confidence=0.85), Law(1.5, 0.95)
    served = [a for a in decoded(plain_target, drafter, 10_000, law, cut) if len(a.response_ids) == LENGTH]
    plain = [trajectory_of(a) for a in decoded(plain_target, None, 0, law) if len(a.response_ids) == LENGTH]
    counts = first_steps([trajectory_of(a) for a in served], [a.steps[0].accepted for a in served])
    of_replay, of_whole_blocks = (
        first_steps(plain, [int(trace.accepted[0]) for trace in replayed(plain_target, drafter, each, plain, law)])
        for each in (cut, DraftingConfig())
    )
    assert same_law(counts, of_replay) > ALARM > same_law(counts, of_whole_blocks)


def test_what_is_kept_of_an_interrupted_replay_has_its_cuts(
    drafter: Drafter, texts: list[Trajectory], plain_target: Target, tmp_path: Path
) -> None:
    traces = replayed(plain_target, drafter, CUT, texts)
    store = KeptTraces(tmp_path, ["it"])
    store.add(range(len(traces)), {"it": traces})
    store.flush()
    ((_, found),) = KeptTraces(tmp_path, ["it"]).read()
    np.testing.assert_array_equal(cuts([each["it"] for each in found]), cuts(traces))


def test_a_drafter_without_a_confidence_is_refused(texts: list[Trajectory], plain_target: Target) -> None:
    for without, said in (
        (random_dspark(plain_target, confidence_head=False), "this dspark has no confidence head"),
        (random_target.random_drafter(plain_target), "this dflash has no confidence head"),
    ):
        with pytest.raises(DraftsmithError, match=f"drafting.confidence: {said}"):
            replayed(plain_target, without, CUT, texts)
        with pytest.raises(DraftsmithError, match=said):
            next(mine(plain_target, without, texts, CUT))
