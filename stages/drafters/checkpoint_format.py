"""What the checkpoint layouts of all architectures share: reading strictly, writing, and fitting a target."""

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
from draftsmith.stages.target.model_sizes import usual_layer, wrong_numbers

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_PARTIAL = "partial_rotary_factor"


class NoMaskTokenError(DraftsmithError):
    """A new drafter has no mask token."""


@contextmanager
def config_errors(where: str) -> Iterator[None]:
    """Values of a kind that the reader does not expect become one clear error."""
    try:
        yield
    except DraftsmithError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise DraftsmithError(
            f"drafter {where}: a field is not what it should be ({one_line(error, 200)}); export the checkpoint again"
        ) from error


def read_raw_config(folder: Path) -> dict[str, Any]:
    """config.json as it is, rotary settings under `rope_parameters`; one of speculators as if it were written here.

    Raises DraftsmithError if it is no JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}); give the folder of a drafter") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"drafter {path}: is not a JSON object; give the folder of a drafter")
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
            f"drafter {path}: rope_theta is {older!r} at the top and {theta!r} in rope_parameters (engines read "
            "either); keep the trained one"
        )
    return raw


# Fields of a config.json that hold others; null and absence are for whoever reads them.
_LISTS = {"architectures": str, "layer_types": str, "aux_hidden_state_layer_ids": int}
_OBJECTS = (
    *("dflash_config", "dspark_config", "eagle_config"),
    *("rope_parameters", "rope_scaling", "transformer_layer_config"),
)


def _containers(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Whether each is of its kind, as `require_kinds` takes it."""
    for name, kind in _LISTS.items():
        value = raw.get(name)
        yield name, value, value is None or (isinstance(value, list) and all(type(each) is kind for each in value))
    for name in _OBJECTS:
        yield name, raw.get(name), isinstance(raw.get(name), dict | None)


def is_speculators(folder: Path) -> bool:
    """Is a checkpoint, whose config.json could be read, in the layout of speculators?"""
    return speculators.KIND in json.loads((folder / CONFIG_FILE).read_text())


def parse_config(raw: Mapping[str, Any], kind: type[Any], architecture: str, path: Path) -> Any:
    """`raw` as a config class of transformers, whose numbers are such as a model can be made of."""
    try:
        config = kind(**{**raw, "architectures": [architecture]})
    except Exception as error:  # transformers checks fields with error classes of its own
        raise DraftsmithError(
            f"drafter {path}: cannot be read ({one_line(error)}); give the folder of a drafter"
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


def require_fields(path: Path, fields: Iterable[tuple[str, Any]]) -> None:
    """Refuse a config in which one of the named values is missing."""
    for field, value in fields:
        if value is None:
            raise DraftsmithError(f"drafter {path}: field {field} is missing (an engine would guess it); add it")


def check_equal(where: str, checks: Iterable[tuple[str, Any, Any]]) -> None:
    """checks: (field, the drafter's, the target's). Raises DraftsmithError at the first that differs."""
    for field, has, needs in checks:
        if has != needs:
            raise DraftsmithError(
                f"drafter {where}: {field} is {has}, the target's is {needs}: it was made for another target; "
                "give a drafter of this target or leave sft.init_from out"
            )


def rope_checks(drafter: Any, target: Any) -> list[tuple[str, Any, Any]]:
    """The rotary settings of two configs, as `check_equal` takes them; none where one of them does not say, or where
    the target's differ by layer: a drafter may then have either."""
    ours, theirs = (getattr(config, "rope_parameters", None) or {} for config in (drafter, target))
    theirs = _rotation(theirs)
    if not (ours.get("rope_theta") and theirs.get("rope_theta")):
        return []
    usual = (("rope_type", "default"), ("factor", 1.0))
    return [
        ("rope_theta", float(ours["rope_theta"]), float(theirs["rope_theta"])),
        *((f"rope_parameters.{field}", ours.get(field, value), theirs.get(field, value)) for field, value in usual),
    ]


def refuse_other_rotations(path: Path, raw: Mapping[str, Any]) -> None:
    """Only drafters whose whole heads rotate are supported, and by the angles that engines compute too. raw: a
    config.json that has rope_parameters."""
    if (raw["rope_parameters"] | raw).get(_PARTIAL) not in (None, 1):
        raise DraftsmithError(f"drafter {path}: {_PARTIAL} is set: only whole heads that rotate are supported")
    if reason := _rotated_otherwise(raw["rope_parameters"]):
        raise DraftsmithError(
            f"drafter {path}: rope_parameters has {reason}, which SGLang computes otherwise than transformers: give a "
            "drafter without it (if it is a line's champion: begin another line, registry.name)"
        )


def _rotated_otherwise(rope: Mapping[str, Any]) -> str | None:
    """The setting by which SGLang's angles or their scale differ from those of transformers; None if they are equal."""
    if (kind := rope.get("rope_type")) in ("dynamic", "longrope"):  # chosen by what else a forward reads
        return f"rope_type {kind}"
    return "attention_factor" if rope.get("attention_factor") is not None else None


def _rotation(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a drafter whose target has these: the same, but plain angles where engines do not agree. Whole heads
    rotate, whatever the target's do: engines would read another part than the models here."""
    if _rotated_otherwise(rope):
        return {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return {name: value for name, value in rope.items() if name != _PARTIAL}


# What every architecture here computes, whatever a config calls it: other values are another model to an engine.
COMPUTED: dict[str, Any] = {
    "hidden_act": "silu",
    "rope_is_neox_style": True,
    "is_neox_style": True,
    "use_gemma_norm": False,
    "quantization_config": None,
    "text_config": None,  # engines would read it in place of the fields around it
}


def refuse_other_models(path: Path, fields: Mapping[str, Any], computed: Mapping[str, Any], within: str = "") -> None:
    """Refuse a config with a field that engines compute by and we do not.

    computed: field -> the value that changes nothing; null and absence are taken for it. within: where the fields
    stand, e.g. "dflash_config.".
    """
    for name, neutral in computed.items():
        if (value := fields.get(name)) is not None and value != neutral:
            raise DraftsmithError(
                f"drafter {path}: {within}{name} is {json.dumps(value)[:60]}: to an engine that is another model than "
                f"the one computed here ({json.dumps(neutral)}); give a drafter without it"
            )


def is_number(value: Any) -> bool:
    """One of JSON, and finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> bool:
    """An integer, and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_block(value: Any) -> bool:
    """A number of tokens that a block may have: the anchor and a proposal at least."""
    return is_integer(value) and value >= 2


def require_kinds(path: Path, checks: Iterable[tuple[str, Any, bool]]) -> None:
    """checks: (field, value, whether it is of the kind that it should be). Raises DraftsmithError at the first not."""
    for field, value, right in checks:
        if not right:
            raise DraftsmithError(f"drafter {path}: {field} is {value!r}; export the checkpoint again")


def check_layer_ids(where: str, ids: Sequence[int], layers: int, *, ask_for: str) -> None:
    """Every id is a layer of the target, and none is named twice."""
    if len(set(ids)) < len(ids):
        raise DraftsmithError(f"drafter {where}: target_layer_ids {list(ids)} name a layer twice; {ask_for}")
    if not ids or min(ids) < 0 or max(ids) >= layers:
        raise DraftsmithError(
            f"drafter {where}: target_layer_ids {list(ids)} do not fit layers 0 … {layers - 1} of the target; "
            "name layers of it, or give a drafter that was made for it"
        )


def unservable_layers(ids: Sequence[int], layers: int) -> str | None:
    """Why an engine would hand these layers to the drafter in another order, or not at all; None if it would not.

    SGLang collects hidden states while the target runs, in front of its layers: in rising order, never behind the last.
    """
    if list(ids) != sorted(ids):
        return f"target_layer_ids {list(ids)} do not rise, and SGLang hands layers over in rising order"
    if max(ids) == layers - 1:
        return f"target_layer_ids {list(ids)} name the last layer, behind which SGLang takes nothing"
    return None


def write_checkpoint(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write config.json and model.safetensors. Raises DraftsmithError for weights that are no numbers."""
    _must_be_finite(folder, tensors)
    (folder / CONFIG_FILE).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
    save_file(dict(tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})


def check_weights(folder: Path, expected: Mapping[str, tuple[int, ...]], own_name: Callable[[str], str | None]) -> None:
    """model.safetensors is there and whole, and has these tensors with these shapes and no other; reads its header
    only. own_name: of an architecture."""
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            names = {own: name for name in file.keys() if (own := own_name(name)) is not None}  # noqa: SIM118
            found = {own: torch.empty(file.get_slice(name).get_shape(), device="meta") for own, name in names.items()}
    except (OSError, SafetensorError) as error:
        raise DraftsmithError(
            f"drafter {path}: cannot be read ({error}); the file is missing or cut short: a drafter is one "
            f"{WEIGHTS_FILE}, export it as that"
        ) from error
    check_tensors(folder, found, expected, "those of its config.json")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """model.safetensors. Raises DraftsmithError if it cannot be read, or holds weights that are no numbers."""
    path = folder / WEIGHTS_FILE
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}); the file is missing or cut short") from error
    _must_be_finite(folder, tensors)
    return tensors


def _must_be_finite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Such a drafter would propose what is never taken, and its training fail as if it diverged."""
    floats = {name: each for name, each in tensors.items() if each.is_floating_point() and each.itemsize > 1}
    if names := [name for name, each in floats.items() if not bool(each.isfinite().all())]:
        raise DraftsmithError(
            f"drafter {folder / WEIGHTS_FILE}: {min(names)} holds NaN or infinite weights ({len(names)} in "
            "all), of a training that diverged or a dtype that is too small: give another checkpoint"
        )


def check_tensors(
    folder: Path, tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], layout: str
) -> None:
    """Every tensor must be there, with its shape, and no other: engines ignore names that they do not know."""
    shared = expected.keys() & tensors.keys()
    for problem, names in (
        ("lacks tensor", expected.keys() - tensors.keys()),
        ("has the unknown tensor", tensors.keys() - expected.keys()),
        ("has the wrong shape for", {name for name in shared if tuple(tensors[name].shape) != expected[name]}),
    ):
        if names:
            raise DraftsmithError(
                f"drafter {folder / WEIGHTS_FILE}: {problem} {min(names)} ({len(names)} in all); expected {layout}"
            )


def cast(drafter: nn.Module, dtype: torch.dtype) -> None:
    """Weights to `dtype`, in place. Rotary frequencies stay float32, as in engines: rounded to bfloat16, they turn by
    radians more or less at position 2000."""
    for parameter in drafter.parameters():
        parameter.data = parameter.data.to(dtype)


def serving_fields(config: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Fields that engines read under older names."""
    return {"rope_theta": config.rope_parameters["rope_theta"], "dtype": str(dtype).removeprefix("torch.")}


def intermediate_size(target_config: Any) -> int:
    """Of a new drafter's MLPs: the target's, or the usual three times its width where it has none of its own."""
    return getattr(usual_layer(target_config), "intermediate_size", None) or 3 * int(target_config.hidden_size)


def target_fields(target_config: Any) -> dict[str, Any]:
    """Widths, heads and rotary settings of the target, which a new drafter takes over."""
    usual = usual_layer(target_config)
    heads = usual.num_attention_heads
    rope = getattr(target_config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}
    # by kind of layer, where these differ: a drafter reads the whole prefix, unless the layers that do turn nothing
    kinds = ("full_attention", "hybrid", "sliding_attention", "hybrid_sliding")
    rope = next((rope[kind] for kind in kinds if rope.get(kind)), rope)
    eps = (getattr(target_config, name, None) for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps"))
    return {
        "vocab_size": target_config.vocab_size,
        "hidden_size": target_config.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": usual.num_key_value_heads,
        "head_dim": getattr(usual, "head_dim", None) or target_config.hidden_size // heads,
        "max_position_embeddings": target_config.max_position_embeddings,
        "rms_norm_eps": next((value for value in eps if value), 1e-6),
        "rope_parameters": _rotation(rope),
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
