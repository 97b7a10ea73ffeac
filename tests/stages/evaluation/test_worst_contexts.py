"""The worst and the typical stretches of answers, with a drafter whose proposals are known."""

from __future__ import annotations

import numpy as np

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.evaluation.worst_contexts import STEPS, ContextCollector
from draftsmith.stages.replay.trace import Trace


def decode(ids: list[int]) -> str:
    return "".join(chr(token) for token in ids)


def traced(prompt: str, answer: str, accepted: list[int], K: int = 3) -> tuple[Trajectory, Trace]:
    """A trace that keeps so many proposals in each step; the others are `x`."""
    tokens = [ord(letter) for letter in prompt + answer]
    anchors, proposed, anchor = [], [], len(prompt)
    for kept in accepted:
        anchors.append(anchor)
        ahead = (tokens[anchor + 1 : anchor + 1 + kept] + [ord("x")] * K)[:K]
        proposed.append(ahead)
        anchor += kept + 1
    assert anchor == len(tokens) - 1
    steps = np.array(anchors), np.array(accepted), np.array(proposed)
    return Trajectory(answer, tokens, len(prompt)), Trace(len(tokens), *steps, 0)


def test_the_worst_stretch_of_every_answer_is_shown_step_by_step() -> None:
    good = traced("q:", "abcdefghijklmnopqrstuvwxyz123", [3] * 7)
    bad = traced("p:", "abcdefghijklmnopqrstuvw", [2, 2, 2, 0, 0, 1, 0, 0, 0, 2, 2])
    worst_of = ContextCollector()
    for place, (_, trace) in ((1, bad), (0, good)):
        worst_of.add([place], [trace])
    found = worst_of.contexts([good[0], bad[0]], ["chat", "code"], decode)
    assert [(each.kind, each.set) for each in found[:2]] == [("worst", "code"), ("worst", "chat")]
    worst = found[0]
    assert worst.tau == (STEPS + 1) / STEPS
    assert worst.before == "p:abcdefghij" and worst.position == 10
    assert worst.steps[0].to_json() == {"kept": "", "rejected": "x", "dropped": "xx", "chosen": "k"}
    assert worst.steps[2].to_json() == {"kept": "m", "rejected": "x", "dropped": "x", "chosen": "n"}
    assert worst.after == "rstuvw"
    text = worst.before + "".join(step.accepted + step.chosen for step in worst.steps) + worst.after
    assert text == decode(bad[0].tokens), "nothing of the answer is lost or doubled"


def test_so_many_are_shown_and_a_cut_step_proposes_no_further_than_the_end() -> None:
    many = [traced("q:", "abcd", [0, 0, 0]) for _ in range(12)]
    worst_of = ContextCollector(count=10)
    worst_of.add(range(12), [trace for _, trace in many])
    found = worst_of.contexts([t for t, _ in many], ["chat"] * 12, decode)
    assert [each.kind for each in found] == ["worst"] * 10 + ["typical"] * 2
    last = found[0].steps[-1]
    assert (last.rejected, last.dropped, last.chosen) == ("x", "", "d")


def test_typical_stretches_are_those_of_the_median_answers_in_any_order() -> None:
    answers = [
        traced("q:", "abcdefghijklmnopqrstuvwxyz123"[: 7 * (kept + 1) + 1], [kept] * 7) for kept in (0, 1, 2, 3, 3)
    ]
    found = []
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        contexts = ContextCollector(count=1)
        for place in order:
            contexts.add([place], [answers[place][1]])
        found.append(contexts.contexts([trajectory for trajectory, _ in answers], ["chat"] * 5, decode))
    assert found[0] == found[1]
    assert [(each.kind, each.tau) for each in found[0]] == [("worst", 1.0), ("typical", 2.0), ("typical", 3.0)]
