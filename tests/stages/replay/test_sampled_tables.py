"""Sampled replay on distributions that are tables, against plain speculative sampling: all that happens in a step.

Steps are so cheap here that a wrong distribution of what was rejected, and of what follows it, is seen too.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from draftsmith.stages.drafters.base import BlockSampler, Drafter, PreparedDrafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import Purpose
from draftsmith.stages.replay import sampled
from draftsmith.stages.replay.sampled import TargetSampler
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.replay.test_sampled import cut, same_distribution

V, DRAWS = 4, 20_000
ALARM = 1e-6  # p-value, of fixed seeds
SAMPLINGS = [SamplingParams(1.0), SamplingParams(0.6), SamplingParams(1.4, 0.85), SamplingParams(1.2, 0.9, 3)]

Step = tuple[int, ...]  # the answer's first two tokens, accepted proposals, and both proposals


@dataclass(frozen=True)
class Tables:
    """Logits [V, V] of the target at offsets 1, 2, 3 and of the drafter at 1, 2, after each token."""

    p: np.ndarray  # [3, V, V]
    q: np.ndarray  # [2, V, V]

    @classmethod
    def random(cls) -> Tables:
        p, q = np.log(np.random.default_rng(3).dirichlet(np.full(V, 0.8), (2, 3, V)))
        return cls(p, q[:2])

    def distributions(self, sampling: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        """Return the distributions that are sampled from: top-k and top-p apply only to the target."""
        p, q = (np.exp(x / sampling.temperature) for x in (self.p, self.q))
        p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
        return cut(p, sampling), q


TABLES = Tables.random()
ANCHOR = 1  # the token, at position 0


def pick(rng: random.Random, weights: np.ndarray) -> int:
    return rng.choices(range(V), weights.tolist())[0]


@cache
def decoded(sampling: SamplingParams) -> Counter[Step]:
    """Run speculative sampling, one request after the other; tokens after a step are sampled from the target."""
    (p, q), rng, found = TABLES.distributions(sampling), random.Random(0), Counter[Step]()
    for _ in range(DRAWS):
        proposed = [pick(rng, q[0, ANCHOR])]
        proposed.append(pick(rng, q[1, proposed[0]]))
        text, accepted, before = [], 0, ANCHOR
        for k, x in enumerate(proposed):
            if rng.random() < p[k, before, x] / q[k, before, x]:
                text.append(x)
                accepted, before = accepted + 1, x
            else:
                text.append(pick(rng, np.maximum(p[k, before] - q[k, before], 0)))
                break
        while len(text) < 2:
            text.append(pick(rng, p[len(text), text[-1]]))
        found[(*text, accepted, *proposed)] += 1
    return found


class TableSampler(BlockSampler):
    """Samples from the drafter's table."""

    offset, head = 0, Head(torch.eye(V))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        self.offset += 1
        return torch.from_numpy(TABLES.q[self.offset - 1]).float()[tokens]


@cache
def texts(sampling: SamplingParams) -> torch.Tensor:
    """Return the target's answers [DRAWS, 4] without a drafter: anchor and sampled tokens."""
    p, rng, found = TABLES.distributions(sampling)[0], random.Random(1), []
    for _ in range(DRAWS):
        text = [ANCHOR]
        for k in range(3):
            text.append(pick(rng, p[k, text[-1]]))
        found.append(text)
    return torch.tensor(found)


def replayed(sampling: SamplingParams) -> Counter[Step]:
    """Return the steps of replay on these answers."""
    tokens, numbers = texts(sampling), np.random.default_rng(2).random((DRAWS, 6, len(Purpose)))
    states = torch.stack([torch.arange(4).expand(DRAWS, -1).clamp(max=2), tokens], -1).float()  # as hidden states
    text = TargetSampler(
        states,
        torch.from_numpy(numbers),
        torch.full((DRAWS,), 4),
        sampling,
        lambda hidden: torch.from_numpy(TABLES.p).float()[hidden[..., 0].long(), hidden[..., 1].long()],
        V,
        torch.full((DRAWS, 4), torch.nan, dtype=torch.float64),
    )
    drafter = cast("Drafter", SimpleNamespace(block_sampler=lambda *_: TableSampler()))
    padded, context = torch.nn.functional.pad(tokens, (0, 2), value=-1), cast("Any", None)
    anchors = torch.zeros(DRAWS, 1, dtype=torch.long)
    found = sampled.draft_sampled(
        PreparedDrafter(drafter, TableSampler.head, 3), context, text, padded, anchors, with_proposals=True
    )
    assert found.expected is not None
    off = found.accepted + 1 - found.expected
    assert abs(float(off.mean())) < 5 * float(off.std()) / DRAWS**0.5, "what is expected is what drawing comes to"
    rows = torch.cat([tokens[:, 1:3], found.accepted, found.proposed[:, 0]], 1)
    return Counter(map(tuple, rows.tolist()))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_steps_have_the_distribution_of_speculative_sampling(sampling: SamplingParams) -> None:
    found = replayed(sampling)
    assert {key[2] for key in found} == {0, 1, 2} and len(found) > 40
    assert same_distribution(decoded(sampling), found) > ALARM


Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
WRONG: dict[str, tuple[str, Rule]] = {
    "accepted by p / q": ("acceptance_ratio", lambda q, p: p / q),
    "accepted by p": ("acceptance_ratio", lambda _q, p: p),
    "rejected from all of q": ("rejection_weights", lambda q, _p: q),
    "rejected from p": ("rejection_weights", lambda _q, p: p),
    "rejected where p has more": ("rejection_weights", lambda q, p: (p - q).clamp(min=0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, rule = WRONG[name]
    right = decoded(SAMPLINGS[2])
    monkeypatch.setattr(sampled, where, rule)
    assert same_distribution(right, replayed(SAMPLINGS[2])) < ALARM
