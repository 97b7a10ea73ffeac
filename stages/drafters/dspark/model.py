"""The DSpark draft model: one backbone forward drafts a block, whose offsets then see the proposals before them.

Source: arXiv 2607.05147, and SGLang 0.5.23 (srt/models/dspark.py, srt/speculative/dspark_components). The backbone is
DFlash's. The logits of an offset are the target's head of its hidden state plus a bias of low rank of the token before
it, `W2 W1[token]`, so a block is drawn offset by offset, and q is a law of its own for each. A linear head says of the
same two how probable it is that the proposal is kept, given that those before it are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.stages.drafters.base import Context, Drafting, Proposals, StepShape, TrainingRecipe, best_of
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.head import Head, flat_linear


@dataclass(frozen=True)
class BiasedHead(Head):
    """The target's head over hidden states, plus `bias` [V, r] over what was read of the token before them.

    Takes both next to each other, [..., H + r]. The bias is of all tokens: its rows are read at every use, so that
    several graphs with a gradient of their own may hang on one head.
    """

    bias: torch.Tensor | None = None

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.bias is not None
        bias, width = self.bias if self.token_ids is None else self.bias[self.token_ids], self.weight.shape[1]
        state, before = hidden[..., :width], hidden[..., width:]
        return super().raw_logits(state) + flat_linear(before.to(bias.dtype), bias)


class MarkovHead(nn.Module):
    """`markov_w1` reads a token, `markov_w2` biases the next one's logits."""

    def __init__(self, vocabulary: int, rank: int):
        super().__init__()
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, vocabulary, bias=False)


class ConfidenceHead(nn.Module):
    """A logit of hidden state and the token before it."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)


class DSparkDrafter(DFlashDrafter):
    """Parameter names are SGLang's: those of DFlash, `markov_head.…`, `confidence_head.proj.…`.

    Hidden states of an offset are [H + r] wide: the backbone's, and what was read of the token before.
    """

    kind, autoregressive, draws, corrects_head = "dspark", True, True, True
    recipe = TrainingRecipe(loss="ce_l1", gamma=4.0)

    def __init__(self, config: Qwen3Config, embedding: torch.Tensor):
        """config: as of DFlash, with `markov_rank`, `enable_confidence_head` and `sample_from_anchor`."""
        super().__init__(config, embedding)
        self.from_anchor: bool = config.sample_from_anchor  # is the anchor's own query the one of offset 1?
        self.markov_head = MarkovHead(config.vocab_size, config.markov_rank)
        width = config.hidden_size + config.markov_rank
        self.confidence_head = ConfidenceHead(width) if config.enable_confidence_head else None

    def initialise(self, generator: torch.Generator, head_weight: torch.Tensor) -> None:
        super().initialise(generator, head_weight)
        self.initialise_additions(generator)

    def initialise_additions(self, generator: torch.Generator) -> None:
        """What DFlash lacks starts as if it were not there: no bias, and every proposal as likely kept as not."""
        rank = self.markov_head.markov_w1.embedding_dim
        nn.init.normal_(self.markov_head.markov_w1.weight, std=rank**-0.5, generator=generator)
        nn.init.zeros_(self.markov_head.markov_w2.weight)
        if self.confidence_head is not None:
            nn.init.zeros_(self.confidence_head.proj.weight)
            nn.init.zeros_(self.confidence_head.proj.bias)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens before offsets [...] → [..., r]."""
        return F.embedding(tokens, self.markov_head.markov_w1.weight)

    def backbone(self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, K: int) -> torch.Tensor:
        """Hidden states [B, A, K, H] of the offsets, which no proposal changes. anchor_tokens, anchors: [B, A]."""
        queries = K if self.from_anchor else K + 1
        return self.block(context, anchor_tokens, anchors, queries)[:, :, queries - K :]

    def block_hidden(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(context, tokens[..., 0], anchors, tokens.shape[-1])
        return torch.cat([hidden, self.read(tokens)], -1)

    def head_over(self, target_head: torch.Tensor, token_ids: torch.Tensor | None) -> Head:
        head = Head.over(target_head, token_ids)
        return BiasedHead(head.weight, head.token_ids, bias=self.markov_head.markov_w2.weight)

    def drafting(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> MarkovDrafting:
        return MarkovDrafting(self, self.backbone(context, anchor_tokens, anchors, block_size - 1), head)

    @torch.no_grad()
    def propose(
        self,
        context: Context,
        anchor_tokens: torch.Tensor,
        anchors: torch.Tensor,
        block_size: int,
        head: Head,
        *,
        with_logprobs: bool = True,
    ) -> Proposals:
        drafting = self.drafting(context, anchor_tokens, anchors, block_size, head)
        steps: list[Proposals] = []
        said = []
        for _ in range(block_size - 1):
            before = steps[-1].tokens if steps else anchor_tokens
            steps.append(best_of(drafting.step(before), head, with_logprobs))
            if self.has_confidence:
                said.append(drafting.confidence())
        logprobs = [step.logprobs for step in steps if step.logprobs is not None]
        return Proposals(
            torch.stack([step.tokens for step in steps], -1),
            torch.stack(logprobs, -1) if with_logprobs else None,
            torch.stack(said, -1) if said else None,
        )

    @property
    def has_confidence(self) -> bool:
        return self.confidence_head is not None

    def confidence(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.confidence_head is not None
        proj = self.confidence_head.proj
        logits: torch.Tensor = proj(hidden.to(proj.weight.dtype))
        return logits[..., 0].float()

    @property
    def queries(self) -> int:
        return self.block_size - self.from_anchor

    def training_operations(self, shape: StepShape) -> float:
        """As of DFlash, and of each position with a loss: behind a bias that is trained, logits are made again in
        backward, a third pass of V'·H; the bias itself, V'·r, in 4."""
        H, rank = self.config.hidden_size, self.markov_head.markov_w1.embedding_dim
        return super().training_operations(shape) + 2.0 * shape.head_positions * shape.head_rows * (H + 4 * rank)


class MarkovDrafting(Drafting):
    """Blocks behind one backbone forward."""

    def __init__(self, drafter: DSparkDrafter, hidden: torch.Tensor, head: Head):
        """hidden: [B, A, K, H]."""
        self._drafter, self._hidden, self._head, self._drafted = drafter, hidden, head, 0
        self._here = hidden[:, :, 0]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [B, A] before the next offset → what the head takes there [B, A, H + r]."""
        self._here = torch.cat([self._hidden[:, :, self._drafted], self._drafter.read(tokens)], -1)
        self._drafted += 1
        return self._here

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._head.logits(self.step(tokens))

    def confidence(self) -> torch.Tensor:
        return self._drafter.confidence(self._here)
