"""The acceptance of a perfect drafter, against the target walked through one position at a time."""

from __future__ import annotations

import torch

from draftsmith.stages.law import Law
from draftsmith.stages.measure.acceptance import ceiling_trace
from draftsmith.stages.replay.chains import committed_tokens
from draftsmith.stages.replay.drawn import Expectation, SampledText
from draftsmith.stages.replay.trace import Trajectory, tau
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed import random_target


def test_every_step_keeps_what_the_target_would_have_said_itself(plain_target: Target) -> None:
    """Half of every answer is the target's own best text, so that runs of all lengths occur."""
    trajectories = []
    for start in random_target.trajectories(4, seed=1):
        tokens = start.tokens[: start.prompt_length + 1]
        for position in range(24):
            logits = plain_target.logits(plain_target.read(torch.tensor([tokens])).hidden[0, -1])
            tokens = [*tokens, int(logits.argmax()) if position % 9 else position % 3]
        trajectories.append(Trajectory(start.trajectory_id, tokens, start.prompt_length))
    traces = [ceiling_trace(plain_target, trajectory, 5) for trajectory in trajectories]
    for trajectory, trace in zip(trajectories, traces, strict=True):
        anchor = trajectory.first_anchor
        for s, at in enumerate(trace.anchors.tolist()):
            assert at == anchor
            kept = 0
            while kept < 4 and anchor + kept + 1 < len(trajectory.tokens):
                ids = torch.tensor([trajectory.tokens[: anchor + kept + 1]])
                best = int(plain_target.logits(plain_target.read(ids).hidden[0, -1]).argmax())
                assert trace.proposed[s, kept] == best
                if best != trajectory.tokens[anchor + kept + 1]:
                    break
                kept += 1
            assert trace.accepted[s] == kept
            anchor += kept + 1
        assert anchor > trajectory.last_anchor
    assert 1 < tau(traces) < 5


def test_what_is_drawn_from_the_targets_own_law_is_kept(plain_target: Target) -> None:
    """By the rule of replay, at every anchor; its ceiling is above that of best tokens."""
    law, trajectories = Law(1.3, 0.95), random_target.trajectories(3, seed=1)
    for trajectory in trajectories:
        trace = ceiling_trace(plain_target, trajectory, 5, drawn=True)
        assert tau([trace]) > tau([ceiling_trace(plain_target, trajectory, 5)])
        tokens, anchors = committed_tokens([trajectory], 4, plain_target.device), torch.tensor(trace.anchors)[None]
        hidden = plain_target.read(tokens[:, :-4]).hidden
        text = SampledText.of(plain_target, hidden, [trajectory], law, 4)
        found = Expectation(text, anchors)
        for k in range(1, 5):
            ahead = tokens.gather(1, anchors + k)
            p = text.of_text(anchors + k - 1, ahead)  # of what top-p leaves out of these texts, what was said before
            found.take(p, p, ahead)
        assert found.accepted[0].tolist() == trace.accepted.tolist()
        assert found.committed[0].tolist() == trace.committed.tolist()
