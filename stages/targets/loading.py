"""Loads a checkpoint's weights into a transformers model, which by itself would fill in missing ones at random."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoConfig
from transformers.models.auto.auto_factory import _get_model_class

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.targets.config import weight_files
from draftsmith.stages.targets.layers import layer_configs
from draftsmith.stages.targets.model_parts import causal_lm_of, decoder_of, model_class


def load_weights(kind: Any, folder: Path, file: Path | None = None, **arguments: Any) -> Any:
    """Return `kind.from_pretrained(folder, …)`. file: the file with the weights if they are not safetensors.

    Raises DraftsmithError if the checkpoint lacks a tensor of the text model, has one of another shape, or a bias that
    the model lacks. One of several tied tensors is enough.
    """
    where = file or _weights_path(folder)
    try:
        model, report = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except RuntimeError as error:
        if "automatic conversion" not in str(error):
            raise
        raise DraftsmithError(  # merging experts into one tensor; transformers does not name the tensor
            f"{where}: the weights of a layer cannot be merged, as if some of its tensors were missing. "
            "Copy or download the model again."
        ) from error
    used = _text_prefixes(model)
    missing = sorted(name for name in report["missing_keys"] if name.startswith(used))
    if getattr(model.config, "quantization_config", None):  # `check_weights` checks scales of weights
        missing = [name for name in missing if not any(part in name.rpartition(".")[2] for part in _HAS_DEFAULT)]
    if missing:
        raise DraftsmithError(
            f"{where}: the weights lack {missing[0]} ({len(missing)} tensors in all), for which "
            f"{type(model).__name__} would get random numbers. Copy or download the model again."
        )
    for name, has, needs in sorted(report["mismatched_keys"]):
        if name.startswith(used):
            raise DraftsmithError(
                f"{where}: {name} has shape {list(has)}, and by config.json {list(needs)}: config and weights "
                "do not belong together. Copy or download the model again."
            )
    if unread := _unread_biases(model, used, report["unexpected_keys"]):
        raise DraftsmithError(
            f"{where}: holds {unread[0]} ({len(unread)} biases in all), and by config.json there is none: config and "
            "weights do not belong together. Copy or download the model again."
        )
    return model


def _unread_biases(model: Any, used: tuple[str, ...], unread: Iterable[str]) -> list[str]:
    """Return the checkpoint's biases of maps that have none in the model, so that it computes another function.

    Quantised checkpoints have some, of zeros.
    """
    if getattr(model.config, "quantization_config", None):
        return []
    maps = {f"{name}.bias" for name, _ in model.named_modules() if name.startswith(used)}
    return sorted(maps.intersection(unread))


_HAS_DEFAULT = ("scale", "zero_point", "g_idx")  # in names of tensors that a quantised checkpoint may lack


def _weights_path(folder: Path) -> Path:
    files = weight_files(folder)
    return files[0] if len(files) == 1 else folder


def _text_prefixes(model: Any) -> tuple[str, ...]:
    """Return the prefixes of the tensors that forwards over text read: a checkpoint may lack the vision part."""
    text_modules = (decoder_of(model), model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is text for text in text_modules))


_FIELD = "parallel.target_parallel"
_DIVIDING = ("colwise", "rowwise", "packed_")  # prefixes of the styles that divide a weight
_HEADS = ("num_attention_heads", "num_key_value_heads")


def divided_parameters(model: Any) -> int:
    """Return how many parameters of a model of transformers would be divided among ranks."""
    plan = _parallel_plan(model)
    return sum(p.numel() for name, p in model.named_parameters() if _style(plan, name).startswith(_DIVIDING))


def model_without_weights(folder: Path) -> Any:
    """Return the model of a folder's config on the meta device, where nothing is allocated."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return model_class(config).from_config(config)


def check_divides(folder: Path, sharing: int) -> None:
    """Raise DraftsmithError if, by its config, the model in `folder` cannot be divided among `sharing` ranks."""
    if sharing == 1:
        return
    if not hasattr(transformers.PreTrainedModel, "prepare_distribute_model"):
        raise DraftsmithError(
            f"{_FIELD}: transformers {transformers.__version__} cannot divide a model in this way. "
            "Install 5.24, which can, or set it to 1."
        )
    config, model = AutoConfig.from_pretrained(folder, local_files_only=True), model_without_weights(folder)
    name = type(model).__name__
    if getattr(config, "quantization_config", None):
        raise DraftsmithError(f"{_FIELD}: {name} in {folder} is quantised, and cannot be divided. Set the field to 1.")
    if not divided_parameters(model):
        raise DraftsmithError(f"{_FIELD}: transformers has no plan to divide {name} by. Set it to 1.")
    for layer, heads in itertools.product(layer_configs(config.get_text_config()), _HEADS):
        count = getattr(layer, heads, None) or sharing
        if count % sharing:
            raise DraftsmithError(
                f"{_FIELD}: {sharing} does not divide the {heads} of the target, {count}. Set one that does, or 1."
            )


def load_slice(folder: Path, ranks: Ranks, device: str, **arguments: Any) -> Any:
    """Load this rank's slice of the model in `folder`, while the other ranks load theirs; only the slice is read.

    arguments: those of `from_pretrained`. Raises DraftsmithError like `check_divides` and `load_weights`, and any error
    of transformers.
    """
    check_divides(folder, ranks.target_parallel)
    from transformers.distributed import DistributedConfig  # missing in releases that `check_divides` refuses

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = _get_model_class(config, model_class(config)._model_mapping)
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    mesh = init_device_mesh(
        where.type, (ranks.world // ranks.target_parallel, ranks.target_parallel), mesh_dim_names=("data", "target")
    )

    class Sliced(kind):  # type: ignore[misc, valid-type]
        """The model divided among some ranks: transformers would use all ranks, and divide embedding and head too."""

        @classmethod
        def prepare_distribute_model(cls, distributed: Any, device_map: Any = None) -> tuple[Any, torch.device, _Mesh]:  # noqa: ARG003
            return distributed, where, _Mesh(mesh["target"])

        def init_parallel_plans(self) -> None:
            super().init_parallel_plans()
            self._tp_plan = _parallel_plan(self)

    Sliced.__name__, Sliced.__qualname__, Sliced.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return load_weights(
        Sliced, folder, distributed_config=DistributedConfig(tp_size=ranks.target_parallel), **arguments
    )


@dataclass(frozen=True)
class _Mesh:
    """The mesh that transformers takes for every kind of parallelism."""

    target: Any  # DeviceMesh

    def get_mesh(self, dims: Any) -> Any:  # noqa: ARG002
        return self.target


def _parallel_plan(model: Any) -> dict[str, str]:
    """Return styles by name of module or weight, `*` for a layer's number, without embedding and head."""
    undivided = {model.get_input_embeddings(), causal_lm_of(model).get_output_embeddings()}
    excluded = {name for name, module in model.named_modules() if module in undivided}
    return {name: style for name, style in (model.tp_plan or {}).items() if name not in excluded}


def _style(plan: dict[str, str], name: str) -> str:
    """Return the style of a weight: its own, or its module's."""
    parts = ["*" if part.isdecimal() else part for part in name.split(".")]
    return plan.get(".".join(parts)) or plan.get(".".join(parts[:-1]), "")
