"""OPD's loss: the target's feedback on what verification committed and rejected (Draft-OPD, arXiv 2605.29343, 3).

A loss of the response stream is a function of the drafter's logits and of `Feedback`, which computes on demand what the
target says at these positions. Under a reduced head both distributions are taken over its tokens; the probability of
one committed token, which the Bernoulli form reads, is the target's over all tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from stages.drafters.head import Head
from stages.training import losses
from stages.training.batches import Batch
from stages.training.chunked import chunked_values
from stages.training.loss_config import LossConfig, PositionWeights
from stages.training.objectives import Anchors, LossReport, labels_of, weighted_mean
from stages.training.steps import VerifySteps


@dataclass(frozen=True)
class Feedback:
    """The target at N positions."""

    tokens: torch.Tensor  # [N] committed
    columns: torch.Tensor  # [N] the same in `head`
    hidden: torch.Tensor  # [N, H] the target's, that predicted these tokens
    head: Head  # of the training step
    target_head: torch.Tensor  # [V, H]
    temperature: float

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        """[N, V'] of its distribution over the tokens of the training head, at the temperature."""
        return losses.at_temperature(self.head.logits(self.hidden), self.temperature)

    @torch.no_grad()
    def token_logprob(self) -> torch.Tensor:
        """[N] log p of the committed tokens, under the full head at temperature 1."""
        return -losses.cross_entropy(Head(self.target_head).logits(self.hidden), self.tokens)

    def of(self, part: slice) -> Feedback:
        """A chunk of the positions."""
        pieces = (self.tokens[part], self.columns[part], self.hidden[part])
        return Feedback(*pieces, self.head, self.target_head, self.temperature)


RESPONSE_LOSSES: dict[str, Callable[[torch.Tensor, Feedback], torch.Tensor]] = {
    "cross_entropy": lambda logits, p: losses.cross_entropy(logits, p.columns),
    "bernoulli_kl": lambda logits, p: losses.bernoulli_forward_kl(
        -losses.cross_entropy(logits, p.columns), p.token_logprob()
    ),
    "forward_kl": lambda logits, p: losses.forward_kl(logits, p.logits()),
    "reverse_kl": lambda logits, p: losses.reverse_kl(logits, p.logits()),
    "tv": lambda logits, p: losses.total_variation(logits, p.logits()),
    "lk": lambda logits, p: losses.lk(logits, p.logits()),
}
REJECTED_LOSSES = {"k3": losses.k3_reverse_kl}  # of the log-probs of one proposal, [N] each


@dataclass
class _Stream:
    """A stream's mean loss, and where it has positions."""

    mean: torch.Tensor
    positions: torch.Tensor  # bool [B, A, K]


def opd_loss(
    hidden: torch.Tensor,
    batch: Batch,
    anchors: Anchors,
    steps: VerifySteps,
    head: Head,
    target_head: torch.Tensor,
    objective: LossConfig,
    *,
    positions_per_chunk: int,
) -> LossReport:
    """λ_acc · weighted mean(response stream) + λ_rej · weighted mean(rejected stream).

    hidden: [B, A, K, H] of the blocks behind the anchors. objective: resolved. target_head: [V, H], the target's own.
    """
    started = time.perf_counter()
    response, correct = _response(hidden, batch, anchors, steps, head, target_head, objective, positions_per_chunk)
    loss = objective.response.weight * response.mean
    trained = response.positions
    figures = {
        "loss_response": float(response.mean.detach()),
        "accuracy": float(correct.sum() / trained.sum().clamp(min=1)),
        "steps_changed_share": _changed(steps, correct, anchors),
    }
    if objective.needs_scores:
        rejected = _rejected(hidden, anchors, steps, head, objective, positions_per_chunk)
        figures["loss_rejected"] = float(rejected.mean.detach())
        loss = loss + objective.rejected.weight * rejected.mean
        trained = trained | rejected.positions
    return LossReport(
        loss, anchors.blocks, int(trained.sum()), figures, {"head_and_loss": time.perf_counter() - started}
    )


def _response(
    hidden: torch.Tensor,
    batch: Batch,
    anchors: Anchors,
    steps: VerifySteps,
    head: Head,
    target_head: torch.Tensor,
    objective: LossConfig,
    positions_per_chunk: int,
) -> tuple[_Stream, torch.Tensor]:
    """The response stream, and where the drafter's argmax is the committed token, bool [B, A, K]."""
    stream = objective.response
    assert stream.loss != "auto" and objective.temperature is not None, "resolve the objective first"
    K = hidden.shape[2]
    offsets = torch.arange(1, K + 1, device=hidden.device)
    labels, inside = labels_of(batch, anchors, K)
    columns, present = head.to_columns(labels)
    where = inside & present
    if stream.scope == "committed":
        where = where & (offsets <= steps.committed[..., None])

    # the target's hidden state that predicts offset k lies at position anchor + k - 1
    at = (anchors.positions[..., None] + offsets - 1).clamp(max=batch.tokens.shape[1] - 1)
    rows = torch.arange(at.shape[0], device=at.device)[:, None, None].expand_as(at)
    feedback = Feedback(
        labels[where], columns[where], batch.hidden[rows[where], at[where]], head, target_head, objective.temperature
    )
    loss_of = RESPONSE_LOSSES[stream.loss]
    count = feedback.columns.numel()
    correct = torch.zeros(count, dtype=torch.bool, device=hidden.device)
    log_q = torch.zeros(count, device=hidden.device)
    by_acceptance = stream.positions.kind in ("reach", "d_pace")

    def values(h: torch.Tensor, part: slice) -> torch.Tensor:
        logits, here = head.logits(h), feedback.of(part)
        with torch.no_grad():
            correct[part] = logits.argmax(-1) == here.columns
            if by_acceptance:
                log_q[part] = -losses.cross_entropy(logits, here.columns)
        return loss_of(logits, here)

    terms = chunked_values(hidden[where], positions_per_chunk, values)
    weights = _weights(stream.positions, offsets, where, log_q)
    correct_BAK = torch.zeros_like(where)
    correct_BAK[where] = correct
    return _Stream(weighted_mean(terms, weights[where]), where), correct_BAK


def _rejected(
    hidden: torch.Tensor,
    anchors: Anchors,
    steps: VerifySteps,
    head: Head,
    objective: LossConfig,
    positions_per_chunk: int,
) -> _Stream:
    """The drafter's proposals from the first rejected one on, judged on their own prefix."""
    offsets = torch.arange(1, hidden.shape[2] + 1, device=hidden.device)
    columns, known = head.to_columns(steps.proposed)
    first = steps.rejected_offset[..., None]
    judged = steps.target_logprobs.isfinite() & anchors.valid[..., None]
    where = (offsets >= first) & (first > 0) & judged & known
    log_p, taken = steps.target_logprobs[where], columns[where]
    loss_of = REJECTED_LOSSES[objective.rejected.loss]

    def values(h: torch.Tensor, part: slice) -> torch.Tensor:
        return loss_of(-losses.cross_entropy(head.logits(h), taken[part]), log_p[part])

    terms = chunked_values(hidden[where], positions_per_chunk, values)
    weights = _weights(objective.rejected.positions, offsets, where, log_p)
    return _Stream(weighted_mean(terms, weights[where]), where)


def _weights(config: PositionWeights, offsets: torch.Tensor, where: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """[B, A, K] weights; where: bool [B, A, K] the stream's positions; log_q: [N] of the committed tokens there."""
    if config.kind in ("reach", "d_pace"):
        judged = log_q.new_zeros(where.shape)
        judged[where] = log_q
        return losses.reach_weights(judged) if config.kind == "reach" else losses.d_pace_weights(judged, where)
    of_offset = {
        "uniform": lambda: torch.ones_like(offsets, dtype=torch.float32),
        "exponential": lambda: losses.decay_weights(offsets, config.gamma),
        "power": lambda: losses.power_weights(offsets, config.delta),
    }[config.kind]()
    return of_offset.expand(where.shape)


def _changed(steps: VerifySteps, correct: torch.Tensor, anchors: Anchors) -> float:
    """Share of the trained steps at which the drafter no longer keeps as many tokens as `steps` says.

    Known without work: offsets up to the first rejection are in the stream, and say whether it is still the first.
    """
    now = correct.long().cumprod(-1).sum(-1)  # at least: nothing is known beyond the stream
    different = torch.where(steps.rejected_offset > 0, now != steps.accepted, now < steps.accepted) & anchors.valid
    return float(different.sum() / anchors.valid.sum().clamp(min=1))
