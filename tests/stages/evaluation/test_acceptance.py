"""Acceptance by hand: tables are ratios of sums, differences are paired over prompts; worst and typical stretches."""

from __future__ import annotations

import numpy as np
import pytest

from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.evaluation.acceptance import (
    STEPS,
    ContextCollector,
    acceptance_table,
    as_served,
    has_loop,
    served_tallies,
    slices,
    tau_by_slice,
    tau_comparisons,
    tau_differences,
)
from draftsmith.stages.replay.steps import AcceptanceStats, Steps


def trace(length: int, anchors: list[int], accepted: list[int]) -> Steps:
    shape = (len(anchors), 3)
    return Steps(length, np.array(anchors), np.array(accepted), np.zeros(shape, int))


def tallies(**traces: list[Steps]) -> dict[str, AcceptanceStats]:
    tallies = {name: AcceptanceStats(len(found)) for name, found in traces.items()}
    for name, tally in tallies.items():
        tally.add(range(len(traces[name])), traces[name])
    return tallies


def test_acceptance_table_by_hand() -> None:
    """Two answers, K = 3. The last step of the first one is cut: one of its proposals is verified."""
    sft = [trace(13, [4, 6, 10, 11], [1, 3, 0, 1]), trace(8, [4, 5, 6], [0, 0, 0])]
    opd = [trace(13, [4, 8], [3, 3]), trace(8, [4], [3])]
    table = acceptance_table(tallies(sft=sft, opd=opd), ["a", "b"], [False, True])
    assert table["sft"].tau == (8 + 3) / 7
    assert table["opd"].tau == (4 + 4 + 3) / 3
    to_sft = table["opd"].differences["sft"]
    assert to_sft.value == pytest.approx(11 / 3 - 11 / 7)
    assert to_sft.low is not None and to_sft.high is not None and to_sft.low <= to_sft.value <= to_sft.high
    assert table["opd"].prompts == 2
    assert table["sft"].tau_without_loops == 2
    assert table["sft"].accepted_histogram == [4, 2, 0, 1]
    # judged: offset 1 seven times, offset 2 in 2+1+2 steps (not at 11, 6), offset 3 in 2+1 steps
    assert table["sft"].acceptance_by_offset == [3 / 7, 1 / 5, 1 / 3]
    assert (table["sft"].verify_steps, table["sft"].block_size) == (7, 4)
    assert table["sft"].differences == {} and table["opd"].differences.keys() == {"sft"}
    with_control = acceptance_table(tallies(sft=sft, control=sft, opd=opd), ["a", "b"], [False, False])
    assert with_control["opd"].differences["control"] == with_control["opd"].differences["sft"]
    assert with_control["control"].differences["sft"].to_json() == {"value": 0, "low": 0, "high": 0}
    assert acceptance_table(tallies(sft=sft), ["a", "b"], [True, True])["sft"].tau_without_loops is None


def test_tau_as_served_by_hand() -> None:
    """The first answer of sft had no drafts, the last answers have a token each and no step."""
    counts = {"champion": [(13, 6), (9, 4), (1, 0)], "sft": [(5, 0), (9, 2), (1, 0)]}
    rows = [
        {"arm": arm, "tokens": tokens, "verify_steps": steps} for arm, own in counts.items() for tokens, steps in own
    ]
    replay = [[trace(13, [4, 8], [3, 3])]] * 2
    drafters = acceptance_table(tallies(champion=replay[0], sft=replay[1]), ["a"], [False])
    replayed = EvaluationResult(drafters=drafters, loop_share=0.0)
    served = served_tallies(rows, ["champion", "sft"])
    found = as_served(replayed, served, ["a", "b", "c"], [["set"], ["set"], ["set"]])
    champion, sft = found.drafters["champion"], found.drafters["sft"]
    assert (champion.tau, champion.tau_replayed, champion.verify_steps) == (20 / 10, 4.0, 10)
    assert (sft.tau, sft.tau_replayed, sft.acceptance_by_offset) == (12 / 6, 4.0, drafters["sft"].acceptance_by_offset)
    assert sft.differences["champion"].value == 0.0 and sft.tau_low is not None
    (overall, of_set) = found.compared("tau", "sft", "champion")
    assert (overall.set, overall.value, overall.base, overall.units) == (None, 0.0, 2.0, 2)
    assert of_set.set == "set" and found.sets["set"]["sft"].tau == 2.0


def test_differences_are_paired_over_prompts() -> None:
    """Simulated: prompts differ far more than two drafters do, which find the same ones easy.

    By the deviations of the simulation, the interval of the difference is a third of that of a single tau.
    """
    rng, found = np.random.default_rng(0), {}
    easy = rng.uniform(0.2, 0.9, 60)
    for name, better in (("sft", 0.0), ("opd", 0.02)):
        tally = found[name] = AcceptanceStats(60)
        tally.steps[:], tally.committed[:] = 40, 40 + rng.binomial(40 * 3, easy + better)
    prompts = [str(i) for i in range(60)]
    table = acceptance_table(found, prompts, [False] * 60)
    paired, single = table["opd"].differences["sft"], table["opd"]
    assert paired.low is not None and paired.high is not None and paired.low < paired.value < paired.high
    assert single.tau_low is not None and single.tau_high is not None
    assert paired.value == pytest.approx(table["opd"].tau - table["sft"].tau)
    assert paired.high - paired.low < (single.tau_high - single.tau_low) / 2
    other = rng.permutation(60)
    found["opd"].committed[:] = found["opd"].committed[other]
    unpaired = tau_differences(found, prompts)["opd", "sft"].interval()
    assert unpaired is not None and unpaired[1] - unpaired[0] > single.tau_high - single.tau_low


def test_answers_to_one_prompt_are_one_observation() -> None:
    """Eight answers to two prompts say as much as two answers of four times the length."""
    ours = [trace(13, [4, 8], [3, 3]), trace(8, [4, 5], [0, 2])]
    theirs = [trace(13, [4, 6, 10, 11], [1, 3, 0, 1]), trace(8, [4, 5, 6], [0, 0, 0])]
    once = tau_differences(tallies(sft=theirs, opd=ours), ["a", "b"])["opd", "sft"]
    again = tau_differences(tallies(sft=theirs * 4, opd=ours * 4), ["a", "b"] * 4)["opd", "sft"]
    alone = tau_differences(tallies(sft=theirs * 4, opd=ours * 4), list("abcdefgh"))["opd", "sft"]
    assert (again.value, again.error, again.units) == (pytest.approx(once.value), pytest.approx(once.error), 2)
    assert alone.error < again.error / 1.5


def test_metrics_of_a_slice_come_from_its_own_answers_and_prompts() -> None:
    ours = [trace(13, [4, 8], [3, 3]), trace(8, [4], [3]), trace(13, [4, 8], [3, 3])]
    theirs = [trace(13, [4, 6, 10, 11], [1, 3, 0, 1]), trace(8, [4, 5, 6], [0, 0, 0]), trace(13, [4, 8], [3, 3])]
    found, prompts = tallies(champion=theirs, opd=ours), ["a", "b", "b"]
    labels = [("chat", "language:de"), ("code",), ("code",)]
    by_slice = tau_by_slice(found, prompts, labels)
    assert {name: {arm: (f.tau, f.prompts) for arm, f in arms.items()} for name, arms in by_slice.items()} == {
        "all": {"champion": (19 / 9, 2), "opd": (19 / 5, 2)},
        "chat": {"champion": (2.0, 1), "opd": (4.0, 1)},
        "code": {"champion": (11 / 5, 1), "opd": (11 / 3, 1)},
        "language:de": {"champion": (2.0, 1), "opd": (4.0, 1)},
    }
    assert [name for name, arms in by_slice.items() if arms["opd"].has_interval] == ["all"], "the others are too small"
    compared = {each.set: each for each in tau_comparisons(found, prompts, [each[:1] for each in labels])}
    assert {name: (e.value, e.base, e.gain and e.gain.value, e.units) for name, e in compared.items()} == {
        None: pytest.approx((19 / 5 - 19 / 9, 19 / 9, 9 / 5 - 1, 2)),
        "chat": pytest.approx((2.0, 2.0, 1.0, 1)),
        "code": pytest.approx((11 / 3 - 11 / 5, 11 / 5, 5 / 3 - 1, 1)),
    }
    assert tau_comparisons(tallies(sft=theirs, opd=ours), prompts, labels) == [], "without a champion"


def test_acceptance_by_offset_of_a_slice_is_that_of_its_answers_alone() -> None:
    """Random traces of three prompt sets and two labels, against a table of the slice's answers by themselves."""
    rng = np.random.default_rng(0)
    traces = [
        trace(40, list(range(4, 39, 4)), np.minimum(rng.integers(0, 4, 9), 39 - np.arange(4, 39, 4)).tolist())
        for _ in range(12)
    ]
    labels = [(("chat", "code", "math")[i % 3], f"language:{'de' if i % 2 else 'en'}") for i in range(12)]
    prompts = [str(i) for i in range(12)]
    found = {each.name: each.by_offset["it"] for each in slices(tallies(it=traces), prompts, labels)}
    assert list(found) == [None, "chat", "code", "math", "language:de", "language:en"]
    for name, shares in found.items():
        chosen = [i for i in range(12) if name is None or name in labels[i]]
        alone = acceptance_table(
            tallies(it=[traces[i] for i in chosen]), [prompts[i] for i in chosen], [False] * len(chosen)
        )
        steps = [(a, j) for i in chosen for a, j in zip(traces[i].accepted, traces[i].judged, strict=True)]
        plain = [sum(a >= k for a, _ in steps) / sum(j >= k for _, j in steps) for k in (1, 2, 3)]
        assert shares == plain == alone["it"].acceptance_by_offset
    short = tallies(it=[trace(7, [4], [2])])["it"]
    assert short.acceptance_by_offset() == [1.0, 1.0], "no step reaches the last offset"


def test_a_verify_step_counts_at_the_depth_of_its_anchor() -> None:
    """The second answer ends before opd has a verify step in the third depth, so it says nothing there."""
    theirs = [trace(4110, [1020, 1023, 1024, 4095, 4096], [2, 0, 3, 0, 3]), trace(4099, [4094, 4096], [1, 1])]
    ours = [trace(4110, [1022, 1024, 4096], [1, 3, 3]), trace(4099, [4095], [2])]
    found_tallies = tallies(champion=theirs, opd=ours)
    found = tau_by_slice(found_tallies, ["a", "b"], [("chat",)] * 2)
    by_depth = {name: arms for name, arms in found.items() if name.startswith("depth")}
    assert {name: {arm: (m.tau, m.prompts) for arm, m in arms.items()} for name, arms in by_depth.items()} == {
        "depth:below-1k": {"champion": (2.0, 1), "opd": (2.0, 1)},
        "depth:1k-4k": {"champion": (7 / 3, 2), "opd": (7 / 2, 2)},
        "depth:4k-16k": {"champion": (4.0, 1), "opd": (4.0, 1)},
    }
    by_offset = {each.name: each.by_offset for each in slices(found_tallies, ["a", "b"], [("chat",)] * 2)}
    assert {name: by_offset[name] for name in by_depth} == {
        "depth:below-1k": {"champion": [1 / 2, 1 / 2, 0.0], "opd": [1.0, 0.0, 0.0]},
        # the champion's steps here: at 1024 and 4095 of the first answer, at 4094 of the second
        "depth:1k-4k": {"champion": [2 / 3, 1 / 3, 1 / 3], "opd": [1.0, 1.0, 1 / 2]},
        "depth:4k-16k": {"champion": [1.0, 1.0, 1.0], "opd": [1.0, 1.0, 1.0]},
    }
    alone = tau_by_slice(tallies(champion=theirs[1:], opd=ours[1:]), ["b"], [("chat",)])
    assert list(alone) == ["all", "chat"], "a single depth is no slice"


def test_a_loop_is_an_n_gram_that_comes_three_times() -> None:
    assert not has_loop([])
    assert not has_loop(list(range(100)))
    gram = [1, 2, 3, 4, 5, 6]
    assert not has_loop(gram + gram)
    assert has_loop([*gram, 9, *gram, 8, *gram])
    assert not has_loop([1, 2, 3, 4, 5, 9, 1, 2, 3, 4, 5, 8, 1, 2, 3, 4, 5, 7])
    assert has_loop([0] * 8) and not has_loop([0] * 7)


def decode(ids: list[int]) -> str:
    return "".join(chr(token) for token in ids)


def traced(prompt: str, answer: str, accepted: list[int], K: int = 3) -> tuple[Trajectory, Steps]:
    """A trace that keeps this many proposals in each step; the others are `x`."""
    tokens = [ord(letter) for letter in prompt + answer]
    anchors, proposed, anchor = [], [], len(prompt)
    for kept in accepted:
        anchors.append(anchor)
        ahead = (tokens[anchor + 1 : anchor + 1 + kept] + [ord("x")] * K)[:K]
        proposed.append(ahead)
        anchor += kept + 1
    assert anchor == len(tokens) - 1
    steps = np.array(anchors), np.array(accepted), np.array(proposed)
    return Trajectory(answer, tokens, len(prompt)), Steps(len(tokens), *steps)


def test_the_worst_stretch_of_every_answer_is_shown_step_by_step() -> None:
    good = traced("q:", "abcdefghijklmnopqrstuvwxyz123", [3] * 7)
    bad = traced("p:", "abcdefghijklmnopqrstuvw", [2, 2, 2, 0, 0, 1, 0, 0, 0, 2, 2])
    worst_of = ContextCollector([("chat", "language:de"), ("code",)])
    for place, (_, trace) in ((1, bad), (0, good)):
        worst_of.add([place], [trace])
    found = worst_of.contexts([good[0], bad[0]], decode)
    assert [(each.kind, each.set) for each in found[:2]] == [("worst", "code"), ("worst", "chat")]
    of_slices = {each.slice: each.position for each in found if each.slice is not None}
    assert of_slices == {"chat": 1, "code": 10, "language:de": 1}
    worst = found[0]
    assert worst.tau == (STEPS + 1) / STEPS
    assert worst.before == "p:abcdefghij" and worst.position == 10
    assert worst.steps[0].to_json() == {"accepted": "", "rejected": "x", "dropped": "xx", "chosen": "k"}
    assert worst.steps[2].to_json() == {"accepted": "m", "rejected": "x", "dropped": "x", "chosen": "n"}
    assert worst.after == "rstuvw"
    text = worst.before + "".join(step.accepted + step.chosen for step in worst.steps) + worst.after
    assert text == decode(bad[0].tokens), "nothing of the answer is lost or doubled"


def test_so_many_are_shown_and_a_cut_step_proposes_no_further_than_the_end() -> None:
    many = [traced("q:", "abcd", [0, 0, 0]) for _ in range(12)]
    worst_of = ContextCollector([("chat",)] * 12, count=10)
    worst_of.add(range(12), [trace for _, trace in many])
    found = worst_of.contexts([t for t, _ in many], decode)
    assert [each.kind for each in found] == ["worst"] * 10 + ["typical"] * 2
    last = found[0].steps[-1]
    assert (last.rejected, last.dropped, last.chosen) == ("x", "", "d")


def test_typical_stretches_are_those_of_the_median_answers_in_any_order() -> None:
    answers = [
        traced("q:", "abcdefghijklmnopqrstuvwxyz123"[: 7 * (kept + 1) + 1], [kept] * 7) for kept in (0, 1, 2, 3, 3)
    ]
    found = []
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        contexts = ContextCollector([("chat",)] * 5, count=1)
        for place in order:
            contexts.add([place], [answers[place][1]])
        found.append(contexts.contexts([trajectory for trajectory, _ in answers], decode))
    assert found[0] == found[1]
    assert [(each.kind, each.tau) for each in found[0]] == [("worst", 1.0), ("typical", 2.0), ("typical", 3.0)]
