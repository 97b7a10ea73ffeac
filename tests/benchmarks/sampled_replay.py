"""Replay of sampled proposals: its time beyond the target's forward, without and with the proposals, and mining.

Text is random, and so are the drafters' weights. Few of their proposals are accepted, so nearly every token has a
verify step: drafting and sampling take larger shares than with a trained drafter. `argmaxes` is the same drafter
replayed as for greedy answers; `of a step` divides the time beyond the target's forward by the verify steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.checkpoint import create_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.replay.groups import Group, group_indices
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from tests.benchmarks import harness

SHAPES: dict[str, Callable[..., DFlashConfig]] = {
    "DFlash2": partial(DFlash2Config, kind="dflash2"),
    "DSpark": partial(DSparkConfig, kind="dspark"),
}
SAMPLINGS = (SamplingParams(1.0), SamplingParams(1.0, 0.95))


def make_trajectories(count: int, tokens: int, vocabulary: int) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    return [Trajectory(str(i), rng.integers(0, vocabulary, tokens).tolist(), tokens // 4) for i in range(count)]


def measure(
    name: str,
    target: Target,
    trajectories: list[Trajectory],
    sampling: SamplingParams,
    block_size: int,
    repetitions: int,
) -> dict[str, Any]:
    """Measure one architecture; return a row of the table."""
    mask = target.tokenizer.convert_ids_to_tokens(target.info.mask_candidates[0])
    shape = SHAPES[name](num_layers=2, block_size=block_size, num_target_features=5, mask_token=mask)
    drafter = create_drafter(shape, target, seed=0).to(target.dtype).eval()

    def forward() -> None:
        for indices in group_indices(trajectories, 4096):
            group = Group.padded([trajectories[i] for i in indices], target.device)
            target.read(group.ids, drafter.target_layer_ids)

    def replayed(sampling: SamplingParams, with_proposals: bool) -> Callable[[], Any]:
        replayer = Replayer(target, ReplayOptions(sampling=sampling, with_proposals=with_proposals))
        return lambda: replayer.traces({"it": drafter}, trajectories)

    arms = {
        "forward": forward,
        "argmaxes": replayed(GREEDY, True),
        "without": replayed(sampling, False),
        "with": replayed(sampling, True),
        "mining": lambda: list(Replayer(target, ReplayOptions(sampling=sampling)).mine(drafter, trajectories)),
    }
    seconds = {arm: harness.median(runs) for arm, runs in harness.alternate(arms, repetitions).items()}
    steps = sum(len(trace.anchors) for trace in replayed(sampling, True)()["it"])
    return {
        "drafter": name,
        "sampling": sampling.truncation or "whole",
        "steps": steps,
        **{f"{arm}_s": value for arm, value in seconds.items()},
        "without_ms_of_a_step": 1e3 * (seconds["without"] - seconds["forward"]) / steps,
        "with_ms_of_a_step": 1e3 * (seconds["with"] - seconds["forward"]) / steps,
    }


def main() -> None:
    parser = harness.parser(__doc__)
    harness.add_target(parser)
    harness.add_clock(parser)
    parser.add_argument("--trajectories", type=int, default=8, help="how many")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each")
    parser.add_argument("--block-size", type=int, default=8)
    options = harness.parsed(parser)
    target = harness.load_target(options.target)
    trajectories = make_trajectories(options.trajectories, options.tokens, target.info.vocab_size)
    rows = [
        measure(name, target, trajectories, sampling, options.block_size, options.repetitions)
        for name in SHAPES
        for sampling in SAMPLINGS
    ]
    vocabulary = len(target.head_weight)
    harness.print_rows(f"{target.info.source}, {vocabulary} tokens", rows)
    harness.report("sampled_replay", {"vocabulary": vocabulary, "rows": rows}, options)


if __name__ == "__main__":
    harness.run(main)
