"""Checks a GPU on which nothing has run yet: `make gpu-check`, at most 8 minutes, no network.

Runs all tests marked `gpu`, then measures training steps in the shapes of Qwen3-4B with random weights. Results are a
table, JSON (`gpu-check.json`) and profiles for Perfetto (`*.trace.json.gz`). Without a CUDA device the tests are
skipped and small shapes are measured, which only shows that this works.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.benchmarks import harness
from tests.gpu.measure import measure, print_metrics
from tests.gpu.world import QWEN3_4B, SCALES, TINY

ROOT = Path(__file__).parents[2]
MINUTES = 8.0
TEST_SHARE = 0.5  # of the time
TRAINING_MINUTES = 1.5  # that must be left when a training starts
OUT = Path("build/gpu")


def run_tests(limit_s: float) -> bool:
    """Run the tests marked `gpu` in another process; return whether none failed. Skipped tests show the reason."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfEs", "-p", "no:cacheprovider", "tests/gpu"]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=limit_s, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the tests did not end in {limit_s:.0f} s and were stopped")
        return False


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file and the profiles")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: CUDA if there is any")
    parser.add_argument("--scale", choices=SCALES, help="left out: Qwen3-4B on CUDA, tiny elsewhere")
    parser.add_argument("--repetitions", type=int, default=3, help="steps of each training that are measured")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="time limit; trainings that do not fit are left out"
    )
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    options = parser.parse_args(arguments)
    options.json = options.out / "gpu-check.json"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, started = parse(arguments), time.monotonic()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scale = SCALES[options.scale] if options.scale else QWEN3_4B if device == "cuda" else TINY
    if not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__}, built {f'for CUDA {cuda}' if (cuda := torch.version.cuda) else 'without CUDA'}"
        )
        print(f"no CUDA device ({built}): tests marked gpu are skipped, the CPU is measured ({scale.name})")
    passed = options.no_tests or run_tests(60 * options.minutes * TEST_SHARE)
    options.out.mkdir(parents=True, exist_ok=True)
    results = measure(scale, device, options.repetitions, options.out, _while_time_is_left(started, options.minutes))
    results["tests_passed"] = None if options.no_tests else passed
    results["seconds"] = time.monotonic() - started
    if results["rows"]:
        print_metrics(results)
    harness.report("gpu-check", results, options)
    print(f"{options.json} and profiles beside it for https://ui.perfetto.dev; {results['seconds']:.0f} s in all")
    return 0 if passed and results["rows"] else 1


def _while_time_is_left(started: float, minutes: float) -> Callable[[str], bool]:
    def wanted(kind: str) -> bool:
        left = minutes - (time.monotonic() - started) / 60
        if left < TRAINING_MINUTES:
            print(f"{kind}: left out, {left:.1f} of {minutes:g} minutes are left")
        return left >= TRAINING_MINUTES

    return wanted


if __name__ == "__main__":
    sys.exit(main())
