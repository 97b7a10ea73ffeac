"""At temperature 1 the committed tokens follow the target's own law.

For every prefix that came up, the counts of the next token are held against the target's distribution there (of a plain
forward): chi-square over the tokens that are expected five times or more, the rest pooled, summed over the prefixes of
one length.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from scipy import stats

from draftsmith.stages.drafters.drawing import probabilities
from draftsmith.stages.engines.base import Request, SamplingParams
from tests.stages.bench import Bench

Prefix = tuple[int, ...]  # of the response

ANSWERS, LENGTH = 600, 6
ALARM = 1e-6  # p-value; the target is trained where the tests run, so every processor draws other answers


class Laws:
    """The target's next-token law behind every prefix of one prompt's answers."""

    def __init__(self, bench: Bench, prompt: list[int]):
        self.bench, self.prompt = bench, prompt
        self._known: dict[Prefix, np.ndarray] = {}

    def __call__(self, prefix: Prefix) -> np.ndarray:
        """p(next token | prompt, prefix) at temperature 1."""
        if prefix not in self._known:
            target = self.bench.target
            hidden = target.read(torch.tensor([[*self.prompt, *prefix]])).hidden[0, -1]
            self._known[prefix] = probabilities(target.logits(hidden), 1.0).numpy()
        return self._known[prefix]


def p_values(laws: Laws, answers: list[Prefix], ends: frozenset[int]) -> list[float]:
    """One p-value a position of the answer, 1 where nothing could be tested."""
    values = []
    for at in range(LENGTH):
        following: dict[Prefix, Counter[int]] = defaultdict(Counter)
        for answer in answers:
            if len(answer) > at and not ends & set(answer[:at]):
                following[answer[:at]][answer[at]] += 1
        statistic, freedom = 0.0, 0
        for prefix, counts in following.items():
            expected = laws(prefix) * counts.total()
            tested = np.flatnonzero(expected >= 5)
            if not len(tested):
                continue
            pooled = np.append(expected[tested], counts.total() - expected[tested].sum())
            observed = np.array([counts[int(token)] for token in tested])
            observed = np.append(observed, counts.total() - observed.sum())
            pooled[-1] = max(pooled[-1], 1.0)  # a rare rest is not to decide alone
            statistic += float(((observed - pooled) ** 2 / pooled).sum())
            freedom += len(tested)
        values.append(float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0)
    return values


@pytest.fixture(scope="module")
def laws(bench: Bench) -> Laws:
    """The beginning of an answer behind which most tokens are open: the likeliest has between 0.3 and 0.8."""
    open_tokens: dict[tuple[int, int], int] = {}
    for i, prompt in enumerate(bench.prompts):
        tokens = prompt.token_ids + bench.greedy[prompt.prompt_id]
        best = torch.softmax(bench.target.logits(bench.target.read(torch.tensor([tokens])).hidden[0]), -1).amax(-1)
        uncertain = ((best > 0.3) & (best < 0.8)).tolist()
        for cut in range(len(prompt.token_ids), len(tokens) - LENGTH):
            open_tokens[i, cut] = sum(uncertain[cut : cut + LENGTH - 2])
    i, cut = max(open_tokens, key=open_tokens.__getitem__)
    return Laws(bench, (bench.prompts[i].token_ids + bench.greedy[bench.prompts[i].prompt_id])[:cut])


@pytest.mark.parametrize("drafter", ["trained", None])
def test_the_engine_follows_the_target(drafter: str | None, laws: Laws, bench: Bench) -> None:
    params = SamplingParams(LENGTH, temperature=1.0)
    requests = [Request(str(seed), laws.prompt, params, seed) for seed in range(ANSWERS)]
    answers = bench.answers(requests, drafter, slots=64)
    if drafter:  # proposals were both kept and rejected, or nothing was tested
        lengths = {step.accepted for completion in answers.values() for step in completion.steps}
        assert {0, 1} <= lengths and len(lengths) >= 3
    values = p_values(laws, [tuple(a.response_ids) for a in answers.values()], bench.target.eos_ids)
    assert sum(value < 1 for value in values) >= 5, "too few positions are open"
    assert min(values) > ALARM
