"""The selector: of every offset the top candidates of the head, scored by the token before them.

Source: SGLang's `CandidateSelector` (srt/models/dflash.py, 0.5.20 and 0.5.23). Candidate c behind token p has the score
unary[c] + <A[p] ⊙ W h, B[c]>. Its unary score is the head's logit: the head's product, by the scale and the soft cap in
the checkpoint's config, which are the target's. The token before the first offset is the anchor's. The softmax over the
candidates is the law q of an offset. Greedily the best candidate is taken offset by offset, each behind the one before
it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from draftsmith.stages.drafters.base import LOGITS_AT_ONCE, Drafting
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.targets.logits import LogitMap


class CandidateSelector(nn.Module):
    """Parameter names are SGLang's: A `predecessor_codebook`, B `successor_codebook` [V, r], W `hidden_projection`."""

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, top_k: int, unary_map: LogitMap):
        super().__init__()
        self.top_k, self.unary_map = top_k, unary_map
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """No pair has a score, so that the best token of the head is taken; B alone is zero, and so has a gradient."""
        nn.init.normal_(self.predecessor_codebook, generator=generator)
        width = self.hidden_projection.in_features
        nn.init.normal_(self.hidden_projection.weight, std=width**-0.5, generator=generator)
        self.successor_codebook.zero_()

    @torch.no_grad()
    def candidates(self, hidden: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [..., H] → columns [..., k] of the head's best tokens, best first, and their unary scores."""
        flat, k = hidden.flatten(0, -2), min(self.top_k, head.weight.shape[0])
        parts = [
            head.raw_logits(part).topk(k, -1) for part in flat.split(max(1, LOGITS_AT_ONCE // head.weight.shape[0]))
        ]
        shape = (*hidden.shape[:-1], k)
        columns = torch.cat([part.indices for part in parts]).view(shape)
        return columns, self.unary_map(torch.cat([part.values for part in parts]).float()).view(shape)

    def pairs(self, hidden: torch.Tensor, previous: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [..., k]: the scores of candidate tokens [..., k] behind tokens [...] at hidden states [..., H]."""
        gate = F.embedding(previous, self.predecessor_codebook) * self.hidden_projection(hidden)
        keys = F.embedding(tokens, self.successor_codebook)
        return (keys @ gate.to(keys.dtype)[..., None])[..., 0].float()


class Walk(Drafting):
    """Through the candidates of blocks, offset by offset."""

    def __init__(self, selector: CandidateSelector, hidden: torch.Tensor, head: Head):
        """hidden: [B, A, K, H]."""
        self._selector, self._hidden, self._head, self._drafted = selector, hidden, head, 0
        self._columns, self._unary = selector.candidates(hidden, head)
        self._tokens = head.to_tokens(self._columns)

    def scores(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns [B, A, k] of the next offset's candidates, and their scores behind tokens [B, A]."""
        k = self._drafted
        self._drafted += 1
        pairs = self._selector.pairs(self._hidden[:, :, k], tokens, self._tokens[:, :, k])
        return self._columns[:, :, k], self._unary[:, :, k] + pairs

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        columns, scores = self.scores(tokens)
        everywhere = scores.new_full((*columns.shape[:-1], self._head.weight.shape[0]), -torch.inf)
        return everywhere.scatter(-1, columns, scores)

    def best(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The best tokens [B, A] of the next offset behind tokens [B, A], and their log-probs under q."""
        columns, scores = self.scores(tokens)
        most, place = scores.max(-1)
        return self._head.to_tokens(columns.gather(-1, place[..., None])[..., 0]), most - scores.logsumexp(-1)
