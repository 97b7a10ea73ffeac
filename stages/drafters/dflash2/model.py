"""The DFlash2 draft model: DFlash's backbone with a convolution around every sublayer, and a candidate selector.

Source: SGLang's `DFlash2DraftModel` (srt/models/dflash.py, 0.5.20 and 0.5.23). One forward of the backbone gives the
hidden states of a block, which do not depend on its proposals; the selector then reads the token before each offset.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.stages.drafters.base import LOGITS_PER_CHUNK, BlockSampler, Context, propose_in_chunks
from draftsmith.stages.drafters.compiled import fused
from draftsmith.stages.drafters.dflash.model import DFlashDrafter, DFlashLayer
from draftsmith.stages.drafters.dflash2.config import TRAITS
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import probability_among
from draftsmith.stages.drafters.spec import StepShape
from draftsmith.stages.targets.info import LogitMap


class CandidateSelector(nn.Module):
    """Scores the head's top candidates of every offset by the token before them. Parameter names are SGLang's.

    Source: SGLang's `CandidateSelector` (srt/models/dflash.py, 0.5.20 and 0.5.23). Candidate c after token p has the
    score unary[c] + <A[p] ⊙ W h, B[c]>. A is `predecessor_codebook`, B `successor_codebook`, both [V, r], W is
    `hidden_projection`. A unary score is the head's logit: the head's product with the target's scale and soft cap,
    which the checkpoint's config holds. The token before the first offset is the anchor's. The softmax over the
    candidates is the distribution q of an offset. Greedy decoding takes the best candidate offset by offset, given the
    one before it. The token before an offset is a candidate too, so the scores of all pairs are computed in one
    batch, and only the path through them is sequential.
    """

    def __init__(self, hidden_size: int, vocab_size: int, rank: int, top_k: int, unary_map: LogitMap):
        super().__init__()
        self.top_k, self.unary_map = top_k, unary_map
        self.predecessor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.zeros(vocab_size, rank))
        self.hidden_projection = nn.Linear(hidden_size, rank, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Give every pair the score 0, so that the head's best token wins. Only B is zero, and it has a gradient."""
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

    def pairs(self, gates: torch.Tensor, previous: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return float32 [..., p, k]: the scores of candidate tokens [..., k] after each of the tokens [..., p].

        gates: [..., r], W h of the hidden states.
        """
        before = F.embedding(previous, self.predecessor_codebook) * gates[..., None, :]
        keys = F.embedding(tokens, self.successor_codebook)
        return (before.to(keys.dtype) @ keys.mT).float()

    def best(self, hidden: torch.Tensor, anchor_tokens: torch.Tensor, head: Head) -> torch.Tensor:
        """Return the best path [B, A, K] through the candidates. hidden: [B, A, K, H]; anchor_tokens: [B, A]."""
        floats_per_block = hidden.shape[2] * self.top_k * self.successor_codebook.shape[1]
        return propose_in_chunks(partial(self._best, head=head), hidden, anchor_tokens, floats_per_block)

    def _best(self, hidden: torch.Tensor, anchor_tokens: torch.Tensor, head: Head) -> torch.Tensor:
        columns, unary = self.candidates(hidden, head)
        tokens = head.to_tokens(columns)
        first = anchor_tokens[..., None, None].expand_as(tokens[..., :1, :])
        pairs = self.pairs(self.hidden_projection(hidden), torch.cat([first, tokens[..., :-1, :]], -2), tokens)
        scores = unary[..., None, :] + pairs  # [B, A, K, k before it, k]
        best, path = scores.argmax(-1), [torch.zeros_like(anchor_tokens)[..., None]]
        for k in range(hidden.shape[-2]):
            path.append(best[..., k, :].gather(-1, path[-1]))
        return tokens.gather(-1, torch.cat(path[1:], -1)[..., None])[..., 0]


class SelectorSampler(BlockSampler):
    """Samples among the candidates of blocks, offset by offset."""

    def __init__(self, selector: CandidateSelector, hidden: torch.Tensor, head: Head):
        """Find the candidates of all offsets. hidden: [B, A, K, H]."""
        self._selector, self.head, self._drafted = selector, head, 0
        self._columns, self._unary = selector.candidates(hidden, head)
        self._tokens, self._gates = head.to_tokens(self._columns), selector.hidden_projection(hidden)

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


BEFORE, AFTER = 0, 1  # the sublayer: first index of the kernels


class BlockConvolution(nn.Module):
    """Grouped dynamic convolution over the positions of a block, before and after a sublayer.

    Source: the parameters and the order of SGLang's `DFlashGroupedConv` (srt/models/dflash.py, 0.5.20 and 0.5.23).
    Output c at position i is Σ_t (base[t, c] + δ[i, t, group of c]) · x[i - t, c]; a tap never reaches into another
    block. One projection of a sublayer's input gives δ of both sides. Parameter names are SGLang's: `base_kernel`
    [2, taps, H] and `kernel_projection`. It is the identity at the start.
    """

    def __init__(self, hidden_size: int, taps: int, group_size: int):
        super().__init__()
        self.taps, self.groups = taps, hidden_size // group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, taps, hidden_size))
        self.kernel_projection = nn.Linear(hidden_size, 2 * taps * self.groups, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Set both sides to the identity, at which all parameters have gradients."""
        self.base_kernel.zero_()
        self.base_kernel[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def before(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sublayer's input, and the kernels for its output. x: [..., S, H] of whole blocks."""
        kernels = self.kernel_projection(x).unflatten(-1, (2, self.taps, self.groups))
        return self._convolve(x, kernels[..., BEFORE, :, :], BEFORE), kernels[..., AFTER, :, :]

    def after(self, x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Convolve the sublayer's output x, which is shaped like its input, with the kernels from `before`."""
        return self._convolve(x, kernels, AFTER)

    def _convolve(self, x: torch.Tensor, kernels: torch.Tensor, side: int) -> torch.Tensor:
        """Convolve one side. kernels: [..., S, taps, groups]."""
        grouped = x.unflatten(-1, (self.groups, -1))
        base = self.base_kernel[side].unflatten(-1, (self.groups, -1))  # [taps, groups, H / groups]
        out = (base[0] + kernels[..., 0, :, None]) * grouped
        for tap in range(1, min(self.taps, x.shape[-2])):  # positions before the block count as zero
            shifted = F.pad(grouped[..., :-tap, :, :], (0, 0, 0, 0, tap, 0))
            out = out + (base[tap] + kernels[..., tap, :, None]) * shifted
        return out.flatten(-2)


class DFlash2Layer(DFlashLayer):
    """A DFlash layer with `attention_conv` and `mlp_conv` around its sublayers."""

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        taps, group_size = (config.dflash_config[name] for name in ("conv_kernel_size", "conv_group_size"))
        self.attention_conv = BlockConvolution(config.hidden_size, taps, group_size)
        self.mlp_conv = BlockConvolution(config.hidden_size, taps, group_size)

    @fused
    def before(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], blocks: int) -> tuple[torch.Tensor, ...]:
        inner, kernels = self.attention_conv.before(self.input_layernorm(x).unflatten(1, (blocks, -1)))
        return *self.self_attn.of_blocks(inner.flatten(1, 2), rope, blocks), kernels

    @fused
    def after(self, x: torch.Tensor, attended: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        x = x + self.attention_conv.after(self.self_attn.o_proj(attended), kernels).flatten(1, 2)
        inner, kernels = self.mlp_conv.before(self.post_attention_layernorm(x).unflatten(1, attended.shape[1:3]))
        return x + self.mlp_conv.after(self.mlp(inner), kernels).flatten(1, 2)


class DFlash2Drafter(DFlashDrafter):
    """The draft model. Parameter names are SGLang's: DFlash's, the convolutions', and `candidate_selector.…`."""

    kind, recipe = TRAITS.kind, TRAITS.recipe
    samples_proposals, has_selector = True, True

    def __init__(self, config: Qwen3Config, embedding: torch.Tensor):
        """Create the model.

        config: DFlash's, with the sizes of convolutions and selector in `dflash_config`, and the scale and soft
        cap of unary scores.
        """
        super().__init__(config, embedding)
        sizes = config.dflash_config
        self.candidate_selector = CandidateSelector(
            config.hidden_size,
            config.vocab_size,
            sizes["selector_rank"],
            sizes["selector_top_k"],
            LogitMap(sizes.get("output_multiplier", 1.0), sizes.get("final_logit_softcapping") or None),
        )

    def _layer(self, config: Qwen3Config) -> DFlashLayer:
        return DFlash2Layer(config) if config.dflash_config.get("conv_kernel_size") else DFlashLayer(config)

    def initialise(self, generator: torch.Generator, head_weight: torch.Tensor) -> None:
        super().initialise(generator, head_weight)
        self.initialise_additions(generator)

    def initialise_additions(self, generator: torch.Generator, scale: float = 1.0) -> None:  # noqa: ARG002
        """Initialise the additions to DFlash so that they leave the proposals as they are."""
        for module in self.modules():
            if isinstance(module, BlockConvolution):
                module.initialise()
        self.candidate_selector.initialise(generator)

    def block_sampler(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> BlockSampler:
        tokens = anchor_tokens[..., None].expand(-1, -1, block_size - 1)
        return SelectorSampler(self.candidate_selector, self.block_hidden(context, tokens, anchors), head)

    @torch.no_grad()
    def propose(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> torch.Tensor:
        tokens = anchor_tokens[..., None].expand(-1, -1, block_size - 1)
        hidden = self.block_hidden(context, tokens, anchors)
        return self.candidate_selector.best(hidden, anchor_tokens, head)

    @torch.no_grad()
    def selector_propose(self, hidden: torch.Tensor, anchor_tokens: torch.Tensor, head: Head) -> torch.Tensor:
        return self.candidate_selector.best(hidden, anchor_tokens, head)

    def selector_candidates(self, hidden: torch.Tensor, head: Head) -> torch.Tensor:
        return self.candidate_selector.candidates(hidden, head)[0]

    def selector_logits(
        self, hidden: torch.Tensor, previous: torch.Tensor, columns: torch.Tensor, head: Head
    ) -> torch.Tensor:
        rows = head.weight[columns].to(hidden.dtype)
        unary = (rows @ hidden[..., None])[..., 0].float()
        selector = self.candidate_selector
        pairs = selector.pairs(selector.hidden_projection(hidden), previous[..., None], head.to_tokens(columns))
        return selector.unary_map(unary) + pairs[..., 0, :]

    def operations(self, shape: StepShape, *, training: bool = True) -> float:
        """Count operations as in DFlash. A training adds:

        the projections of the kernels, H · 2·taps·groups twice per layer and token, in 3 passes; for each position with
        a loss the candidates, V'·H once, and their scores, k·H (unary) in 3 passes, k·r (pairs) and H·r (projection) in
        4: they are computed again in backward. With an adapter, which leaves the selector as it is, these have 3.
        """
        c, sizes = self.config, self.config.dflash_config
        H, r, k = c.hidden_size, sizes["selector_rank"], min(sizes["selector_top_k"], shape.head_rows)
        taps = sizes.get("conv_kernel_size") or 0
        kernels = [(H, 2 * taps * (H // sizes["conv_group_size"]))] * 2 if taps else []
        convolutions = c.num_hidden_layers * shape.linear(
            shape.blocks * self.block_size, 3 if training else 1, *kernels
        )
        per_position = k * r + H * r
        if training:
            per_position = shape.head_rows * H + 3 * k * H + (4 if shape.rank is None else 3) * per_position
        selector = shape.head_positions * per_position
        return super().operations(shape, training=training) + 2.0 * (convolutions + selector)
