"""The worst stretches of answers, by a drafter whose proposals are known."""

from __future__ import annotations

import numpy as np

from draftsmith.stages.measure.contexts import STEPS, WorstContexts
from draftsmith.stages.replay.trace import Trace, Trajectory


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
    return Trajectory(answer, tokens, len(prompt)), Trace(len(tokens), *steps, np.zeros((len(accepted), K)), 0)


def test_the_worst_stretch_of_every_answer_is_shown_step_by_step() -> None:
    good = traced("q:", "abcdefghijklmnopqrstuvwxyz123", [3] * 7)
    bad = traced("p:", "abcdefghijklmnopqrstuvw", [2, 2, 2, 0, 0, 1, 0, 0, 0, 2, 2])
    worst_of = WorstContexts()
    for place, (_, trace) in ((1, bad), (0, good)):
        worst_of.add([place], [trace])
    found = worst_of.told([good[0], bad[0]], ["chat", "code"], decode)
    assert [each["set"] for each in found] == ["code", "chat"], "the worst first"
    worst = found[0]
    assert worst["tau"] == (STEPS + 1) / STEPS
    assert worst["before"] == "p:abcdefghij" and worst["position"] == 10
    assert worst["steps"][0] == {"kept": "", "rejected": "x", "dropped": "xx", "chosen": "k"}
    assert worst["steps"][2] == {"kept": "m", "rejected": "x", "dropped": "x", "chosen": "n"}
    assert worst["after"] == "rstuvw"
    told = worst["before"] + "".join(step["kept"] + step["chosen"] for step in worst["steps"]) + worst["after"]
    assert told == decode(bad[0].tokens), "nothing of the answer is lost or doubled"


def test_so_many_are_shown_and_a_cut_step_proposes_no_further_than_the_end() -> None:
    many = [traced("q:", "abcd", [0, 0, 0]) for _ in range(12)]
    worst_of = WorstContexts(count=10)
    worst_of.add(range(12), [trace for _, trace in many])
    found = worst_of.told([t for t, _ in many], ["chat"] * 12, decode)
    assert len(found) == 10
    last = found[0]["steps"][-1]
    assert (last["rejected"], last["dropped"], last["chosen"]) == ("x", "", "d")
