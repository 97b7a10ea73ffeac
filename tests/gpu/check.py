"""Measures training on a GPU on which nothing has run yet: `python -m tests.gpu.check`, at most 9 minutes, no network.

SFT and OPD run as the stages run them, in the shapes of Qwen3-4B with random weights. Results are a table and JSON
(`gpu-check.json`). Without a CUDA device small shapes are measured, which only shows that this works.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import harness
from tests.gpu.measure import measure, print_metrics
from tests.gpu.trainings import KINDS
from tests.gpu.world import QWEN3_4B, SCALES, TINY

MINUTES = 9.0
TRAINING_MINUTES = 1.5  # that must be left when a training starts
OUT = Path("build/gpu")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="by default CUDA if there is any")
    parser.add_argument("--scale", choices=SCALES, help="by default Qwen3-4B on CUDA, tiny elsewhere")
    parser.add_argument("--repetitions", type=int, default=2, help="steps of each training that are measured")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time limit; trainings that do not fit are skipped"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="trainings; by default all")
    options = parser.parse_args(arguments)
    options.json = options.out / f"gpu-check{f'-{options.scale}' if options.scale else ''}.json"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, started = parse(arguments), time.monotonic()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scale = SCALES[options.scale] if options.scale else QWEN3_4B if device == "cuda" else TINY
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        built = f"torch {torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"
        print(f"no CUDA device ({built}): the CPU is measured ({scale.name})")
    kinds = _while_time_is_left(options.kinds, started, options.minutes)
    rows: list[dict[str, Any]] = []
    kernels = {}
    for row, of_training in measure(scale, device, options.repetitions, kinds):
        rows.append(row)
        kernels[row["training"]] = of_training
        print_metrics(row, of_training)
        results = {"scale": scale.name, "rows": rows, "kernels": kernels, "seconds": time.monotonic() - started}
        harness.report("gpu-check", results, options)  # again after each, since the time may be over before the next
    print(f"{options.json}; {time.monotonic() - started:.0f} s in all")
    return 0 if rows else 1


def _while_time_is_left(kinds: Sequence[str], started: float, minutes: float) -> Iterator[str]:
    """Yield the trainings for which time is left when they begin."""
    for kind in kinds:
        left = minutes - (time.monotonic() - started) / 60
        if left < TRAINING_MINUTES:
            print(f"{kind}: left out, {left:.1f} of {minutes:g} minutes are left")
        else:
            yield kind


if __name__ == "__main__":
    sys.exit(main())
