"""A checkpoint in another layout than the one it is kept in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters import checkpoint_format, speculators
from draftsmith.stages.drafters.checkpoint import TOKENS_FILE, read_info, write_info
from draftsmith.stages.target.layers import model_class
from draftsmith.stages.target.logit_probe import embedding_scale


def export_speculators(source: Path, target_model: Path, target: str, folder: Path) -> None:
    """The checkpoint in `source` in the layout that vLLM loads, with the target's embedding and head.

    target_model: a folder of transformers. target: where an engine finds it. Raises DraftsmithError.
    """
    raw = json.loads((source / checkpoint_format.CONFIG_FILE).read_text())
    architectures = json.loads((target_model / checkpoint_format.CONFIG_FILE).read_text()).get("architectures") or []
    config = speculators.to_speculators(raw, target, architectures)
    tensors = checkpoint_format.read_tensors(source)
    dtype = tensors["fc.weight"].dtype  # a confidence head is float32 whatever the others are
    if (scale := _embedding_scale(target_model)) != 1:
        raise DraftsmithError(
            f"target {target_model}: multiplies its embedding by {scale:g}, and speculators' drafters read it as it "
            "is: export the drafter without --format"
        )
    embedding, head = _embedding_and_head(target_model)
    folder.mkdir(parents=True, exist_ok=True)
    of_target = {speculators.EMBEDDING: embedding.to(dtype), speculators.HEAD: head.to(dtype)}
    checkpoint_format.write_checkpoint(folder, config, tensors | of_target)
    if (source / TOKENS_FILE).exists():
        shutil.copyfile(source / TOKENS_FILE, folder / TOKENS_FILE)
    write_info(folder, read_info(source))


def _embedding_scale(model: Path) -> float:
    """What its first layer reads, as a multiple of the table; no weights are read."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        return embedding_scale(model_class(config).from_config(config).get_input_embeddings())


def _embedding_and_head(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [V, H]; the head of a model that has none of its own is its embedding, of which it gets a copy."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (it is no mapping)
                    for wanted in (speculators.EMBEDDING, speculators.HEAD):
                        if name == wanted or name.endswith(f".{wanted}"):
                            found[wanted] = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise DraftsmithError(f"target {path}: cannot be read ({error}); it is cut short or damaged") from error
    if speculators.EMBEDDING not in found:
        raise DraftsmithError(f"target {model}: has no tensor {speculators.EMBEDDING}; its layout is not known here")
    embedding = found[speculators.EMBEDDING]
    return embedding, found.get(speculators.HEAD, embedding.clone())
