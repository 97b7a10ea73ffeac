"""What a new drafter looks like, and how a drafter is used when it drafts."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from draftsmith.stages.contract import Config, OnlyIfSet

Confidence = Annotated[
    float | None,
    Field(
        gt=0,
        lt=1,
        description="cut a block in front of the first proposal that is kept with a smaller probability, by the "
        "drafter's own confidence; of a DSpark with a confidence head, embedded engine only; left out: verify all",
    ),
    OnlyIfSet(),
]


class DFlashConfig(Config):
    """Shape of a new DFlash drafter. Sizes left out follow the target, as z-lab's checkpoints do."""

    kind: Literal["dflash"] = "dflash"
    num_layers: Annotated[int, Field(ge=1)] = 5
    block_size: Annotated[int, Field(ge=2, description="anchor + proposals")] = 16
    target_layer_ids: Annotated[
        tuple[int, ...] | None,
        Field(description="layer k = the hidden state AFTER target layer k; left out: spread over the depth"),
    ] = None
    num_target_features: Annotated[
        int | None, Field(ge=1, description="how many target layers to spread; left out: one a drafter layer")
    ] = None
    mask_token: Annotated[
        str | int | None,
        Field(
            description="a token of the target's vocabulary, or the id of an unused row of its embedding (Qwen3: "
            "151669); left out: the tokenizer's mask token"
        ),
    ] = None
    intermediate_size: int | None = None
    sliding_window: Annotated[
        int | None,
        Field(
            ge=1,
            description="positions that a query of a sliding layer sees, its own included; such layers read the block "
            "backwards only, as engines do; left out: all layers see everything",
        ),
    ] = None
    layer_types: Annotated[
        tuple[Literal["full_attention", "sliding_attention"], ...] | None,
        Field(description="of every layer, with sliding_window; left out: all slide"),
    ] = None

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if self.layer_types is None:
            return self
        if len(self.layer_types) != self.num_layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers of {self.num_layers}")
        if ("sliding_attention" in self.layer_types) != (self.sliding_window is not None):
            raise ValueError("sliding_window is of layers that slide: give both, or neither")
        return self

    @model_validator(mode="after")
    def _one_way_to_name_layers(self) -> Self:
        if self.target_layer_ids is not None and self.num_target_features is not None:
            raise ValueError("give target_layer_ids or num_target_features, not both")
        return self


class DFlash2Config(DFlashConfig):
    """Shape of a new DFlash2 drafter, or of what a DFlash drafter to go on from is given in addition."""

    kind: Literal["dflash2"]  # type: ignore[assignment]
    conv_kernel_size: Annotated[
        int, Field(ge=0, description="taps of the convolutions around every sublayer; 0, with conv_group_size: none")
    ] = 2
    conv_group_size: Annotated[int, Field(ge=0, description="channels that share a dynamic kernel")] = 16
    selector_rank: Annotated[int, Field(ge=1, description="width of the tokens' codebooks")] = 256
    selector_top_k: Annotated[int, Field(ge=1, description="candidates of an offset")] = 16

    @model_validator(mode="after")
    def _convolutions_have_groups(self) -> Self:
        if bool(self.conv_kernel_size) != bool(self.conv_group_size):
            raise ValueError("conv_kernel_size and conv_group_size are of the same convolutions: give both, or 0 twice")
        return self


class DSparkConfig(DFlashConfig):
    """Shape of a new DSpark drafter, or of what a DFlash drafter to go on from is given in addition."""

    kind: Literal["dspark"]  # type: ignore[assignment]
    block_size: Annotated[int, Field(ge=2, description="anchor + proposals")] = 8
    markov_rank: Annotated[int, Field(ge=1, description="of the bias of the token before an offset")] = 256
    markov_head: Annotated[
        Literal["vanilla", "gated", "rnn"],
        Field(description="the bias reads the token alone, or the offset's hidden state too, or all tokens before it"),
        OnlyIfSet(),
    ] = "vanilla"
    confidence_head: Annotated[
        bool,
        Field(description="learn how probable it is that a proposal is kept: blocks may be cut by it (`confidence`)"),
    ] = True


class Eagle3Config(Config):
    """Shape of a new EAGLE-3 drafter. Sizes left out follow the target."""

    kind: Literal["eagle3"]
    block_size: Annotated[
        int, Field(ge=2, description="anchor + chain; training unrolls as many steps as the chain is long")
    ] = 8
    target_layer_ids: Annotated[
        tuple[int, int, int] | None,
        Field(description="layer k = the hidden state AFTER target layer k; left out: SGLang's choice"),
    ] = None
    draft_vocab_size: Annotated[
        int | None,
        Field(ge=2, description="propose only from this many most frequent tokens of the answers; left out: all"),
    ] = None
    intermediate_size: int | None = None


def _kind_of(value: Any) -> str:
    kind = value.get("kind", "dflash") if isinstance(value, dict) else getattr(value, "kind", "")
    return str(kind)


DrafterConfig = Annotated[
    Annotated[DFlashConfig, Tag("dflash")]
    | Annotated[DFlash2Config, Tag("dflash2")]
    | Annotated[DSparkConfig, Tag("dspark")]
    | Annotated[Eagle3Config, Tag("eagle3")],
    Discriminator(
        _kind_of,
        custom_error_type="drafter_kind",
        custom_error_message="kind must be dflash, dflash2, dspark or eagle3",
    ),
]


NO_FREQUENT_TOKENS = "says nothing of which tokens are frequent, so it drafts from all"  # what head_tokens then does


class DraftingConfig(Config):
    """How a drafter drafts. Part of every trace: other settings propose other tokens."""

    block_size: Annotated[int | None, Field(ge=2, description="left out: the trained block size")] = None
    head_tokens: Annotated[
        int | None,
        Field(ge=2, description="propose only from this many most frequent tokens; embedded engine only"),
    ] = None
    confidence: Confidence = None


def no_confidence(kind: str, field: str = "drafting.confidence") -> str:
    """What is wrong with a block that is cut by such a drafter. kind: the drafter's."""
    without = "this drafter has no confidence head" if kind == "dspark" else f"{kind} has no confidence head"
    return f"{field}: {without}: leave it out, or draft with a dspark that has one (drafter.confidence_head)"
