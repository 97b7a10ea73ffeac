"""The response stream: a loss at committed tokens, for SFT (anchors anywhere, whole blocks) and for OPD.

A loss is a function of the drafter's logits and of a `ChunkSignal`. Under a reduced head both distributions are over
the head's tokens. Only the Bernoulli form reads a committed token's probability under the target's whole vocabulary.

A drafter that samples its proposals (`Drafter.samples_proposals`) has a distribution that scales with the request's
temperature, as the target's does: logits that match the target's at one temperature match at any. Distributions are
therefore compared at temperature 1. Two things are compared at the request's temperature: the tokens that were sampled
at it, and whether a proposal would be accepted. If proposals are argmaxes, only the order of the drafter's logits
counts, and a proposal is accepted if the answer has it.

Some drafters select among the head's candidates by the token before each offset. Then the loss of the head, which keeps
the right token among the candidates, is added to the same loss of the drafter's distribution q, the softmax over the
candidates. Only in the loss, a missing right token takes the last candidate's place, so that it can be learned. The
target's probabilities of the candidates are those over all tokens of the head: the rest of its mass is on tokens that
cannot be proposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch.nn import functional

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.compiled import compiled
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import truncation_mask
from draftsmith.stages.targets.info import LogitMap
from draftsmith.stages.targets.sampling import SamplingParams
from draftsmith.stages.training import losses
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.drafted_blocks import DraftedBlocks, block_labels, tokens_at
from draftsmith.stages.training.loss_registry import PositionWeights, ResponseStream, loss_traits
from draftsmith.stages.training.loss_report import Ratio, WeightedMean
from draftsmith.stages.training.softmax_heads import LossContext

NO_HIDDEN = "this loss reads the target's distribution: batches need its hidden states"


@dataclass(frozen=True)
class ChunkSignal:
    """The target's tokens and distributions at the N positions of a chunk, as tensors and numbers alone."""

    columns: torch.Tensor  # [N] committed tokens as columns of the heads
    token_logprob: torch.Tensor  # [N] of the committed tokens under the full head; [0] if no loss reads them
    products: torch.Tensor | None  # [N, V'] of the target's head, in its weights' dtype
    logit_map: LogitMap  # from these products to logits
    temperature: float  # of the target's distribution
    proposal_temperature: float  # of the drafter's samples

    def logits(self) -> torch.Tensor:
        """Return the target's logits [N, V'] over the tokens of the training heads, at the temperature."""
        return losses.at_temperature(self._logits(), self.temperature)

    def log_probs(self) -> torch.Tensor:
        """Return the logarithms [N, V'] of its distribution over these tokens."""
        return torch.log_softmax(self.logits(), -1)

    def rejected(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the probability [N] that a proposal sampled from the drafter's logits [N, V'] is rejected."""
        return losses.total_variation(logits, self.logits())

    def verifying_logits(self, sampling: SamplingParams) -> torch.Tensor:
        """Return the logits [N, V'] that verify sampled proposals: at their temperature, with top-k and top-p."""
        logits = self._logits() / sampling.temperature
        if not sampling.truncates:
            return logits
        return logits.masked_fill(truncation_mask(logits.softmax(-1), sampling), losses.NOTHING)

    def _logits(self) -> torch.Tensor:
        assert self.products is not None, NO_HIDDEN
        return self.logit_map(self.products.float())


@dataclass(frozen=True)
class TargetSignal:
    """The target's tokens and hidden states at N positions."""

    tokens: torch.Tensor  # [N] committed tokens
    columns: torch.Tensor  # [N] the same as columns of the heads
    hidden: torch.Tensor | None  # [N, H] the target's hidden states that predicted these tokens
    context: LossContext
    temperature: float  # of its distribution
    # [N] of the committed tokens under the full head, once `with_token_logprobs` has computed it
    token_logprob: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @torch.no_grad()
    def with_token_logprobs(self) -> TargetSignal:
        """Return this signal with log-probs of tokens, which losses read more than once, some again in backward."""
        assert self.hidden is not None, NO_HIDDEN
        with torch.autocast(self.hidden.device.type, enabled=False):
            full = Head(self.context.target_head, logit_map=self.context.heads.target.logit_map)
            logprob = losses.chunked_values(
                self.hidden,
                self.context.positions_per_chunk,
                lambda h, chunk: -losses.cross_entropy(full.logits(h), self.tokens[chunk]),
            )
        return replace(self, token_logprob=logprob)

    @torch.no_grad()
    def at(self, chunk: slice, *, distribution: bool) -> ChunkSignal:
        """Return the signal at a chunk of the positions, with the target's distribution if it is read."""
        context, products, head = self.context, None, self.context.heads.target
        if distribution:
            assert self.hidden is not None, NO_HIDDEN
            with torch.autocast(self.hidden.device.type, enabled=False):  # the training loop's is only for the drafter
                products = head.raw_logits(self.hidden[chunk])
        columns, logprob, temperature = self.columns[chunk], self.token_logprob[chunk], context.proposal_temperature
        return ChunkSignal(columns, logprob, products, head.logit_map, self.temperature, temperature)


@dataclass(frozen=True)
class CandidateSignal:
    """The target's probabilities of a selector's k candidates at N positions, like a `ChunkSignal` of all tokens."""

    columns: torch.Tensor  # [N] columns of the committed tokens among the candidates
    log_p: torch.Tensor  # [N, k] log-probs of p, which need not sum to 1: the rest of p cannot be proposed
    proposal_temperature: float
    token_logprob: torch.Tensor  # [N] of the committed tokens

    def logits(self) -> torch.Tensor:
        return self.log_p

    log_probs = logits

    def rejected(self, logits: torch.Tensor) -> torch.Tensor:
        return 1 - torch.minimum(self.log_p.exp(), logits.softmax(-1)).sum(-1)


LossFunction: TypeAlias = Callable[[torch.Tensor, ChunkSignal | CandidateSignal], torch.Tensor]


def _ce_l1(logits: torch.Tensor, p: ChunkSignal | CandidateSignal) -> torch.Tensor:
    cross_entropies = losses.cross_entropy(losses.at_temperature(logits, p.proposal_temperature), p.columns)
    return losses.ce_l1(cross_entropies, p.rejected(logits))


FUNCTIONS: dict[str, LossFunction] = {  # name in `loss_registry.LOSSES` -> function of the drafter's logits
    "cross_entropy": lambda logits, p: losses.cross_entropy(logits, p.columns),
    "bernoulli_kl": lambda logits, p: losses.bernoulli_forward_kl(
        -losses.cross_entropy(logits, p.columns), p.token_logprob
    ),
    "forward_kl": lambda logits, p: losses.forward_kl(logits, p.logits()),
    "ce_l1": _ce_l1,
}


def loss_function(name: str) -> LossFunction:
    """Return the loss with a resolved name or `MODULE:FUNCTION`."""
    if ":" not in name:
        return FUNCTIONS[name]
    imported = losses.imported(name)
    return lambda logits, p: imported(logits, p.log_probs())


def loss_tile(
    products: torch.Tensor, logit_map: LogitMap, p: ChunkSignal, loss_of: LossFunction, *, with_log_q: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute a chunk's losses [N], differentiable; whether the drafter proposes the committed tokens, bool [N]; log q.

    products: [N, V'], those of the drafter's head. logit_map: the map from them to logits. with_log_q: whether log q
    [N] of the committed tokens is read. Compiled, this reads the products once and once more for their gradient, and
    keeps none of the float32 logits in between.
    """
    logits = logit_map(products.float())
    with torch.no_grad():
        correct = logits.argmax(-1) == p.columns
        log_q = -losses.cross_entropy(logits, p.columns) if with_log_q else None
    return loss_of(logits, p), correct, log_q


@dataclass(frozen=True)
class StreamLoss:
    """The loss of a stream, and the positions that it covers."""

    sums: WeightedMean
    positions: torch.Tensor  # bool [B, A, K]
    correct: torch.Tensor  # bool [B, A, K]: the drafter would propose the committed token
    committed: torch.Tensor  # [B, A] tokens that each verify step commits, as given or found

    @classmethod
    def joined(cls, parts: Sequence[StreamLoss]) -> StreamLoss:
        """Return the stream of all blocks of a batch that was drafted in several parts."""
        sums = WeightedMean.joined([part.sums for part in parts])
        return cls(
            sums, *(torch.cat(x, 1) for x in zip(*((p.positions, p.correct, p.committed) for p in parts), strict=True))
        )

    @property
    def accuracy(self) -> Ratio:
        """Return the share of the positions where the drafter would propose the committed token."""
        return Ratio(int(self.correct.sum()), int(self.positions.sum()))


def response_loss(
    blocks: DraftedBlocks,
    context: LossContext,
    stream: ResponseStream,
    temperature: float,
    committed: torch.Tensor | None = None,
    proposals: int | None = None,
) -> StreamLoss:
    """Sum the loss over the stream's positions.

    stream: the resolved one. temperature: that of the target's distribution. committed: [B, A] number of tokens that
    each verify step committed, which the scope `committed` reads. If all offsets have a weight, None is allowed: the
    number then comes from these blocks, whose proposals are compared with the answer. proposals: the number in a served
    block; by default K.
    """
    assert stream.loss != "auto", "resolve the loss first"
    assert stream.scope != "auto", "resolve the loss first"
    batch, anchors, hidden, heads = blocks.batch, blocks.anchors, blocks.hidden, context.heads
    K = hidden.shape[2]
    offsets = torch.arange(1, K + 1, device=hidden.device)
    labels, columns, mask, absent = _stream_positions(batch, anchors, K, heads.drafter, stream, committed)

    indices = mask.nonzero(as_tuple=True)  # indexing with the mask itself would scan it at every use
    # the target's hidden state that predicts offset k is at position anchor + k - 1
    at = (anchors[..., None] + offsets - 1).clamp(max=batch.tokens.shape[1] - 1)
    predicted_by = None if batch.hidden is None else batch.hidden[indices[0], at[indices]]
    signal = TargetSignal(labels[indices], columns[indices], predicted_by, context, temperature)
    if stream.loss == "bernoulli_kl":
        signal = signal.with_token_logprobs()
    drafted = head_loss(hidden[indices], signal, stream)
    if heads.selector is not None:
        selected = selector_loss(hidden[indices], tokens_at(batch, anchors, 0, K)[indices], signal, stream.loss)
        terms = drafted.terms + stream.choice * selected.terms
        drafted = PositionLosses(terms, selected.correct, selected.log_q)
    correct = torch.zeros_like(mask)
    correct[indices] = drafted.correct
    if committed is None:
        committed = correct.long().cumprod(-1).sum(-1).clamp(max=K if proposals is None else proposals) + 1
    weights = _stream_weights(stream, mask, drafted.log_q, committed, absent)
    sums = WeightedMean.from_values(drafted.terms, weights[indices], stream.weight)
    return StreamLoss(sums, mask, correct, committed)


def head_loss(hidden: torch.Tensor, signal: TargetSignal, stream: ResponseStream) -> PositionLosses:
    """Compute the loss of the drafter's head, and of its confidence, at N positions. hidden: [N, H]."""
    context, heads = signal.context, signal.context.heads
    by_confidence = stream.weights().kind == "d_pace"
    scaled_head = heads.drafter.with_temperature(context.proposal_temperature)
    head = scaled_head if stream.loss == "cross_entropy" else heads.drafter
    log_q = torch.zeros(len(hidden), device=hidden.device)  # stays zero if no weight reads it
    loss_of, greedy = loss_function(stream.loss), context.sampling.greedy
    reads_distribution = loss_traits(stream.loss).reads_distribution or (heads.confidence is not None and not greedy)
    is_own = ":" not in stream.loss  # another's function may not compile
    tile = compiled(loss_tile) if hidden.is_cuda and is_own else loss_tile
    correct = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)

    def values(h: torch.Tensor, chunk: slice) -> torch.Tensor:
        products, here = head.raw_logits(h), signal.at(chunk, distribution=reads_distribution)
        terms, correct[chunk], of_chunk = tile(products, head.logit_map, here, loss_of, with_log_q=by_confidence)
        if of_chunk is not None:
            log_q[chunk] = of_chunk
        if heads.confidence is not None:  # detached: the confidence must not change the proposals that it describes
            accepted = correct[chunk].float()
            if not greedy:
                scaled = scaled_head.logit_map(products.detach().float())
                accepted = losses.acceptance(scaled, here.verifying_logits(context.sampling))
            predicted = heads.confidence(h.detach())
            terms = terms + functional.binary_cross_entropy_with_logits(predicted, accepted, reduction="none")
        return terms

    terms = losses.chunked_values(hidden, context.positions_per_chunk, values, trained_head=heads.trained)
    return PositionLosses(terms, correct, log_q)


def response_weight(
    batch: Batch, anchors: torch.Tensor, K: int, head: Head, stream: ResponseStream, committed: torch.Tensor
) -> float:
    """Sum the stream's weights, given that verify steps are known and no weight depends on the drafter.

    head: the drafter's. committed: [B, A] number of tokens that each verify step committed.
    """
    _, _, mask, absent = _stream_positions(batch, anchors, K, head, stream, committed)
    return float(_stream_weights(stream, mask, torch.empty(0), committed, absent)[mask].sum())


def _stream_positions(
    batch: Batch, anchors: torch.Tensor, K: int, head: Head, stream: ResponseStream, committed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return committed tokens, their columns in the head, the mask of the stream's positions, and the mask of positions
    dropped because the head lacks the token, each [B, A, K]."""
    labels, inside = block_labels(batch, anchors, K)
    columns, present = head.to_columns(labels)
    if stream.scope == "committed" and not stream.beyond:
        assert committed is not None, "this scope needs verify steps"
        inside = inside & (torch.arange(1, K + 1, device=labels.device) <= committed[..., None])
    return labels, columns, inside & present, inside & ~present


def _stream_weights(
    stream: ResponseStream, mask: torch.Tensor, log_q: torch.Tensor, committed: torch.Tensor, absent: torch.Tensor
) -> torch.Tensor:
    """Return the weights [B, A, K] of the stream's positions, which are those of `mask`.

    log_q: [N] of the committed tokens there. absent: positions dropped because the head lacks the token.
    """
    if stream.weights().kind == "d_pace":
        log_q_at = log_q.new_zeros(mask.shape).masked_scatter(mask, log_q)
        weights = losses.d_pace_weights(log_q_at, mask, absent=absent)
    else:
        weights = offset_weights(stream.weights(), mask)
    if stream.scope == "committed" and stream.beyond:
        offsets = torch.arange(1, mask.shape[2] + 1, device=mask.device)
        weights = weights * torch.exp(-(offsets - committed[..., None]).clamp(min=0) / stream.beyond)
    return weights


def offset_weights(config: PositionWeights, mask: torch.Tensor) -> torch.Tensor:
    """Return weights that depend only on the offset, for all positions of `mask` [B, A, K]."""
    offsets = torch.arange(1, mask.shape[2] + 1, device=mask.device)
    if config.kind == "uniform":
        return torch.ones(mask.shape, device=mask.device)
    exponential = config.kind == "exponential"
    weights = (
        losses.decay_weights(offsets, config.gamma) if exponential else losses.power_weights(offsets, config.delta)
    )
    return weights.expand(mask.shape)


@dataclass(frozen=True)
class PositionLosses:
    """The drafter's losses at N positions."""

    terms: torch.Tensor  # [N] differentiable
    correct: torch.Tensor  # bool [N]: the drafter would propose the committed token
    log_q: torch.Tensor  # [N] of the committed token, without gradient; -inf where it cannot be proposed


@torch.no_grad()
def _candidates(
    drafter: Drafter, hidden: torch.Tensor, columns: torch.Tensor, context: LossContext
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the candidates at hidden states [N, H]. columns: [N] of the committed tokens in the head.

    Returns their columns [N, k], always with the committed token; its index [N] among them; and whether the drafter
    itself has it among its candidates, bool [N].
    """
    among = drafter.selector_candidates(hidden, context.heads.drafter)
    present = (among == columns[:, None]).any(-1)
    among = torch.cat([among[:, :-1], torch.where(present, among[:, -1], columns)[:, None]], -1)
    return among, (among == columns[:, None]).long().argmax(-1), present


def selector_loss(hidden: torch.Tensor, previous: torch.Tensor, signal: TargetSignal, loss: str) -> PositionLosses:
    """Compute the loss of the selector's choice at N positions.

    hidden: [N, H] the drafter's. previous: [N] tokens before these positions. loss: a resolved name.
    """
    context = signal.context
    drafter, head, size = context.heads.selector, context.heads.drafter, context.positions_per_chunk
    assert drafter is not None
    loss_of, reads_distribution = loss_function(loss), loss_traits(loss).reads_distribution
    among, index, present = _candidates(drafter, hidden, signal.columns, context)
    log_p = torch.zeros(among.shape, device=among.device)  # computed once: backward calls `values` again
    for chunk in losses.slices(len(among) if reads_distribution else 0, size):
        log_p[chunk] = signal.at(chunk, distribution=True).log_probs().gather(-1, among[chunk])
    correct, log_q = torch.zeros_like(present), torch.full_like(index, -torch.inf, dtype=torch.float32)

    def values(h: torch.Tensor, chunk: slice) -> torch.Tensor:
        logits = drafter.selector_logits(h, previous[chunk], among[chunk], head)
        at, inside = index[chunk], present[chunk]
        scaled = losses.at_temperature(logits, context.proposal_temperature)
        with torch.no_grad():
            correct[chunk] = inside & (logits.argmax(-1) == at)
            log_q[chunk] = torch.where(inside, -losses.cross_entropy(scaled, at), -torch.inf)
        here = CandidateSignal(at, log_p[chunk], context.proposal_temperature, signal.token_logprob[chunk])
        return loss_of(scaled if loss == "cross_entropy" else logits, here)

    terms = losses.chunked_values(hidden, size, values, trained_head=True)
    return PositionLosses(terms, correct, log_q)


def selector_logprobs(
    hidden: torch.Tensor, previous: torch.Tensor, columns: torch.Tensor, context: LossContext
) -> torch.Tensor:
    """Return the selector's log q [N] of tokens, differentiable.

    hidden: [N, H]. previous: [N] tokens before these positions. columns: [N] of the tokens in the head.
    """
    drafter, head = context.heads.selector, context.heads.drafter
    assert drafter is not None
    among, index, _ = _candidates(drafter, hidden, columns, context)

    def values(h: torch.Tensor, chunk: slice) -> torch.Tensor:
        return -losses.cross_entropy(drafter.selector_logits(h, previous[chunk], among[chunk], head), index[chunk])

    return losses.chunked_values(hidden, context.positions_per_chunk, values, trained_head=True)
