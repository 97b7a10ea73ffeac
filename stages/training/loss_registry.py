"""The losses of SFT and OPD: streams, each with a loss, a weight and weights of its positions; and presets.

Formulas are in `losses.py`; `response_loss.py` and `opd/step.py` apply them.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from draftsmith.stages.runtime.stage import Config

if TYPE_CHECKING:
    from draftsmith.stages.drafters.spec import TrainingRecipe

BEYOND = 1.0  # the reason: "Which offsets are trained" in `tests/lab/README.md`


@dataclass(frozen=True)
class LossTraits:
    """Properties of a loss that the rest of a training must know."""

    reads_distribution: bool  # the target's whole distribution, not only its committed token
    copies: int  # copies of a chunk's float32 logits that it needs at once


LOSSES = {  # the functions are in `response_loss.py`
    "cross_entropy": LossTraits(reads_distribution=False, copies=5),
    "bernoulli_kl": LossTraits(reads_distribution=False, copies=5),
    "forward_kl": LossTraits(reads_distribution=True, copies=7),
    "ce_l1": LossTraits(reads_distribution=True, copies=5),
}
_IMPORTED = LossTraits(reads_distribution=True, copies=6)  # as many as the lab's loss with the most copies


def loss_traits(name: str) -> LossTraits:
    """Return the traits of one of Draftsmith's losses or of `MODULE:FUNCTION`."""
    return _IMPORTED if ":" in name else LOSSES[name]


def loss_file(name: str) -> Path:
    """Return the source file of the loss `MODULE:FUNCTION`. Raises ValueError (for validators of configs)."""
    module, _, function = name.partition(":")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.has_location or not function.isidentifier():
        raise ValueError(f"no loss {name}. Name MODULE:FUNCTION, with the module on Python's path (PYTHONPATH).")
    return Path(str(spec.origin))


def _check_name(name: str) -> str:
    if ":" in name:
        loss_file(name)
    elif name not in ("auto", *LOSSES):
        names = ", ".join(("auto", *LOSSES))
        raise ValueError(f"no loss {name!r}. Use one of {names}, or your own function as MODULE:FUNCTION.")
    return name


LossName = Annotated[str, AfterValidator(_check_name)]
"""A loss of Draftsmith, or `MODULE:FUNCTION` (`losses.imported`), whose source file is part of the stage's key."""

PRESETS: dict[str, dict[str, Any]] = {
    # the form that fits the verification rule and the architecture
    "matched": {},
    # Draft-OPD, arXiv 2605.29343, and its authors' code: Bernoulli forward KL on committed tokens, k3 reverse KL on the
    # rejected suffix, pooled
    "paper": {
        "pooled": True,
        "response": {"loss": "bernoulli_kl", "scope": "committed", "beyond": 0, "positions": {"kind": "uniform"}},
        "rejected": {"loss": "k3"},
    },
}


class PositionWeights(Config):
    """The weight of offset k = 1, 2, … of a block in its stream's mean."""

    kind: Annotated[
        Literal["uniform", "exponential", "power", "d_pace"],
        Field(
            description="exponential: exp(-(k-1)/gamma); power: delta^(k-1); d_pace: what the offset adds to the "
            "expected accepted length under the drafter's own confidence, smoothed by 0.5"
        ),
    ]
    gamma: Annotated[
        float, Field(gt=0, description="gamma of exponential weights; 7 in DFlash's paper, for blocks of 16")
    ] = 7.0
    delta: Annotated[float, Field(gt=0, le=1, description="delta of power weights; 0.8 in Draft-OPD's paper")] = 0.8


_UNIFORM = PositionWeights(kind="uniform")


class ResponseStream(Config):
    """The stream of committed tokens."""

    loss: Annotated[
        LossName,
        Field(
            description="auto follows the verification rule: cross_entropy if greedy, forward_kl if sampled (EAGLE-3 "
            "and DSpark always as in SFT: forward_kl, ce_l1); cross_entropy and bernoulli_kl read the committed token, "
            "the others the target's whole distribution (ce_l1 both: 0.1 cross-entropy + 0.9 L1); MODULE:FUNCTION is "
            "your own loss"
        ),
    ] = "auto"
    weight: Annotated[float, Field(ge=0, description="λ_acc")] = 1.0
    choice: Annotated[
        float,
        Field(
            ge=0,
            description="for a drafter with a selector (DFlash2): weight of the same loss of its choice among the "
            "candidates, added to the loss of its head",
        ),
    ] = 1.0
    scope: Annotated[
        Literal["auto", "committed", "block"],
        Field(
            description="committed: the accepted prefix and the correction, which verification reaches, and later "
            "offsets with falling weight (`beyond`); block: all offsets, as in SFT; auto: committed (EAGLE-3 and "
            "DSpark: block, unless `beyond` is set)"
        ),
    ] = "auto"
    beyond: Annotated[
        float | None,
        Field(
            ge=0,
            description="for scope committed: the offset d after the correction is trained with weight exp(-d/beyond), "
            f"as it is reached once this error is corrected; 0 = none of them; default: {BEYOND:g}",
        ),
    ] = None
    positions: Annotated[
        PositionWeights | None,
        Field(description="by default, whole blocks as in the architecture's SFT, committed offsets uniformly"),
    ] = None

    @model_validator(mode="after")
    def _beyond_what_is_committed(self) -> ResponseStream:
        if self.beyond and self.scope == "block":
            raise ValueError("only scope committed reads beyond. Remove one of the two.")
        return self

    def weights(self) -> PositionWeights:
        """Return the position weights of a resolved stream."""
        assert self.positions is not None, "resolve the weights first"
        return self.positions


class RejectedStream(Config):
    """The stream of the drafter's own proposals from the first rejected one on. Without it, nothing is scored."""

    loss: Annotated[Literal["none", "k3"], Field(description="k3: reverse KL, estimated at the proposals")] = "none"
    weight: Annotated[float, Field(ge=0, description="λ_rej")] = 1.0
    offsets: Annotated[
        int | None, Field(ge=1, description="only this many offsets of a block, from the rejected one on; default: all")
    ] = None
    positions: PositionWeights = PositionWeights(kind="power")

    @model_validator(mode="after")
    def _fixed_weights(self) -> RejectedStream:
        if self.positions.kind == "d_pace":
            raise ValueError("d_pace does not weigh rejected positions. Use uniform, exponential or power weights.")
        return self


class LossConfig(Config):
    """`matched`, `paper`, or the streams; `preset: paper` along with streams changes some fields of the preset."""

    response: ResponseStream = ResponseStream()
    rejected: RejectedStream = RejectedStream()
    pooled: Annotated[
        bool,
        Field(
            description="divide both streams by the sum of their weights, so that a token counts the same in either; "
            "false: each stream is a mean"
        ),
    ] = False
    temperature: Annotated[
        float | None,
        Field(
            ge=0,
            description="temperature of the target's distribution, if the loss reads it; 0 = only its argmax; by "
            "default the answers' temperature, 1 if they are greedy or the drafter samples its proposals",
        ),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, dict) or "preset" not in value:
            return value
        name = value["preset"]
        if name not in PRESETS:
            raise ValueError(f"no preset {name!r}. Use {' or '.join(sorted(PRESETS))}, or a mapping of fields.")
        expanded = dict(PRESETS[name])
        for field, setting in value.items():
            if field != "preset":
                merge = isinstance(setting, dict) and field in expanded
                expanded[field] = expanded[field] | setting if merge else setting
        return expanded

    @model_validator(mode="after")
    def _fits_together(self) -> LossConfig:
        loss = self.response.loss
        if self.temperature is not None and (loss == "auto" or not loss_traits(loss).reads_distribution):
            readers = ", ".join(name for name, traits in LOSSES.items() if traits.reads_distribution)
            raise ValueError(f"only {readers} read temperature. Name one of them in loss.response.loss.")
        if self.response.weight == 0 and (self.rejected.loss == "none" or self.rejected.weight == 0):
            raise ValueError("both streams have weight 0, so nothing would be trained. Raise one of the weights.")
        if self.needs_scores and self.response.positions is not None and self.response.positions.kind == "d_pace":
            raise ValueError(
                "response.positions: d_pace's weights are not known before the loss, as a rejected stream needs. Use "
                "uniform, exponential or power weights."
            )
        return self

    @property
    def needs_scores(self) -> bool:
        """Return whether the loss reads the target's log-probs of rejected proposals."""
        return self.rejected.loss != "none" and self.rejected.weight > 0

    @property
    def reads_steps(self) -> bool:
        """Return whether verify steps must be known before the loss; a loss over all offsets finds them itself."""
        return self.needs_scores or (self.response.scope == "committed" and not self.response.beyond)

    @property
    def reads_committed(self) -> bool:
        """Return whether the loss depends on the tokens that a verify step commits."""
        return self.needs_scores or self.response.scope == "committed"

    def resolved(self, recipe: TrainingRecipe, sampled: bool, temperature: float) -> LossConfig:
        """Return this config with every unset field resolved; the evidence is in `tests/lab/README.md`.

        recipe: the architecture's. sampled: whether the verification rule is sampled. temperature: the sampling's.
        """
        loss, scope = self.response.loss, self.response.scope
        beyond, positions = self.response.beyond, self.response.positions
        as_in_sft = loss_traits(recipe.loss).reads_distribution  # SFT on the target's distribution continues with it
        if loss == "auto":
            matched = "forward_kl" if sampled else "cross_entropy"
            loss = recipe.loss if as_in_sft else matched
        if scope == "auto":
            scope = "block" if as_in_sft and beyond is None else "committed"
        if beyond is None:
            beyond = BEYOND if scope == "committed" else 0.0
        if positions is None:
            whole = scope == "block"
            positions = PositionWeights(kind="exponential", gamma=recipe.gamma) if whole else _UNIFORM
        resolved = {"loss": loss, "scope": scope, "beyond": beyond, "positions": positions}
        return self.model_copy(
            update={
                "response": self.response.model_copy(update=resolved),
                "temperature": (temperature or 1.0) if self.temperature is None else self.temperature,
            }
        )
