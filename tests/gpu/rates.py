"""Measures the rates of a GPU: `python -m tests.gpu.rates`. Each row is printed and written (`rates.jsonl`) as it ends.

The last row is the share of the data sheet's FLOP/s that whole training steps reach: the one number that `draftsmith
check` knows of a GPU. Its line is printed as `artifacts/host.py` has it. Without a CUDA device tiny shapes are
measured, which only shows that this works.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from draftsmith.artifacts.host import GPU_MODELS, all_gpus, gpu_driver
from draftsmith.stages.drafters.block_attention import ContextMask, block_attention
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.loss_registry import ResponseStream
from draftsmith.stages.training.response_loss import TargetSignal, head_loss
from draftsmith.stages.training.softmax_heads import LossContext, SoftmaxHeads
from tests.benchmarks import harness, machine
from tests.gpu.measure import NOMINAL_TFLOPS, Rates, measure_training
from tests.gpu.world import SCALES, Scale, make_target

LOSSES = ("cross_entropy", "forward_kl", "ce_l1")
TRAININGS = ("SFT", "OPD")  # whose steps are the rate of a stage
OUT = Path("build/gpu")


class Rows:
    """Prints and writes each row as it ends."""

    def __init__(self, path: Path):
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, what: str, **values: Any) -> None:
        """Add a row; a value without a number says why there is none."""
        shown = (f"{name} {harness._cell(value)}" for name, value in values.items())
        print(f"{what}: {', '.join(shown)}", flush=True)
        with self._path.open("a") as file:
            file.write(json.dumps({"what": what, **values}) + "\n")

    def timed(self, what: str, work: Callable[[], Any], **values: Any) -> float:
        """Add a row with the seconds of the first call, which compiles, and of later ones; return the latter."""
        first = harness.seconds_of(work)
        seconds = harness.median([harness.seconds_of(work) for _ in range(3)])
        self.add(what, first_s=first, seconds=seconds, **values)
        return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", choices=SCALES, help="by default Qwen3-4B on CUDA, tiny elsewhere")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the rows")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = SCALES[options.scale or ("qwen3-4b" if device == "cuda" else "tiny")]
    rows = Rows(options.out / "rates.jsonl")
    rows.add("here", **harness.conditions(), driver=str(gpu_driver()), gcc=_version("gcc"), scale=scale.name)
    _products(rows, scale)
    _copy(rows, device)
    _attention(rows, scale, device)
    _losses(rows, scale, device)
    target = make_target(scale, device, "bfloat16")
    _target_layer(rows, scale, target)
    _embedded_steps(rows, scale, target)
    _rate(rows, scale, target, device)


def _version(program: str) -> str:
    if shutil.which(program) is None:
        return "none"
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _products(rows: Rows, scale: Scale) -> None:
    shape = scale.target
    H, head_dim = shape["hidden_size"], shape["head_dim"]
    maps = {
        "queries": (H, shape["num_attention_heads"] * head_dim),
        "keys": (H, shape["num_key_value_heads"] * head_dim),
        "gate": (H, shape["intermediate_size"]),
        "down": (shape["intermediate_size"], H),
        "head": (H, shape["vocab_size"]),
    }
    for name, (k, n) in maps.items():
        for count in (512, 2048):
            rate = machine.matmul_rate(count, k, n, torch.bfloat16, 3) / 1e3
            rows.add(f"product {name}", rows=count, tflop_per_s=rate)


def _copy(rows: Rows, device: str) -> None:
    source = torch.empty(2**30 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    seconds = rows.timed("copy", source.clone, bytes=2 * source.numel())
    rows.add("memory", gb_per_s=2 * source.numel() / seconds / 1e9)


def _attention(rows: Rows, scale: Scale, device: str) -> None:
    shape, T, S = scale.target, scale.longest, scale.drafter.block_size or 16
    heads, kv_heads, D = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    A = scale.step["anchors_per_sequence"]
    q, k, own = (
        torch.randn(1, *size, D, device=device, dtype=torch.bfloat16, requires_grad=True)
        for size in ((heads, A, S), (kv_heads, T), (kv_heads, A, S))
    )
    mask = ContextMask(torch.linspace(scale.prompt, T - 1, A, device=device).long()[None])
    rows.timed("attention forward", lambda: block_attention(q, (k, k), (own, own), mask), blocks=A, tokens=T)
    rows.timed("attention, both ways", lambda: block_attention(q, (k, k), (own, own), mask).sum().backward())


def _losses(rows: Rows, scale: Scale, device: str) -> None:
    V, H, N = scale.target["vocab_size"], scale.target["hidden_size"], 8192 if device == "cuda" else 32
    hidden = torch.randn(N, H, device=device, dtype=torch.bfloat16, requires_grad=True)
    head = Head(torch.randn(V, H, device=device, dtype=torch.bfloat16) / H**0.5)
    for positions in (512, 2048):
        context = LossContext(SoftmaxHeads(head, head, trained=False), head.weight, positions)
        tokens = torch.randint(0, V, (N,), device=device)
        signal = TargetSignal(tokens, tokens, torch.randn_like(hidden), context, 1.0)
        for loss in LOSSES:
            fields = {"loss": loss, "scope": "block", "positions": {"kind": "d_pace"}}
            stream = ResponseStream.model_validate(fields)
            for stance in ("force_eager", "default"):
                with torch.compiler.set_stance(stance):
                    rows.timed(
                        f"loss {loss}",
                        lambda signal=signal, stream=stream: head_loss(hidden, signal, stream).terms.sum().backward(),  # type: ignore[misc]
                        chunk=positions,
                        positions=N,
                        compiled=stance == "default" and device == "cuda",
                    )


def _target_layer(rows: Rows, scale: Scale, target: Target) -> None:
    ids = torch.zeros(1, scale.longest, dtype=torch.long, device=target.device)
    positions = torch.arange(scale.longest, device=target.device)[None]
    cache, layers = target.new_cache(1, scale.longest), target.info.num_layers
    for how, work in {
        "transformers": lambda: target.read(ids),
        "with a cache": lambda: target.step(ids, positions, cache, slice(0, 1)),
    }.items():
        seconds = rows.timed(f"target's read, {how}", work, tokens=scale.longest)
        rows.add(f"target's layer, {how}", ms=1e3 * seconds / layers)


def _embedded_steps(rows: Rows, scale: Scale, target: Target) -> None:
    for count in (1, 8, 64):
        capacity = scale.prompt + 64
        engine = EmbeddedEngine(target, slots=count, capacity=capacity)
        requests = [Request(str(i), [1] * scale.prompt, 32) for i in range(count)]
        for width in (1, 8, 16):
            step = engine.step_timer(requests, width, target.new_cache(count, capacity))
            step()
            seconds = harness.median([step() for _ in range(3)])
            rows.add("embedded step", requests=count, tokens=width, ms=1e3 * seconds)


def _rate(rows: Rows, scale: Scale, target: Target, device: str) -> None:
    """Measure steps of three answers; print the line for `artifacts/host.py`."""
    small, rates = replace(scale, step={**scale.step, "sequences_per_step": 3}), Rates.here(device)
    flop = seconds = 0.0
    for kind in TRAININGS:
        row, _ = measure_training(kind, small, target, 1, rates)
        rows.add(f"step {kind}", **{name: row[name] for name in ("step_s", "tflop", "mfu", "peak_gb")})
        flop, seconds = flop + row["tflop"] * 1e12, seconds + row["step_s"]
    gpu = all_gpus()[0] if device == "cuda" else None
    name = "CPU" if gpu is None else next((name for name in NOMINAL_TFLOPS if name in gpu.model), gpu.model)
    peak = GPU_MODELS[name].peak if name in GPU_MODELS else 1e12 * (rates.nominal or rates.measured)
    share = flop / seconds / peak
    rows.add("rate", tflop_per_s=flop / seconds / 1e12, share=share)
    memory = 0.0 if gpu is None else gpu.memory
    print(f'    "{name}": GpuModel({memory:.3g}, {peak:.4g}, {share:.2g}),  # measured {time.strftime("%Y-%m-%d")}')


if __name__ == "__main__":
    harness.run(main)
