"""A native head for multi-token prediction, around the decoder layer that transformers has for the target.

The entry at position i is `join` of two normalised vectors, the embedding of the token at i + 1 and the target's hidden
state of position i, or for proposals the head's own state. Its output, after the head's norm and the target's head,
predicts the token at i + 2. A decoder layer of the target's class computes this output, with the keys and
values of chains in place of a cache.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModel

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.base import as_input
from draftsmith.stages.drafters.chain import Chain, ChainDrafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.mtp.config import TRAITS
from draftsmith.stages.drafters.mtp.families import ENGINE_FIELD, family_of
from draftsmith.stages.drafters.spec import StepShape

_ATTENTION = "draftsmith_chains"
_ONE_LAYER = {
    "num_hidden_layers": 1,
    "vocab_size": 1,  # its embedding is not used
    "pad_token_id": None,
    "layer_types": ["full_attention"],
    "first_k_dense_replace": 0,
    "mlp_only_layers": [],
}


class _EntriesKnownError(Exception):
    """Ends a layer's forward when keys and values are known. Layers have no other way to stop there."""


class _Entries:
    """Takes the keys and values of a layer's input, which is not read further."""

    def attend(self, _queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        self.keys, self.values = keys, values
        raise _EntriesKnownError


def _attention(
    module: nn.Module,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Chain | _Entries,
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend by the chains that are passed in place of a mask. The signature is transformers'.

    Values narrower than keys (MLA) are filled up with zeros: kernels need both of one width.
    """
    width, wide = value.shape[-1], key.shape[-1]
    factor = 1.0 if scaling is None else scaling * wide**0.5  # kernels scale by the width
    query = query if abs(factor - 1) < 1e-6 else query * factor
    attended = attention_mask.attend(query, key, nn.functional.pad(value, (0, wide - width)))
    return attended.unflatten(-1, (query.shape[1], wide))[..., :width], None


AttentionInterface.register(_ATTENTION, _attention)


class MtpDrafter(ChainDrafter):
    """The head. Checkpoints name its parameters as the target's family does (`families.py`)."""

    kind, recipe = TRAITS.kind, TRAITS.recipe
    has_own_head = False
    layer_names = ("join", "layer")
    source: Mapping[str, Any] = {}  # config.json of the target, as engines read it

    def __init__(self, config: Any, embedding: torch.Tensor):
        """Create the model, without values. config: the target's text config, with `block_size` and the engine."""
        super().__init__()
        family = family_of(config)
        assert family is not None  # `parse` and `new_config` have checked it
        self.config, self.family = config, family
        self.reading = family.reading(getattr(config, ENGINE_FIELD))
        self.block_size: int = config.block_size
        self.target_layer_ids = [config.num_hidden_layers - 1]
        self._embedding = (embedding,)
        self._target_norm: tuple[nn.Module, ...] = ()  # frozen, not a part of this module
        with torch.device("meta"):
            decoder = _one_layer(config)
            self.layer, self.norm = decoder.layers[0], decoder.norm
            self.embed_norm, self.hidden_norm = copy.deepcopy(self.norm), copy.deepcopy(self.norm)
            self.join = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.to_empty(device=torch.get_default_device())
        self.rotary = type(decoder.rotary_emb)(decoder.config)
        self._maps = {name: (module.in_features, module.out_features) for name, module in self.linear_maps().items()}

    def _facts(self) -> Mapping[str, object]:
        return {**super()._facts(), "layers": 1}

    def initialise(self, generator: torch.Generator, target_head: torch.Tensor) -> None:
        """Keep the target's own weights, which `create` has read."""

    @torch.no_grad()
    def start_from(self, decoder: Any) -> None:
        """Start as the target's last layer that has the head's shapes, for a target without a head.

        It reads the sum of the two normalised vectors (identities in `join`; their norms only divide), and its output
        goes through a copy of the target's final norm, so that it proposes like the target's own end from the start.

        decoder: the target's layers and final norm. Raises DraftsmithError if no layer has the head's shapes.
        """
        shapes = _shapes(self.layer)
        last = next((layer for layer in reversed([*decoder.layers]) if _shapes(layer) == shapes), None)
        if last is None:
            raise DraftsmithError(
                "sft.drafter: the target has no MTP head, and no layer with a head's shapes to start from (a quantised "
                "target has none). Choose another drafter.kind."
            )
        self.layer.load_state_dict(last.state_dict())
        self.norm.load_state_dict(decoder.norm.state_dict())
        plain = type(self.norm)(self.config.hidden_size).state_dict()  # 1, or 0 if the norm adds 1
        for norm in (self.embed_norm, self.hidden_norm):
            norm.load_state_dict(plain)
        self.join.weight.copy_(torch.eye(self.config.hidden_size).repeat(1, 2))

    def follow(self, target_norm: nn.Module) -> None:
        """Read hidden states through the target's final norm, which stays the target's."""
        self._target_norm = (target_norm,)

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        if self.reading.target_normed:
            norm = self._target_norm[0]
            features = norm(features.to(next(norm.parameters()).dtype))
        return as_input(features, self.norm.weight.dtype)

    def _run(
        self, attending: Chain | _Entries, tokens: torch.Tensor, features: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the layer's output [B, N, H] of entries at positions [B, N]. features: [B, N, H]."""
        x = self.embed(tokens)
        if self.reading.zeroes_first:
            x = x.masked_fill((positions == 0)[..., None], 0)
        parts = [self.embed_norm(x), self.hidden_norm(features)]
        joined = self.join(torch.cat(parts[::-1] if self.family.hidden_first else parts, -1))
        rope = self.rotary(joined, positions)
        output = self.layer(joined, attention_mask=attending, position_embeddings=rope)
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def entries(
        self, following: torch.Tensor, features: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = _Entries()
        with suppress(_EntriesKnownError):
            self._run(kept, following, features, positions)
        return kept.keys, kept.values

    def advance(self, chain: Chain, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self._run(chain, tokens, chain.features, positions)
        hidden = self.norm(output)
        return hidden, hidden if self.reading.own_normed else output

    def head_over(self, target_head: torch.Tensor, token_ids: torch.Tensor | None) -> Head:
        return Head.over(target_head, token_ids, self.logit_map)

    def operations(self, shape: StepShape, *, training: bool = True) -> float:
        """Count the operations of a training, with N = rows · T positions and e = rows · A · K entries of chains.

        Maps: prefix entries need keys and values (3 passes) and compute queries too (1 pass), entries of chains need
        all maps (3 passes), the router and the experts that are chosen; attention in 7 products, of heads as wide as
        keys, over the positions before the anchor and the chain's own; the frozen head in 2 passes. Without training
        there is one pass, or two products of attention. Each multiply-add counts as two operations. An adapter
        (`StepShape.linear`) leaves router and experts as they are (2 passes).
        """
        K, q, passes = self.block_size - 1, _width(self.config, self.layer.self_attn), 3 if training else 1
        N, entries = shape.prefixes * shape.rows * shape.width, shape.blocks * K
        queries = [size for name, size in self._maps.items() if ".self_attn.q" in name]
        keys = [size for name, size in self._maps.items() if ".self_attn.k" in name or ".v_" in name]
        first = passes if shape.rank is None else min(passes, 2)  # of what no trained weight comes before
        maps = (
            shape.linear(N, first, self._maps["join"]) + shape.linear(N, passes, *keys) + shape.linear(N, 1, *queries)
        )
        maps += shape.linear(entries, passes, *self._maps.values())
        maps += entries * self._experts_read() * first
        attention = K * q * shape.seen_within(None) + entries * q * (K + 1) / 2
        head = shape.head_positions * shape.head_rows * self.config.hidden_size
        return 2.0 * (maps + (7 if training else 2) * attention + (2 if training else 1) * head)

    def _experts_read(self) -> float:
        """Return the number of weights that an entry is multiplied by: the router's and its chosen experts'."""
        mlp = self.layer.mlp
        if not hasattr(mlp, "experts"):
            return 0.0
        experts = list(mlp.experts.parameters())
        chosen = self.config.num_experts_per_tok / len(experts[0])
        return float(mlp.gate.weight.numel() + chosen * sum(p.numel() for p in experts))


def _width(config: Any, attention: Any) -> int:
    """Return the width of a layer's queries, to which MLA's values are padded."""
    return max(int(attention.o_proj.in_features), config.num_attention_heads * getattr(config, "qk_head_dim", 0))


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def _one_layer(config: Any) -> Any:
    """Return the target's decoder with one layer of full attention, and with experts if the target has some."""
    small = copy.deepcopy(config)
    for name, value in _ONE_LAYER.items():
        if hasattr(small, name):
            setattr(small, name, value)
    return AutoModel.from_config(small, attn_implementation=_ATTENTION)
