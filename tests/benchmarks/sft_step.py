"""Where the time of a training step goes: SFT and the forms of OPD, full head and reduced head.

A drafter like the quickstart's (2 layers, 5 target layers, but blocks of 8) on random trajectories of its size, weights
in float32 under bfloat16 autocast. Verify steps are invented: committed tokens are geometric with a mean of 1.8, and
all proposals after them are rejected. Mining them again would not cost what it costs in training, and is left out.
What chains cost does not depend on where they lead.

`target` is the forward that yields the features, which training keeps in memory while they fit: `times_sft` leaves it
out, `times_sft_with_target` is what a training costs whose features do not fit. Both are medians of the ratios in each
round, of OPD to SFT with the same loss and head; `times_sft_flop` is the ratio of the operations. With
`--features-kept` the target reads the answers once, before all steps. `OPD random` is one pass over all blocks.

`mining` is what OPD adds: traces mined again, and the target's scores for a rejected stream. A trajectory is trained
every (trajectories / sequences_per_step) steps, so `remine_every: N` mines it again once in ceil(N / that) times.
`SFT, dense` is the same step as other trainers have it: attention under one mask over all blocks, all logits in
float32, torch's cross-entropy on them.

Operations are those of all matrix products as counted by torch's FlopCounterMode, the target's and attention included;
the share is of the measured bfloat16 matrix product rate of `machine`. Positions are block positions with a loss.
Seconds are the process's CPU time where `--cpu-time` is given: with one thread on a machine that others use, too, it is
the time that the step would take alone, but for caches and memory that are shared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import create_drafter
from draftsmith.stages.drafters.dflash import model as dflash_model
from draftsmith.stages.drafters.registry import KINDS
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training import losses
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import Batch, FeatureSource, frequent_tokens, step_rng, token_counts
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.drafted_blocks import block_labels, draft_blocks, encode_batch
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.opd.anchor_sources import ChainAnchors
from draftsmith.stages.training.opd.body import anchor_source
from draftsmith.stages.training.opd.step import OpdStep, StepOptions
from draftsmith.stages.training.opd.verify_steps import MinedTable
from draftsmith.stages.training.optimiser import make_optimiser
from draftsmith.stages.training.sft.body import sft_loss
from draftsmith.stages.training.softmax_heads import HeadSource, LossContext
from tests.benchmarks import harness, machine
from tests.stages.drafters.dense import dense_attention
from tests.stages.kernel_flops import KERNEL_FLOPS
from tests.stages.training.case import mined_table, whole_step

GAMMA = 2.0
DENSE = "SFT, dense"
TAU = 1.8  # of the invented verify steps
HEAD_TOKENS = 4096  # of the reduced head
SAMPLED = {"loss": {"response": {"loss": "forward_kl"}}}  # as on sampled answers
ARMS: dict[str, dict[str, Any] | None] = {
    "SFT": None,
    DENSE: {},
    "SFT, forward KL": {"loss": "forward_kl"},
    "OPD mined once": {"anchors": "visited", "remine_every": 0},
    "OPD mined once, sampled": {"anchors": "visited", "remine_every": 0, **SAMPLED},
    "OPD mined once, paper": {"anchors": "visited", "remine_every": 0, "loss": "paper"},
    "OPD random": {"anchors": "random"},
    "OPD successors": {"anchors": "successors"},
    "OPD successors, sampled": {"anchors": "successors", **SAMPLED},
    "OPD chains": {"anchors": "chains"},
    "OPD chains, two rounds": {"anchors": "chains"},
    "OPD chains, sampled": {"anchors": "chains", **SAMPLED},
}
TWO_ROUNDS = "OPD chains, two rounds"
FORWARD_KL = "SFT, forward KL"
PARTS = ("target", "mining", "drafter", "head_and_loss", "backward", "update")


@dataclass(frozen=True)
class World:
    """What all arms train on; each has a copy of the drafter."""

    target: Target
    trajectories: list[Trajectory]
    make_drafter: Callable[[], Drafter]
    table: MinedTable
    sampling: SamplingParams = GREEDY  # of the answers
    features: FeatureSource | None = None  # if the target's are kept


def make_trajectories(count: int, vocab_size: int) -> list[Trajectory]:
    """Random tokens, of the quickstart's lengths: prompts of 64 … 128 tokens and answers of 96."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(64, 128, count).astype(int)
    return [
        Trajectory(str(i), rng.integers(0, vocab_size, int(n) + 96).tolist(), int(n)) for i, n in enumerate(lengths)
    ]


def invented_steps(trajectory: Trajectory, K: int, tau: float, rng: np.random.Generator) -> Steps:
    """A trace that commits `tau` tokens a step on average (if the block were endless) and rejects all the rest."""
    anchors, anchor = [], trajectory.first_anchor
    while anchor <= trajectory.last_anchor:
        anchors.append(anchor)
        anchor += min(K, int(rng.geometric(1 / tau)))
    visited = np.array(anchors)
    committed = np.diff(visited, append=min(anchor, len(trajectory.tokens) - 1))
    proposed = rng.choice(np.array(trajectory.tokens), (len(visited), K))
    logprobs = -rng.exponential(2.0, proposed.shape).astype(np.float32)
    return Steps(len(trajectory.tokens), visited, committed - 1, proposed, logprobs)


def make_world(target: Target, sequences: int, kind: str = "dflash", temperature: float = 0.0) -> World:
    """Return a new drafter and invented steps on random text."""
    trajectories = make_trajectories(sequences, target.info.vocab_size)
    mask = target.tokenizer.convert_ids_to_tokens(target.info.mask_candidates[0])
    fields = {"kind": kind, "num_layers": 2, "block_size": 8, "num_target_features": 5, "mask_token": mask}
    shape = KINDS[kind].shape.model_validate(fields)
    rng = np.random.default_rng(1)
    table = mined_table([invented_steps(t, shape.block_size - 1, TAU, rng) for t in trajectories], shape.block_size - 1)
    sampling = SamplingParams(temperature)
    return World(target, trajectories, lambda: create_drafter(shape, target, seed=0), table, sampling)


class Step:
    """One training step of one arm, by phase."""

    def __init__(self, name: str, world: World, fields: dict[str, Any] | None, config: TrainingConfig):
        self.world, self.config, self.step = world, config, 0
        self.drafter = world.make_drafter()
        counts = token_counts(world.trajectories, world.target.info.vocab_size)
        self.drafter.frequent_tokens = frequent_tokens(counts).to(world.target.device)
        self.drafter.train()
        self.optimiser = make_optimiser(self.drafter.parameters(), config)
        self.heads = HeadSource(self.drafter, world.target.head_weight, config)
        self.dense = name.startswith(DENSE)
        self.sampling = world.sampling if self.drafter.samples_proposals else GREEDY
        sft, sampled = fields if name.startswith("SFT") else None, not world.sampling.greedy
        config_of_sft = SftConfig.model_validate({"gamma": GAMMA, **(sft or {})})
        self.stream = config_of_sft.stream(self.drafter.recipe, sampled=sampled)
        self.opd = self._opd(name, fields) if fields is not None and sft is None else None
        loss = self.stream.loss if self.opd is None else self.opd.objective.response.loss
        self.base = f"{'SFT' if loss == self.stream.loss else FORWARD_KL}, head {config.head_tokens or 'full'}"

    def _opd(self, name: str, fields: dict[str, Any]) -> OpdStep:
        config, table = OpdConfig.model_validate(self.config.model_dump() | fields), self.world.table
        sampling = self.world.sampling
        objective = config.loss.resolved(self.drafter.recipe, not sampling.greedy, sampling.temperature)
        source = anchor_source(config, table, self.drafter, scored=objective.needs_scores)
        if name == TWO_ROUNDS:
            source = ChainAnchors(config.anchors_per_sequence, rounds=2)
        options = StepOptions(config, objective, table.proposals, self.sampling)
        return OpdStep(self.drafter, self.world.target, source, options)

    def _loss(self, features: FeatureSource) -> LossReport:
        """Compute the step's loss, with features that are read before."""
        indices = list(range(len(self.world.trajectories)))
        batch, rng, config = features.batch(indices), step_rng(0, self.step), self.config
        if self.opd is not None:
            (report,) = self.opd.micro_batches(self.step, whole_step(indices, batch), rng)
            return report
        started = time.perf_counter()
        shifts, target = rng.random(len(indices)), self.world.target
        anchors = position_anchors(batch.trajectories, config.anchors_per_sequence, shifts, target.device)
        heads = self.heads.sample(rng, [batch.tokens])
        selected = time.perf_counter()
        if self.dense:
            return self._dense_loss(batch, anchors)
        context = LossContext(heads, target.head_weight, config.positions_per_chunk, self.sampling)
        report = sft_loss(self.drafter, batch, anchors, context, self.stream, temperature=1.0)
        report.seconds["head_and_loss"] += selected - started
        return report

    def _dense_loss(self, batch: Batch, anchors: torch.Tensor) -> LossReport:
        """Compute the value of sft_loss with cross-entropy as other trainers do."""
        started = time.perf_counter()
        with patch.object(dflash_model, "block_attention", dense_attention):
            hidden = draft_blocks(self.drafter, encode_batch(self.drafter, batch), batch, anchors).hidden
        drafted = time.perf_counter()
        K = hidden.shape[2]
        labels, inside = block_labels(batch, anchors, K)
        logits = F.linear(hidden, self.world.target.head_weight).float()
        terms = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)
        weights = losses.decay_weights(torch.arange(1, K + 1), GAMMA) * inside
        with torch.no_grad():
            accuracy = float(((logits.argmax(-1) == labels) & inside).sum() / inside.sum())
        loss = (weights * terms).sum() / weights.sum()
        seconds = {"drafter": drafted - started, "head_and_loss": time.perf_counter() - drafted}
        return LossReport(loss, anchors.numel(), int(inside.sum()), {"accuracy": accuracy}, seconds)

    def run(self) -> tuple[dict[str, float], int]:
        """Train a step; return the seconds by phase, and the trained positions. Sampling the head counts as head."""
        self.step += 1
        started = time.perf_counter()
        layers = self.drafter.target_layer_ids
        features = self.world.features or FeatureSource(self.world.target, layers, self.world.trajectories, self.config)
        features.batch(range(len(self.world.trajectories)))
        read = time.perf_counter()
        with torch.autocast(self.world.target.device.type, torch.bfloat16):
            report = self._loss(features)
        float(report.loss.detach())  # waits for an accelerator
        valued = time.perf_counter()
        report.loss.backward()
        backward = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        done = time.perf_counter()
        drafted, mined = report.seconds["drafter"], report.seconds.get("mining", 0.0)
        seconds = (read - started, mined, drafted, valued - read - drafted - mined, backward - valued, done - backward)
        return dict(zip(PARTS, seconds, strict=True)), report.positions


def operations(work: Callable[[], Any]) -> float:
    """Count the operations of all matrix products of a call."""
    with FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS) as counter:
        work()
    return float(counter.get_total_flops())


def measure(steps: dict[str, Step], repetitions: int) -> list[dict[str, Any]]:
    """Measure all steps in alternation; return a row for each."""
    rate = machine.peak_rate(torch.bfloat16) * 1e9
    counted = {name: operations(step.run) for name, step in steps.items()}  # also the round that warms up
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    positions = {}
    names = list(steps)
    for r in range(repetitions):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            seconds, positions[name] = steps[name].run()
            parts[name].append(seconds)
    totals = {name: np.array([sum(run.values()) for run in runs]) for name, runs in parts.items()}
    without = {name: totals[name] - [run["target"] for run in runs] for name, runs in parts.items()}
    rows = []
    for name, step in steps.items():
        medians = {part: harness.median([run[part] for run in parts[name]]) for part in PARTS}
        total = sum(medians.values())
        trained, base = total - medians["target"], step.base
        rows.append(
            {
                "step": name,
                **{f"{part}_ms": 1e3 * value for part, value in medians.items()},
                "total_ms": 1e3 * total,
                "times_sft": harness.median(without[name] / without[base]),
                "times_sft_with_target": harness.median(totals[name] / totals[base]),
                "gflop": counted[name] / 1e9,
                "times_sft_flop": counted[name] / counted[base],
                "positions": positions[name],
                "positions_per_s": positions[name] / total,
                "positions_per_s_features_kept": positions[name] / trained,
                "matmul_share": counted[name] / total / rate,
            }
        )
    return rows


def main() -> None:
    parser = harness.parser(__doc__, repetitions=5)
    harness.add_target(parser)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--anchors", type=int, default=16, help="a sequence")
    parser.add_argument("--arms", nargs="+", help="trainings to measure, by beginnings of names; by default all")
    parser.add_argument("--kind", default="dflash", choices=["dflash", "dflash2", "dspark"])
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers")
    parser.add_argument("--features-kept", action="store_true", help="the target reads the answers once")
    harness.add_clock(parser)
    options = harness.parsed(parser)
    world = make_world(harness.load_target(options.target), options.sequences, options.kind, options.temperature)
    if options.features_kept:
        layers = world.make_drafter().target_layer_ids
        features = FeatureSource(world.target, layers, world.trajectories, TrainingConfig())
        features.batch(range(options.sequences))  # now: no step counts the operations
        world = replace(world, features=features)
    wanted = tuple(options.arms or ARMS)
    arms = {n: fields for n, fields in ARMS.items() if n in ("SFT", FORWARD_KL) or n.startswith(wanted)}
    steps = {}
    for head_tokens in (None, HEAD_TOKENS):
        config = TrainingConfig(
            sequences_per_step=options.sequences,
            anchors_per_sequence=options.anchors,
            head_tokens=head_tokens,
            learning_rate=1e-6,
        )
        for name, fields in arms.items():
            if name == DENSE and head_tokens:
                continue
            steps[f"{name}, head {head_tokens or 'full'}"] = Step(name, world, fields, config)
    rows = measure(steps, options.repetitions)
    traces = [world.table.steps_of(i) for i in range(len(world.trajectories))]
    tau = sum(trace.committed.sum() for trace in traces) / sum(map(len, traces))
    harness.print_rows(
        f"{world.target.info.source}: {options.sequences} sequences of "
        f"{options.anchors} blocks of {world.table.proposals + 1}, tau {tau:.2f} (+1 included), "
        f"{world.table.visited.mean():.0f} verify steps a sequence; "
        f"shares of {machine.peak_rate(torch.bfloat16):,.0f} GFLOP/s",
        rows,
    )
    harness.report("sft_step", {"rows": rows, "matmul_gflop_per_s": machine.peak_rate(torch.bfloat16)}, options)


if __name__ == "__main__":
    harness.run(main)
