"""The sizes of target and drafter that memory estimates are made of, from the models' configs alone.

Letters of the formulas, here and in `flows/checks/estimates.py`: P, P_d parameters of target and drafter, s bytes of an
element in the serving dtype, T positions of the longest sequence (prompt limit + new tokens), H hidden size, K target
layers that the drafter reads, B sequences a step, V vocabulary (or the reduced head). They are meant to be right within
a third where memory decides; activations of the target's own forward passes are small beside what is listed. Weights
are counted on torch's meta device: exact for every architecture, and nothing is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.stages.target.model_sizes import usual_layer

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROCESS = 600e6  # Python with torch and transformers imported; on a GPU about as much for its context


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a config that memory depends on."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    windows: tuple[int, ...] = ()  # positions, of every layer that slides
    divided: int = 0  # of the parameters, those that ranks divide which share the model

    @classmethod
    def from_config(cls, config: Any, parameters: int, divided: int = 0) -> ModelSize:
        usual = usual_layer(config)
        heads = usual.num_attention_heads
        sliding = [kind for kind in getattr(config, "layer_types", None) or () if kind == "sliding_attention"]
        window = getattr(usual, "sliding_window", None)
        return cls(
            parameters=parameters,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(usual, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            kv_heads=getattr(usual, "num_key_value_heads", None) or heads,
            head_dim=getattr(usual, "head_dim", None) or config.hidden_size // heads,
            vocabulary=getattr(config, "draft_vocab_size", None) or config.vocab_size,
            windows=(window,) * len(sliding) if window else (),
            divided=divided,
        )

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """2 · layers · kv_heads · head_dim · itemsize: keys and values of one position."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class Sizes:
    """Of the models that a run is about."""

    target: ModelSize
    drafter: ModelSize
    features: int  # K
    block_size: int
    itemsize: int  # s
    longest_prompt: int
    positions: int  # the target's context
    kind: str  # of the drafter
    device_memory: float = math.inf  # bytes of the device that trains: a step is split until it fits
    accelerated: bool = False  # each process has such a device; else they share the machine's memory

    @property
    def feature_bytes(self) -> int:
        """(K + 1) · H · s for one position: the layers that the drafter reads, and the last hidden state."""
        return (self.features + 1) * self.target.hidden * self.itemsize

    def weights(self, model: ModelSize, itemsize: int | None = None, sharing: int = 1) -> float:
        """P · s, in the serving dtype unless given; of one of several ranks that share the model, its part."""
        parameters = model.parameters - model.divided * (1 - 1 / sharing)
        return parameters * (itemsize or self.itemsize)

    def reduced_head(self, tokens: int | None) -> tuple[int, float]:
        """(rows of the head, bytes of its copy: none for the whole vocabulary)."""
        if tokens is None or tokens >= self.target.vocabulary:
            return self.target.vocabulary, 0.0
        return tokens, float(tokens * self.target.hidden * self.itemsize)


@dataclass(frozen=True)
class AnswerCounts:
    """How many answers a stage reads or makes, and how long they are, as far as its config says."""

    longest: int  # T
    count: float = math.inf  # at most
    verify_steps: float = 0.0  # in all, about


@dataclass(frozen=True)
class Use:
    """How a node uses a stage: the models, and what its inputs are."""

    sizes: Sizes
    prompts: Mapping[str, int] = field(default_factory=dict)  # split -> how many there are, in the order of their rows
    drafters: int = 0  # among the inputs
    answers: AnswerCounts | None = None  # the trajectories that it reads

    @property
    def longest(self) -> int:
        """T of what it reads; the target's context where nothing says."""
        return self.answers.longest if self.answers is not None else self.sizes.positions


def target_size(folder: Path) -> ModelSize:
    """Of the model whose config.json lies in `folder`."""
    from draftsmith.stages.target.layers import weightless_model
    from draftsmith.stages.target.loading import divided_parameters

    model = weightless_model(folder)
    parameters = sum(p.numel() for p in model.parameters())  # tied ones once
    return ModelSize.from_config(model.config.get_text_config(), parameters, divided_parameters(model))
