"""Weights of a checkpoint into a model of transformers, which would fill what is missing with random numbers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.targets.capabilities import decoder_of
from draftsmith.stages.targets.source import weight_files


def load_weights(kind: Any, folder: Path, file: Path | None = None, **arguments: Any) -> Any:
    """`kind.from_pretrained(folder, …)`. file: what holds the weights, where these are not safetensors.

    Raises DraftsmithError if the checkpoint lacks a tensor of the text model, or has one of another shape, or a
    bias that it has not. Of tied ones one is enough.
    """
    where = file or _place(folder)
    try:
        model, found = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except RuntimeError as error:
        if "automatic conversion" not in str(error):
            raise
        raise DraftsmithError(  # of single experts into one tensor, which transformers does not name
            f"{where}: the weights of some layer cannot be put together, as if some of its tensors were lacking: "
            "copy or download the model again"
        ) from error
    used = _names(model)
    lacking = sorted(name for name in found["missing_keys"] if name.startswith(used))
    if getattr(model.config, "quantization_config", None):  # `check_weights` asks for those of weights
        lacking = [name for name in lacking if not any(part in name.rpartition(".")[2] for part in _HAS_DEFAULT)]
    if lacking:
        raise DraftsmithError(
            f"{where}: the weights lack {lacking[0]} ({len(lacking)} tensors in all), for which "
            f"{type(model).__name__} would get random numbers: copy or download the model again"
        )
    for name, has, needs in sorted(found["mismatched_keys"]):
        if name.startswith(used):
            raise DraftsmithError(
                f"{where}: {name} has shape {list(has)}, and by config.json {list(needs)}: config and weights "
                "do not belong together; copy or download the model again"
            )
    if unread := _unread_biases(model, used, found["unexpected_keys"]):
        raise DraftsmithError(
            f"{where}: holds {unread[0]} ({len(unread)} biases in all), and by config.json there is none: config and "
            "weights do not belong together; copy or download the model again"
        )
    return model


def _unread_biases(model: Any, used: tuple[str, ...], unread: Iterable[str]) -> list[str]:
    """Of maps that the model has without one: what it computes is another model than the checkpoint's. Quantised
    checkpoints have some of zeros."""
    if getattr(model.config, "quantization_config", None):
        return []
    maps = {f"{name}.bias" for name, _ in model.named_modules() if name.startswith(used)}
    return sorted(maps.intersection(unread))


_HAS_DEFAULT = ("scale", "zero_point", "g_idx")  # in the names of what a quantisation may leave out


def _place(folder: Path) -> Path:
    files = weight_files(folder)
    return files[0] if len(files) == 1 else folder


def _names(model: Any) -> tuple[str, ...]:
    """What names of tensors begin with that forwards over text read: a checkpoint may lack its part for images."""
    read = (decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is each for each in read))
