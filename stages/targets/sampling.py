"""Sampling parameters of answers. Imports no torch, since planning and checks read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field


def _not_one(top_k: int) -> int:
    if top_k == 1:
        raise ValueError("top_k 1 is greedy decoding. Set temperature to 0 instead.")
    return top_k


TopK = Annotated[
    int,
    Field(ge=0, le=2**31 - 1, description="sample from this many most likely tokens, cut before top_p; 0 = all"),
    AfterValidator(_not_one),
]


@dataclass(frozen=True)
class SamplingParams:
    """The distribution that answers are sampled from: the target's at a temperature, cut to the `top_k` most likely
    tokens, and of these to the smallest set of most likely ones whose probability among them reaches `top_p`.

    Greedy decoding has neither cut, so all greedy parameters are equal.
    """

    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all

    def __post_init__(self) -> None:
        if self.greedy:
            object.__setattr__(self, "top_p", 1.0)
            object.__setattr__(self, "top_k", 0)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Return whether some tokens can never be sampled."""
        return self.top_p < 1 or self.top_k > 0

    @property
    def truncation(self) -> str:
        """Return top_p and top_k as in a config."""
        return f"top_p {self.top_p:g}" + (f", top_k {self.top_k}" if self.top_k else "")


GREEDY = SamplingParams()
