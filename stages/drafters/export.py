"""Exports a checkpoint in the layout that vLLM loads, or with a calibrated confidence."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters import checkpoint_format, speculators
from draftsmith.stages.drafters.checkpoint import TOKENS_FILE, lineage_from, read_info, write_info
from draftsmith.stages.drafters.digest import EAGLE3_LAYERS, WEIGHTS_FILE
from draftsmith.stages.targets.describe import embedding_scale
from draftsmith.stages.targets.model_parts import model_class


def export_speculators(source: Path, target_model: Path, target: str, folder: Path) -> None:
    """Write the checkpoint in `source` in the layout that vLLM loads, with the target's embedding and head.

    target_model: a folder of transformers. target: where an engine finds it. Raises DraftsmithError.
    """
    raw = json.loads((source / checkpoint_format.CONFIG_FILE).read_text())
    architectures = json.loads((target_model / checkpoint_format.CONFIG_FILE).read_text()).get("architectures") or []
    config = speculators.to_speculators(raw, target, architectures)
    tensors = checkpoint_format.read_tensors(source)
    dtype = tensors["fc.weight"].dtype  # not just any tensor's: a confidence head is always float32
    if (scale := _embedding_scale(target_model)) != 1:
        raise DraftsmithError(
            f"target {target_model}: multiplies its embedding by {scale:g}, and speculators' drafters read it "
            "unscaled. Export the drafter without --format."
        )
    embedding, head = _embedding_and_head(target_model)
    folder.mkdir(parents=True, exist_ok=True)
    shared = {speculators.EMBEDDING: embedding.to(dtype), speculators.HEAD: head.to(dtype)}
    checkpoint_format.write_checkpoint(folder, config, tensors | shared)
    if (source / TOKENS_FILE).exists():
        shutil.copyfile(source / TOKENS_FILE, folder / TOKENS_FILE)
    _write_info(source, folder)


def export_eagle3(source: Path, folder: Path) -> None:
    """Write the EAGLE-3 checkpoint in `source` for vLLM, which numbers a layer by its input, not by its output.

    vLLM does not read SGLang's field of layer ids, and would use other layers without an error.
    """
    shutil.copytree(source, folder)
    path = folder / checkpoint_format.CONFIG_FILE
    raw = json.loads(path.read_text())
    raw[EAGLE3_LAYERS] = [layer + 1 for layer in raw["eagle_config"][EAGLE3_LAYERS]]
    path.write_text(json.dumps(raw, indent=2))
    _write_info(source, folder)


def calibrate_confidence(folder: Path, source: Path, scale: float, shift: float) -> None:
    """Fold scale · logit + shift into the confidence head of an export of `source`. Its proposals stay the same."""
    tensors = checkpoint_format.read_tensors(folder)
    weight, bias = (f"confidence_head.proj.{name}" for name in ("weight", "bias"))
    tensors[weight] = (scale * tensors[weight].double()).float()
    tensors[bias] = (scale * tensors[bias].double() + shift).float()
    (folder / WEIGHTS_FILE).unlink()  # mapped into memory: replaced, not overwritten
    raw = json.loads((folder / checkpoint_format.CONFIG_FILE).read_text())
    checkpoint_format.write_checkpoint(folder, raw, tensors)
    _write_info(source, folder)


def _write_info(source: Path, folder: Path) -> None:
    """Record the exported drafter as the last parent of the copy, which has another digest."""
    write_info(folder, replace(read_info(source), parents=lineage_from(source)))


def _embedding_scale(model: Path) -> float:
    """Return the factor on the embeddings that a model's first layer reads. No weights are read."""
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        return embedding_scale(model_class(config).from_config(config).get_input_embeddings())


def _embedding_and_head(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embedding and head, both [V, H]; the head of a model without one is a copy of its embedding."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a mapping)
                    for ending in (speculators.EMBEDDING, speculators.HEAD):
                        if name == ending or name.endswith(f".{ending}"):
                            tensors[ending] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DraftsmithError(f"target {path}: cannot be read ({error}). It is cut short or damaged.") from error
    if speculators.EMBEDDING not in tensors:
        raise DraftsmithError(
            f"target {model}: has no tensor {speculators.EMBEDDING}. Export the drafter without --format."
        )
    embedding = tensors[speculators.EMBEDDING]
    return embedding, tensors.get(speculators.HEAD, embedding.clone())
