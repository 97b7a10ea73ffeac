"""Replay with one chain and with many gives the trace of the reference and of the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory, group_by_length, pad_tokens
from draftsmith.stages.drafters.base import PreparedDrafter
from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.chains import start_anchors, successors
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.trace import Trace, tau
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import GREEDY, SamplingParams
from tests.stages.bench import Bench, assert_recorded, assert_same
from tests.testbed import random_target
from tests.testbed.drafter import DrafterArtifacts

SAMPLED = SamplingParams(temperature=1.0, top_p=0.9)


@pytest.fixture(params=["bench", "eagle_bench"])
def any_bench(request: pytest.FixtureRequest) -> Bench:
    """Of an autoregressive drafter too: after a rejection its context holds tokens and features that it must not
    read, and a chain depends on the tokens that it proposed itself."""
    found: Bench = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("drafter", "drafting"),
    [("trained", {}), ("trained", {"block_size": 4, "head_tokens": 60}), ("untrained", {"block_size": 5})],
)
def test_replay_equals_the_reference_and_the_engines_record(
    drafter: str, drafting: dict[str, int], sampling: SamplingParams, any_bench: Bench
) -> None:
    bench = any_bench
    limit = 40 if drafter == "trained" else 24  # the reference takes step by step
    answers = bench.answers(bench.requests(8, limit, sampling, seed=3), drafter, slots=5, **drafting)
    trajectories = [c.trajectory() for c in answers.values() if len(c.response_ids) > 1]
    trajectories = bench.clear(trajectories, bench.drafters[drafter], **drafting)
    assert len(trajectories) >= 5
    reference = bench.sequential_traces(trajectories, drafter, **drafting)
    assert_recorded(reference, [answers[t.trajectory_id] for t in trajectories])
    for chains in (1, 16, None):
        assert_same(bench.replay(trajectories, drafter, chains, **drafting), reference)


def test_a_trace_does_not_depend_on_how_the_answer_was_generated(any_bench: Bench) -> None:
    """Replay on greedy answers without a drafter gives what the engine records with that drafter."""
    served = any_bench.answers(any_bench.requests(24), "trained")
    assert {name: answer.response_ids for name, answer in served.items()}.items() <= any_bench.greedy.items()
    traces = any_bench.replay(any_bench.answered(24), "trained", 7)
    assert_recorded(traces, [served[p.prompt_id] for p in any_bench.prompts[:24]])
    accepted = set(np.concatenate([trace.accepted for trace in traces]).tolist())
    assert {0, 1, any_bench.drafters["trained"].block_size - 1} <= accepted


def test_proposals_are_in_the_draft_vocabulary(eagle_bench: Bench) -> None:
    """The answers have tokens outside it too, which no proposal equals."""
    trajectories = eagle_bench.answered()
    vocabulary = eagle_bench.drafters["trained"].head_over(eagle_bench.target.head_weight, None).token_ids
    assert vocabulary is not None and vocabulary.numel() < eagle_bench.target.info.vocab_size
    allowed = set(vocabulary.tolist())
    for trace in eagle_bench.replay(trajectories, "trained", 4):
        assert set(trace.proposed.flatten().tolist()) <= allowed
    assert any(set(t.tokens[t.prompt_length :]) - allowed for t in trajectories)


def test_sixteen_chains_draft_little_more_than_one_block_per_step(bench: Bench) -> None:
    """Rejections make chains meet: at a tau near 2 the extra starts cost less than a third.

    The test bed is trained where the tests run, so its tau is not the same on every processor.
    """
    served = bench.answers(bench.requests(40, 80, SamplingParams(1.0), seed=3), slots=40).values()
    trajectories = [completion.trajectory() for completion in served if len(completion.response_ids) > 1]
    trajectories = bench.clear(trajectories, bench.drafters["trained"])
    assert len(trajectories) > 20
    one, many = (bench.replay(trajectories, "trained", chains) for chains in (1, 16))
    assert_same(many, one)
    assert tau(many) > 1.5
    steps = sum(len(trace.anchors) for trace in one)
    assert sum(trace.evaluated_blocks for trace in one) == steps
    assert steps < sum(trace.evaluated_blocks for trace in many) <= 4 / 3 * steps


@pytest.mark.parametrize("drafter", ["trained", "untrained"])
def test_a_successor_is_the_next_anchor_of_a_single_block(drafter: str, bench: Bench) -> None:
    """Each position is drafted in a batch of one; after the end of an answer it is the first anchor."""
    model = bench.drafters[drafter]
    head = model.drafting_head(bench.target.head_weight, None)
    trajectories = bench.answered(6)
    positions = np.stack(  # in front of the last anchor too, to which a rejection there leads
        [np.append(t.last_anchor - 1, np.linspace(t.first_anchor, t.last_anchor, 8).astype(int)) for t in trajectories]
    )
    _, context = bench.read(trajectories, model)
    following = successors(
        PreparedDrafter(model, head, model.block_size), context, trajectories, torch.from_numpy(positions), None
    )
    assert following.shape == positions.shape
    for row, t in enumerate(trajectories):
        _, alone = bench.read([t], model)
        for column, position in enumerate(positions[row].tolist()):
            at = torch.tensor([[position]])
            block = model.propose(alone, torch.tensor([[t.tokens[position]]]), at, model.block_size, head)
            anchor = position + 1
            for proposal in block[0, 0].tolist():
                if anchor >= len(t.tokens) or proposal != t.tokens[anchor]:
                    break
                anchor += 1
            assert following[row, column] == (anchor if anchor <= t.last_anchor else t.first_anchor)
        assert following[row, -1] == t.first_anchor


# ---- ends


def rule_of_the_engine(anchor: int, tokens: list[int], proposed: list[int]) -> tuple[int, int, int, int]:
    """Return (accepted, committed, judged, rejected offset), token by token."""
    accepted = committed = 0
    rest = tokens[anchor + 1 :]
    judged = min(len(proposed), len(rest))
    for proposal in proposed:
        if committed == len(rest):
            return accepted, committed, judged, 0
        committed += 1
        if proposal != rest[committed - 1]:
            return accepted, committed, judged, committed
        accepted += 1
    return accepted, committed + (committed < len(rest)), judged, 0


def test_ends_are_neither_accepted_nor_rejected(bench: Bench) -> None:
    """Answers are cut everywhere: the last steps are verified by the tokens that remain."""
    cut = [
        Trajectory("", prompt.token_ids + bench.greedy[prompt.prompt_id][:n], len(prompt.token_ids))
        for prompt in bench.prompts[:4]
        for n in range(2, min(30, len(bench.greedy[prompt.prompt_id])))
    ]
    kinds = set()
    for trajectory, trace in zip(cut, bench.replay(cut, "trained", 3), strict=True):
        assert trace.committed.sum() == trajectory.answer_length - 1
        for s, anchor in enumerate(trace.anchors.tolist()):
            expected = rule_of_the_engine(anchor, trajectory.tokens, trace.proposed[s].tolist())
            found = trace.accepted[s], trace.committed[s], trace.judged[s], trace.rejected_offset[s]
            assert tuple(map(int, found)) == expected
            kinds.add((bool(trace.judged[s] < trace.proposed.shape[1]), bool(trace.rejected_offset[s])))
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}


@pytest.mark.parametrize("limit", [2, 3, 5, 9, 17])
def test_a_length_limit_inside_a_block_leaves_the_same_trace(limit: int, bench: Bench) -> None:
    served = list(bench.answers(bench.requests(24, limit), "trained").values())
    assert_recorded(bench.replay([c.trajectory() for c in served], "trained", 4), served)


def test_a_stop_token_inside_a_block_ends_the_trace(bench: Bench) -> None:
    stopped = [c for c in bench.answers(bench.requests(32), "trained").values() if c.finish_reason == "stop"]
    traces = bench.replay([c.trajectory() for c in stopped], "trained", 16)
    assert_recorded(traces, stopped)
    ends = [(trace.accepted[-1], trace.judged[-1], trace.committed[-1]) for trace in traces]
    assert any(accepted == judged == committed < 7 for accepted, judged, committed in ends)
    assert all(trace.anchors[-1] + trace.committed[-1] == trace.length - 1 for trace in traces)


@pytest.mark.parametrize("fixed", [0, 1])
def test_padding_after_a_shorter_trajectory_is_never_accepted(
    fixed: int, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drafter always proposes one token, and any token may be the padding."""
    drafter = bench.drafters["trained"]

    def propose(_context: object, _tokens: object, anchors: torch.Tensor, block_size: int, *_: object, **__: object):  # type: ignore[no-untyped-def]
        return torch.full((*anchors.shape, block_size - 1), fixed)

    monkeypatch.setattr(drafter, "propose", propose)
    long = bench.prompts[0].token_ids * 2
    short = Trajectory("short", [5, 6, 7, fixed, fixed, fixed], 3)
    traces = bench.replay([Trajectory("long", long, 4), short], "trained", 16)
    assert traces[1].anchors.tolist() == [3]
    assert traces[1].accepted.tolist() == traces[1].committed.tolist() == [2]


def test_a_single_token_leaves_no_step_and_does_not_disturb_its_batch(bench: Bench) -> None:
    prompt, other = bench.prompts[:2]
    short = Trajectory("short", prompt.token_ids + bench.greedy[prompt.prompt_id][:1], len(prompt.token_ids))
    long = Trajectory("long", other.token_ids + bench.greedy[other.prompt_id], len(other.token_ids))
    alone = bench.replay([long], "trained", 16)
    both = bench.replay([short, long], "trained", 16)
    assert len(both[0].anchors) == 0
    assert_same(both[1:], alone)
    assert len(bench.sequential_traces([short], "trained")[0].anchors) == 0


# ---- definitions


def trace_of(length: int, anchors: list[int], accepted: list[int], proposals: int = 3) -> Trace:
    proposed = np.zeros((len(anchors), proposals), int)
    return Trace(length, np.array(anchors), np.array(accepted), proposed, len(anchors))


def test_tau_by_hand() -> None:
    """Prompt of 4, response of 9 at positions 4 … 12; K = 3. Steps commit 2, 4, 1 and, cut by the end, 1 token."""
    trace = trace_of(13, [4, 6, 10, 11], [1, 3, 0, 1])
    assert trace.judged.tolist() == [3, 3, 2, 1]
    assert trace.committed.tolist() == [2, 4, 1, 1]
    assert trace.rejected_offset.tolist() == [2, 0, 1, 0]
    assert tau([trace]) == 8 / 4
    other = trace_of(6, [4], [0])  # one token after the anchor, rejected
    assert other.committed.tolist() == [1] and other.rejected_offset.tolist() == [1]
    assert tau([trace, other]) == 9 / 5  # a ratio of sums, not the mean of 2 and 1
    assert np.isnan(tau([]))


def test_all_accepted_commits_the_bonus_token() -> None:
    assert trace_of(20, [4], [3]).committed.tolist() == [4]
    assert trace_of(8, [4], [3]).committed.tolist() == [3]  # the end cuts the bonus token
    assert trace_of(9, [4], [3]).committed.tolist() == [4]


def test_first_and_last_anchor() -> None:
    trajectory = Trajectory("", list(range(10)), 4)
    assert (trajectory.first_anchor, trajectory.last_anchor, trajectory.answer_length) == (4, 8, 6)
    assert start_anchors(trajectory, 1) == [4]
    assert start_anchors(trajectory, 2) == [4, 6]
    assert start_anchors(trajectory, 50) == [4, 5, 6, 7, 8]
    assert start_anchors(Trajectory("", [0, 1, 2], 2), 4) == []


def test_groups_have_every_index_once_and_respect_the_bound() -> None:
    lengths = np.random.default_rng(0).integers(5, 120, 300).tolist()
    groups = list(group_by_length(lengths, 512))
    assert sorted(i for group in groups for i in group) == list(range(300))
    assert all(len(group) * max(lengths[i] for i in group) <= 512 or len(group) == 1 for group in groups)
    assert list(group_by_length([900, 3], 512)) == [[1], [0]]
    assert list(group_by_length([], 512)) == []


def test_padding_is_on_the_right() -> None:
    padded = pad_tokens([Trajectory("", [1, 2, 3], 1), Trajectory("", [4], 1)], torch.device("cpu"), fill=-1)
    assert padded.tolist() == [[1, 2, 3], [4, -1, -1]]


def test_packed_weights_do_not_change_a_trace(
    tiny_drafter: DrafterArtifacts, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is bfloat16; on a processor without its products nothing is packed."""
    target = Target.load(tiny_drafter.target, dtype="bfloat16")
    drafter = load_drafter(tiny_drafter.drafter / DRAFTER_FOLDER, target, torch.bfloat16)
    texts = bench.answered()

    def traces() -> list[Trace]:
        return [trace for group in Replayer(target).mine(drafter, texts[:6]) for trace in group.traces]

    packed = traces()
    monkeypatch.setattr(Head, "for_decoding", lambda head, _target: head)
    monkeypatch.setattr(type(drafter), "for_decoding", lambda drafter: drafter)
    for trace, expected in zip(packed, traces(), strict=True):
        for part in ("anchors", "accepted", "proposed"):
            np.testing.assert_array_equal(getattr(trace, part), getattr(expected, part))


def test_a_float16_target_serves_and_is_replayed(tmp_path: Path) -> None:
    """On a CPU: float16 ends at 65,504, which no mask may exceed."""
    target = Target.load(random_target.write_artifact(tmp_path), dtype="float16", device="cpu")
    save_drafter(random_target.random_drafter(target), tmp_path / "drafter", target.dtype)
    drafter = load_drafter(tmp_path / "drafter", target)
    engine = EmbeddedEngine(target, drafter, slots=4, capacity=64)
    requests = [Request(str(i), [5, 3, 9, 1][: i + 1], 20, seed=i) for i in range(4)]
    answers = [each for each in engine.generate(requests) if len(each.response_ids) > 1]
    traces = Replayer(target).traces({"it": drafter}, [answer.trajectory() for answer in answers])["it"]
    assert len(traces) > 1
    for answer, trace in zip(answers, traces, strict=True):
        served, replayed = {step.anchor for step in answer.steps}, set(trace.anchors.tolist())
        assert len(served & replayed) >= 0.8 * len(replayed)  # near-ties of other kernel shapes
