"""DFlash's forward (arXiv 2602.06036) written out: one block, one head, one query, one key at a time, in float64.

No mask, no batch, no cache, no padding; the only thing shared with the fast implementation is the names of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tests.stages.drafters.texts import Texts

Tensors = Mapping[str, torch.Tensor]
Positions = list[torch.Tensor]  # [H] each
Around = Callable[[Tensors, str, Positions], tuple[Positions, Callable[[Positions], Positions]]]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x, weight: [D]."""
    return x / math.sqrt(float((x * x).mean()) + eps) * weight


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Rotate one head's vector [D]: the pair (i, i + D/2) turns by position · theta^(-2i/D)."""
    half = len(x) // 2
    turned = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return turned


def block_hidden(
    tensors: Tensors,
    embedding: torch.Tensor,
    features: torch.Tensor,
    anchor_token: int,
    anchor: int,
    *,
    block_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    eps: float,
    theta: float,
    mask_token: int,
    first: int = 1,
    windows: Sequence[int | None] | None = None,
    causal: Sequence[bool] | None = None,
    around: Around = lambda _weights, _name, inputs: (inputs, lambda outputs: outputs),
) -> torch.Tensor:
    """embedding: [V, H]; features: [T, K*H] of positions 0 … T-1. Returns [block_size-first, H].

    first: the query that predicts offset 1. windows, causal: one per layer; None: everything is seen. around: gets a
    layer's weights, the sublayer's name (`attention` or `mlp`) and its inputs at the block's positions; returns the
    inputs to use and a function of the sublayer's outputs.
    """
    weights = {name: tensor.detach().double() for name, tensor in tensors.items()}
    context = [
        rms_norm(weights["fc.weight"] @ features[t].double(), weights["hidden_norm.weight"], eps) for t in range(anchor)
    ]
    tokens = [anchor_token] + [mask_token] * (block_size - 1)
    states = [embedding[token].double() for token in tokens]

    for layer in range(layers):
        w = {
            name.removeprefix(f"layers.{layer}."): t
            for name, t in weights.items()
            if name.startswith(f"layers.{layer}.")
        }

        def project(x: torch.Tensor, which: str, head: int, w: Tensors = w) -> torch.Tensor:
            size = len(w["self_attn.q_norm.weight"])
            return w[f"self_attn.{which}_proj.weight"][head * size : (head + 1) * size] @ x

        normed, finish = around(w, "attention", [rms_norm(x, w["input_layernorm.weight"], eps) for x in states])
        # what a query may read: the context at its position, then every token of its own block
        readable = [(t, x) for t, x in enumerate(context)] + [(anchor + k, x) for k, x in enumerate(normed)]
        attended = []
        for k, x in enumerate(normed):
            parts = []
            width, backwards = windows[layer] if windows else None, bool(causal and causal[layer])
            within = [
                (position, seen)
                for position, seen in readable
                if (width is None or anchor + k - position < width) and not (backwards and position > anchor + k)
            ]
            for head in range(heads):
                shared = head * kv_heads // heads
                query = rotate(rms_norm(project(x, "q", head), w["self_attn.q_norm.weight"], eps), anchor + k, theta)
                scores, values = [], []
                for position, seen in within:
                    key = rms_norm(project(seen, "k", shared), w["self_attn.k_norm.weight"], eps)
                    scores.append(float(query @ rotate(key, position, theta)) / math.sqrt(len(query)))
                    values.append(project(seen, "v", shared))
                largest = max(scores)
                shares = [math.exp(score - largest) for score in scores]
                parts.append(sum((s / sum(shares) * v for s, v in zip(shares, values, strict=True)), torch.zeros(())))
            attended.append(w["self_attn.o_proj.weight"] @ torch.cat(parts))
        states = [x + y for x, y in zip(states, finish(attended), strict=True)]
        normed, finish = around(w, "mlp", [rms_norm(x, w["post_attention_layernorm.weight"], eps) for x in states])
        outputs = []
        for x in normed:
            gate = w["mlp.gate_proj.weight"] @ x
            outputs.append(w["mlp.down_proj.weight"] @ (gate * torch.sigmoid(gate) * (w["mlp.up_proj.weight"] @ x)))
        states = [x + y for x, y in zip(states, finish(outputs), strict=True)]
    return torch.stack([rms_norm(x, weights["norm.weight"], eps) for x in states[first:]])


def hidden_of(texts: Texts, anchor: int, **differently: Any) -> torch.Tensor:
    """Return the result of `block_hidden` for the first text; sizes are by default its drafter's."""
    drafter: Any = texts.drafter
    config = drafter.config
    sizes = {
        "block_size": texts.block,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "eps": config.rms_norm_eps,
        "theta": config.rope_parameters["rope_theta"],
        "mask_token": texts.target.tokenizer.mask_token_id,
    }
    embedding = drafter.embedding_scale * texts.target.embedding
    return block_hidden(
        dict(drafter.named_parameters()),
        embedding,
        texts.features[0],
        texts.trajectories[0].tokens[anchor],
        anchor,
        **sizes | differently,
    )
