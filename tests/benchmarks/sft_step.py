"""Where the time of a training step goes: SFT and the forms of OPD, full head and reduced head.

A drafter like the quickstart's (2 layers, 5 target layers, but blocks of 8) on random trajectories of its size, weights
in float32 under bfloat16 autocast. Mined steps are made up: committed tokens are geometric with `--tau`, everything
behind is rejected. `target` is the forward that yields the features, which training keeps in memory while they fit.
Operations are those of all matrix products as counted by torch's FlopCounterMode (attention kernels are not in it);
the share is of the measured bfloat16 matrix product rate of `machine`. Positions are block positions with a loss.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from stages.drafters.base import Drafter
from stages.drafters.checkpoint import create_drafter
from stages.drafters.config import DFlashConfig
from stages.replay.trace import Trajectory
from stages.targets.causal_lm import Target
from stages.training.anchors import random_anchors
from stages.training.batches import Batch, FeatureSource, frequent_tokens, step_rng
from stages.training.config import TrainingConfig
from stages.training.objectives import Anchors, LossReport, MinedSteps, OpdObjective, opd_loss, sft_loss
from stages.training.vocabulary import training_head
from tests.benchmarks import harness, machine

GAMMA = 2.0
OBJECTIVES = {
    "SFT": None,
    "OPD matched greedy": OpdObjective("matched", sampled=False),
    "OPD matched sampled": OpdObjective("matched", sampled=True),
    "OPD paper": OpdObjective("paper", sampled=False),
}
PARTS = ("target", "drafter", "head_and_loss", "backward", "update")


def make_trajectories(count: int, vocab_size: int) -> list[Trajectory]:
    """Random tokens, of the quickstart's lengths: prompts of 64 … 128 tokens and answers of 96."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(64, 128, count).astype(int)
    return [
        Trajectory(str(i), rng.integers(0, vocab_size, int(n) + 96).tolist(), int(n)) for i, n in enumerate(lengths)
    ]


def make_mined(anchors: Anchors, batch: Batch, K: int, tau: float, rng: np.random.Generator) -> MinedSteps:
    """Steps that commit `tau` tokens on average (if the block were endless) and reject all the rest."""
    committed = torch.from_numpy(rng.geometric(1 / tau, tuple(anchors.positions.shape))).clamp(max=K)
    committed = committed.to(anchors.positions.device)
    shape = (*committed.shape, K)
    flat = batch.tokens.flatten()
    proposed = flat[torch.from_numpy(rng.integers(0, flat.numel(), shape)).to(flat.device)]
    logprobs = torch.from_numpy(-rng.exponential(2.0, shape).astype(np.float32)).to(flat.device)
    return MinedSteps(committed, committed, proposed, logprobs)


class Step:
    """One training step of one objective, in parts."""

    def __init__(self, target: Target, objective: OpdObjective | None, config: TrainingConfig, tau: float):
        self.target, self.objective, self.config, self.tau = target, objective, config, tau
        self.trajectories = make_trajectories(config.sequences_per_step, target.info.vocab_size)
        mask = target.tokenizer.convert_ids_to_tokens(target.info.mask_candidates[0])
        shape = DFlashConfig(num_layers=2, block_size=8, num_target_features=5, mask_token=mask)
        self.drafter: Drafter = create_drafter(shape, target, seed=0)
        self.drafter.frequent_tokens = frequent_tokens(self.trajectories, target.info.vocab_size).to(target.device)
        self.drafter.train()
        self.optimiser = torch.optim.AdamW(self.drafter.parameters(), lr=1e-4, betas=(0.9, 0.95))

    def _loss(self, batch: Batch) -> LossReport:
        rng, config = step_rng(0, 0), self.config
        anchors = random_anchors(batch.trajectories, config.anchors_per_sequence, rng, self.target.device)
        needed = [batch.tokens]
        if self.objective is None:
            head = training_head(self.target.head_weight, self.drafter.frequent_tokens, config, rng, needed)
            return sft_loss(
                self.drafter, batch, anchors, head, gamma=GAMMA, positions_per_chunk=config.positions_per_chunk
            )
        mined = make_mined(anchors, batch, self.drafter.block_size - 1, self.tau, rng)
        if self.objective.loss == "paper":
            needed.append(mined.proposed)
        head = training_head(self.target.head_weight, self.drafter.frequent_tokens, config, rng, needed)
        return opd_loss(
            self.drafter,
            batch,
            anchors,
            mined,
            head,
            self.target.head_weight,
            self.objective,
            positions_per_chunk=config.positions_per_chunk,
        )

    def run(self) -> tuple[dict[str, float], int]:
        """Seconds of every part, and the positions trained. The head's selection counts as head."""
        began = time.perf_counter()
        features = FeatureSource(self.target, self.drafter.target_layer_ids, self.trajectories)
        batch = features.batch(range(len(self.trajectories)))
        read = time.perf_counter()
        with torch.autocast(self.target.device.type, torch.bfloat16):
            report = self._loss(batch)
        float(report.loss.detach())  # waits for an accelerator
        valued = time.perf_counter()
        report.loss.backward()
        backward = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        done = time.perf_counter()
        drafted = report.seconds["drafter"]
        seconds = (read - began, drafted, valued - read - drafted, backward - valued, done - backward)
        return dict(zip(PARTS, seconds, strict=True)), report.positions


def operations(work: Callable[[], Any]) -> float:
    """Operations of all matrix products of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def measure(steps: dict[str, Step], repetitions: int) -> list[dict[str, Any]]:
    """One row of figures a step, measured in alternation."""
    rate = machine.peak_rate(torch.bfloat16) * 1e9
    counted = {name: operations(step.run) for name, step in steps.items()}  # also the round that warms up
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    positions = {}
    for _ in range(repetitions):
        for name, step in steps.items():
            seconds, positions[name] = step.run()
            parts[name].append(seconds)
    rows = []
    for name in steps:
        medians = {part: harness.median([run[part] for run in parts[name]]) for part in PARTS}
        total = sum(medians.values())
        trained = total - medians["target"]
        rows.append(
            {
                "step": name,
                **{f"{part}_ms": 1e3 * value for part, value in medians.items()},
                "total_ms": 1e3 * total,
                "positions": positions[name],
                "positions_per_s": positions[name] / total,
                "positions_per_s_features_kept": positions[name] / trained,
                "matmul_share": counted[name] / total / rate,
            }
        )
    return rows


def parse() -> argparse.Namespace:
    options = harness.parser(__doc__, repetitions=5)
    harness.add_target(options)
    options.add_argument("--sequences", type=int, default=4)
    options.add_argument("--anchors", type=int, default=16, help="a sequence")
    options.add_argument("--head-tokens", type=int, default=4096, help="size of the reduced head")
    options.add_argument("--tau", type=float, default=1.8, help="of the mined steps")
    return options.parse_args()


def main() -> None:
    options = parse()
    harness.set_threads(options.threads)
    target = harness.load_target(options.target)
    steps = {}
    for head_tokens in (None, options.head_tokens):
        config = TrainingConfig(
            sequences_per_step=options.sequences, anchors_per_sequence=options.anchors, head_tokens=head_tokens
        )
        for name, objective in OBJECTIVES.items():
            steps[f"{name}, head {head_tokens or 'full'}"] = Step(target, objective, config, options.tau)
    rows = measure(steps, options.repetitions)
    harness.print_table(
        f"{target.info.source}: {options.sequences} sequences of {options.anchors} blocks of 8; "
        f"shares of {machine.peak_rate(torch.bfloat16):,.0f} GFLOP/s",
        list(rows[0]),
        [list(row.values()) for row in rows],
    )
    harness.report("sft_step", {"rows": rows, "matmul_gflop_per_s": machine.peak_rate(torch.bfloat16)}, options)


if __name__ == "__main__":
    harness.run(main)
