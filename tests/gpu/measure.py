"""SFT and OPD as the stages run them: tokens/s, share of the device's rate, memory against the estimate, kernels.

Operations are those of all matrix products: the drafter's forward and backward as the training counts them, and what
`flows/checks/hours.py` expects of the target's forwards, of mining and of scoring. The rate is that of the device's
data sheet (`mfu`), and that of a large product on it (`of_matmul_rate`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from draftsmith.flows.checks.hours import step_flop
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.estimate import PROCESS_BYTES, AnswerCounts, StageUse
from draftsmith.stages.training.estimate import row_tokens, training_memory
from draftsmith.stages.training.opd.body import OpdTraining
from draftsmith.stages.training.optimiser import MicroBatches, train
from draftsmith.stages.training.trainer import loaded_sizes, micro_batch_tokens
from tests.benchmarks import harness, machine
from tests.gpu.trainings import KINDS, make_training
from tests.gpu.watch import Profile, Timed, watched
from tests.gpu.world import Scale, make_drafter, make_target, make_trajectories

WARM = 2  # steps that are not measured: kernels are compiled, and memory is allocated
PROFILED = 3  # answers of the profiled step: of a whole one with the paper's losses it has over a million events
KERNELS = 12  # of a training that are printed


# TFLOP/s of dense products in bfloat16, from data sheets
NOMINAL_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "A100": 312, "L40S": 362}


@dataclass(frozen=True)
class Rates:
    """TFLOP/s of matrix products in bfloat16."""

    measured: float
    nominal: float | None  # None: unknown device

    @classmethod
    def here(cls, device: str) -> Rates:
        if device == "cpu":
            return cls(machine.peak_rate(torch.bfloat16) / 1e3, None)
        device_name = torch.cuda.get_device_name()
        nominal = next((float(rate) for name, rate in NOMINAL_TFLOPS.items() if name in device_name), None)
        return cls(machine.matmul_rate(8192, 8192, 8192, torch.bfloat16, 5) / 1e3, nominal)


def measure(
    scale: Scale, device: str, repetitions: int, kinds: Iterable[str] = KINDS
) -> Iterator[tuple[dict[str, Any], dict[str, dict[str, float]]]]:
    """Measure each training, which may take minutes; yield its row and kernels as it ends."""
    target = make_target(scale, device, "bfloat16")
    rates = Rates.here(device)
    for kind in kinds:
        yield measure_training(kind, scale, target, repetitions, rates)


def measure_training(
    kind: str, scale: Scale, target: Target, repetitions: int, rates: Rates
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Measure a training of random answers. Return its row, and its kernels by name.

    kind: of KINDS. repetitions: steps after those that compile.
    """
    drafter = make_drafter(scale.drafter, target)
    trajectories = make_trajectories(scale)
    steps = WARM + repetitions + 1  # the features of the last one are read while the one before it is measured
    training = make_training(kind, drafter, target, trajectories, {**scale.step, "steps": steps})
    config, on_gpu = training.config, target.device.type == "cuda"
    limit = micro_batch_tokens(config, target, drafter, scale.longest)
    sizes = loaded_sizes(target, drafter, scale.longest)
    scores = isinstance(training, OpdTraining) and training.objective.needs_scores
    use = StageUse(sizes, answers=AnswerCounts(scale.longest, len(trajectories)))
    parts = training_memory(config, use, mines=kind != "SFT", scores=scores)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        context = Timed.under(Path(folder))
        of_row = config.anchors_per_sequence * drafter.block_size  # tokens in addition to its trajectory
        micro_batches = MicroBatches(training.micro_batches, limit, of_row, context)
        totals = train(context, drafter, config, micro_batches, training.memory)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    seconds = harness.median([end - start for start, end in pairwise(context.ends)][WARM - 1 : WARM - 1 + repetitions])
    others = sum(flop for phase, flop in step_flop(config, use).items() if phase != "drafter")
    tflop = totals["tflop"] / steps + others / 1e12
    estimated = sum(parts.values()) - PROCESS_BYTES
    profile = _profile(kind, drafter, target, trajectories, scale.step, micro_batches.limit)
    kernels = profile.kernels()
    row = {
        "training": kind,
        "answers": config.sequences_per_step,
        "at_once": max(
            1, min(config.sequences_per_step, micro_batches.limit // row_tokens(config, sizes, scale.longest))
        ),
        "step_s": seconds,
        "tokens_per_s": config.sequences_per_step * scale.longest / seconds,
        "positions_per_s": totals["positions"] / steps / seconds,
        "tflop": tflop,
        "matmul_tflop_per_s": rates.measured,
        "mfu": None if rates.nominal is None else tflop / seconds / rates.nominal,
        "of_matmul_rate": tflop / seconds / rates.measured,
        "peak_gb": None if peak is None else peak / 1e9,
        "estimated_gb": estimated / 1e9,
        "peak_of_estimate": None if peak is None else peak / estimated,
        "target_share": profile.target_share(),
        "launches_an_answer": sum(kernel.calls for kernel in kernels.values()) / PROFILED,
        "last_loss": context.measured[-1][1]["loss"],
    }
    return row, {name: vars(kernel) for name, kernel in kernels.items()}


def _profile(
    kind: str,
    drafter: Drafter,
    target: Target,
    trajectories: Sequence[Trajectory],
    step: Mapping[str, Any],
    limit: int,
) -> Profile:
    """Return the profile of a small step: the second of three, so that the next one's features are read during it."""
    training = make_training(kind, drafter, target, trajectories, {**step, "sequences_per_step": PROFILED, "steps": 3})
    profile = Profile(target.device)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder, watched(target), profile.profiler:
        context = Timed.under(Path(folder), after_step=profile.profiler.step)
        of_row = training.config.anchors_per_sequence * drafter.block_size
        micro_batches = MicroBatches(training.micro_batches, limit, of_row, context)
        train(context, drafter, training.config, micro_batches, training.memory)
    return profile


def print_metrics(row: Mapping[str, Any], kernels: Mapping[str, Mapping[str, float]]) -> None:
    """Print a training's row, and the kernels that took most."""
    kind = row["training"]
    harness.print_rows(f"Training steps: {kind}", [{n: "-" if value is None else value for n, value in row.items()}])
    harness.print_table(
        f"{kind}: kernels of a step of {PROFILED} answers",
        ["", "share", "calls"],
        [[name[:100], kernel["share"], kernel["calls"]] for name, kernel in list(kernels.items())[:KERNELS]],
    )
