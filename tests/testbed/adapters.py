"""LoRA adapters in peft's format, with random weights, and models with an adapter merged into their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.testbed.context import RecordingContext
from tests.testbed.random_target import resolved, write_model

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
ALL = (*ATTENTION, "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PREFIX = "base_model.model."


def write_adapter(
    folder: Path,
    model: Path,
    maps: Sequence[str] = ALL,
    *,
    rank: int = 3,
    alpha: int = 6,
    seed: int = 0,
    size: float = 0.2,
    **fields: Any,
) -> Path:
    """Write an adapter of some maps of every layer of a model's folder. size: of its numbers; fields: of its config."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in sorted(load_file(model / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if module.endswith(tuple(maps)):
            (out, into), key = weight.shape, f"{PREFIX}{module}"
            tensors[f"{key}.lora_A.weight"] = size * torch.randn(rank, into, generator=generator)
            tensors[f"{key}.lora_B.weight"] = size * torch.randn(out, rank, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted(each.rpartition(".")[2] for each in maps)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": names, "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adapted_artifact(folder: Path, **ranks: int) -> Path:
    """Return the artifact of a random target with adapters of these names and ranks."""
    write_model(folder / "model")
    paths = {
        name: str(write_adapter(folder / name, folder / "model", rank=rank, seed=index))
        for index, (name, rank) in enumerate(ranks.items())
    }
    return resolved(folder, adapters=paths)


def merge(model: Path, adapter: Path, folder: Path) -> Path:
    """Write the folder of a model whose weights are W + lora_alpha / r · B A; return it."""
    shutil.copytree(model, folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights, factors = load_file(model / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in factors if key.endswith(".lora_A.weight")]:
        name = f"{key.removeprefix(PREFIX).removesuffix('.lora_A.weight')}.weight"
        product = factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double()
        merged = weights[name].double() + config["lora_alpha"] / config["r"] * product
        weights[name] = merged.to(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def served_inputs(folder: Path, model: Path, prompts: Path, drafter: Path) -> dict[str, Path]:
    """Return artifacts of a target with two adapters, of prompts that they share, and of a drafter of the target alone.

    model, prompts: the target's folder and a file of rows. drafter: an artifact of stage `sft`.
    """
    from draftsmith.stages.data.prompts import STAGE as PROMPTS
    from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
    from draftsmith.stages.targets.stage import STAGE as TARGET

    adapters = {
        "a": write_adapter(folder / "a", model, seed=1, size=0.05),
        "b": write_adapter(folder / "b", model, ATTENTION, rank=8, alpha=16, seed=2, size=0.05),
    }
    target = RecordingContext.under(folder / "target")
    paths = {name: str(path) for name, path in adapters.items()}
    TARGET.run(target, TARGET.config.model_validate({"source": str(model), "dtype": "float32", "adapters": paths}))
    asked = RecordingContext.under(folder / "prompts", {"target": target.out})
    sources = [{"kind": "jsonl", "path": str(prompts)}]
    PROMPTS.run(asked, PROMPTS.config.model_validate({"sources": sources, "train": 2, "heldout": 16}))
    (folder / "drafter").mkdir()
    copied = shutil.copytree(drafter / DRAFTER_FOLDER, folder / "drafter" / DRAFTER_FOLDER)
    (copied / "drafter.json").unlink()  # it was made for the target alone
    return {"target": target.out, "prompts": asked.out, "drafter": folder / "drafter"}


def rolled_out_alike(folder: Path, inputs: dict[str, Path], engine: dict[str, Any], *, proposals: bool = True) -> None:
    """Assert that a rollout with an engine of servers has the answers and verify steps of the embedded engine.

    proposals: the servers report them.
    """
    from draftsmith.artifacts.tables.parquet import read_table
    from draftsmith.artifacts.tables.schemas import ADAPTED_TRAJECTORIES, TRACE
    from draftsmith.stages.engines.stage import STAGE

    answers, steps = [], []
    for name, given in (("embedded", {"kind": "embedded"}), ("served", engine)):
        ctx = RecordingContext.under(folder / name, inputs)
        fields = {"splits": ["heldout"], "sampling": {"max_new_tokens": 48}, "engine": given}
        STAGE.run(ctx, STAGE.config.model_validate(fields))
        table = read_table(ctx.out / "trajectories.parquet", ADAPTED_TRAJECTORIES)
        answers.append(table.drop_columns(["engine"]).to_pylist())
        if "drafter" in inputs:
            without = ["target_logprobs"] if proposals else ["target_logprobs", "proposed_ids"]
            steps.append(read_table(ctx.out / "trace.parquet", TRACE).drop_columns(without).to_pylist())
    assert [row["adapter"] for row in answers[0]].count("a") == len(answers[0]) / 2 == 8
    assert answers[1] == answers[0]
    assert not steps or (steps[1] == steps[0] and len(steps[0]) > 50)
