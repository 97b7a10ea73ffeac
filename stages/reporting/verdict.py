"""What an evaluation found, in words, for who decides on a drafter.

The words say no more than was measured: a training is one drafter and no method, a difference within its interval is
none that was seen, and all sentences of a report hold together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from draftsmith.stages.measure.doubts import doubts_about
from draftsmith.stages.reporting.names import name_of


def findings(evaluation: Mapping[str, Any]) -> list[str]:
    """A sentence for every verdict of `evaluation.json`, what their intervals are of, and whether outputs stayed the
    target's own."""
    verdicts = evaluation.get("verdicts") or []
    seeds = evaluation.get("training_seeds") or {}
    doubted = [_doubted(evaluation, verdict) for verdict in verdicts]
    sentences = [
        _unjudged(verdict, _drafter(verdict["arm"], seeds))
        if doubts
        else _SENTENCES[verdict["kind"]](verdict, _drafter(verdict["arm"], seeds))
        for verdict, doubts in zip(verdicts, doubted, strict=True)
    ]
    judged = [verdict for verdict in verdicts if verdict["different"] is not None]
    if judged:
        sentences.append(_together(len(judged), judged[0]["level"]))
    exact = evaluation.get("exactness") or {}
    if (prompts := exact.get("fp32_prompts")) and exact.get("fp32_identical") != prompts:
        sentences.append(
            f"Do not serve these drafters: in fp32 only {exact.get('fp32_identical')} of {prompts} outputs equal plain "
            "decoding, so that something changes what the target says."
        )
    return sentences


def _doubted(evaluation: Mapping[str, Any], verdict: Mapping[str, Any]) -> bool:
    """Whether the speeds that a verdict compares cannot be relied on: what `doubts` says of either at the headline's
    setting."""
    setting = {name: evaluation.get(name) for name in ("temperature", "concurrency")}
    arms = verdict["arm"], verdict["other"]
    judged = verdict["kind"] == "speed" and verdict["different"] is not None
    return judged and bool(doubts_about(evaluation, setting, *arms))


def _unjudged(verdict: Mapping[str, Any], drafter: str) -> str:
    return (
        f"{drafter} and that of {name_of(verdict['other'])}: measured at {verdict['value']:.3f} times its speed, which "
        "is not judged, for what is said of these figures."
    )


def _drafter(arm: str, seeds: Mapping[str, int | None]) -> str:
    seed = seeds.get(arm)
    return f"This drafter of {name_of(arm)} (one training{'' if seed is None else f', seed {seed}'})"


def _tau(verdict: Mapping[str, Any], drafter: str) -> str:
    other, value = f"that of {name_of(verdict['other'])}", f"{verdict['value']:+.3f}"
    if verdict["different"] is None:
        return f"{drafter} has a tau {value} beside {other}: one held-out prompt cannot tell whether they differ."
    measured = f"{value} ({_interval(verdict, '+.3f')}, {verdict['prompts']} prompts)"
    if not verdict["different"]:
        return f"{drafter} does not differ measurably in tau from {other}: {measured}."
    return f"{drafter} has a measurably {'higher' if verdict['value'] > 0 else 'lower'} tau than {other}: {measured}."


def _speed(verdict: Mapping[str, Any], drafter: str) -> str:
    other, value = f"that of {name_of(verdict['other'])}", f"{verdict['value']:.3f} times its speed"
    turns = f"{verdict['turns']} turn{'s' if verdict['turns'] > 1 else ''} over the same {verdict['prompts']} prompts"
    if verdict["different"] is None and verdict["turns"] >= verdict["turns_needed"]:
        return f"{drafter} and {other}: {value} in {turns}, of which one outweighs all others: too little to tell."
    if verdict["different"] is None:
        return (
            f"{drafter} and {other}: {value} in {turns}, too few turns to tell whether they differ "
            f"({verdict['turns_needed']} are needed; raise evaluation.rounds)."
        )
    measured = f"{value} ({_interval(verdict, '.3f')}, {turns})"
    if not verdict["different"]:
        return f"{drafter} does not differ measurably in speed from {other}: {measured}."
    return f"{drafter} decodes measurably {'faster' if verdict['value'] > 1 else 'slower'} than {other}: {measured}."


_SENTENCES = {"tau": _tau, "speed": _speed}


def _together(count: int, level: float) -> str:
    if count == 1:
        return "This verdict holds at 95 %."
    return (
        f"These {count} verdicts hold together at 95 %: each interval is of 1 - 5 %/{count}, which is {_share(level)}."
    )


def _interval(verdict: Mapping[str, Any], form: str) -> str:
    return f"{_share(verdict['level'])} interval {verdict['low']:{form}} to {verdict['high']:{form}}"


def _share(level: float) -> str:
    return f"{100 * level:.3g} %"
