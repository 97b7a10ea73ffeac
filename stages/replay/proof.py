"""Proof of a swap: which of two drafters made the verify steps that a server recorded.

Answers do not show which drafter serves, because verification is lossless. Verify steps do: both drafters are replayed
at the anchors of the served steps.

- In float32 with greedy decoding every step must be the new drafter's: the same proposals, as many accepted.
- Otherwise near-ties round either way. Wald's sequential test takes the likelihood ratio of the accepted counts. An
  argmax proposal is the answer's token with P = Φ(margin / noise): the margin is that token's logit less the highest
  other one, the noise the largest of a correct bfloat16 engine, as for the parity gate
  (tests/stages/replay/test_parity_noise.py). A sampled proposal is accepted with P = min(1, q / p) (`sampled.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from scipy.special import ndtr, ndtri

from draftsmith.stages.data.trajectories import Trajectory, pad_tokens
from draftsmith.stages.drafters.base import Context, Drafter, PreparedDrafter
from draftsmith.stages.replay.chains import committed_tokens, draft
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.sampled import TargetSampler, acceptance_ratio, samples_proposals
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import SamplingParams

ServedAnswer: TypeAlias = tuple[Trajectory, Steps]  # the served steps; `proposed` is [S, 0] if only counts are known

ERROR_RATE = 0.01  # rate of swaps reported as proven that did not happen
DECISIVE = -math.log(ERROR_RATE)  # log-likelihood ratio: Wald's bound
MISFIT = -float(ndtri(ERROR_RATE))  # standard deviations
NOISY_SHARE, NOISY_PROPOSALS = 0.18, 7  # share of blocks in which noise changes one of this many proposals
LAPSE = 0.05  # the least probability of either outcome of a proposal: a single odd step decides nothing


@dataclass(frozen=True)
class Proof:
    """The result of a comparison of served steps with two drafters."""

    swapped: bool | None  # None: inconclusive
    reason: str  # the evidence


def prove(
    target: Target,
    old: Drafter,
    new: Drafter,
    answers: Sequence[ServedAnswer],
    options: ReplayOptions | None = None,
    *,
    float32: bool,
) -> Proof:
    """Decide whether the new drafter made the steps of these answers. If inconclusive, call it again with more.

    answers: not retracted by a full server, since some tokens of a retracted answer belong to no step.
    options: block size and sampling, as served.
    float32: server and target compute in float32.
    """
    replayer = Replayer(target, options)
    sampling, pair = replayer.options.sampling, (replayer.prepare(old), replayer.prepare(new))
    answers = [answer for answer in answers if answer[1]]
    steps = sum(len(served) for _, served in answers)
    if not answers:
        return Proof(None, "No verify step was recorded. Ask for longer answers.")
    if float32 and sampling.greedy:
        not_old, not_new = (sum(_different_steps(target, drafter, answer) for answer in answers) for drafter in pair)
        swapped = False if not_new else True if not_old else None
        reason = f"{not_new} of {steps} verify steps are not the new drafter's, {not_old} are not the old one's."
    else:
        by_old, by_new = (log_probabilities(chances(target, drafter, answers, sampling), answers) for drafter in pair)
        counts = np.concatenate([served.accepted for _, served in answers])
        evidence = step_evidence(by_old, by_new, counts).sum(0)
        swapped = decide(evidence)
        reason = (
            f"The log-likelihood ratio of new to old over {steps} verify steps is {evidence[0]:.1f} "
            f"(±{DECISIVE:.1f} decides), their misfit to the new drafter {misfit(evidence):.1f} (at most {MISFIT:.1f})."
        )
    remedies = {
        True: "The new drafter serves.",
        False: "The server drafts with other weights. Write the drafter again.",
        None: "Ask for more answers.",
    }
    return Proof(swapped, f"{reason} {remedies[swapped]}")


def decide(evidence: np.ndarray) -> bool | None:
    """Return whether the new drafter served, by the sum [3] of `step_evidence`; None if it is inconclusive."""
    ratio = evidence[0]
    if ratio <= -DECISIVE or misfit(evidence) > MISFIT:
        return False
    return True if ratio >= DECISIVE else None


def misfit(evidence: np.ndarray) -> float:
    """Return the standard deviations by which the steps are less likely than the new drafter's own."""
    _, shortfall, variance = evidence
    return float(shortfall / math.sqrt(variance)) if variance > 0 else 0.0


def step_evidence(old: np.ndarray, new: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return [S, 3]: log-likelihood ratio of new to old; its shortfall from new's expected one; its variance.

    old, new: [S, K + 1] from `log_probabilities`; counts: [S] accepted proposals, as served.
    """
    rows, p, log_p = np.arange(len(counts)), np.exp(new), np.maximum(new, np.log(np.finfo(float).tiny))
    likelihood, expected = new[rows, counts], (p * log_p).sum(1)
    return np.stack([likelihood - old[rows, counts], expected - likelihood, (p * log_p**2).sum(1) - expected**2], 1)


def log_probabilities(chances: np.ndarray, answers: Sequence[ServedAnswer]) -> np.ndarray:
    """Return [S, K + 1] log-probabilities of 0 … K accepted proposals, -inf for more than the answer has left.

    chances: [S, K] probabilities that a proposal of the served steps is accepted if those before it are.
    """
    chances, offsets = np.clip(chances, LAPSE, 1 - LAPSE), np.arange(chances.shape[1] + 1)
    left = np.concatenate([len(t.tokens) - 1 - served.anchors for t, served in answers])
    last = np.minimum(left, chances.shape[1])[:, None]
    accepted = np.pad(np.log(chances).cumsum(1), ((0, 0), (1, 0)))  # everything before an offset
    rejected = np.pad(np.log1p(-chances), ((0, 0), (0, 1)))
    return np.where(offsets < last, accepted + rejected, np.where(offsets == last, accepted, -np.inf))


def chances(
    target: Target, drafter: PreparedDrafter, answers: Sequence[ServedAnswer], sampling: SamplingParams
) -> np.ndarray:
    """Return [S, K]: the probability that a proposal of the served steps is accepted if those before it are."""
    if samples_proposals(drafter.drafter, sampling):
        return np.concatenate([_sampled_chances(target, drafter, answer, sampling) for answer in answers])
    margins, leads = np.concatenate([_margins(target, drafter, answer) for answer in answers], 1)
    probabilities: np.ndarray = ndtr(margins / noise_of(leads))
    return probabilities


def noise_of(leads: np.ndarray) -> float:
    """Return the noise of margins that changes one of the first proposals in `NOISY_SHARE` of the blocks.

    leads: [S, K] the highest logit of every proposal less the second one.
    """
    low, high = 1e-6, 1e3
    for _ in range(30):
        level = math.sqrt(low * high)
        changed = 1 - ndtr(leads[:, :NOISY_PROPOSALS] / level).prod(1).mean()
        low, high = (level, high) if changed < NOISY_SHARE else (low, level)
    return high


@dataclass(frozen=True)
class Anchored:
    """The blocks of a drafter after the anchors of a served answer."""

    context: Context
    tokens: torch.Tensor  # [1, T + K], -1 after the end
    anchors: torch.Tensor  # [1, S]
    hidden: torch.Tensor  # [1, T, H] of the target

    @classmethod
    def read(cls, target: Target, drafter: PreparedDrafter, answer: ServedAnswer) -> Anchored:
        """Read an answer with the target, and encode it for the drafter."""
        trajectory, served = answer
        ids = pad_tokens([trajectory], target.device)
        out = target.read(ids, drafter.drafter.target_layer_ids)
        assert out.features is not None
        context = drafter.drafter.encode(out.features, ids, torch.arange(ids.shape[1], device=ids.device)[None])
        tokens = committed_tokens([trajectory], drafter.block_size - 1, ids.device)
        return cls(context, tokens, to_device(served.anchors, ids.device)[None], out.hidden)

    def at(self, offset: int) -> torch.Tensor:
        """Return the answer's tokens [1, S] at an offset after the anchors, -1 after its end."""
        return self.tokens.gather(1, self.anchors + offset)


@torch.no_grad()
def _different_steps(target: Target, drafter: PreparedDrafter, answer: ServedAnswer) -> int:
    """Count the served steps in which this drafter proposes, or has accepted, something else."""
    served, at = answer[1], Anchored.read(target, drafter, answer)
    blocks = draft(drafter, at.context, at.tokens, at.anchors)
    accepted, proposed = (x[0].cpu().numpy() for x in (blocks.accepted, blocks.proposed))
    same = (proposed[:, : served.proposed.shape[1]] == served.proposed).all(1) & (accepted == served.accepted)
    return int((~same).sum())


@torch.no_grad()
def _margins(target: Target, drafter: PreparedDrafter, answer: ServedAnswer) -> np.ndarray:
    """Return [2, S, K]: logits of the answer's tokens less the highest other one, and the highest less the second."""
    at = Anchored.read(target, drafter, answer)
    blocks, columns = drafter.sampler(at.context, at.at(0), at.anchors), []
    for k in range(drafter.block_size - 1):
        logits = blocks.logits(at.at(k).clamp(min=0))
        column, present = drafter.head.to_columns(at.at(k + 1).clamp(min=0))
        best, second = logits.topk(2).values.unbind(-1)
        own = logits.gather(-1, column[..., None])[..., 0].masked_fill(~present, -torch.inf)
        columns.append(torch.stack([own - torch.where(own < best, best, second), best - second]))
    margins: np.ndarray = torch.stack(columns, -1)[:, 0].double().cpu().numpy()
    return margins


@torch.no_grad()
def _sampled_chances(
    target: Target, drafter: PreparedDrafter, answer: ServedAnswer, sampling: SamplingParams
) -> np.ndarray:
    at, K = Anchored.read(target, drafter, answer), drafter.block_size - 1
    blocks = drafter.sampler(at.context, at.at(0), at.anchors)
    sampler = TargetSampler.for_trajectories(target, at.hidden, answer[:1], sampling, K)
    columns = []
    for k in range(K):
        p = sampler.answer_probability(at.anchors + k, at.at(k + 1))
        q = blocks.probability(at.at(k).clamp(min=0), at.at(k + 1), sampling.temperature)
        columns.append(acceptance_ratio(q, p).clamp(max=1))
    ratios: np.ndarray = torch.stack(columns, -1)[0].cpu().numpy()
    return ratios
