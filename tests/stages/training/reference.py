"""The losses as loops in float64: one block at a time, term by term, for any drafter.

The loops take the drafter's hidden states one block at a time (`test_model.py` of each architecture holds those) and do
the rest in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.training.loss_registry import LossConfig, PositionWeights
from draftsmith.stages.training.loss_report import LossReport
from tests.stages.training.case import Case, K, hidden_of

TOLERANCE = 1e-4  # of a loss; the drafter computes in float32


@dataclass(frozen=True)
class Choice:
    """A selector's choice among candidates, the token in question always one of them."""

    columns: list[int]
    log_q: torch.Tensor  # [k] with gradient
    index: int  # of the token among them
    present: bool  # whether it is a candidate by itself
    selected: bool  # whether the drafter would propose it
    token_temperature: float = 1.0  # as in `Slow`

    def term(self, loss: str, log_p: torch.Tensor, of_token: float) -> torch.Tensor:
        """Return the loss. log_p: [V'] of the target over the head's tokens. of_token: over all tokens."""
        if loss in ("cross_entropy", "bernoulli_kl"):
            return PLAIN[loss](self.log_q, self.index, log_p, of_token)
        p = log_p[self.columns].clamp(min=-1e6).exp()
        if loss == "forward_kl":
            return PLAIN[loss](self.log_q, self.index, (p / p.sum()).log(), of_token)
        acceptance = torch.minimum(p, self.log_q.exp()).sum()
        if loss == "ce_l1":
            return 0.1 * -at_temperature(self.log_q, self.token_temperature)[self.index] + 0.9 * 2 * (1 - acceptance)
        return 1 - acceptance if loss == TV else -acceptance.log()


@dataclass
class Slow:
    """The drafter's and the target's distributions at one position."""

    case: Case
    drafter: Drafter
    target_head: torch.Tensor  # [V, H]
    head: torch.Tensor  # [V', H] what the drafter proposes with
    tokens: list[int]  # [V'] ids of the head's rows
    head_temperature: float = 1.0  # what divides the drafter's logits
    token_temperature: float = 1.0  # what divides them where ce_l1 reads the sampled token
    _hidden: dict[tuple[int, int, tuple[int, ...]], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def borrowing(
        cls, case: Case, drafter: Drafter, target_head: torch.Tensor, tokens: Sequence[int] | None = None
    ) -> Slow:
        """Return the form of a drafter that borrows the target's head, over some tokens."""
        chosen = list(range(len(target_head)) if tokens is None else tokens)
        return cls(case, drafter, target_head, target_head[chosen], chosen)

    @classmethod
    def owning(cls, case: Case, drafter: Eagle3Drafter, target_head: torch.Tensor) -> Slow:
        """Return the form of a drafter whose head, over its draft vocabulary, is trained with it."""
        return cls(case, drafter, target_head, drafter.lm_head.weight, drafter.draft_tokens.tolist())

    def log_q(self, row: int, anchor: int, following: Sequence[int] = ()) -> torch.Tensor:
        """Return log q [K, V'] of the head, with gradient; the context ends at the anchor.

        following: the tokens after the anchor that an autoregressive drafter reads; a parallel one reads the anchor's.
        """
        return torch.log_softmax(
            (self.hidden(row, anchor, following) @ self.head.T).double() / self.head_temperature, -1
        )

    def hidden(self, row: int, anchor: int, following: Sequence[int] = ()) -> torch.Tensor:
        """Return the hidden states [K, H]."""
        key = (row, anchor, tuple(following))
        if key not in self._hidden:
            self._hidden[key] = self._drafted(row, anchor, following)
        return self._hidden[key]

    def _drafted(self, row: int, anchor: int, following: Sequence[int]) -> torch.Tensor:
        batch, before = self.case.batch, (slice(row, row + 1), slice(anchor))
        context = self.drafter.encode(batch.features[before], batch.tokens[before], batch.positions[before])
        chain = [self.case.trajectories[row].tokens[anchor], *following][:K]
        chain += [0] * (K - len(chain))  # beyond the end of the trajectory: nothing is read there
        return self.drafter.block_hidden(context, torch.tensor([[chain]]), torch.tensor([[anchor]]))[0, 0]

    def choice(self, row: int, anchor: int, following: Sequence[int], k: int, column: int) -> Choice:
        """Return the selector's choice at offset k after the anchor and the tokens that follow it."""
        assert isinstance(self.drafter, DFlash2Drafter)
        selector, hidden = self.drafter.candidate_selector, self.hidden(row, anchor, following)[k - 1]
        logits = (self.head @ hidden).double()
        previous = [self.case.trajectories[row].tokens[anchor], *following][k - 1]
        gate = selector.predecessor_codebook[previous].double() * (selector.hidden_projection.weight @ hidden).double()

        def score(c: int) -> torch.Tensor:
            return logits[c] + (gate * selector.successor_codebook[self.tokens[c]].double()).sum()

        ranked = sorted(range(len(logits)), key=lambda c: -float(logits[c].detach()))[: selector.top_k]
        best = max(ranked, key=lambda c: float(score(c).detach()))
        if present := column in ranked:
            among = ranked
        else:
            among = [*ranked[:-1], column]
        distribution = torch.log_softmax(torch.stack([score(c) for c in among]) / self.head_temperature, -1)
        return Choice(among, distribution, among.index(column), present, best == column, self.token_temperature)

    def term(self, loss: str, log_q: torch.Tensor, column: int, log_p: torch.Tensor, of_token: float) -> torch.Tensor:
        """Return the loss of a position."""
        if loss == "ce_l1":
            return (
                0.1 * -at_temperature(log_q, self.token_temperature)[column]
                + 0.9 * (log_p.exp() - log_q.exp()).abs().sum()
            )
        return PLAIN[loss](log_q, column, log_p, of_token)

    def log_p(self, row: int, position: int, temperature: float = 1.0) -> torch.Tensor:
        """[V'] the target's log-probs of the token at `position` over the head's tokens; at 0 all is on the argmax."""
        logits = self._target_logits(row, position)[self.tokens]
        if temperature == 0:
            return torch.where(torch.arange(len(logits)) == logits.argmax(), 0.0, -math.inf).double()
        return torch.log_softmax(logits / temperature, -1)

    def token_log_p(self, row: int, position: int, token: int) -> float:
        """Return log p of the token over all tokens."""
        return float(torch.log_softmax(self._target_logits(row, position), -1)[token])

    def _target_logits(self, row: int, position: int) -> torch.Tensor:
        """Return logits [V], read from the position before."""
        return (self.target_head @ hidden_of(self.case.batch)[row, position - 1]).double()


# ---- the formulas of losses of one position


def at_temperature(log_q: torch.Tensor, temperature: float) -> torch.Tensor:
    return torch.log_softmax(log_q / temperature, -1)


def plain_bernoulli(log_q: float, log_p: float) -> float:
    log_p, log_q = max(log_p, -10.0), max(log_q, -10.0)
    p, q = math.exp(log_p), math.exp(log_q)
    not_p = max(math.log(1 - p), -10.0) if p < 1 else -10.0
    not_q = max(math.log(1 - q), -10.0) if q < 1 else -10.0
    return min(max(p * (log_p - log_q) + (1 - p) * (not_p - not_q), -10.0), 10.0)


def plain_k3(log_q: float, log_p: float) -> float:
    delta = max(log_p, -10.0) - max(log_q, -10.0)
    return min(math.exp(delta) - delta - 1, 10.0)


def differentiable(plain: Callable[[float, float], float], log_q: torch.Tensor, log_p: float) -> torch.Tensor:
    """Make a plain function of two floats differentiable: the slope in log_q is a central difference."""
    at, step = float(log_q.detach()), 1e-6
    value = plain(at, log_p)
    slope = (plain(at + step, log_p) - plain(at - step, log_p)) / (2 * step)
    return value + slope * (log_q - at)


TV, LK = (f"tests.lab.losses:{name}" for name in ("tv", "lk"))
Plain = Callable[[torch.Tensor, int, torch.Tensor, float], torch.Tensor]

# of log q [V'], the committed token's column, log p [V'] at the temperature, and log p of the token under all tokens
PLAIN: dict[str, Plain] = {
    "cross_entropy": lambda log_q, column, _p, _t: -log_q[column],
    "bernoulli_kl": lambda log_q, column, _p, token: differentiable(plain_bernoulli, log_q[column], token),
    "forward_kl": lambda log_q, _c, log_p, _t: (log_p.exp() * (log_p.clamp(min=-1e6) - log_q)).sum(),
    TV: lambda log_q, _c, log_p, _t: (log_p.exp() - log_q.exp()).abs().sum() / 2,
    LK: lambda log_q, _c, log_p, _t: -torch.minimum(log_p.exp(), log_q.exp()).sum().log(),
}


def plain_weight(config: PositionWeights, k: int, log_q: dict[int, float]) -> float:
    """Return the weight of offset k. log_q: of the committed tokens, also of those that the head lacks."""
    if config.kind == "exponential":
        return math.exp(-(k - 1) / config.gamma)
    if config.kind == "power":
        return config.delta ** (k - 1)
    if config.kind == "d_pace":
        smoothed = {j: 0.5 * math.exp(value) + 0.5 for j, value in log_q.items()}
        return sum(math.prod(value for j, value in smoothed.items() if j <= i) for i in log_q if i >= k)
    return 1.0


# ---- whole losses: sums over rows, anchors and offsets that divide at the end


def slow_sft(slow: Slow, loss: str, decay: float, temperature: float = 1.0) -> tuple[torch.Tensor, int, float]:
    """Return the loss, how many positions have one, and the share of them whose argmax is the trajectory's token.

    decay: factor of the weight from one offset to the next.
    """
    total, weights, positions, correct = torch.zeros((), dtype=torch.float64), 0.0, 0, 0
    for row, _, anchor in slow.case.blocks():
        sequence = slow.case.trajectories[row].tokens
        log_q = slow.log_q(row, anchor, sequence[anchor + 1 :])
        for k in range(1, min(K, len(sequence) - 1 - anchor) + 1):
            if (label := sequence[anchor + k]) not in slow.tokens:
                continue
            column, weight = slow.tokens.index(label), decay ** (k - 1)
            log_p, of_token = slow.log_p(row, anchor + k, temperature), slow.token_log_p(row, anchor + k, label)
            term, right = slow.term(loss, log_q[k - 1], column, log_p, of_token), int(log_q[k - 1].argmax()) == column
            if slow.drafter.has_selector:
                choice = slow.choice(row, anchor, sequence[anchor + 1 :], k, column)
                term, right = term + choice.term(loss, log_p, of_token), choice.selected
            total = total + weight * term
            weights += weight
            positions += 1
            correct += right
    return total / weights, positions, correct / positions


def slow_opd(slow: Slow, objective: LossConfig) -> tuple[torch.Tensor, int]:
    """Return the loss and its number of positions: of the response stream, and of the rejected one on proposals."""
    case, tokens = slow.case, slow.tokens
    response, response_weights = torch.zeros((), dtype=torch.float64), 0.0
    rejected, rejected_weights = torch.zeros((), dtype=torch.float64), 0.0
    trained: set[tuple[int, int, int]] = set()
    for row, index, anchor in case.blocks():
        sequence = case.trajectories[row].tokens
        log_q = slow.log_q(row, anchor, sequence[anchor + 1 :])
        labels = {k: sequence[anchor + k] for k in range(1, K + 1) if anchor + k < len(sequence)}
        committed, beyond = K, objective.response.beyond or 0.0
        if objective.response.scope == "committed":
            committed = int(case.steps.committed[row, index])
            labels = {k: label for k, label in labels.items() if beyond or k <= committed}
        never = dict.fromkeys((k for k, label in labels.items() if label not in tokens), -math.inf)
        labels = {k: label for k, label in labels.items() if label in tokens}
        of_labels = {k: float(log_q[k - 1, tokens.index(label)].detach()) for k, label in labels.items()}
        choices = {}
        if slow.drafter.has_selector:
            choices = {
                k: slow.choice(row, anchor, sequence[anchor + 1 :], k, tokens.index(label))
                for k, label in labels.items()
            }
            of_labels = {k: float(c.log_q[c.index].detach()) if c.present else -math.inf for k, c in choices.items()}
        for k, label in labels.items():
            assert objective.temperature is not None
            weight = plain_weight(objective.response.weights(), k, of_labels | never)
            if k > committed:
                weight *= math.exp(-(k - committed) / beyond)
            log_p = slow.log_p(row, anchor + k, objective.temperature)
            of_token = slow.token_log_p(row, anchor + k, label)
            term = slow.term(objective.response.loss, log_q[k - 1], tokens.index(label), log_p, of_token)
            if choices:
                term = term + objective.response.choice * choices[k].term(objective.response.loss, log_p, of_token)
            response = response + weight * term
            response_weights += weight
            trained.add((row, index, k))
        first = int(case.steps.rejected_offset[row, index])
        if not (first and objective.needs_scores):
            continue
        proposed = case.steps.proposed[row, index].tolist()
        log_q = slow.log_q(row, anchor, proposed)
        for k in range(first, min(K, first - 1 + (objective.rejected.offsets or K)) + 1):
            log_p_of_it = float(case.steps.logprobs[row, index, k - 1])
            if math.isnan(log_p_of_it) or proposed[k - 1] not in tokens:
                continue
            weight = plain_weight(objective.rejected.positions, k, {})
            log_q_of_it = log_q[k - 1, tokens.index(proposed[k - 1])]
            if slow.drafter.has_selector:
                choice = slow.choice(row, anchor, proposed, k, tokens.index(proposed[k - 1]))
                log_q_of_it = choice.log_q[choice.index]
            term = differentiable(plain_k3, log_q_of_it, log_p_of_it)
            rejected = rejected + weight * term
            rejected_weights += weight
            trained.add((row, index, k))
    if objective.pooled:
        response_weights = rejected_weights = response_weights + rejected_weights
    loss = objective.response.weight * response / response_weights
    if objective.needs_scores:
        loss = loss + objective.rejected.weight * rejected / rejected_weights
    return loss, len(trained)


def assert_equal(report: LossReport, slow: torch.Tensor, drafter: Drafter) -> None:
    """Check for the same value and the same gradient in every parameter, none of which is zero."""
    torch.testing.assert_close(report.loss.detach().double(), slow.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    parameters = list(drafter.parameters())
    fast = torch.autograd.grad(report.loss, parameters)
    for (name, _), a, b in zip(drafter.named_parameters(), fast, torch.autograd.grad(slow, parameters), strict=True):
        scale = float(b.abs().max())
        assert scale > 1e-5, name
        assert float((a - b).abs().max()) <= 1e-3 * scale + 1e-6, name
