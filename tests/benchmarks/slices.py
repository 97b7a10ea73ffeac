"""How often a slice refuses a challenger, by simulation (`simulated_slices`), and how often a drift check names one."""

from __future__ import annotations

import argparse

import numpy as np

from draftsmith.artifacts.results.evaluation import ALL, CHAMPION
from draftsmith.flows.refresh.drift import degraded_sets
from draftsmith.stages.evaluation.acceptance import tau_by_slice
from draftsmith.stages.replay.steps import DEPTHS
from tests.stages.evaluation.test_error_rates import simulated_slices
from tests.stages.evaluation.test_gate_rules import decided_by_slice

CHALLENGERS = {  # factors of tau below and above 4k tokens of context, and gate.max_set_loss
    "equal": ((1.0, 1.0), 0.02),
    "equal, max_set_loss 0": ((1.0, 1.0), 0.0),
    "+5 %, -20 % above 4k": ((1.05, 0.8), 0.02),
    "+5 %, -10 % above 4k": ((1.05, 0.9), 0.02),
}
LONG = {f"tau of {name}" for name in DEPTHS[2:]}


def refused(prompts: int, evaluations: int, factors: tuple[float, float], max_set_loss: float) -> tuple[float, float]:
    """Return the share of evaluations that some slice refuses, and of those that one above 4k refuses."""
    rng, by_any, by_long = np.random.default_rng(prompts), 0, 0
    for _ in range(evaluations):
        decision = decided_by_slice(rng, prompts, max_set_loss, below_4k=factors[0], above_4k=factors[1])
        broken = {rule.name for rule in decision.rules if rule.broken and rule.name.startswith("tau of ")}
        by_any, by_long = by_any + bool(broken), by_long + bool(broken & LONG)
    return by_any / evaluations, by_long / evaluations


def named_by_drift(prompts: int, evaluations: int) -> float:
    """Return the share of drift checks that name a slice of a champion which has not changed, at threshold 0."""
    rng, named = np.random.default_rng(prompts), 0
    for _ in range(evaluations):
        now, then = (
            {name: arms[CHAMPION] for name, arms in tau_by_slice(*simulated_slices(rng, prompts)).items()}
            for _ in range(2)
        )
        named += any(not text.startswith(ALL) for text in degraded_sets(now, then, 0.0))
    return named / evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=1000, help="for each row and number of prompts")
    parser.add_argument("--prompts", type=int, nargs="+", default=[24, 48, 144, 512])
    options = parser.parse_args()
    for name, case in CHALLENGERS.items():
        for prompts in options.prompts:
            by_any, by_long = refused(prompts, options.evaluations, *case)
            shares = f"refused {by_any:.1%}, by a depth above 4k {by_long:.1%}"
            print(f"{name:<24} {prompts:>4} prompts: {shares}", flush=True)
    for prompts in options.prompts:
        named = named_by_drift(prompts, options.evaluations)
        print(f"{'drift check':<24} {prompts:>4} prompts: {named:.1%} name a slice", flush=True)


if __name__ == "__main__":
    main()
