"""Strict reading and writing of checkpoints, and their fit to a target, for the layouts of all architectures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.stages.drafters import speculators
from draftsmith.stages.drafters.digest import WEIGHTS_FILE
from draftsmith.stages.drafters.spec import RawConfig
from draftsmith.stages.targets.layers import usual_layer, wrong_numbers

CONFIG_FILE = "config.json"
_PARTIAL_ROTATION = "partial_rotary_factor"


@contextmanager
def config_errors(where: str) -> Iterator[None]:
    """Turn errors caused by unexpected values into one clear error."""
    try:
        yield
    except DraftsmithError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise DraftsmithError(
            f"drafter {where}: a field has an unexpected value ({one_line(error, 200)}). Export the checkpoint again."
        ) from error


def read_raw_config(folder: Path) -> RawConfig:
    """Read config.json; convert the layout of speculators, and put rotary settings under `rope_parameters`.

    Raises DraftsmithError if it is not a JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}). Name the folder of a drafter.") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"drafter {path}: is not a JSON object. Name the folder of a drafter.")
    with config_errors(str(path)):
        for holder in (raw, raw.get("transformer_layer_config")):
            require_kinds(path, _containers(holder or {}))
        if speculators.KIND in raw:
            raw = speculators.from_speculators(raw, str(path))
        if "rope_parameters" not in raw and "rope_theta" in raw:
            scaling = raw.pop("rope_scaling", None) or {}
            scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
            raw["rope_parameters"] = {**scaling, "rope_theta": raw["rope_theta"]}
        theta, older = (raw.get("rope_parameters") or {}).get("rope_theta"), raw.get("rope_theta")
    if older is not None and theta not in (None, older):
        raise DraftsmithError(
            f"drafter {path}: rope_theta is {older!r} at the top and {theta!r} in rope_parameters, and engines read "
            "either. Keep the trained one."
        )
    return raw


# Fields of a config.json that contain others. Their readers handle null and absence.
_LISTS = {"architectures": str, "layer_types": str, "aux_hidden_state_layer_ids": int}
_OBJECTS = (
    *("dflash_config", "dspark_config", "eagle_config"),
    *("rope_parameters", "rope_scaling", "transformer_layer_config"),
)


def _containers(raw: RawConfig) -> Iterator[tuple[str, Any, bool]]:
    """Yield the checks of these fields for `require_kinds`."""
    for name, kind in _LISTS.items():
        value = raw.get(name)
        yield name, value, value is None or (isinstance(value, list) and all(type(item) is kind for item in value))
    for name in _OBJECTS:
        yield name, raw.get(name), isinstance(raw.get(name), dict | None)


def is_speculators(folder: Path) -> bool:
    """Return whether a checkpoint, whose config.json is readable, is in the layout of speculators."""
    return speculators.KIND in json.loads((folder / CONFIG_FILE).read_text())


def parse_config(raw: RawConfig, kind: type[Any], architecture: str, path: Path) -> Any:
    """Parse `raw` as a config class of transformers. Raises DraftsmithError if no model can be created from it."""
    try:
        config = kind(**{**raw, "architectures": [architecture]})
    except Exception as error:  # transformers has its own error classes for its fields
        raise DraftsmithError(
            f"drafter {path}: cannot be read ({one_line(error)}). Name the folder of a drafter."
        ) from error
    rotation = config.rope_parameters.get("rope_type")
    known = isinstance(rotation, str) and rotation in ("default", *ROPE_INIT_FUNCTIONS)
    require_kinds(
        path,
        [
            *((name, value, False) for name, value in wrong_numbers(config, _SIZES)),
            ("rope_parameters.rope_type", rotation, known),
        ],
    )
    return config


_SIZES = (
    *("vocab_size", "draft_vocab_size", "hidden_size", "intermediate_size", "head_dim", "block_size"),
    *("num_hidden_layers", "num_target_layers", "num_attention_heads", "num_key_value_heads"),
    "max_position_embeddings",
)


def check_equal(where: str, checks: Iterable[tuple[str, Any, Any]]) -> None:
    """Raise DraftsmithError at the first value that differs. checks: (field, the drafter's, the target's)."""
    for field, has, needs in checks:
        if has != needs:
            raise DraftsmithError(
                f"drafter {where}: {field} is {has}, the target's is {needs}, so it was trained for another target. "
                "Choose a drafter of this target, or remove sft.init_from."
            )


def rope_checks(drafter: Any, target: Any) -> list[tuple[str, Any, Any]]:
    """Return the checks of two configs' rotary settings for `check_equal`.

    The list is empty if a config has no such settings, or if the target's differ by layer: then any are right.
    """
    ours, theirs = (getattr(config, "rope_parameters", None) or {} for config in (drafter, target))
    theirs = _rotation(theirs)
    if not (ours.get("rope_theta") and theirs.get("rope_theta")):
        return []
    usual = (("rope_type", "default"), ("factor", 1.0))
    return [
        ("rope_theta", float(ours["rope_theta"]), float(theirs["rope_theta"])),
        *((f"rope_parameters.{field}", ours.get(field, value), theirs.get(field, value)) for field, value in usual),
    ]


def refuse_other_rotations(path: Path, raw: RawConfig) -> None:
    """Refuse drafters that rotate only a part of each head, or use angles that engines compute differently.

    raw: the content of a config.json that has rope_parameters.
    """
    if (raw["rope_parameters"] | raw).get(_PARTIAL_ROTATION) not in (None, 1):
        raise DraftsmithError(
            f"drafter {path}: {_PARTIAL_ROTATION} is set, and only rotation of whole heads is supported."
        )
    if reason := _rotated_otherwise(raw["rope_parameters"]):
        raise DraftsmithError(
            f"drafter {path}: rope_parameters has {reason}, which SGLang computes differently from transformers. "
            "Choose a drafter without it (if it is a line's champion, begin another line with registry.name)."
        )


def _rotated_otherwise(rope: RawConfig) -> str | None:
    """Return the setting by which SGLang's angles or their scale differ from transformers'; None if they are equal."""
    if (kind := rope.get("rope_type")) in ("dynamic", "longrope"):  # depends on what else a forward reads
        return f"rope_type {kind}"
    return "attention_factor" if rope.get("attention_factor") is not None else None


def _rotation(rope: RawConfig) -> RawConfig:
    """Return the rotary settings of a drafter for a target with these settings.

    They are the same, except for default angles where engines disagree. Whole heads rotate, even if only parts of the
    target's do: engines and the models here would rotate different parts.
    """
    if _rotated_otherwise(rope):
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return {name: value for name, value in rope.items() if name != _PARTIAL_ROTATION}


# The values that every architecture here computes with. With other values an engine computes another model.
COMPUTED: RawConfig = {
    "hidden_act": "silu",
    "rope_is_neox_style": True,
    "is_neox_style": True,
    "use_gemma_norm": False,
    "quantization_config": None,
    "text_config": None,  # engines would read it instead of the fields around it
}


def refuse_other_models(path: Path, fields: RawConfig, computed: RawConfig, within: str = "") -> None:
    """Refuse a config with a field that engines read and that is not computed here.

    computed: field -> the value that changes nothing, as null and absence do.
    within: the object that holds the fields, e.g. "dflash_config.".
    """
    for name, neutral in computed.items():
        if (value := fields.get(name)) is not None and value != neutral:
            raise DraftsmithError(
                f"drafter {path}: {within}{name} is {json.dumps(value)[:60]}, and only {json.dumps(neutral)} is "
                "computed here: an engine would serve another model. Choose a drafter without it."
            )


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> bool:
    """Return whether a JSON value is an integer, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)


def are_integers(value: Any) -> bool:
    """Return whether a JSON value is a list of integers."""
    return isinstance(value, list) and all(map(is_integer, value))


def is_block(value: Any) -> bool:
    """Return whether a JSON value is a block size: at least the anchor and one proposal."""
    return is_integer(value) and value >= 2


def require_kinds(path: Path, checks: Iterable[tuple[str, Any, bool]]) -> None:
    """Raise DraftsmithError at the first field with a wrong value. checks: (field, value, whether it is valid)."""
    for field, value, right in checks:
        if not right and value is None:
            raise DraftsmithError(f"drafter {path}: field {field} is missing, and an engine would guess it. Add it.")
        if not right:
            raise DraftsmithError(f"drafter {path}: {field} is {value!r}. Export the checkpoint again.")


def check_layer_ids(where: str, ids: Sequence[int], layers: int, *, ask_for: str) -> None:
    """Check that every id is a layer of the target, and none comes twice. Raises DraftsmithError."""
    if len(set(ids)) < len(ids):
        raise DraftsmithError(f"drafter {where}: target_layer_ids {list(ids)} name a layer twice. {ask_for}")
    if not ids or min(ids) < 0 or max(ids) >= layers:
        raise DraftsmithError(
            f"drafter {where}: target_layer_ids {list(ids)} do not fit layers 0 … {layers - 1} of the target. "
            "Name layers of it, or choose a drafter that was trained for it."
        )


def unservable_layers(ids: Sequence[int], layers: int) -> str | None:
    """Return why an engine would pass these layers in another order, or not at all; None if it passes them as they are.

    SGLang collects hidden states before each layer while the target runs: in rising order, never after the last one.
    """
    if list(ids) != sorted(ids):
        return f"target_layer_ids {list(ids)} do not rise, and SGLang passes layers in rising order"
    if max(ids) == layers - 1:
        return f"target_layer_ids {list(ids)} name the last layer, after which SGLang takes nothing"
    return None


def write_checkpoint(folder: Path, raw: RawConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write config.json and model.safetensors. Raises DraftsmithError for weights that are not finite."""
    _must_be_finite(folder, tensors)
    (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def save(
    drafter: Any,
    folder: Path,
    dtype: torch.dtype,
    fields: Mapping[str, Any] = {},
    others: Mapping[str, torch.Tensor] = {},
) -> None:
    """Write config.json and model.safetensors, with exactly the tensors that engines expect.

    fields: config.json fields that differ from the model's. others: tensors in addition to the weights.
    """
    raw = drafter.config.to_dict() | {
        "block_size": drafter.block_size,
        "rope_theta": drafter.config.rope_parameters["rope_theta"],  # as older engines read it
        "dtype": str(dtype).removeprefix("torch."),
    }
    tensors = {
        name: p.detach().to("cpu", torch.float32 if name.startswith(drafter.float32_weights) else dtype).contiguous()
        for name, p in drafter.named_parameters()
    }
    write_checkpoint(folder, {**raw, **fields}, {**tensors, **others})


def check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]], own_name: Callable[[str], str | None]) -> None:
    """Check that model.safetensors is complete and has exactly these tensors with these shapes. Reads only its header.

    own_name: the architecture's `own_name`. Raises DraftsmithError.
    """
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            names = {weight: name for name in file.keys() if (weight := own_name(name)) is not None}  # noqa: SIM118
            shapes = {weight: tuple(file.get_slice(name).get_shape()) for weight, name in names.items()}
    except (OSError, SafetensorError) as error:
        raise DraftsmithError(
            f"drafter {path}: cannot be read ({error}): the file is missing or cut short. Export the drafter as one "
            f"{WEIGHTS_FILE}."
        ) from error
    _check_shapes(folder, shapes, expected, "those of its config.json")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read model.safetensors. Raises DraftsmithError if it cannot be read, or holds weights that are not finite."""
    path = folder / WEIGHTS_FILE
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}). The file is missing or cut short.") from error
    _must_be_finite(folder, tensors)
    return tensors


def _must_be_finite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse NaN and infinite weights: no proposal would be accepted, and training would fail as if it diverged."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.itemsize > 1}
    if names := [name for name, tensor in floats.items() if not bool(tensor.isfinite().all())]:
        raise DraftsmithError(
            f"drafter {folder / WEIGHTS_FILE}: {min(names)} holds NaN or infinite weights ({len(names)} in "
            "all): its training diverged, or its dtype is too small. Choose another checkpoint."
        )


def _check_shapes(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], layout: str
) -> None:
    """Check that all tensors and no others are there, with their shapes: engines ignore names that they do not know."""
    for problem, names in (
        ("lacks tensor", expected.keys() - shapes.keys()),
        ("has the unknown tensor", shapes.keys() - expected.keys()),
        ("has the wrong shape for", {name for name, shape in expected.items() if shapes.get(name, shape) != shape}),
    ):
        if names:
            raise DraftsmithError(
                f"drafter {folder / WEIGHTS_FILE}: {problem} {min(names)} ({len(names)} in all). Expected: {layout}."
            )


def load_tensors(
    drafter: Any,
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    layout: str,
    dtype: torch.dtype,
    others: Mapping[str, tuple[int, ...]] = {},
) -> None:
    """Load the weights of a checkpoint, which must have them all and no more, and convert them to `dtype`.

    others: shapes of the tensors that the checkpoint has in addition to the weights.
    """
    expected = {name: tuple(p.shape) for name, p in drafter.named_parameters()}
    _check_shapes(folder, {name: tuple(t.shape) for name, t in tensors.items()}, {**expected, **others}, layout)
    drafter.load_state_dict(dict(tensors), strict=False)
    cast(drafter, dtype, drafter.float32_weights)


def cast(module: nn.Module, dtype: torch.dtype, but: tuple[str, ...] = ()) -> None:
    """Convert the weights to `dtype`, in place, except those whose names begin with one of `but`.

    Rotary frequencies stay float32, as in engines: rounded to bfloat16, angles are off by radians at position 2000.
    """
    for name, parameter in module.named_parameters():
        if not name.startswith(but):
            parameter.data = parameter.data.to(dtype)


def intermediate_size(target_config: Any) -> int:
    """Return the width of a new drafter's MLPs: the target's, or three times its hidden size if it has none."""
    return getattr(usual_layer(target_config), "intermediate_size", None) or 3 * int(target_config.hidden_size)


def target_fields(target_config: Any) -> RawConfig:
    """Return the widths, heads and rotary settings of the target, which a new drafter adopts."""
    usual = usual_layer(target_config)
    heads, latent = usual.num_attention_heads, getattr(usual, "kv_lora_rank", None)
    rope = getattr(target_config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}
    # If the settings differ by kind of layer, take those of layers that read the whole prefix, as a drafter does,
    # unless these layers do not rotate.
    kinds = ("full_attention", "hybrid", "sliding_attention", "hybrid_sliding")
    rope = next((rope[kind] for kind in kinds if rope.get(kind)), rope)
    eps = (getattr(target_config, name, None) for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps"))
    return {
        "vocab_size": target_config.vocab_size,
        "hidden_size": target_config.hidden_size,
        "num_attention_heads": heads,
        # with MLA a target caches one latent for all heads; keys and values of as many heads would be larger than that
        "num_key_value_heads": math.gcd(heads, 8) if latent else usual.num_key_value_heads,
        "head_dim": getattr(usual, "head_dim", None) or target_config.hidden_size // heads,
        "max_position_embeddings": target_config.max_position_embeddings,
        "rms_norm_eps": next((value for value in eps if value), 1e-6),
        "rope_parameters": _rotation(rope),
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
