"""The response stream: a loss at committed tokens, of SFT (anchors anywhere, whole blocks) and of OPD alike.

A loss is a function of the drafter's logits and of `Feedback`, which computes on demand what the target says at these
positions. Under a reduced head both distributions are taken over its tokens; the probability of one committed token,
which the Bernoulli form reads, is the target's over all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from draftsmith.stages.drafters.head import Head
from draftsmith.stages.training import losses
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.blocks import Anchors, labels_of, weighted_mean
from draftsmith.stages.training.chunked import chunked_values
from draftsmith.stages.training.loss_config import PositionWeights, ResponseStream
from draftsmith.stages.training.vocabulary import Heads


@dataclass(frozen=True)
class Feedback:
    """The target at N positions."""

    tokens: torch.Tensor  # [N] committed
    columns: torch.Tensor  # [N] the same in the heads
    hidden: torch.Tensor | None  # [N, H] the target's, that predicted these tokens
    head: Head  # the target's over the tokens of the training step
    target_head: torch.Tensor  # [V, H]
    temperature: float

    def logits(self) -> torch.Tensor:
        """[N, V'] of its distribution over the tokens of the training head, at the temperature."""
        return losses.at_temperature(self._under(self.head), self.temperature)

    def token_logprob(self) -> torch.Tensor:
        """[N] log p of the committed tokens, under the full head at temperature 1."""
        return -losses.cross_entropy(self._under(Head(self.target_head)), self.tokens)

    @torch.no_grad()
    def _under(self, head: Head) -> torch.Tensor:
        assert self.hidden is not None, "this loss asks for the target's distribution: batches need its hidden states"
        with torch.autocast(self.hidden.device.type, enabled=False):  # the training loop's is for the drafter alone
            return head.logits(self.hidden)

    def of(self, part: slice) -> Feedback:
        """A chunk of the positions."""
        hidden = None if self.hidden is None else self.hidden[part]
        return Feedback(self.tokens[part], self.columns[part], hidden, self.head, self.target_head, self.temperature)


RESPONSE_LOSSES: dict[str, Callable[[torch.Tensor, Feedback], torch.Tensor]] = {
    "cross_entropy": lambda logits, p: losses.cross_entropy(logits, p.columns),
    "bernoulli_kl": lambda logits, p: losses.bernoulli_forward_kl(
        -losses.cross_entropy(logits, p.columns), p.token_logprob()
    ),
    "forward_kl": lambda logits, p: losses.forward_kl(logits, p.logits()),
    "tv": lambda logits, p: losses.total_variation(logits, p.logits()),
    "lk": lambda logits, p: losses.lk(logits, p.logits()),
}


@dataclass(frozen=True)
class Stream:
    """A stream's mean loss, and where it has positions."""

    mean: torch.Tensor
    positions: torch.Tensor  # bool [B, A, K]
    correct: torch.Tensor  # bool [B, A, K]: the drafter's argmax is the committed token

    @property
    def accuracy(self) -> float:
        """Share of its positions where the drafter's argmax is the committed token."""
        return float(self.correct.sum() / self.positions.sum().clamp(min=1))


def response_stream(
    hidden: torch.Tensor,
    batch: Batch,
    anchors: Anchors,
    heads: Heads,
    target_head: torch.Tensor,
    config: ResponseStream,
    *,
    temperature: float,
    committed: torch.Tensor | None = None,
    proposals: int | None = None,
    positions_per_chunk: int,
) -> Stream:
    """Weighted mean of the loss over the stream's positions.

    hidden: [B, A, K, H] of blocks drafted on the trajectory's own tokens. config: resolved. target_head: [V, H], the
    target's own. The scope `committed` reads committed, [B, A] tokens that the verify step committed; left out where
    all offsets have a weight, they are found from this very pass: its proposals, of which a served block has
    `proposals` (left out: K), against the trajectory.
    """
    assert config.loss != "auto", "resolve the loss first"
    assert config.scope != "auto", "resolve the loss first"
    K = hidden.shape[2]
    offsets = torch.arange(1, K + 1, device=hidden.device)
    labels, inside = labels_of(batch, anchors, K)
    columns, present = heads.drafter.to_columns(labels)
    where = inside & present
    if config.scope == "committed" and not config.beyond:
        assert committed is not None, "this scope needs verify steps"
        where = where & (offsets <= committed[..., None])

    # the target's hidden state that predicts offset k lies at position anchor + k - 1
    at = (anchors.positions[..., None] + offsets - 1).clamp(max=batch.tokens.shape[1] - 1)
    rows = torch.arange(at.shape[0], device=at.device)[:, None, None].expand_as(at)
    predicted_by = None if batch.hidden is None else batch.hidden[rows[where], at[where]]
    feedback = Feedback(labels[where], columns[where], predicted_by, heads.target, target_head, temperature)
    loss_of = RESPONSE_LOSSES[config.loss]
    count = feedback.columns.numel()
    correct = torch.zeros(count, dtype=torch.bool, device=hidden.device)
    log_q = torch.zeros(count, device=hidden.device)
    by_confidence = config.weights().kind == "d_pace"

    def values(h: torch.Tensor, part: slice) -> torch.Tensor:
        logits, here = heads.drafter.logits(h), feedback.of(part)
        with torch.no_grad():
            correct[part] = logits.argmax(-1) == here.columns
            if by_confidence:
                log_q[part] = -losses.cross_entropy(logits, here.columns)
        return loss_of(logits, here)

    terms = chunked_values(hidden[where], positions_per_chunk, values, trained_head=heads.trained)
    correct_at = torch.zeros_like(where)
    correct_at[where] = correct
    weights = position_weights(config.weights(), offsets, where, log_q)
    if config.scope == "committed" and config.beyond:
        if committed is None:
            committed = correct_at.long().cumprod(-1).sum(-1).clamp(max=K if proposals is None else proposals) + 1
        weights = weights * torch.exp(-(offsets - committed[..., None]).clamp(min=0) / config.beyond)
    return Stream(weighted_mean(terms, weights[where]), where, correct_at)


def position_weights(
    config: PositionWeights, offsets: torch.Tensor, where: torch.Tensor, log_q: torch.Tensor
) -> torch.Tensor:
    """[B, A, K] weights; where: bool [B, A, K] the stream's positions; log_q: [N] of the committed tokens there."""
    if config.kind == "d_pace":
        judged = log_q.new_zeros(where.shape)
        judged[where] = log_q
        return losses.d_pace_weights(judged, where, config.alpha)
    of_offset = {
        "uniform": lambda: torch.ones_like(offsets, dtype=torch.float32),
        "exponential": lambda: losses.decay_weights(offsets, config.gamma),
        "power": lambda: losses.power_weights(offsets, config.delta),
    }[config.kind]()
    return of_offset.expand(where.shape)
