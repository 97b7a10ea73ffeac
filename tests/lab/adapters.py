"""One drafter for three LoRA adapters, or one each: `python -m tests.lab.adapters FOLDER` prints a table.

The small target of the test bed is adapted three times, each time to other wording of another family of text. The
traffic has equal shares. Drafters are trained on the same greedy answers: one of the target alone on its own answers,
one shared on all, and one for each adapter on its third, with a third of the shared one's steps: as many in all. The
shared one is also trained further, on all answers or for each adapter on its third: all weights, or a low-rank adapter
of the drafter. A finished stage is not run again.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import ADAPTED_TRAJECTORIES
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed import cache, target
from tests.testbed.context import RecordingContext
from tests.testbed.procedural import text, training
from tests.testbed.procedural.training import MASK, TrainingTextConfig

ADAPTERS = text.EASY  # each is of the family of its name, in the wording of revision 2
TRAIN, HELDOUT, STEPS, SEEDS = 450, 90, 600, (0, 1, 2)
GREEDY = {"max_new_tokens": 96, "temperature": 0.0}
FURTHER: dict[str, dict[str, Any]] = {  # arm: fields of its training
    f"shared, then one each, {STEPS // 3} steps": {},
    f"shared, then LoRA-64 one each, {STEPS // 3} steps": {"lora": {"rank": 64}},
    f"shared, then LoRA-8 one each, {STEPS // 3} steps": {"lora": {"rank": 8}},
    f"shared, then LoRA-64 one each, {STEPS // 3} steps of 1e-2": {"lora": {"rank": 64}, "learning_rate": 1e-2},
    f"shared, then LoRA-8 one each, {STEPS // 3} steps of 1e-2": {"lora": {"rank": 8}, "learning_rate": 1e-2},
}
TRAINING = {
    "drafter": {"num_layers": 1, "block_size": 8, "target_layer_ids": (0, 1, 2), "mask_token": MASK},
    "learning_rate": 3e-3,
    "sequences_per_step": 8,
    "anchors_per_sequence": 12,
    "gamma": 4.0,
    "compute_dtype": "float32",
}


def adapter(family: str) -> Path:
    """Return a fine-tuned adapter of the small target, cached."""
    taught = TrainingTextConfig(
        families=(family,), revision_2=1, documents=2000, steps=300, rows_per_step=4, learning_rate=4e-3
    )
    folder = target.target_folder()

    def build(out: Path) -> None:
        training.train_adapter(out, taught, folder)

    return cache.cached(f"adapter-{family}", build, code=(text, training), extra=f"{taught} {target.sums()}")


def stage(
    name: str, out: Path, config: Mapping[str, Any], inputs: Mapping[str, Path] | None = None, seed: int = 0
) -> Path:
    """Run a stage unless it has been, and return its artifact."""
    if not (done := out.with_suffix(".done")).exists():
        print(out.name, flush=True)
        declared = importlib.import_module(STAGES[name]).STAGE
        declared.run(
            RecordingContext(out, out.with_suffix(".work"), inputs or {}, seed), declared.config.model_validate(config)
        )
        done.touch()
    return out


def answers(folder: Path, name: str, adapters: Mapping[str, str]) -> dict[str, Path]:
    """Return the artifacts of a target, of its prompts and of its answers to them."""
    seen = frozenset(example.prompt for example in training.training_examples(target.TAUGHT))
    rows = [
        {"messages": [{"role": "user", "content": each.prompt}], "adapter": each.family}
        for each in text.examples(target.PROMPT_SEED, 4 * (TRAIN + HELDOUT), exclude=seen)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {"train": TRAIN // 3, "heldout": HELDOUT // 3}
    sources = [
        {
            "kind": "jsonl",
            "path": str(folder / "prompts.jsonl"),
            "label": family,
            "filter": {"adapter": family},
            "counts": counts,
        }
        for family in ADAPTERS
    ]
    made = {
        "target": stage(
            "target",
            folder / f"{name}-target",
            {"source": str(target.target_folder()), "dtype": "float32", "adapters": adapters},
        )
    }
    made["prompts"] = stage("prompts", folder / f"{name}-prompts", {"sources": sources, "heldout_share": 0.3}, made)
    for split in ("train", "heldout"):
        config = {"splits": [split], "sampling": GREEDY, "engine": {"slots": 32}}
        made[split] = stage("rollout", folder / f"{name}-{split}", config, {n: made[n] for n in ("target", "prompts")})
    return made


def only(folder: Path, stored: Path, name: str) -> Path:
    """Return an artifact with the answers under one adapter."""
    folder.mkdir(exist_ok=True)
    rows = read_table(stored / "trajectories.parquet", ADAPTED_TRAJECTORIES).to_pylist()
    chosen = [row for row in rows if row["adapter"] == name]
    write_table(folder / "trajectories.parquet", ADAPTED_TRAJECTORIES, chosen)
    return folder


def main(folder: Path) -> None:
    """Train all drafters and print tau under each adapter: the mean of the seeds, and their range.

    Beside it the size of the file that an arm adds.
    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    alone = answers(folder, "alone", {})
    made = answers(folder, "adapted", {name: str(adapter(name)) for name in ADAPTERS})

    def drafters(
        name: str, of: Mapping[str, Path], trajectories: Path, steps: int, start: str = "", **fields: Any
    ) -> list[Path]:
        config = TRAINING | {"steps": steps} | fields
        inputs = {"target": of["target"], "trajectories": trajectories}
        starts = [{"drafter": folder / f"sft-{start}-{seed}"} if start else {} for seed in SEEDS]
        return [
            stage("sft", folder / f"sft-{name}-{seed}", config, inputs | starts[i], seed)
            for i, seed in enumerate(SEEDS)
        ]

    def for_all(name: str, of: Mapping[str, Path], steps: int, start: str = "") -> dict[str, list[Path]]:
        return dict.fromkeys(ADAPTERS, drafters(name, of, of["train"], steps, start))

    arms = {
        f"of the target alone, {STEPS} steps": for_all("alone", alone, STEPS),
        f"shared, {STEPS} steps": for_all("shared", made, STEPS),
        f"one each, {STEPS // 3} steps": {},
        f"shared, {3 * STEPS} steps": for_all("shared-long", made, 3 * STEPS),
        f"one each, {STEPS} steps": {},
        f"shared, {STEPS} steps, then again": for_all("shared-further", made, STEPS, "shared"),
    }
    thirds = {name: only(folder / f"only-{name}", made["train"], name) for name in ADAPTERS}
    for name, own in thirds.items():
        arms[f"one each, {STEPS // 3} steps"][name] = drafters(f"{name}-third", made, own, STEPS // 3)
        arms[f"one each, {STEPS} steps"][name] = drafters(name, made, own, STEPS)
    for number, (arm, fields) in enumerate(FURTHER.items()):
        arms[arm] = {
            name: drafters(f"{name}-further-{number}", made, own, STEPS // 3, "shared", **fields)
            for name, own in thirds.items()
        }
    model = Target.load(made["target"])
    replayer = Replayer(model, ReplayOptions(with_proposals=False))
    heldout = {
        name: load_trajectories(only(folder / f"heldout-{name}", made["heldout"], name)).trajectories
        for name in ADAPTERS
    }
    print("| drafter |", " | ".join(ADAPTERS), "| kB each |")
    for arm, by_adapter in arms.items():
        cells = []
        for name, folders in by_adapter.items():
            loaded = {
                str(i): load_drafter(each / DRAFTER_FOLDER, model, any_target=True) for i, each in enumerate(folders)
            }
            taus = [tally.tau for tally in replayer.acceptance(loaded, heldout[name]).values()]
            cells.append(f"{np.mean(taus):.3f} ({min(taus):.3f} to {max(taus):.3f})")
        own = next(folders[0].glob("adapter/*.safetensors"), folders[0] / DRAFTER_FOLDER / "model.safetensors")
        print(f"| {arm} |", " | ".join(cells), f"| {own.stat().st_size / 1e3:.0f} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
