"""Verify steps/s: speculative decoding against replay of stored trajectories, and the blocks evaluated for a step.

Sequential decoding runs the engine with one request in flight; 16 in flight are the fair comparison with a
service that has many requests at once. Replay reads the trajectories with the target once (its forward is part of the
time), then drafts at the anchors; sequential replay, one chain, many chains and as many as pay give the same trace.
A second table shows where replay's time goes: target forward, drafter's context, its blocks, head (logits and argmax),
and bookkeeping, which is all the rest.

Give artifacts of a refresh, or leave them out for the test bed: a small target made here, with a drafter of tau about
5.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import (
    DRAFTER_FOLDER,
    Trajectory,
    group_by_length,
    load_trajectories,
    pad_tokens,
)
from draftsmith.stages.drafters.base import Context, PreparedDrafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.chains import replay_chains, replay_sequentially
from draftsmith.stages.replay.stage import MiningConfig
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import SamplingParams
from tests.benchmarks import harness
from tests.stages.bench import tau

TOKENS_PER_FORWARD = MiningConfig().tokens_per_target_forward
SLOTS = 16
PHASES = ("target forward", "drafter context", "drafter blocks", "head", "bookkeeping")


class Bench:
    """One drafter and some trajectories, replayed in different ways."""

    def __init__(self, target: Target, drafter_folder: Path, trajectories: list[Trajectory], temperature: float = 0.0):
        self.target, self.trajectories, self.temperature = target, trajectories, temperature
        self.drafter = load_drafter(drafter_folder, target)
        self.head = self.drafter.drafting_head(target.head_weight, None)

    def features(self, group: list[Trajectory]) -> torch.Tensor:
        """Return the target's features, read as comparisons of drafters read them."""
        return self.target.features(pad_tokens(group, self.target.device), self.drafter.target_layer_ids)

    @torch.no_grad()
    def context(self, group: list[Trajectory], features: torch.Tensor) -> Context:
        ids = pad_tokens(group, self.target.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand(len(group), -1)
        return self.drafter.encode(features, ids, positions)

    def groups(self) -> list[list[Trajectory]]:
        grouped = group_by_length([len(t.tokens) for t in self.trajectories], TOKENS_PER_FORWARD)
        return [[self.trajectories[i] for i in group] for group in grouped]

    def sequentially(self) -> list[Steps]:
        return [
            replay_sequentially(
                self.drafter, self.context([t], self.features([t])), t, self.drafter.block_size, self.head
            )
            for t in self.trajectories
        ]

    def replay(self, group: list[Trajectory], context: Context, count: int | None) -> list[Steps]:
        return replay_chains(PreparedDrafter(self.drafter, self.head, self.drafter.block_size), context, group, count)

    def chains(self, count: int | None) -> list[Steps]:
        """Replay in `count` chains; return the traces in the order of the trajectories."""
        by_id: dict[str, Steps] = {}
        for group in self.groups():
            traces = self.replay(group, self.context(group, self.features(group)), count)
            by_id |= {t.trajectory_id: trace for t, trace in zip(group, traces, strict=True)}
        return [by_id[t.trajectory_id] for t in self.trajectories]

    def decode(self, prompts: int, slots: int = 1) -> int:
        """Decode the first prompts speculatively; return the number of verify steps."""
        requests = [
            Request(
                t.trajectory_id,
                t.tokens[: t.prompt_length],
                t.answer_length,
                SamplingParams(self.temperature),
                seed=index,
            )
            for index, t in enumerate(self.trajectories[:prompts])
        ]
        capacity = max(len(t.tokens) for t in self.trajectories) + self.drafter.block_size
        engine = EmbeddedEngine(self.target, self.drafter, slots=slots, capacity=capacity)
        return sum(done.verify_steps for done in engine.generate(requests))


def _keep(found: dict[str, list[Steps]], name: str, work: Callable[[], list[Steps]]) -> None:
    found[name] = work()


def measure(bench: Bench, chains: int, decoded: int, repetitions: int) -> list[dict[str, Any]]:
    """Measure all methods in alternation; return a row for each."""
    one_request, slots = "speculative decoding, one request", f"speculative decoding, {SLOTS} requests"
    found: dict[str, list[Steps]] = {}
    served: dict[str, int] = {}
    replays: dict[str, Callable[[], list[Steps]]] = {
        "sequential replay": bench.sequentially,
        "one chain": lambda: bench.chains(1),
        f"{chains} chains": lambda: bench.chains(chains),
        "as many chains as pay": lambda: bench.chains(None),
    }
    arms: dict[str, Callable[[], Any]] = {
        one_request: lambda: served.update({one_request: bench.decode(decoded)}),
        slots: lambda: served.update({slots: bench.decode(len(bench.trajectories), SLOTS)}),
    }
    for name, work in replays.items():
        arms[name] = partial(_keep, found, name, work)
    seconds = {name: harness.median(values) for name, values in harness.alternate(arms, repetitions).items()}
    reference = found["sequential replay"]
    rows = []
    for name in arms:
        traces = found.get(name, [])
        steps = served.get(name) or sum(len(t.anchors) for t in traces)
        rate = steps / seconds[name]
        rows.append(
            {
                "method": name,
                "verify_steps": steps,
                "steps_per_s": rate,
                "times_one_request": rate * seconds[one_request] / served[one_request],
                f"times_{SLOTS}_requests": rate * seconds[slots] / served[slots],
                "blocks_per_step": sum(t.evaluated_blocks for t in traces) / steps if traces else 1.0,
                "tau_with_plus_1": tau(traces) if traces else "",
                # all in float32; in bfloat16 other batch shapes round otherwise, and near-ties flip
                "traces_as_sequential": sum(map(_same, traces, reference)) / len(traces) if traces else "",
            }
        )
    return rows


def _same(trace: Steps, reference: Steps) -> bool:
    return np.array_equal(trace.anchors, reference.anchors) and np.array_equal(trace.proposed, reference.proposed)


@contextmanager
def timed(owner: object, name: str, seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time of a method's calls to `seconds[phase]` within the block."""
    original = getattr(owner, name)

    def method(*arguments: Any, **settings: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **settings)
        finally:
            harness.seconds_of(lambda: None)  # an accelerator's queue
            seconds[phase] += time.perf_counter() - started

    setattr(owner, name, method)
    try:
        yield
    finally:
        setattr(owner, name, original)


def shares(bench: Bench, count: int | None, repetitions: int) -> dict[str, float]:
    """Return the seconds by phase of replay, from the fastest of some repetitions."""
    best: dict[str, float] = {}
    for _ in range(repetitions):
        seconds: dict[str, float] = defaultdict(float)
        # propose = block_hidden + head: the head's time is what is left of it
        with (
            timed(bench, "features", seconds, "target forward"),
            timed(bench, "context", seconds, "drafter context"),
            timed(bench.drafter, "block_hidden", seconds, "drafter blocks"),
            timed(bench.drafter, "propose", seconds, "head"),
        ):
            whole = harness.seconds_of(lambda: bench.chains(count))
        seconds["head"] -= seconds["drafter blocks"]
        seconds["bookkeeping"] = whole - sum(seconds.values())
        if not best or whole < sum(best.values()):
            best = {phase: seconds[phase] for phase in PHASES}
    return best


def artifacts(options: argparse.Namespace) -> tuple[Path, Path, Path]:
    """Return target, drafter and trajectories: all given, or all of the test bed."""
    given = [options.target, options.drafter, options.trajectories]
    if all(given):
        return options.target, options.drafter, options.trajectories
    if any(given):
        raise DraftsmithError("only some artifacts are given. Give --target, --drafter and --trajectories, or none.")
    from tests.testbed.drafter import drafter_artifacts

    made = drafter_artifacts()
    return made.target, made.drafter, made.heldout


def print_parts(title: str, columns: list[str], parts: dict[str, dict[str, float]]) -> None:
    """Print the seconds by phase and their shares, a row for each arm."""
    rows = [
        [name, *(f"{found[c]:.3f} ({found[c] / sum(found.values()):.0%})" for c in columns)]
        for name, found in parts.items()
    ]
    harness.print_table(title, ["", *columns], rows)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--target", type=Path, help="artifact of stage `target`")
    parser.add_argument("--drafter", type=Path, help="artifact of stage `sft` or `opd`")
    parser.add_argument("--trajectories", type=Path, help="artifact of stage `rollout`")
    parser.add_argument("--count", type=int, default=32, help="trajectories replayed")
    parser.add_argument("--decode", type=int, default=4, help="prompts decoded one at a time, for the first line")
    parser.add_argument("--chains", type=int, default=16)
    options = harness.parsed(parser)
    target_folder, drafter_folder, trajectories = artifacts(options)
    stored = load_trajectories(trajectories)
    target = Target.load(target_folder)
    bench = Bench(
        target, drafter_folder / DRAFTER_FOLDER, list(stored.trajectories[: options.count]), stored.sampling.temperature
    )
    rows = measure(bench, options.chains, options.decode, options.repetitions)
    harness.print_rows(
        f"{target.info.source if options.target else 'test bed'}, {target.info.dtype}: {len(bench.trajectories)} "
        f"trajectories, blocks of {bench.drafter.block_size}",
        rows,
    )
    arms = {"one chain": 1, f"{options.chains} chains": options.chains, "as many as pay": None}
    parts = {name: shares(bench, count, options.repetitions) for name, count in arms.items()}
    print_parts("seconds of replay, and their share", list(PHASES), parts)
    harness.report("replay", {"rows": rows, "replay_seconds": parts}, options)


if __name__ == "__main__":
    harness.run(main)
