"""Runs the numerical stages of a refresh as processes, without Prefect and MLflow: `python -m tests.gpu.refresh MODEL`.

MODEL is the test bed's target, or random weights in a tiny shape or in Qwen3-0.6B's. There is a line for each stage as
it ends: its seconds with the start of its process, tokens/s of its longest work, the peak of its memory (torch's
allocator on a GPU, else of the process) and the estimate of `draftsmith check`, and the artifact's content id. Finished
stages are reused: the same command continues after a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact, Manifest
from draftsmith.flows.checks.findings import RaisingFindings
from draftsmith.flows.checks.memory import Hardware, model_sizes, node_need, stage_uses
from draftsmith.flows.checks.models import check_drafters
from draftsmith.flows.config.load import config_from_fields
from draftsmith.flows.execution.machine import Device
from draftsmith.flows.execution.make import run_attempt
from draftsmith.flows.execution.process import Event
from draftsmith.flows.planning.graph import Node, Selection
from draftsmith.flows.planning.plan import Build
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.targets.estimate import PROCESS_BYTES
from tests.benchmarks import harness
from tests.gpu.world import TINY, Scale, make_target
from tests.sglang_cpu.options import HERE
from tests.stages.training.fake_step import TARGETS
from tests.testbed import random_target, target
from tests.testbed.refresh import small_refresh

OUT = Path("build/gpu")
COLUMNS = ("stage", "seconds", "tokens_per_s", "peak_gb", "estimated_gb", "peak_of_estimate", "content")


@dataclass(frozen=True)
class Model:
    """A target with its prompts, and the sizes of its refresh."""

    make: Callable[[Path], tuple[Path, Path]]  # returns the model's folder and the file of prompts
    dtype: str
    answer: int  # tokens
    fields: Mapping[str, Any]  # of the refresh's config


def _random_model(scale: Scale, dtype: str, rows: int, folder: Path) -> tuple[Path, Path]:
    """Write a model of random weights, and prompts of random tokens."""
    model, prompts = folder / "model", folder / "prompts.jsonl"
    if not prompts.exists():
        device, vocabulary = "cuda" if torch.cuda.is_available() else "cpu", scale.target["vocab_size"]
        random_target.save(make_target(scale, device, dtype, alike=scale is TINY).model, model, vocabulary)
        ids = np.random.default_rng(0).integers(0, vocabulary - 2, (rows, scale.prompt))  # the last two are special
        lines = [json.dumps({"prompt": f"prompt {i}", "prompt_token_ids": row.tolist()}) for i, row in enumerate(ids)]
        prompts.write_text("\n".join(lines) + "\n")
        os.utime(prompts, (0, 0))  # checks warn of a file that may still be written to
    return model, prompts


def _random(scale: Scale, dtype: str, rows: int) -> Callable[[Path], tuple[Path, Path]]:
    return lambda folder: _random_model(scale, dtype, rows, folder)


QWEN3_06B = Scale("qwen3-0.6b", TARGETS["Qwen3-0.6B"], DFlashConfig(), {}, prompt=128, longest=640, answers=64)
TRAINING = {"compute_dtype": "bfloat16", "sequences_per_step": 8, "anchors_per_sequence": 128}
MODELS = {
    "test-bed": Model(
        lambda _: (target.target_folder(), target.prompts_file()), "float32", 96,
        {
            "prompts": {"train": 320, "validation": 8, "heldout": 48, "heldout_share": 0.25},
            "rollout": {"prompts": 240, "engine": {"slots": 64}},
            "sft": {"steps": 300, "sequences_per_step": 8, "drafter": {"block_size": 8}},
            "assisted": {"skip": 240, "engine": {"slots": 64}},
            "opd": {"steps": 60},
            "heldout": {"engine": {"slots": 64}},
            "evaluation": {"rounds": 2, "speed_prompts": 8, "validation_prompts": 8, "exactness_prompts": 8},
        },
    ),
    "tiny": Model(
        _random(TINY, "float32", 100), "float32", 24,
        {
            "prompts": {"train": 12, "validation": 2, "heldout": 4},
            "rollout": {"prompts": 8},
            "sft": {"steps": 6},
            "assisted": {"skip": 8},
            "opd": {"steps": 4},
            "evaluation": {"speed_prompts": 2, "exactness_prompts": 2, "block_sizes": [6]},
        },
    ),
    "qwen3-0.6b": Model(
        _random(QWEN3_06B, "bfloat16", 1000), "bfloat16", 512,
        {
            "prompts": {"train": 96, "validation": 8, "heldout": 24},
            "rollout": {"prompts": 64, "engine": {"slots": 64}},
            "sft": {**TRAINING, "steps": 30, "drafter": {"num_layers": 5, "block_size": 16, "target_layer_ids": None}},
            "assisted": {"skip": 64, "engine": {"slots": 64}},
            "opd": {**TRAINING, "steps": 20, "remine_every": 0},
            "heldout": {"engine": {"slots": 64}},
            "evaluation": {
                "sampling": {"max_new_tokens": 64}, "concurrency": 8, "rounds": 2, "speed_prompts": 8,
                "validation_prompts": 8, "exactness_prompts": 2, "block_sizes": [16],
            },
        },
    ),
}  # fmt: skip


class Rates:
    """The units of work a second of a stage's process."""

    def __init__(self) -> None:
        self._spans: dict[tuple[str, int], list[tuple[float, int]]] = {}  # unit, total -> first and last progress

    def follow(self, event: Event) -> None:
        """Note an event."""
        if event["event"] == "progress":
            span = self._spans.setdefault((event["unit"], event["total"]), [])
            span[1:] = [(time.monotonic(), event["done"])]
            if len(span) == 1 or event["done"] <= span[0][1]:  # work of the same size begins
                span[:] = [(time.monotonic(), event["done"])]

    def of(self, unit: str) -> float | None:
        """Return the rate of the longest work in this unit, from its first progress on; None if it was too short."""
        spans = [span for (each, _), span in self._spans.items() if each == unit and len(span) == 2]
        (began, first), (ended, last) = max(spans, key=lambda span: span[1][0] - span[0][0], default=((0.0, 0),) * 2)
        return (last - first) / (ended - began) if ended > began else None


def refresh_config(name: str, folder: Path, sglang: Path | None) -> RefreshConfig:
    """Return the config of a model's refresh. sglang: the interpreter of the engine; None: the embedded one."""
    model = MODELS[name]
    source, prompts = model.make(folder)
    fields = small_refresh(name, source, prompts, model.answer, refresh={"control": False}, **model.fields)
    fields["target"]["dtype"] = model.dtype if sglang is None else HERE.dtype
    del fields["stages"]["threads"]
    if sglang is not None:
        launch = {"options": dict(HERE.options), "environment": dict(HERE.environment)}
        for stage in ("rollout", "assisted", "heldout", "evaluation"):
            fields[stage]["engine"] = {"kind": "sglang", "python": str(sglang), "launch": launch}
    return config_from_fields(fields, RefreshConfig)


def run(
    config: RefreshConfig,
    store: Store,
    until: Sequence[str] = ("mining", "evaluation"),
    ended: Callable[[list[dict[str, Any]]], None] = lambda _rows: None,
) -> list[dict[str, Any]]:
    """Run the stages up to these nodes; print and return a row for each. ended: called with the rows as each ends."""
    nodes = Selection(until=tuple(until)).nodes(REFRESH.nodes(config))
    refs: dict[str, Artifact] = {}
    estimates: dict[str, float] = {}
    rows = []
    print("  ".join(f"{column:>{max(12, len(column))}}" for column in COLUMNS))
    for node in nodes:
        inputs = {name: refs[source] for name, source in node.inputs.items()}
        ref = refs[node.name] = _build(node, inputs, config, store)
        manifest = ref.manifest
        if node.name == "target":
            estimates = _estimates(nodes, ref.path)
        peak, estimated = manifest.metrics["peak_memory_gb"], estimates.get(node.name)
        values = (
            node.name, manifest.duration_s, manifest.metrics.get("tokens_per_s"), peak, estimated,
            peak / estimated if estimated else None, ref.content_id[:12],
        )  # fmt: skip
        cells = ("-" if value is None else harness._cell(value) for value in values)
        print("  ".join(f"{cell:>{max(12, len(c))}}" for c, cell in zip(COLUMNS, cells, strict=True)), flush=True)
        metrics = dict(manifest.metrics)
        if node.name == "evaluation":
            exactness = EvaluationResult.read(ref.path).exactness.model_dump()
            metrics |= {name: value for name, value in exactness.items() if isinstance(value, int | float)}
        rows.append({**dict(zip(COLUMNS, values, strict=True)), "metrics": metrics})
        ended(rows)
    return rows


def _build(node: Node, inputs: Mapping[str, Artifact], config: RefreshConfig, store: Store) -> Artifact:
    """Return the artifact of a node, made by a process unless the store has it."""
    build, rates = Build.of(REFRESH, config, node, inputs), Rates()
    with store.claim(build.stage, build.key) as claim:
        if not isinstance(claim, Attempt):
            return claim
        made_from = run_attempt(build, claim, store.root.parent, Device(), rates.follow)
        answers = inputs["trajectories"].manifest if "trajectories" in inputs else None
        rate = _tokens_per_s(node, rates, answers)
        metrics = made_from.metrics | ({} if rate is None else {"tokens_per_s": rate})
        return claim.commit(made_from.model_copy(update={"metrics": metrics}))


def _tokens_per_s(node: Node, rates: Rates, answers: Manifest | None) -> float | None:
    """Return the answers' tokens that a training or a replay reads a second. A rollout reports its own."""
    if answers is None:
        return None
    length = answers.metrics["response_tokens"] / answers.metrics["answers"]
    if (steps := rates.of("steps")) is not None:
        return steps * length * float(node.config.sequences_per_step)  # type: ignore[attr-defined]
    replayed = rates.of("trajectories")
    return None if replayed is None else replayed * length


def _estimates(nodes: Sequence[Node], artifact: Path) -> dict[str, float]:
    """Return the GB that `draftsmith check` estimates: of torch's allocator on a GPU, else of the process."""
    plans = check_drafters(RaisingFindings(), nodes, artifact, whole=True)
    sizes = model_sizes(nodes, artifact, plans, Hardware.here())
    assert sizes is not None
    process, uses = PROCESS_BYTES if sizes.accelerated else 0.0, stage_uses(nodes, sizes)
    needs = {node.name: node_need(node, uses[node.name]) for node in nodes if node.name in uses}
    return {name: (need.memory - process) / 1e9 for name, need in needs.items() if need.memory}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--sglang", type=Path, metavar="PYTHON", help="generate on SGLang servers of this interpreter")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the JSON file")
    parser.add_argument("--home", type=Path, help="folder of artifacts and logs; by default the model's in --out")
    parser.add_argument(
        "--until", nargs="+", default=["mining", "evaluation"], metavar="NODE", help="the last stages (%(default)s)"
    )
    options = parser.parse_args(arguments)
    name = options.model + ("-sglang" if options.sglang else "")
    options.json = options.out / f"refresh-{name}.json"
    home = (options.home or options.out / name).resolve()
    home.mkdir(parents=True, exist_ok=True)
    os.environ["DRAFTSMITH_HOME"] = str(home)
    started = time.monotonic()

    def write(rows: list[dict[str, Any]]) -> None:
        harness.write("gpu-refresh", {"rows": rows, "seconds": time.monotonic() - started}, options)

    config = refresh_config(options.model, home, options.sglang)
    rows = run(config, Store(home / "store"), options.until, write)
    outcomes = [
        [f"{row['stage']}: {metric}", value]
        for row in rows
        if row["stage"] in ("mining", "evaluation")
        for metric, value in row["metrics"].items()
    ]
    if outcomes:
        harness.print_table("results", ["", "value"], outcomes)
    print(f"{options.json}; {time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    harness.run(main)
