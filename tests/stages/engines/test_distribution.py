"""At temperature 1 the committed tokens follow the target's own law, and the test rejects wrong acceptance rules.

For every prefix that came up, the counts of the next token are held against the target's distribution there (of a plain
forward): chi-square over the tokens that are expected five times or more, the rest pooled, summed over the prefixes of
one length.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from draftsmith.stages.drafters.drawing import probabilities
from draftsmith.stages.engines.base import Request, SamplingParams
from tests.stages.bench import Bench

Prefix = tuple[int, ...]  # of the response

ANSWERS, LENGTH = 600, 6
WRONG_ANSWERS = 6000  # rules differ little where the target is nearly sure
ALARM = 1e-6  # p-value; the target is trained where the tests run, so every processor draws other answers


class Laws:
    """The target's next-token law and the drafter's block behind every prefix of one prompt's answers."""

    def __init__(self, bench: Bench, prompt: list[int]):
        self.bench, self.prompt = bench, prompt
        self._known: dict[Prefix, tuple[np.ndarray, np.ndarray, Prefix]] = {}

    def __call__(self, prefix: Prefix) -> np.ndarray:
        """p(next token | prompt, prefix) at temperature 1."""
        return self._at(prefix)[0]

    def drafter_law(self, prefix: Prefix) -> np.ndarray:
        """The drafter's softmax at offset 1 behind the prefix."""
        return self._at(prefix)[1]

    def block(self, prefix: Prefix) -> Prefix:
        """What the drafter proposes when the last token of the prefix is the anchor."""
        return self._at(prefix)[2]

    @torch.no_grad()
    def _at(self, prefix: Prefix) -> tuple[np.ndarray, np.ndarray, Prefix]:
        if prefix not in self._known:
            target, drafter = self.bench.target, self.bench.drafters["trained"]
            tokens = torch.tensor([[*self.prompt, *prefix]])
            out = target.read(tokens, drafter.target_layer_ids)
            law = probabilities(target.logits(out.hidden[0, -1]), 1.0).numpy()
            assert out.features is not None
            context = drafter.encode(out.features, tokens, torch.arange(tokens.shape[1])[None])
            anchor = torch.tensor([[tokens.shape[1] - 1]])
            block = tokens[:, -1:, None].expand(-1, -1, drafter.block_size - 1)  # a parallel drafter reads the first
            hidden = drafter.block_hidden(context, block, anchor)[0, 0]
            logits = target.logits(hidden)
            draft = torch.softmax(logits[0].double(), -1).numpy()
            self._known[prefix] = (law, draft, tuple(logits.argmax(-1).tolist()))
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


Rule = Callable[[Laws, Prefix, int, np.random.Generator], tuple[bool, int]]


def loop(laws: Laws, rule: Rule, rng: np.random.Generator, ends: frozenset[int]) -> Prefix:
    """Plain speculative decoding of one answer: a block at a time, verified token by token with `rule`."""
    answer: Prefix = (_draw(laws(()), rng),)
    while len(answer) < LENGTH and answer[-1] not in ends:
        for proposal in laws.block(answer):
            accepted, token = rule(laws, answer, proposal, rng)
            answer = (*answer, token)
            if not accepted or token in ends or len(answer) == LENGTH:
                break
        else:
            answer = (*answer, _draw(laws(answer), rng))
    return answer


def _draw(p: np.ndarray, rng: np.random.Generator) -> int:
    return int(min(np.searchsorted(np.cumsum(p), rng.random() * p.sum(), side="right"), len(p) - 1))


def right(laws: Laws, prefix: Prefix, proposal: int, rng: np.random.Generator) -> tuple[bool, int]:
    """Accept with p(x), otherwise draw from p without x."""
    p = laws(prefix)
    if rng.random() < p[proposal]:
        return True, proposal
    rest = p.copy()
    rest[proposal] = 0
    return False, _draw(rest, rng)


def accepts_what_is_likely(laws: Laws, prefix: Prefix, proposal: int, rng: np.random.Generator) -> tuple[bool, int]:
    """Wrong: whatever the target gives more than 0.3 is kept."""
    return (True, proposal) if laws(prefix)[proposal] > 0.3 else right(laws, prefix, proposal, rng)


def draws_again_from_all(laws: Laws, prefix: Prefix, proposal: int, rng: np.random.Generator) -> tuple[bool, int]:
    """Wrong: after a rejection the rejected token may be drawn again."""
    p = laws(prefix)
    return (True, proposal) if rng.random() < p[proposal] else (False, _draw(p, rng))


def compares_with_the_drafter(laws: Laws, prefix: Prefix, proposal: int, rng: np.random.Generator) -> tuple[bool, int]:
    """Wrong for proposals that are an argmax: min(1, p/q) is the rule for proposals that were drawn from q."""
    p, q = laws(prefix), laws.drafter_law(prefix)
    if rng.random() < p[proposal] / q[proposal]:
        return True, proposal
    rest = np.maximum(p - q, 0)
    return False, _draw(rest, rng)


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


def test_a_plain_loop_with_the_right_rule_passes_too(laws: Laws, bench: Bench) -> None:
    rng = np.random.default_rng(0)
    answers = [loop(laws, right, rng, bench.target.eos_ids) for _ in range(ANSWERS)]
    assert min(p_values(laws, answers, bench.target.eos_ids)) > ALARM


@pytest.mark.parametrize("rule", [accepts_what_is_likely, draws_again_from_all, compares_with_the_drafter])
def test_wrong_acceptance_rules_are_caught(rule: Rule, laws: Laws, bench: Bench) -> None:
    rng = np.random.default_rng(0)
    answers = [loop(laws, rule, rng, bench.target.eos_ids) for _ in range(WRONG_ANSWERS)]
    assert min(p_values(laws, answers, bench.target.eos_ids)) < ALARM
