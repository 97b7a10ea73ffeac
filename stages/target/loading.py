"""Weights of a checkpoint into a model of transformers, which would fill what is missing with random numbers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.target.layers import causal_lm_of, decoder_of, model_class
from draftsmith.stages.target.model_sizes import layer_configs
from draftsmith.stages.target.source import weight_files


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


_FIELD = "parallel.target_parallel"
_DIVIDING = ("colwise", "rowwise", "packed_")  # begin the names of the styles that divide a weight
_HEADS = ("num_attention_heads", "num_key_value_heads")


def divided_parameters(model: Any) -> int:
    """How many of a model's parameters ranks would divide among them. model: of transformers, on any device."""
    plan = _plan_of(model)
    return sum(p.numel() for name, p in model.named_parameters() if _style(plan, name).startswith(_DIVIDING))


def check_divides(folder: Path, sharing: int) -> None:
    """Raises DraftsmithError if the model in `folder` cannot be divided among so many ranks. Of its config alone."""
    if sharing == 1:
        return
    import transformers
    from transformers import AutoConfig

    if not hasattr(transformers.PreTrainedModel, "prepare_distribute_model"):
        raise DraftsmithError(
            f"{_FIELD}: transformers {transformers.__version__} cannot divide a model as is needed here; it is known "
            "that 5.24 can: install that, or set it to 1"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    name = type(model).__name__
    if getattr(config, "quantization_config", None):
        raise DraftsmithError(f"{_FIELD}: {name} in {folder} is quantised, which is not divided here: set it to 1")
    if not divided_parameters(model):
        raise DraftsmithError(f"{_FIELD}: transformers has no plan to divide {name} by: set it to 1")
    for layer, heads in itertools.product(layer_configs(config.get_text_config()), _HEADS):
        count = getattr(layer, heads, None) or sharing
        if count % sharing:
            raise DraftsmithError(
                f"{_FIELD}: {sharing} does not divide the {heads} of the target, {count}: give a number that does, or 1"
            )


def load_part(folder: Path, ranks: Ranks, device: str, **arguments: Any) -> Any:
    """This rank's part of the model in `folder`, of which the others load theirs now; no more of the file is read.

    arguments: of `from_pretrained`. Raises DraftsmithError as `check_divides` and `load_weights`, and whatever
    transformers raises.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoConfig
    from transformers.models.auto.auto_factory import _get_model_class

    check_divides(folder, ranks.target_parallel)
    from transformers.distributed import DistributedConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = _get_model_class(config, model_class(config)._model_mapping)
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    mesh = init_device_mesh(
        where.type, (ranks.world // ranks.target_parallel, ranks.target_parallel), mesh_dim_names=("data", "target")
    )

    class Part(kind):  # type: ignore[misc, valid-type]
        """transformers would divide a model among all ranks there are, and embedding and head with it."""

        @classmethod
        def prepare_distribute_model(cls, asked: Any, device_map: Any = None) -> tuple[Any, torch.device, _Mesh]:  # noqa: ARG003
            return asked, where, _Mesh(mesh["target"])

        def init_parallel_plans(self) -> None:
            super().init_parallel_plans()
            self._tp_plan = _plan_of(self)

    Part.__name__, Part.__qualname__, Part.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return load_weights(Part, folder, distributed_config=DistributedConfig(tp_size=ranks.target_parallel), **arguments)


@dataclass(frozen=True)
class _Mesh:
    """What transformers asks for its kinds of parallelism: there is one."""

    target: Any  # DeviceMesh

    def get_mesh(self, dims: Any) -> Any:  # noqa: ARG002
        return self.target


def _plan_of(model: Any) -> dict[str, str]:
    """Styles by name of module or weight, with `*` for numbers of layers; none for embedding and head."""
    whole = {model.get_input_embeddings(), causal_lm_of(model).get_output_embeddings()}
    left_out = {name for name, module in model.named_modules() if module in whole}
    return {name: style for name, style in (model.tp_plan or {}).items() if name not in left_out}


def _style(plan: dict[str, str], name: str) -> str:
    """Of a weight: its own, or its module's."""
    parts = ["*" if part.isdecimal() else part for part in name.split(".")]
    return plan.get(".".join(parts)) or plan.get(".".join(parts[:-1]), "")
