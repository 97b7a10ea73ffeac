"""One command for a GPU that nobody has tried yet: `make gpu-check`, at most 8 minutes, no network.

All tests that are marked `gpu`, then what training steps take in the shapes of Qwen3-4B with random weights, as a
table, as JSON (`gpu-check.json`) and as profiles for Perfetto (`*.trace.json.gz`). Without a CUDA device the tests are
skipped and the figures are of shapes that only show that this works.
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
from tests.gpu.figures import measure, print_figures
from tests.gpu.world import QWEN3_4B, SCALES, TINY

ROOT = Path(__file__).parents[2]
MINUTES = 8.0
OF_TESTS = 0.5  # of the time
OF_TRAINING = 1.5  # minutes that should be left when one begins
OUT = Path("build/gpu")


def run_tests(limit_s: float) -> bool:
    """Those marked `gpu`, in a process of their own; whether none failed. Skipped ones say why."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfEs", "-p", "no:cacheprovider", "tests/gpu"]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=limit_s, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the tests were ended after {limit_s:.0f} s")
        return False


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file and the profiles")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="left out: CUDA if there is any")
    parser.add_argument("--scale", choices=SCALES, help="left out: Qwen3-4B on CUDA, tiny elsewhere")
    parser.add_argument("--repetitions", type=int, default=3, help="steps of each training that are measured")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it; what does not fit is left out")
    parser.add_argument("--no-tests", action="store_true", help="figures alone")
    options = parser.parse_args(arguments)
    options.json = options.out / "gpu-check.json"
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options, began = parse(arguments), time.monotonic()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    scale = SCALES[options.scale] if options.scale else QWEN3_4B if device == "cuda" else TINY
    if not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__}, built {f'for CUDA {cuda}' if (cuda := torch.version.cuda) else 'without CUDA'}"
        )
        print(f"no CUDA device is here ({built}): tests marked gpu are skipped, figures are of the CPU, {scale.name}")
    passed = options.no_tests or run_tests(60 * options.minutes * OF_TESTS)
    options.out.mkdir(parents=True, exist_ok=True)
    figures = measure(scale, device, options.repetitions, options.out, _while_time_is_left(began, options.minutes))
    figures["tests_passed"] = None if options.no_tests else passed
    figures["seconds"] = time.monotonic() - began
    if figures["rows"]:
        print_figures(figures)
    harness.report("gpu-check", figures, options)
    print(f"{options.json} and profiles beside it for https://ui.perfetto.dev; {figures['seconds']:.0f} s in all")
    return 0 if passed and figures["rows"] else 1


def _while_time_is_left(began: float, minutes: float) -> Callable[[str], bool]:
    def wanted(kind: str) -> bool:
        left = minutes - (time.monotonic() - began) / 60
        if left < OF_TRAINING:
            print(f"{kind}: left out, {left:.1f} of {minutes:g} minutes are left")
        return left >= OF_TRAINING

    return wanted


if __name__ == "__main__":
    sys.exit(main())
