"""Replay of sampled proposals: equal to a plain reference, and in distribution to decoding.

Also of targets that are not plain: soft caps, sinks and windows, recurrent states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from draftsmith.artifacts.results.evaluation import CHAMPION
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.sampling import (
    Purpose,
    is_truncated,
    probabilities,
    seed_from_name,
    truncate,
    truncation_mask,
)
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.evaluation.acceptance import tau_by_slice, tau_comparisons, tau_difference
from draftsmith.stages.replay import sampled
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import AcceptanceStats, Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.bench import step_rows, tau
from tests.stages.drafters.texts import logits_of
from tests.testbed import random_target
from tests.testbed.dflash2 import random_dflash2
from tests.testbed.dspark import random_dspark
from tests.testbed.families import write_family
from tests.testbed.sampling_drafters import sampling_dflash, sampling_eagle3

DRAFTERS: dict[str, Callable[[Target], Drafter]] = {
    "dflash2": partial(random_dflash2, selector_top_k=40),  # with fewer candidates next to nothing is accepted
    "dspark": random_dspark,
    "eagle3": sampling_eagle3,
}
SAMPLING = SamplingParams(temperature=1.5, top_p=0.95, top_k=40)
PROMPT = [5, 3, 9, 1]
ANSWERS, LENGTH = 500, 6
ALARM = 1e-5  # p-value, of fixed seeds


@pytest.fixture(scope="module", params=DRAFTERS)
def drafter(request: pytest.FixtureRequest, plain_target: Target) -> Drafter:
    return DRAFTERS[request.param](plain_target)


def decoded(target: Target, drafter: Drafter | None, first_seed: int) -> list[Completion]:
    engine = EmbeddedEngine(target, drafter, slots=100, capacity=len(PROMPT) + LENGTH + 8)
    return list(
        engine.generate([Request(str(i), PROMPT, LENGTH, SAMPLING, i) for i in range(first_seed, first_seed + ANSWERS)])
    )


@pytest.fixture(scope="module")
def texts(plain_target: Target) -> list[Trajectory]:
    return [a.trajectory() for a in decoded(plain_target, None, 0) if len(a.response_ids) == LENGTH]


def replayed(
    target: Target, drafter: Drafter, texts: Sequence[Trajectory], sampling: SamplingParams = SAMPLING, **options: Any
) -> list[Steps]:
    return Replayer(target, ReplayOptions(sampling=sampling, **options)).traces({"it": drafter}, texts)["it"]


# ---- the plain reference: one text, one block, one token after the other


@dataclass
class Plainly:
    """Replays one answer in numpy, from the drafter's and the target's logits on any prefix."""

    target: Target
    drafter: Drafter
    text: Trajectory

    def __post_init__(self) -> None:
        tokens = torch.tensor([self.text.tokens])
        out = self.target.read(tokens, self.drafter.target_layer_ids)
        assert out.features is not None
        logits = self.target.logits(out.hidden)[0]
        self.p, self.whole = _sampling(logits, SAMPLING), _sampling(logits, SamplingParams(SAMPLING.temperature))
        with torch.no_grad():
            self.context = self.drafter.encode(out.features, tokens, torch.arange(tokens.shape[1])[None])
        self.head = self.drafter.drafting_head(self.target.head_weight, None)
        self.numbers = np.random.default_rng(seed_from_name(self.text.trajectory_id)).random((64, len(Purpose)))

    @torch.no_grad()
    def q(self, anchor: int, chain: list[int], k: int) -> np.ndarray:
        """Return q [V] of offset k, given the tokens of `chain` (the anchor's and the proposals)."""
        K = self.drafter.block_size - 1
        given = torch.tensor([[(chain + [0] * K)[:K]]])
        hidden = self.drafter.block_hidden(self.context, given, torch.tensor([[anchor]]))
        whole = np.zeros(self.target.info.vocab_size)
        ids = self.head.token_ids
        logits = logits_of(self.drafter, hidden, given, self.head)[0, 0, k - 1]
        whole[slice(None) if ids is None else ids.numpy()] = _sampling(logits, SamplingParams(SAMPLING.temperature))
        return whole

    def answer_probability(self, at: int) -> float:
        """Return the probability of the answer's token at a position, before top-p if that leaves it out."""
        y = self.text.tokens[at]
        return float(self.p[at - 1][y] or self.whole[at - 1][y])

    def step(self, anchor: int) -> tuple[int, list[int]]:
        """Return the number of accepted proposals, and all proposals."""
        chain, on_text, accepted = [self.text.tokens[anchor]], True, 0
        for k in range(1, self.drafter.block_size):
            at, numbers = anchor + k, self.numbers[anchor + k]
            q = self.q(anchor, chain, k)
            inside = at < len(self.text.tokens)
            if on_text and inside:
                y = self.text.tokens[at]
                if numbers[Purpose.ACCEPT] < q[y] / self.answer_probability(at):
                    accepted += 1
                    chain.append(y)
                    continue
                q = np.maximum(q - self.p[at - 1], 0)
            on_text = False
            chain.append(int(np.searchsorted(np.cumsum(q), numbers[Purpose.PROPOSAL] * q.sum(), side="right")))
        return accepted, chain[1:]

    def trace(self) -> list[tuple[int, int, list[int]]]:
        steps, anchor = [], self.text.first_anchor
        while anchor <= self.text.last_anchor:
            accepted, proposed = self.step(anchor)
            steps.append((anchor, accepted, proposed))
            anchor += accepted + 1
        return steps

    def steps_expected(self) -> float:
        """Return the exact expected number of verify steps, from the last anchor backwards."""
        ahead = [0.0] * (len(self.text.tokens) + self.drafter.block_size)
        for anchor in range(self.text.last_anchor, self.text.first_anchor - 1, -1):
            reach, total = 1.0, 1.0
            for k in range(1, self.drafter.block_size):
                if (at := anchor + k) >= len(self.text.tokens):
                    break
                y = self.text.tokens[at]
                chance = min(1.0, self.q(anchor, self.text.tokens[anchor:at], k)[y] / self.answer_probability(at))
                total += reach * (1 - chance) * ahead[at]
                reach *= chance
            else:
                at += 1
            ahead[anchor] = total + reach * ahead[at]
        return ahead[self.text.first_anchor]


def cut(p: np.ndarray, sampling: SamplingParams) -> np.ndarray:
    """Return distributions [..., V] after top-k and top-p, with a loop over them."""
    for row in p.reshape(-1, p.shape[-1]) if sampling.truncates else ():
        order = np.argsort(-row)
        row[order[sampling.top_k or len(row) :]] = 0
        row /= row.sum()
        row[order[np.concatenate([[0.0], row[order].cumsum()[:-1]]) >= sampling.top_p]] = 0
    cut_off: np.ndarray = p / p.sum(-1, keepdims=True)
    return cut_off


def _sampling(logits: torch.Tensor, sampling: SamplingParams) -> np.ndarray:
    return cut(torch.softmax(logits.double() / sampling.temperature, -1).numpy(), sampling)


def test_parallel_replay_equals_the_plain_reference(
    drafter: Drafter, texts: list[Trajectory], plain_target: Target
) -> None:
    some = [*texts[:4], *random_target.trajectories(2)]  # also what top-k and top-p leave out
    expected = [Plainly(plain_target, drafter, text).trace() for text in some]
    for chains in (1, 3, None):
        assert [step_rows(trace) for trace in replayed(plain_target, drafter, some, chains=chains)] == expected


def test_expected_commits_equal_the_mean_of_sampled_ones(drafter: Drafter, plain_target: Target) -> None:
    (answer,) = EmbeddedEngine(plain_target, capacity=32).generate([Request("", PROMPT, 20, SAMPLING, 2)])
    text = answer.trajectory()
    assert text.answer_length == 20
    copies = [Trajectory(str(i), text.tokens, text.prompt_length) for i in range(500)]  # each with its own numbers
    traces = replayed(plain_target, drafter, copies)
    at = np.concatenate([trace.anchors for trace in traces])
    found, expected = (
        np.concatenate([getattr(trace, name) for trace in traces]) for name in ("committed", "expected_committed")
    )
    varied = 0
    for anchor in np.unique(at):
        here = found[at == anchor]
        assert np.ptp(expected[at == anchor]) < 1e-5  # it depends only on the anchor
        if len(here) >= 100:
            error = max(here.std(), 0.05) / len(here) ** 0.5
            assert abs(here.mean() - expected[at == anchor][0]) < 5 * error
            varied += here.std() > 0.3
    assert varied >= 3

    exact = (text.answer_length - 1) / Plainly(plain_target, drafter, text).steps_expected()
    assert tau(traces) == pytest.approx(exact, rel=0.04)  # ratio of sums; the text's end counts


def test_expected_tau_varies_less_than_that_of_sampled_traces(plain_target: Target) -> None:
    """This holds over many answers; a single short one may be an exception."""
    samples = 40
    engine = EmbeddedEngine(plain_target, capacity=48)
    texts = [
        answer.trajectory() for answer in engine.generate([Request(str(i), PROMPT, 30, SAMPLING, i) for i in range(8)])
    ]
    many = [Trajectory(f"{i}/{text.trajectory_id}", text.tokens, 4) for i in range(samples) for text in texts]
    traces = replayed(plain_target, random_dspark(plain_target), many)
    steps, committed, averaged = (
        np.array(values).reshape(samples, len(texts)).sum(1)
        for values in zip(
            *((len(t.anchors), t.committed.sum(), t.expected_committed.sum()) for t in traces), strict=True
        )
    )
    sampled_tau, tau_of_averages = committed / steps, averaged / steps
    assert abs(sampled_tau.mean() - tau_of_averages.mean()) < 5 * sampled_tau.std() / samples**0.5
    assert tau_of_averages.std() < 0.8 * sampled_tau.std()


def test_comparison_drift_and_gate_use_expected_commits(texts: list[Trajectory], plain_target: Target) -> None:
    """The comparison, the drift check and the gate do not use sampled lengths."""
    arms = {CHAMPION: random_dspark(plain_target), "opd": random_dflash2(plain_target, selector_top_k=40)}
    some, averaged = texts[:30], {}
    for arm, drafter in arms.items():
        traces = replayed(plain_target, drafter, some)
        sums = [sum(getattr(t, name).sum() for t in traces) for name in ("expected_committed", "committed")]
        assert abs(sums[0] - sums[1]) > 1
        averaged[arm] = sums[0] / sum(len(t.anchors) for t in traces)
    tallies = Replayer(plain_target, ReplayOptions(sampling=SAMPLING, with_proposals=False)).acceptance(arms, some)
    prompts, labels = [text.trajectory_id for text in some], [("chat",)] * len(some)
    difference = averaged["opd"] - averaged[CHAMPION]
    assert tau_difference(tallies["opd"], tallies[CHAMPION], prompts).value == pytest.approx(difference)
    assert tau_comparisons(tallies, prompts, labels)[0].value == pytest.approx(difference)
    found = tau_by_slice(tallies, prompts, labels)["chat"]
    assert {arm: metrics.tau for arm, metrics in found.items()} == pytest.approx(averaged)


# ---- in distribution: texts of plain decoding, replayed, against decoding with the drafter


def first_steps(texts: Sequence[Trajectory], accepted: Sequence[int]) -> Counter[tuple[int, int]]:
    """Count the pairs of the token after the first anchor and the proposals accepted in the first step."""
    return Counter((t.tokens[t.first_anchor + 1] % 4, n) for t, n in zip(texts, accepted, strict=True))


def same_distribution(a: Counter[Any], b: Counter[Any]) -> float:
    """Return the p-value of two samples having one distribution; rare values are pooled."""
    common = [key for key in a | b if a[key] + b[key] >= 10]
    table = np.array([[counts[key] for key in common] for counts in (a, b)])
    rest = np.array([[sum(counts.values()) - row.sum()] for counts, row in zip((a, b), table, strict=True)])
    table = np.hstack([table, rest]) if rest.sum() >= 10 else table
    return float(stats.chi2_contingency(table).pvalue)


def test_accepted_lengths_have_the_distribution_of_sampled_decoding(
    drafter: Drafter, texts: list[Trajectory], plain_target: Target
) -> None:
    """`test_sampled_tables.py` shows that wrong rules are seen."""
    answers = [a for a in decoded(plain_target, drafter, 10_000) if len(a.response_ids) == LENGTH]
    assert {0, 1, 2, 3} <= {accepted for answer in answers for _, accepted, _ in step_rows(answer.steps)}
    served = first_steps([a.trajectory() for a in answers], [step_rows(a.steps)[0][1] for a in answers])
    found = first_steps(texts, [int(trace.accepted[0]) for trace in replayed(plain_target, drafter, texts)])
    assert same_distribution(served, found) > ALARM


def test_the_targets_distribution_ignores_autocast(texts: list[Trajectory], plain_target: Target) -> None:
    hidden = plain_target.read(torch.tensor([texts[0].tokens])).hidden
    text = sampled.TargetSampler.for_trajectories(plain_target, hidden, texts[:1], SAMPLING, 4)
    at = torch.arange(len(texts[0].tokens))
    with torch.autocast("cpu", torch.bfloat16):
        found = text.distribution_at(torch.zeros_like(at), at), text.answer_probability(at[None], at[None])
    assert torch.equal(found[0], text.distribution_at(torch.zeros_like(at), at))
    fresh = replace(text, cached=torch.full_like(text.cached, torch.nan))
    assert torch.equal(found[1], fresh.answer_probability(at[None], at[None]))


def test_accepted_lengths_do_not_need_proposals(
    drafter: Drafter, texts: list[Trajectory], plain_target: Target
) -> None:
    whole = replayed(plain_target, drafter, texts)
    without = replayed(plain_target, drafter, texts, with_proposals=False)
    assert any(trace.proposed.any() for trace in whole) and not any(trace.proposed.any() for trace in without)
    for one, other in zip(whole, without, strict=True):
        assert one.expected is not None and other.expected is not None
        assert np.array_equal(one.anchors, other.anchors) and np.array_equal(one.accepted, other.accepted)
        assert np.array_equal(one.expected, other.expected)


@pytest.mark.parametrize("sampling", [SAMPLING, SamplingParams(0.7)], ids=str)
def test_answer_probabilities_are_computed_once(
    sampling: SamplingParams, texts: list[Trajectory], plain_target: Target
) -> None:
    some = texts[:4]
    tokens = torch.tensor([text.tokens for text in some])
    computed: list[int] = []

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        computed.append(len(hidden))
        return plain_target.logits(hidden)

    text = sampled.TargetSampler.for_trajectories(plain_target, plain_target.read(tokens).hidden, some, sampling, 4)
    text = replace(text, logits=logits)
    following = torch.nn.functional.pad(tokens[:, 1:], (0, 3), value=-1)  # what blocks ask for reaches after the end
    at = torch.arange(following.shape[1]).expand_as(following)
    part = slice(2, 7)
    early, late = text.answer_probability(at[:, part], following[:, part]), text.answer_probability(at, following)
    assert torch.equal(early, late[:, part]) and sum(computed) == tokens[:, 1:].numel()
    assert (late[:, tokens.shape[1] - 1 :] == 1).all()
    for row, one in enumerate(some):
        whole = probabilities(plain_target.logits(text.hidden[row]), sampling.temperature)
        p, y = truncate(whole, sampling), torch.tensor(one.tokens[1:])[:, None]
        own, before = p[:-1].gather(1, y)[:, 0], whole[:-1].gather(1, y)[:, 0]
        expected = torch.where(own > 0, own, before)
        torch.testing.assert_close(late[row, : len(expected)], expected, rtol=1e-5, atol=0)
        chosen = text.select(torch.tensor([row]))
        assert torch.equal(chosen.answer_probability(at[:1], following[row][None])[0], late[row])
    assert sum(computed) == tokens[:, 1:].numel()


def test_greedy_texts_and_other_drafters_are_verified_by_equality(plain_target: Target) -> None:
    texts = random_target.trajectories(4)
    sampling_drafter, plain = sampling_dflash(plain_target), random_target.random_drafter(plain_target)
    of_argmaxes = replayed(plain_target, plain, texts, SAMPLING)
    for other in (
        replayed(plain_target, sampling_drafter, texts, SamplingParams()),
        replayed(plain_target, plain, texts, SamplingParams()),
    ):
        for trace, expected in zip(other, of_argmaxes, strict=True):
            assert trace.expected is None
            np.testing.assert_array_equal(trace.proposed, expected.proposed)
            np.testing.assert_array_equal(trace.accepted, expected.accepted)


def test_a_smaller_block_gives_its_own_trace(drafter: Drafter, texts: list[Trajectory], plain_target: Target) -> None:
    traces = replayed(plain_target, drafter, texts[:8], drafting=DraftingConfig(block_size=3))
    assert all(trace.proposed.shape[1] == 2 and (trace.expected_committed <= 3).all() for trace in traces)


# ---- targets that are not plain


@pytest.mark.parametrize("family", ["Gemma 2", "gpt-oss", "Qwen3.5 with images", "GLM-5"])
def test_replay_and_scores_equal_the_reference_for_every_family(family: str, tmp_path: Path) -> None:
    """The answers were decoded with the drafter, in rows that later requests reuse."""
    write_family(tmp_path, family)
    target = Target.from_source(tmp_path, dtype="float32", device="cpu")
    drafter = random_dspark(target)
    requests = [Request(str(i), [5 + i, 3, 9, 1][: 3 + i % 2], 12, SAMPLING, i) for i in range(6)]
    answers = EmbeddedEngine(target, drafter, slots=2, capacity=32).generate(requests)
    texts = [answer.trajectory() for answer in answers if len(answer.response_ids) > 4][:3]
    expected = [Plainly(target, drafter, text).trace() for text in texts]
    assert len({accepted for trace in expected for _, accepted, _ in trace}) > 2
    for chains in (1, None):
        assert [step_rows(trace) for trace in replayed(target, drafter, texts, chains=chains)] == expected

    after_rejections = 0
    for group in Replayer(target, ReplayOptions(sampling=SAMPLING)).mine(drafter, texts):
        for text, trace in group:
            for (anchor, accepted, row), found in zip(step_rows(trace), trace.logprobs, strict=True):
                end = anchor + min(len(row), len(text.tokens) - 1 - anchor)
                hidden = target.read(torch.tensor([text.tokens[: anchor + 1] + row])).hidden[0, anchor:end]
                sampling = target.logits(hidden).log_softmax(-1)
                of_row = sampling.gather(1, torch.tensor(row[: end - anchor])[:, None])[:, 0]
                torch.testing.assert_close(torch.from_numpy(found[: end - anchor]), of_row, atol=2e-4, rtol=2e-4)
                after_rejections += max(0, end - anchor - accepted - 1)
    assert after_rejections > 4


# ---- answers under a top-p or top-k that cannot produce them: verified before truncation

WIDE, NARROW = SamplingParams(1.0), SamplingParams(1.0, 0.9)
NARROWER = [NARROW, SamplingParams(1.0, 0.95, 12)]
COUNT = 60


def sample_answers(target: Target, sampling: SamplingParams) -> list[Trajectory]:
    requests = [Request(str(i), [5, 3, 9, 1], 24, sampling, i) for i in range(COUNT)]
    answers = EmbeddedEngine(target, slots=COUNT, capacity=24 + 8).generate(requests)
    return [answer.trajectory() for answer in answers if len(answer.response_ids) > 1]  # as they are loaded


@pytest.fixture(scope="module")
def wide(plain_target: Target) -> list[Trajectory]:
    return sample_answers(plain_target, WIDE)


@pytest.mark.parametrize("narrow", NARROWER, ids=str)
def test_the_share_outside_the_nucleus_is_counted_and_reported(
    narrow: SamplingParams, wide: list[Trajectory], plain_target: Target, tmp_path: Path
) -> None:
    samples, argmax = random_dspark(plain_target), random_target.random_drafter(plain_target)
    drafters: dict[str, Drafter] = {"samples": samples, "argmax": argmax}

    def acceptance(texts: list[Trajectory], sampling: SamplingParams) -> dict[str, AcceptanceStats]:
        replayer = Replayer(plain_target, ReplayOptions(sampling=sampling))
        return replayer.acceptance(drafters, texts, cache=tmp_path / f"{sampling.truncates}{texts is wide}")

    count = total = 0
    for text in wide:  # of the positions that verify steps commit, before truncation
        hidden = plain_target.read(torch.tensor([text.tokens])).hidden[0, text.first_anchor : -1]
        whole = probabilities(plain_target.logits(hidden), 1.0)
        tokens = torch.tensor(text.tokens[text.first_anchor + 1 :])
        count += int(truncation_mask(whole, narrow).gather(1, tokens[:, None]).sum())
        total += len(tokens)
    for _ in range(2):  # the second time from the cache
        found = acceptance(wide, narrow)
        assert found["samples"].outside_nucleus_share == count / total > 0.05
        assert found["argmax"].outside_nucleus_share is None
    assert sampled.truncation_warning(found["samples"].outside_nucleus_share, narrow) is not None

    assert acceptance(wide, WIDE)["samples"].outside_nucleus_share == 0
    own = acceptance(sample_answers(plain_target, narrow), narrow)["samples"].outside_nucleus_share
    assert own == 0
    assert sampled.truncation_warning(own, narrow) is sampled.truncation_warning(None, narrow) is None

    groups = Replayer(plain_target, ReplayOptions(sampling=narrow)).mine(drafters["samples"], wide)
    traces = [trace for group in groups for _, trace in group]
    assert sum(trace.outside_nucleus for trace in traces) == count


def test_tau_is_close_to_that_of_the_true_sampling(wide: list[Trajectory], plain_target: Target) -> None:
    """A fifth of the tokens are outside: if all of them were accepted, tau would be a tenth higher."""
    drafter = {"it": random_dspark(plain_target)}
    true, stated = (
        Replayer(plain_target, ReplayOptions(sampling=sampling)).acceptance(drafter, wide)["it"].tau
        for sampling in (WIDE, SamplingParams(1.0, 0.8))
    )
    assert stated == pytest.approx(true, rel=0.05)


def test_truncation_without_sorting_equals_truncation_with_sorting() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(3 * torch.randn(50, 40, generator=generator, dtype=torch.float64), -1)
    for sampling in [
        *(SamplingParams(1.0, top_p, top_k) for top_p in (0.3, 0.9, 0.99) for top_k in (0, 5)),
        SamplingParams(1.0, top_k=5),
    ]:
        expected = truncation_mask(p, sampling)
        found = torch.stack([is_truncated(p, torch.full((50,), token), sampling) for token in range(40)], -1)
        assert np.array_equal(found.numpy(), expected.numpy()) and expected.any()
