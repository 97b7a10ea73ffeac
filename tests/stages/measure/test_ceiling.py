"""The acceptance of a perfect drafter, against the target walked through one position at a time."""

from __future__ import annotations

import torch

from draftsmith.stages.measure.acceptance import ceiling_trace
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
