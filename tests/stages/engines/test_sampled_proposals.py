"""Sampled answers follow the target's distribution where a drafter samples its proposals; wrong rules are caught."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.sampling import Purpose, sample_inverse_cdf, sampling_distribution, uniform
from draftsmith.stages.engines import rejection_sampling
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.bench import step_rows
from tests.testbed.dflash2 import random_dflash2
from tests.testbed.dspark import random_dspark
from tests.testbed.sampling_drafters import sampling_eagle3

PROMPT = [5, 3, 9, 1]
TOKENS_EACH = 3  # the prefill's token, and two that a block proposed
SAMPLING = SamplingParams(1.5, top_p=0.95, top_k=40)
ANSWERS = 800
CLASSES = 6  # of tokens: counts of single pairs would be too small
ALARM = 1e-6  # p-value, of fixed seeds


def answers(
    target: Target,
    drafter: Drafter | None,
    count: int = ANSWERS,
    slots: int = 100,
) -> list[Completion]:
    engine = EmbeddedEngine(target, drafter, slots=slots, capacity=16)
    requests = [Request(str(i), PROMPT, TOKENS_EACH, SAMPLING, i) for i in range(count)]
    return sorted(engine.generate(requests), key=lambda answer: int(answer.request.request_id))


@pytest.fixture(scope="module")
def distribution(plain_target: Target) -> np.ndarray:
    """Return the exact distribution of the second and third token's classes, of answers that do not end before."""
    end = plain_target.info.vocab_size - 1

    def behind(texts: torch.Tensor) -> torch.Tensor:
        logits = plain_target.logits(plain_target.read(texts).hidden[:, -1])
        return sampling_distribution(logits, SAMPLING)

    prompt = torch.tensor([PROMPT])
    tokens = torch.arange(end)
    first = behind(prompt)[0, :end]
    ones = torch.cat([prompt.expand(end, -1), tokens[:, None]], 1)
    second = first[:, None] * behind(ones)[:, :end]
    twos = torch.cat([ones[:, None].expand(-1, end, -1), tokens[None, :, None].expand(end, -1, 1)], -1)
    third = second[..., None] * behind(twos.flatten(0, 1)).view(end, end, -1)  # also ends
    counts = torch.zeros(CLASSES, CLASSES, dtype=third.dtype)
    classes = tokens % CLASSES, torch.arange(end + 1) % CLASSES
    counts.index_put_((classes[0][:, None], classes[1][None]), third.sum(0), accumulate=True)
    return (counts / counts.sum()).numpy()


def p_value(found: list[Completion], distribution: np.ndarray) -> float:
    counts = np.zeros_like(distribution)
    for answer in found:
        if len(answer.response_ids) == 3:
            counts[answer.response_ids[1] % CLASSES, answer.response_ids[2] % CLASSES] += 1
    return float(stats.chisquare(counts.ravel(), (distribution * counts.sum()).ravel()).pvalue)


@pytest.fixture(
    scope="module",
    params=[partial(random_dflash2, selector_top_k=40), random_dspark, sampling_eagle3],
    ids=["dflash2", "dspark", "eagle3"],
)
def drafter(request: pytest.FixtureRequest, plain_target: Target) -> Drafter:
    made: Drafter = request.param(plain_target)
    return made


def test_sampled_answers_follow_the_target(drafter: Drafter, distribution: np.ndarray, plain_target: Target) -> None:
    found = answers(plain_target, drafter)
    accepted = [accepted for answer in found for _, accepted, _ in step_rows(answer.steps)]
    assert min(accepted.count(n) for n in (0, 1, 2)) > 25
    assert p_value(found, distribution) > ALARM
    assert p_value(answers(plain_target, None), distribution) > ALARM  # the reference itself


def test_a_request_samples_the_same_tokens_in_any_batch(drafter: Drafter, plain_target: Target) -> None:
    many, few = (answers(plain_target, drafter, 40, slots) for slots in (40, 7))
    for answer, other in zip(many, few, strict=True):
        assert answer.response_ids == other.response_ids
        assert step_rows(answer.steps) == step_rows(other.steps)


# ---- only verification, of distributions that are tables: many draws, so that every wrong rule is seen

DRAWS, TOKENS, OFFSETS = 3000, 5, 2
TABLES = np.random.default_rng(0).dirichlet(np.full(TOKENS, 0.7), (2, OFFSETS + 1))  # p and q of each offset


ALL = SamplingParams(1.0)


def committed(sampling: SamplingParams) -> list[list[int]]:
    """Return the tokens of one step for many requests; p and q do not depend on earlier tokens."""
    p, q = (torch.from_numpy(table) for table in TABLES)
    q = q[:-1]
    proposed = torch.stack(
        [
            sample_inverse_cdf(
                q, torch.tensor([uniform(seed, 1 + k, Purpose.PROPOSAL) for k in range(OFFSETS)]).double()
            )
            for seed in range(DRAWS)
        ]
    )
    found = rejection_sampling.verify(
        rejection_sampling.Drafted(proposed, dict.fromkeys(range(DRAWS), q)),
        p.log().expand(DRAWS, -1, -1),
        torch.arange(1, OFFSETS + 2).expand(DRAWS, -1),
        [Request("", [], 9, sampling, seed) for seed in range(DRAWS)],
    )
    return [row[: kept + 1] for row, kept in zip(found.tokens.tolist(), found.accepted, strict=True)]


def least_p_value(sampling: SamplingParams = ALL) -> float:
    """Return the least p-value, over the offsets of a step, of committed tokens against the target's distribution."""
    values, steps = [], committed(sampling)
    distributions = sampling_distribution(torch.from_numpy(TABLES[0]).log(), sampling).numpy()
    for place, distribution in enumerate(distributions):
        counts = np.bincount([step[place] for step in steps if len(step) > place], minlength=TOKENS)
        if counts[distribution == 0].any():
            return 0.0
        values.append(stats.chisquare(counts[distribution > 0], distribution[distribution > 0] * counts.sum()).pvalue)
    return float(min(values))


Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], tuple[int, torch.Tensor]]


def _walk(ratio: Callable[..., float], rest: Callable[..., torch.Tensor]) -> Rule:
    def rule(
        proposed: torch.Tensor, p: torch.Tensor, q: torch.Tensor, first: int, seed: int
    ) -> tuple[int, torch.Tensor]:
        for k, x in enumerate(proposed.tolist()):
            if uniform(seed, first + k, Purpose.ACCEPT) >= ratio(float(p[k, x]), float(q[k, x])):
                number = uniform(seed, first + k, Purpose.RESIDUAL)
                return k, sample_inverse_cdf(rest(p[k], q[k]), torch.tensor(number).double())
        return len(proposed), sample_inverse_cdf(p[-1], torch.tensor(uniform(seed, first + len(proposed))).double())

    return rule


def _surplus(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p - q).clamp(min=0)


WRONG: dict[str, Rule] = {
    "accepts by q / p": _walk(lambda p, q: q / max(p, 1e-30), _surplus),
    "accepts by p, as for an argmax": _walk(lambda p, _q: p, _surplus),
    "draws again from all of p": _walk(lambda p, q: p / q, lambda p, _q: p),
    "keeps what is likely": _walk(lambda p, _q: float(p > 0.2), _surplus),
}


@pytest.mark.parametrize("sampling", [ALL, SamplingParams(1.3, top_p=0.9)], ids=str)
def test_every_token_of_a_step_follows_the_target(sampling: SamplingParams) -> None:
    assert least_p_value(sampling) > ALARM


@pytest.mark.parametrize("rule", WRONG)
def test_wrong_rules_are_caught(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection_sampling, "_verify_sampled", WRONG[rule])
    assert least_p_value() < ALARM
