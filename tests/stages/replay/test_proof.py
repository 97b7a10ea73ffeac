"""The proof of a swap: exact in float32, and with its error rate under the parity gate's noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay import proof
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.proof import ServedAnswer, prove
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from tests.benchmarks.proof import Side, everywhere, moved, read, scrambled, simulate
from tests.stages.bench import Bench
from tests.testbed import random_target
from tests.testbed.architectures import RANDOM
from tests.testbed.dspark import random_dspark

ANSWERS, FEW, SIMULATIONS = 24, 4, 200


@pytest.fixture(scope="module")
def old(bench: Bench) -> Drafter:
    """Return a drafter near the trained one."""
    return moved(bench.drafters["trained"], scrambled(bench.drafters["trained"]), 0.15)


def served(bench: Bench, drafter: Drafter, count: int = FEW) -> list[ServedAnswer]:
    """Return the answers of an engine with this drafter."""
    answers = replace(bench, drafters={"it": drafter}).answers(bench.requests(count), "it")
    return [(answer.trajectory(), answer.steps) for answer in answers.values() if answer.steps is not None]


@dataclass(frozen=True)
class Swap:
    """A target, the drafters before and after a swap, and the answers of an engine with each."""

    target: Target
    old: Drafter
    new: Drafter
    by_old: list[ServedAnswer]
    by_new: list[ServedAnswer]

    def swapped(self, answers: Sequence[ServedAnswer], *, float32: bool, old: Drafter | None = None) -> bool | None:
        return prove(self.target, old or self.old, self.new, answers, float32=float32).swapped


@pytest.fixture(scope="module")
def swap(bench: Bench, old: Drafter) -> Swap:
    new = bench.drafters["trained"]
    return Swap(bench.target, old, new, served(bench, old, ANSWERS), served(bench, new, ANSWERS))


def without_proposals(answers: Sequence[ServedAnswer]) -> list[ServedAnswer]:
    return [(t, replace(steps, proposed=steps.proposed[:, :0])) for t, steps in answers]


@pytest.mark.parametrize("recorded", [list, without_proposals])
def test_in_float32_every_step_shows_the_drafter(recorded: Callable[[Any], list[ServedAnswer]], swap: Swap) -> None:
    of_new = recorded(swap.by_new)
    assert swap.swapped(of_new, float32=True) is True
    assert swap.swapped(recorded(swap.by_old), float32=True) is False
    assert swap.swapped(of_new, float32=True, old=swap.new) is None


def test_another_drafter_than_both_is_no_swap(bench: Bench, swap: Swap) -> None:
    assert swap.swapped(served(bench, moved(swap.new, swap.old, 0.5)), float32=True) is False
    untrained = served(bench, bench.drafters["untrained"], count=8)
    options = ReplayOptions(DraftingConfig(block_size=6))
    assert prove(bench.target, swap.old, swap.new, untrained, options, float32=False).swapped is False


def test_the_likelihood_decides_with_enough_answers(swap: Swap) -> None:
    of_new = without_proposals(swap.by_new)
    assert swap.swapped(of_new[:1], float32=False) is None
    assert swap.swapped(of_new, float32=False) is True
    assert swap.swapped(without_proposals(swap.by_old), float32=False) is False
    assert swap.swapped([], float32=False) is swap.swapped([], float32=True) is None, "without a step"


@pytest.fixture(scope="module")
def sides(bench: Bench, old: Drafter) -> list[Side]:
    return [read(bench.target, drafter, bench.answered(ANSWERS)) for drafter in (old, bench.drafters["trained"])]


def test_a_swap_that_did_not_happen_is_seldom_proven(sides: list[Side]) -> None:
    result = simulate(sides[0], sides[1], SIMULATIONS, noisy=True)
    assert result["missed"] <= 0.01 and result["false_alarms"] <= 0.02 and result["inconclusive"] < 0.2


def test_with_too_little_noise_assumed_it_would_be(
    bench: Bench, old: Drafter, sides: list[Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Similar drafters differ at near-ties, which noise changes."""
    monkeypatch.setattr(proof, "NOISY_SHARE", 0.001)
    sure = [read(bench.target, drafter, bench.answered(ANSWERS)) for drafter in (old, bench.drafters["trained"])]
    noisy = [replace(side, table=each.table) for side, each in zip(sides, sure, strict=True)]
    assert simulate(noisy[0], noisy[1], SIMULATIONS, noisy=True)["missed"] > 0.01


@pytest.mark.parametrize("kind", RANDOM)
def test_a_proposal_is_likely_where_it_is_accepted(kind: str, plain_target: Target) -> None:
    drafter, texts = RANDOM[kind](plain_target), random_target.trajectories(3, seed=4)
    replayer = Replayer(plain_target)
    chances = proof.chances(plain_target, replayer.prepare(drafter), everywhere(texts), GREEDY)
    traces = replayer.traces({"it": drafter}, texts)["it"]
    first = np.cumsum([0, *(t.last_anchor + 1 - t.first_anchor for t in texts)])
    for t, trace, start in zip(texts, traces, first, strict=False):
        counts = (chances[trace.anchors - t.first_anchor + start] > 0.5).cumprod(1).sum(1)
        np.testing.assert_array_equal(np.minimum(counts, trace.judged), trace.accepted)


def test_sampled_proposals_decide_by_their_probabilities(plain_target: Target) -> None:
    sampling = SamplingParams(temperature=1.5)
    new, old = (random_dspark(plain_target, seed=seed) for seed in (0, 1))
    requests = [Request(str(i), [5, 3, 9, 1], 16, sampling, i) for i in range(40)]
    for drafter, expected in ((new, True), (old, False)):
        engine = EmbeddedEngine(plain_target, drafter, slots=40, capacity=32)
        answers = [(each.trajectory(), each.steps) for each in engine.generate(requests) if each.steps is not None]
        result = prove(plain_target, old, new, answers, ReplayOptions(sampling=sampling), float32=True)
        assert result.swapped is expected
