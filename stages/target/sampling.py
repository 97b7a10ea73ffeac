"""The law that texts were drawn by. Plans and checks read it, which load no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field


def _several(top_k: int) -> int:
    if top_k == 1:
        raise ValueError("the most likely token alone is greedy decoding: say temperature 0")
    return top_k


TopK = Annotated[
    int,
    Field(ge=0, le=2**31 - 1, description="only so many most likely tokens are drawn, in front of top_p; 0 = all"),
    AfterValidator(_several),
]


@dataclass(frozen=True)
class Law:
    """How texts were drawn from the target: at a temperature, of the `top_k` most likely tokens, and of these the
    smallest set of most likely ones whose probability among them reaches `top_p`."""

    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all

    @classmethod
    def of(cls, temperature: float, top_p: float, top_k: int) -> Law:
        """Greedy texts have no top-p and no top-k."""
        return cls(temperature, top_p, top_k) if temperature > 0 else GREEDY

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncates(self) -> bool:
        """Does it leave tokens out?"""
        return self.top_p < 1 or self.top_k > 0

    @property
    def truncation(self) -> str:
        """What leaves tokens out, as a config says it."""
        return f"top_p {self.top_p:g}" + (f", top_k {self.top_k}" if self.top_k else "")


GREEDY = Law()
