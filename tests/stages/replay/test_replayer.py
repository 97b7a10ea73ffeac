"""Replay with one chain and with many gives the trace of the reference and of the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, group_by_length
from draftsmith.stages.drafters.base import PreparedDrafter
from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.chains import successors
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from tests.stages.bench import Bench, assert_recorded, assert_same, step_rows, tau
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
    """Replay on greedy answers without a drafter gives what the engine records with that drafter.

    A stop token or the limit may be inside a block.
    """
    served = any_bench.answers(any_bench.requests(24), "trained")
    assert {name: answer.response_ids for name, answer in served.items()}.items() <= any_bench.greedy.items()
    traces = any_bench.replay(any_bench.answered(24), "trained", 7)
    assert_recorded(traces, [served[p.prompt_id] for p in any_bench.prompts[:24]])
    accepted = set(np.concatenate([trace.accepted for trace in traces]).tolist())
    whole = any_bench.drafters["trained"].block_size - 1
    assert {0, 1, whole} <= accepted
    assert {answer.finish_reason for answer in served.values()} == {"stop", "length"}
    ends = [(trace.accepted[-1], trace.judged[-1], trace.committed[-1]) for trace in traces]
    assert any(accepted == judged == committed < whole for accepted, judged, committed in ends)


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


# ---- definitions


def trace_of(length: int, anchors: list[int], accepted: list[int], proposals: int = 3) -> Steps:
    proposed = np.zeros((len(anchors), proposals), int)
    return Steps(length, np.array(anchors), np.array(accepted), proposed)


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


def test_groups_have_every_index_once_and_respect_the_bound() -> None:
    lengths = np.random.default_rng(0).integers(5, 120, 300).tolist()
    groups = list(group_by_length(lengths, 512))
    assert sorted(i for group in groups for i in group) == list(range(300))
    assert all(len(group) * max(lengths[i] for i in group) <= 512 or len(group) == 1 for group in groups)
    assert list(group_by_length([900, 3], 512)) == [[1], [0]]
    assert list(group_by_length([], 512)) == []


def test_packed_weights_do_not_change_a_trace(
    tiny_drafter: DrafterArtifacts, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This is bfloat16; on a processor without its products nothing is packed."""
    target = Target.load(tiny_drafter.target, dtype="bfloat16")
    drafter = load_drafter(tiny_drafter.drafter / DRAFTER_FOLDER, target, torch.bfloat16)
    texts = bench.answered()

    def traces() -> list[Steps]:
        return [trace for group in Replayer(target).mine(drafter, texts[:6]) for _, trace in group]

    packed = traces()
    monkeypatch.setattr(Head, "for_decoding", lambda head, _target: head)
    monkeypatch.setattr(type(drafter), "for_decoding", lambda drafter: drafter)
    assert_same(packed, traces())


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
        served, replayed = {anchor for anchor, _, _ in step_rows(answer.steps)}, set(trace.anchors.tolist())
        assert len(served & replayed) >= 0.8 * len(replayed)  # near-ties of other kernel shapes
