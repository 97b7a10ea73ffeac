"""The response stream: a loss at committed tokens, of SFT (anchors anywhere, whole blocks) and of OPD alike.

A loss is a function of the drafter's logits and of `Feedback`, which computes on demand what the target says at these
positions. Under a reduced head both distributions are taken over its tokens; the probability of one committed token,
which the Bernoulli form reads, is the target's over all tokens.

Proposals that are drawn (`Drafter.samples_proposals`) follow the drafter's own distribution at the request's
temperature, and so does the target: logits that are the target's draw as it does at any. Distributions are therefore
compared at temperature 1. Only what is known of one temperature is held against the drafter at that: the tokens that
were drawn at it, and whether a proposal would be kept. Where proposals are argmaxes the order of the drafter's logits
alone counts, and what is kept is what the text has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import truncation_mask
from draftsmith.stages.target.sampling import GREEDY, SamplingParams
from draftsmith.stages.training import losses
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.blocks import Anchors, Share, Weighted, labels_of, tokens_at
from draftsmith.stages.training.chunked_loss import chunked_values
from draftsmith.stages.training.lm_heads import Heads
from draftsmith.stages.training.loss_config import PositionWeights, ResponseStream
from draftsmith.stages.training.selector_loss import chosen

NO_HIDDEN = "this loss asks for the target's distribution: batches need its hidden states"


@dataclass(frozen=True)
class Feedback:
    """The target at N positions."""

    tokens: torch.Tensor  # [N] committed
    columns: torch.Tensor  # [N] the same in the heads
    hidden: torch.Tensor | None  # [N, H] the target's, that predicted these tokens
    head: Head  # the target's over the tokens of the training step
    target_head: torch.Tensor  # [V, H]
    temperature: float
    sampling: SamplingParams = GREEDY  # that tokens and proposals are drawn under; greedy: proposals are argmaxes
    said: torch.Tensor | None = None  # [N] log p of the committed tokens, under the full head at temperature 1

    def logits(self) -> torch.Tensor:
        """[N, V'] of its distribution over the tokens of the training head, at the temperature."""
        return losses.at_temperature(self._logits, self.temperature)

    def verifying_logits(self) -> torch.Tensor:
        """[N, V'] of the distribution that verifies proposals: at its temperature, with its top-k and top-p."""
        logits = self._logits / self.sampling.temperature
        if not self.sampling.truncates:
            return logits
        return logits.masked_fill(truncation_mask(logits.softmax(-1), self.sampling), losses.NOTHING)

    @cached_property
    def _logits(self) -> torch.Tensor:
        return self._under(self.head)

    @torch.no_grad()
    def asked(self, positions_per_chunk: int = 512) -> Feedback:
        """The same that knows `token_logprob`: losses read it more than once, some again in their backward."""
        assert self.hidden is not None, NO_HIDDEN
        with torch.autocast(self.hidden.device.type, enabled=False):
            whole = Head(self.target_head, logit_map=self.head.logit_map)
            said = chunked_values(
                self.hidden,
                positions_per_chunk,
                lambda h, part: -losses.cross_entropy(whole.logits(h), self.tokens[part]),
            )
        return replace(self, said=said)

    @property
    def token_logprob(self) -> torch.Tensor:
        """[N] `said`, once it was `asked`."""
        assert self.said is not None
        return self.said

    @torch.no_grad()
    def _under(self, head: Head) -> torch.Tensor:
        assert self.hidden is not None, NO_HIDDEN
        with torch.autocast(self.hidden.device.type, enabled=False):  # the training loop's is for the drafter alone
            return head.logits(self.hidden)

    def of(self, part: slice) -> Feedback:
        """A chunk of the positions."""
        hidden, said = (None if x is None else x[part] for x in (self.hidden, self.said))
        return replace(self, tokens=self.tokens[part], columns=self.columns[part], hidden=hidden, said=said)


def drawn_at(sampling: SamplingParams) -> float:
    """What divides the drafter's logits where tokens and proposals are sampled."""
    return 1.0 if sampling.greedy else sampling.temperature


RESPONSE_LOSSES: dict[str, Callable[[torch.Tensor, Feedback], torch.Tensor]] = {
    "cross_entropy": lambda logits, p: losses.cross_entropy(logits, p.columns),
    "bernoulli_kl": lambda logits, p: losses.bernoulli_forward_kl(
        -losses.cross_entropy(logits, p.columns), p.token_logprob
    ),
    "forward_kl": lambda logits, p: losses.forward_kl(logits, p.logits()),
    "ce_l1": lambda logits, p: losses.ce_l1(logits, p.logits(), p.columns, drawn_at(p.sampling)),
}


def loss_function(name: str) -> Callable[[torch.Tensor, Feedback], torch.Tensor]:
    """Return the loss of a name: one of `RESPONSE_LOSSES`, or `MODULE:FUNCTION`."""
    if ":" not in name:
        return RESPONSE_LOSSES[name]
    named = losses.imported(name)
    return lambda logits, p: named(logits, torch.log_softmax(p.logits(), -1))


@dataclass(frozen=True)
class Stream:
    """A stream's loss, and where it has positions."""

    sums: Weighted
    positions: torch.Tensor  # bool [B, A, K]
    correct: torch.Tensor  # bool [B, A, K]: the drafter's argmax is the committed token

    @property
    def accuracy(self) -> Share:
        """Share of its positions where the drafter's argmax is the committed token."""
        return Share(int(self.correct.sum()), int(self.positions.sum()))


def response_stream(
    hidden: torch.Tensor,
    batch: Batch,
    anchors: Anchors,
    heads: Heads,
    target_head: torch.Tensor,
    config: ResponseStream,
    *,
    temperature: float,
    sampling: SamplingParams = GREEDY,
    committed: torch.Tensor | None = None,
    proposals: int | None = None,
    positions_per_chunk: int,
) -> Stream:
    """Sums of the loss over the stream's positions.

    temperature: of the target's distribution. sampling: that of tokens and proposals.

    hidden: [B, A, K, H] of blocks drafted on the trajectory's own tokens. config: resolved. target_head: [V, H], the
    target's own. The scope `committed` reads committed, [B, A] tokens that the verify step committed; left out where
    all offsets have a weight, they are found from this very pass: its proposals, of which a served block has
    `proposals` (left out: K), against the trajectory.
    """
    assert config.loss != "auto", "resolve the loss first"
    assert config.scope != "auto", "resolve the loss first"
    K = hidden.shape[2]
    offsets = torch.arange(1, K + 1, device=hidden.device)
    labels, columns, where, absent = _places(batch, anchors, K, heads.drafter, config, committed)

    places = where.nonzero(as_tuple=True)  # a mask as an index would be looked through at every use
    # the target's hidden state that predicts offset k lies at position anchor + k - 1
    at = (anchors.positions[..., None] + offsets - 1).clamp(max=batch.tokens.shape[1] - 1)
    rows = torch.arange(at.shape[0], device=at.device)[:, None, None].expand_as(at)
    predicted_by = None if batch.hidden is None else batch.hidden[rows[where], at[where]]
    feedback = Feedback(labels[where], columns[where], predicted_by, heads.target, target_head, temperature, sampling)
    if config.loss == "bernoulli_kl":
        feedback = feedback.asked(positions_per_chunk)
    judged = _judged(hidden[places], feedback, heads, config, positions_per_chunk)
    if heads.chooser is not None:
        before = tokens_at(batch, anchors, 0, K)[where]
        judged = _with_choice(judged, hidden[places], before, feedback, heads, config, positions_per_chunk)
    correct_at = torch.zeros_like(where)
    correct_at[places] = judged.correct
    weights = position_weights(config.weights(), offsets, where, judged.log_q, absent)
    if config.scope == "committed" and config.beyond:
        if committed is None:
            committed = correct_at.long().cumprod(-1).sum(-1).clamp(max=K if proposals is None else proposals) + 1
        weights = weights * _reached(offsets, committed, config.beyond)
    return Stream(Weighted.of(judged.terms, weights[where], config.weight), where, correct_at)


@dataclass(frozen=True)
class _Judged:
    """The drafter at the stream's N positions."""

    terms: torch.Tensor  # [N] losses
    correct: torch.Tensor  # bool [N]
    log_q: torch.Tensor  # [N] of the committed tokens, without gradient; zeros where no weight reads them


def _judged(
    hidden: torch.Tensor, feedback: Feedback, heads: Heads, config: ResponseStream, positions_per_chunk: int
) -> _Judged:
    """Compute the losses chunk by chunk. hidden: [N, H]."""
    by_confidence = config.weights().kind == "d_pace"
    cooled = heads.drafter.with_temperature(drawn_at(feedback.sampling))
    head = cooled if config.loss == "cross_entropy" else heads.drafter
    log_q = torch.zeros(len(hidden), device=hidden.device)
    loss_of = loss_function(config.loss)
    correct = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)

    def values(h: torch.Tensor, part: slice) -> torch.Tensor:
        logits, here = head.logits(h), feedback.of(part)
        with torch.no_grad():
            correct[part] = logits.argmax(-1) == here.columns
            if by_confidence:
                log_q[part] = -losses.cross_entropy(logits, here.columns)
        terms = loss_of(logits, here)
        if heads.confidence is not None:  # detached: what is said of the proposals is not to change them
            kept = correct[part].float()
            if not here.sampling.greedy:
                drawn = cooled.logits(h.detach()) if cooled is not head else logits
                kept = losses.acceptance(drawn.detach(), here.verifying_logits())
            terms = terms + losses.confidence(heads.confidence(h.detach()), kept)
        return terms

    terms = chunked_values(hidden, positions_per_chunk, values, trained_head=heads.trained)
    return _Judged(terms, correct, log_q)


def _with_choice(
    judged: _Judged,
    hidden: torch.Tensor,
    before: torch.Tensor,
    feedback: Feedback,
    heads: Heads,
    config: ResponseStream,
    positions_per_chunk: int,
) -> _Judged:
    """The loss of the choice behind tokens [N] on top of the head's, and what is chosen in place of the head's best."""
    assert heads.chooser is not None
    choice = chosen(
        heads.chooser,
        hidden,
        before,
        feedback.columns,
        heads.drafter,
        config.loss,
        positions_per_chunk,
        temperature=drawn_at(feedback.sampling),
        token_logprob=feedback.said,
        target_logits=lambda part: feedback.of(part).logits(),
    )
    return _Judged(judged.terms + config.choice * choice.terms, choice.correct, choice.log_q)


def response_weight(
    batch: Batch, anchors: Anchors, K: int, head: Head, config: ResponseStream, committed: torch.Tensor
) -> float:
    """The sum of the stream's weights, where verify steps are known and no weight depends on the drafter."""
    offsets = torch.arange(1, K + 1, device=committed.device)
    _, _, where, _ = _places(batch, anchors, K, head, config, committed)
    weights = position_weights(config.weights(), offsets, where, torch.empty(0))
    if config.scope == "committed" and config.beyond:
        weights = weights * _reached(offsets, committed, config.beyond)
    return float(weights[where].sum())


def _places(
    batch: Batch, anchors: Anchors, K: int, head: Head, config: ResponseStream, committed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Committed tokens, their columns in the head, where the stream has positions, and where it has none for want of
    the token in the head, each [B, A, K]."""
    labels, inside = labels_of(batch, anchors, K)
    columns, present = head.to_columns(labels)
    if config.scope == "committed" and not config.beyond:
        assert committed is not None, "this scope needs verify steps"
        inside = inside & (torch.arange(1, K + 1, device=labels.device) <= committed[..., None])
    return labels, columns, inside & present, inside & ~present


def _reached(offsets: torch.Tensor, committed: torch.Tensor, beyond: float) -> torch.Tensor:
    """[B, A, K] 1 on what was committed, exp(-d / beyond) at d behind it."""
    return torch.exp(-(offsets - committed[..., None]).clamp(min=0) / beyond)


def position_weights(
    config: PositionWeights,
    offsets: torch.Tensor,
    where: torch.Tensor,
    log_q: torch.Tensor,
    absent: torch.Tensor | None = None,
) -> torch.Tensor:
    """[B, A, K] weights; where: bool [B, A, K] the stream's positions; log_q: [N] of the committed tokens there;
    absent: as `_places` has them."""
    if config.kind == "d_pace":
        judged = log_q.new_zeros(where.shape)
        judged[where] = log_q
        return losses.d_pace_weights(judged, where, absent=absent)
    of_offset = {
        "uniform": lambda: torch.ones_like(offsets, dtype=torch.float32),
        "exponential": lambda: losses.decay_weights(offsets, config.gamma),
        "power": lambda: losses.power_weights(offsets, config.delta),
    }[config.kind]()
    return of_offset.expand(where.shape)
