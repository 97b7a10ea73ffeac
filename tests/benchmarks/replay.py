"""Verify steps/s: speculative decoding against replay of stored trajectories, and the blocks evaluated for a step.

Sequential decoding runs the engine with one request in flight. Replay reads the trajectories with the target once (its
forward is part of the time, its share shown beside it), then drafts at the anchors; sequential replay, one chain and
many chains give the same trace. Give artifacts of a refresh, or leave them out for the test bed: a small target made
here, with a drafter of tau about 5.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from artifacts.errors import DraftsmithError
from stages.drafters.base import Context
from stages.drafters.checkpoint import load_drafter
from stages.engines.base import Request, SamplingParams
from stages.engines.embedded import EmbeddedEngine
from stages.replay.chains import replay_chains
from stages.replay.sequential import replay_sequentially
from stages.replay.trace import Trace, Trajectory, groups_by_length, pad_tokens, tau
from stages.stored import DRAFTER_FOLDER, load_trajectories
from stages.targets.causal_lm import Target
from tests.benchmarks import harness

TOKENS_PER_FORWARD = 2048  # as the stage `mining` groups trajectories


class Bench:
    """One drafter and some trajectories, replayed in different ways."""

    def __init__(self, target: Target, drafter_folder: Path, trajectories: list[Trajectory]):
        self.target, self.trajectories = target, trajectories
        self.drafter = load_drafter(drafter_folder, target)
        self.head = self.drafter.drafting_head(target.head_weight, None)

    @torch.no_grad()
    def read(self, group: list[Trajectory]) -> Context:
        """The drafter's context of some trajectories."""
        ids = pad_tokens(group, self.target.device)
        features = self.target.read(ids, self.drafter.target_layer_ids).features
        assert features is not None
        return self.drafter.encode(features, torch.arange(ids.shape[1], device=ids.device).expand(len(group), -1))

    def groups(self) -> list[list[Trajectory]]:
        grouped = groups_by_length([len(t.tokens) for t in self.trajectories], TOKENS_PER_FORWARD)
        return [[self.trajectories[i] for i in group] for group in grouped]

    def read_all(self) -> None:
        for group in self.groups():
            self.read(group)

    def sequentially(self) -> list[Trace]:
        return [
            replay_sequentially(self.drafter, self.read([t]), t, self.drafter.block_size, self.head)
            for t in self.trajectories
        ]

    def chains(self, count: int) -> list[Trace]:
        return [
            trace
            for group in self.groups()
            for trace in replay_chains(
                self.drafter, self.read(group), group, self.drafter.block_size, self.head, count, with_logprobs=False
            )
        ]

    def decode(self, prompts: int) -> int:
        """Speculative decoding of the first prompts, one request in flight; returns the verify steps."""
        requests = [
            Request(t.trajectory_id, t.tokens[: t.prompt_length], SamplingParams(t.response_length))
            for t in self.trajectories[:prompts]
        ]
        capacity = max(len(t.tokens) for t in self.trajectories) + self.drafter.block_size
        engine = EmbeddedEngine(self.target, self.drafter, slots=1, capacity=capacity)
        return sum(len(done.steps) for done in engine.generate(requests))


def measure(bench: Bench, chains: int, decoded: int, repetitions: int) -> list[dict[str, Any]]:
    """One row of figures a method, all measured in alternation."""
    names = ("speculative decoding, one request", "sequential replay", "one chain", f"{chains} chains")
    found: dict[str, list[Trace]] = {}
    served: list[int] = []
    arms = {
        names[0]: lambda: served.append(bench.decode(decoded)),
        names[1]: lambda: found.update({names[1]: bench.sequentially()}),
        names[2]: lambda: found.update({names[2]: bench.chains(1)}),
        names[3]: lambda: found.update({names[3]: bench.chains(chains)}),
        "target forward alone": bench.read_all,
    }
    seconds = {name: harness.median(values) for name, values in harness.alternate(arms, repetitions).items()}
    reading = seconds["target forward alone"]
    rows = []
    for name in names:
        traces = found.get(name)
        steps = sum(len(t.anchors) for t in traces) if traces else served[-1]
        rate = steps / seconds[name]
        rows.append(
            {
                "method": name,
                "verify_steps": steps,
                "steps_per_s": rate,
                "steps_per_s_without_target": steps / (seconds[name] - reading) if traces else "",
                "times_decoding": rate / (served[-1] / seconds[names[0]]),
                "blocks_per_step": sum(t.evaluated_blocks for t in traces) / steps if traces else 1.0,
                "tau_with_plus_1": tau(traces) if traces else "",
                "target_forward_share": reading / seconds[name] if traces else "",
            }
        )
    return rows


def artifacts(options: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Target, drafter and trajectories: all given, or all of the test bed."""
    given = [options.target, options.drafter, options.trajectories]
    if all(given):
        return options.target, options.drafter, options.trajectories
    if any(given):
        raise DraftsmithError("give --target, --drafter and --trajectories together, or none of them")
    from tests.testbed.drafter import drafter_artifacts
    from tests.testbed.target import TINY, target_folder, write_prompts

    prompts = harness.benchmark_folder("testbed") / "prompts.jsonl"
    write_prompts(prompts, TINY)
    made = drafter_artifacts(target_folder(TINY), prompts)
    return made.target, made.drafter, made.heldout


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--target", type=Path, help="artifact of stage `target`")
    parser.add_argument("--drafter", type=Path, help="artifact of stage `sft` or `opd`")
    parser.add_argument("--trajectories", type=Path, help="artifact of stage `rollout`, greedy")
    parser.add_argument("--count", type=int, default=32, help="trajectories replayed")
    parser.add_argument("--decode", type=int, default=4, help="prompts decoded for the first line")
    parser.add_argument("--chains", type=int, default=16)
    options = parser.parse_args()
    harness.set_threads(options.threads)
    target_folder, drafter_folder, trajectories = artifacts(options)
    stored = load_trajectories(trajectories)
    if stored.temperature > 0:
        raise DraftsmithError(f"{trajectories}: sampled at {stored.temperature}; give greedy trajectories")
    target = Target.load(target_folder)
    bench = Bench(target, drafter_folder / DRAFTER_FOLDER, stored.trajectories[: options.count])
    rows = measure(bench, options.chains, options.decode, options.repetitions)
    harness.print_table(
        f"{target.info.source if options.target else 'test bed'}, {target.info.dtype}: {len(bench.trajectories)} "
        f"trajectories, blocks of {bench.drafter.block_size}",
        list(rows[0]),
        [list(row.values()) for row in rows],
    )
    harness.report("replay", {"rows": rows}, options)


if __name__ == "__main__":
    harness.run(main)
