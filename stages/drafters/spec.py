"""Describes an architecture: traits, its module's interface, settings. Plans read it, so it imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeAlias

import numpy as np
from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.stage import Config

if TYPE_CHECKING:
    import torch

    from draftsmith.stages.targets.causal_lm import Target


@dataclass(frozen=True)
class StepShape:
    """The sizes of a training step that its number of operations depends on."""

    rows: int  # trajectories
    width: int  # positions, with padding
    anchors: np.ndarray  # [rows, A] positions
    head_positions: int  # block positions with a loss
    head_rows: int  # tokens in the softmax
    prefixes: int = 1  # encodings of the trajectories; 0 if chains are drafted again on the same context
    rank: int | None = None  # rank of the adapter that is trained instead of the weights

    @property
    def blocks(self) -> int:
        return self.anchors.size

    def seen_within(self, window: int | None) -> int:
        """Return the total prefix positions that a layer with this window reads for all anchors."""
        return int((self.anchors if window is None else np.minimum(self.anchors, window - 1)).sum())

    def linear(self, tokens: float, passes: int, *maps: tuple[int, int]) -> float:
        """Count the multiply-adds of linear maps (inputs, outputs) over `tokens` tokens.

        passes: 1 forward, 2 with the gradient of the weights, 3 also with the gradient of the input. An adapter skips
        the gradient of the weights; A and B have these passes, and B always has the gradient of its input.
        """
        products = sum(inputs * outputs for inputs, outputs in maps)
        if self.rank is None or passes == 1:
            return tokens * passes * products
        adapter = self.rank * sum(passes * inputs + 3 * outputs for inputs, outputs in maps)
        return tokens * ((passes - 1) * products + adapter)


@dataclass(frozen=True)
class TrainingRecipe:
    """How an architecture is trained on the target's answers: as its authors do, unless another way was better."""

    loss: str  # loss of a position, named as in `stages/training/losses.py`
    gamma: float  # offset k has the weight exp(-(k-1)/gamma)
    sampled_loss: str | None = None  # loss on sampled answers; None: the same
    reads_distribution: bool = False  # another loss needs the target's distribution, whatever `loss` is

    def loss_on(self, *, sampled: bool) -> str:
        """Return the loss for sampled or for greedy answers."""
        return self.sampled_loss or self.loss if sampled else self.loss


class DrafterShape(Config):
    """The shape of a new drafter; every architecture has a subclass."""

    kind: str
    block_size: int  # anchor + proposals


@dataclass(frozen=True)
class Traits:
    """The traits of one architecture: `TRAITS` of `draftsmith.stages.drafters.<kind>.config`."""

    kind: str  # as in `drafter.kind` of a config
    shape: type[DrafterShape]
    checkpoint: str  # module that creates, loads and saves it (`Architecture`); it imports torch
    recipe: TrainingRecipe
    served_in_any_dtype: bool = False  # SGLang on a GPU drafts with the others in bfloat16
    native: bool = False  # the target's own head, which training starts from; it reads the last hidden state


class Architecture(Protocol):
    """The interface of a module `draftsmith.stages.drafters.<kind>.checkpoint`. Configs are those of transformers."""

    ARCHITECTURE: str  # in `architectures` of config.json
    MODEL: type[Any]  # takes (config, the target's embedding)

    def new_config(self, shape: Any, target_config: Any, tokenizer: Callable[[], Any]) -> Any: ...
    def parse(self, path: Path, raw: RawConfig) -> Any: ...  # settings that engines would guess: explicit or refused
    def check_fits(self, drafter: Any, target: Any, where: str) -> None: ...
    def target_layer_ids(self, config: Any) -> list[int]: ...
    def description(self, config: Any, tokenizer: Callable[[], Any]) -> str: ...
    def own_name(self, name: str) -> str | None: ...  # the model's name for a file's tensor; None: not the drafter's
    def create(self, config: Any, target: Target, frequent: torch.Tensor | None = None) -> Any: ...
    def save(self, drafter: Any, folder: Path, dtype: torch.dtype) -> None: ...
    def load_weights(self, drafter: Any, folder: Path, target: Target, dtype: torch.dtype) -> None: ...


RawConfig: TypeAlias = dict[str, Any]  # the JSON of a config.json

NO_FREQUENT_TOKENS = "has no frequent_tokens.npy, so head_tokens has no effect"


class DraftingConfig(Config):
    """How a drafter drafts. It is part of every trace, because other settings propose other tokens."""

    block_size: Annotated[int | None, Field(ge=2, description="default: the trained block size")] = None
    head_tokens: Annotated[
        int | None,
        Field(ge=2, description="propose only from the most frequent tokens, this many; embedded engine only"),
    ] = None

    def block_of(self, trained: int) -> int:
        """Return the tokens per block, with the anchor. Raises DraftsmithError for more than the trained block size."""
        if (self.block_size or 0) > trained:
            raise DraftsmithError(
                f"drafting.block_size: {self.block_size} is larger than the trained {trained}. Lower it."
            )
        return self.block_size or trained
