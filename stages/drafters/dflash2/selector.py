"""The selector: scores the head's top candidates of every offset by the token before them.

Source: SGLang's `CandidateSelector` (srt/models/dflash.py, 0.5.20 and 0.5.23). Candidate c after token p has the score
unary[c] + <A[p] ⊙ W h, B[c]>. Its unary score is the head's logit: the head's product, by the scale and the soft cap in
the checkpoint's config, which are the target's. The token before the first offset is the anchor's. The softmax over the
candidates is the distribution q of an offset. Greedily the best candidate is taken offset by offset, given the one
before it. What stands before an offset is a candidate too, so the scores of all pairs are computed in one batch, and
only the path through them is sequential.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from draftsmith.stages.drafters.base import LOGITS_PER_CHUNK, BlockSampler, propose_in_chunks
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import probability_among
from draftsmith.stages.target.logit_map import LogitMap


class CandidateSelector(nn.Module):
    """Scores candidates. Parameter names are SGLang's.

    A is `predecessor_codebook`, B `successor_codebook`, both [V, r], W is `hidden_projection`.
    """

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, top_k: int, unary_map: LogitMap):
        super().__init__()
        self.top_k, self.unary_map = top_k, unary_map
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Give every pair the score 0, so that the head's best token is taken. B alone is zero, and has a gradient."""
        nn.init.normal_(self.predecessor_codebook, generator=generator)
        width = self.hidden_projection.in_features
        nn.init.normal_(self.hidden_projection.weight, std=width**-0.5, generator=generator)
        self.successor_codebook.zero_()

    @torch.no_grad()
    def candidates(self, hidden: torch.Tensor, head: Head) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns [..., k] of the head's best tokens, best first, and their unary scores.

        hidden: [..., H].
        """
        flat, k = hidden.flatten(0, -2), min(self.top_k, head.weight.shape[0])
        count = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
        chunks = [head.raw_logits(chunk).topk(k, -1) for chunk in flat.split(count)]
        shape = (*hidden.shape[:-1], k)
        columns = torch.cat([chunk.indices for chunk in chunks]).view(shape)
        return columns, self.unary_map(torch.cat([chunk.values for chunk in chunks]).float()).view(shape)

    def gates(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return W h [..., r] of hidden states [..., H]."""
        projected: torch.Tensor = self.hidden_projection(hidden)
        return projected

    def pairs(self, gates: torch.Tensor, previous: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., p, k]: the scores of candidate tokens [..., k] after each of the tokens [..., p].

        gates: [..., r] of the hidden states.
        """
        before = F.embedding(previous, self.predecessor_codebook) * gates[..., None, :]
        keys = F.embedding(tokens, self.successor_codebook)
        return (before.to(keys.dtype) @ keys.mT).float()

    def best(self, hidden: torch.Tensor, anchor_tokens: torch.Tensor, head: Head) -> torch.Tensor:
        """Return the best path [B, A, K] through the candidates. hidden: [B, A, K, H]; anchor_tokens: [B, A]."""

        def propose(hidden: torch.Tensor, anchor_tokens: torch.Tensor) -> torch.Tensor:
            return self._best(hidden, anchor_tokens, head)

        of_block = hidden.shape[2] * self.top_k * self.successor_codebook.shape[1]
        return propose_in_chunks(propose, hidden, anchor_tokens, of_block)

    def _best(self, hidden: torch.Tensor, anchor_tokens: torch.Tensor, head: Head) -> torch.Tensor:
        columns, unary = self.candidates(hidden, head)
        tokens = head.to_tokens(columns)
        first = anchor_tokens[..., None, None].expand_as(tokens[..., :1, :])
        pairs = self.pairs(self.gates(hidden), torch.cat([first, tokens[..., :-1, :]], -2), tokens)
        scores = unary[..., None, :] + pairs  # [B, A, K, k before it, k]
        best, path = scores.argmax(-1), [torch.zeros_like(anchor_tokens)[..., None]]
        for k in range(hidden.shape[-2]):
            path.append(best[..., k, :].gather(-1, path[-1]))
        return tokens.gather(-1, torch.cat(path[1:], -1)[..., None])[..., 0]


class SelectorSampler(BlockSampler):
    """Samples among the candidates of blocks, offset by offset."""

    def __init__(self, selector: CandidateSelector, hidden: torch.Tensor, head: Head):
        """hidden: [B, A, K, H]."""
        self._selector, self.head, self._drafted = selector, head, 0
        self._columns, self._unary = selector.candidates(hidden, head)
        self._tokens, self._gates = head.to_tokens(self._columns), selector.gates(hidden)

    def _scores(self, tokens: torch.Tensor) -> tuple[int, torch.Tensor]:
        """Return the next offset, and the scores [B, A, k] of its candidates."""
        k = self._drafted
        self._drafted += 1
        pairs = self._selector.pairs(self._gates[:, :, k], tokens[..., None], self._tokens[:, :, k])
        return k, self._unary[:, :, k] + pairs[..., 0, :]

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        k, scores = self._scores(tokens)
        everywhere = scores.new_full((*scores.shape[:-1], self.head.weight.shape[0]), -torch.inf)
        return everywhere.scatter(-1, self._columns[:, :, k], scores)

    def probability(self, tokens: torch.Tensor, following: torch.Tensor, temperature: float) -> torch.Tensor:
        k, scores = self._scores(tokens)
        return probability_among(scores, self._tokens[:, :, k], following, temperature)
