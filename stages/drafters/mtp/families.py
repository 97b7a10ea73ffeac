"""The families of native heads: what their tensors are called, and how engines compute with them. No torch.

Sources: `srt/models/{mimo_mtp, glm4_moe_nextn, deepseek_nextn, qwen3_next_mtp, qwen3_5_mtp}.py` of SGLang 0.5.23, and
`model_executor/models/{mimo, mimo_mtp, glm4_moe_mtp, deepseek_mtp, qwen3_next_mtp}.py` of vLLM 0.32.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from draftsmith.artifacts.errors import DraftsmithError


@dataclass(frozen=True)
class Reading:
    """How an engine feeds a head."""

    target_normed: bool = True  # the target's hidden state is the one after its final norm
    own_normed: bool = True  # the head's own state is fed back after the head's norm
    zeroes_first: bool = False  # the embedding of the entry at position 0 is zero


@dataclass(frozen=True)
class Family:
    """The layout of a family's head in a checkpoint, and the engines' readings."""

    architectures: tuple[str, ...]  # of targets, as in config.json
    prefix: str  # of the head's tensors; {layers} is the target's number of layers
    names: Mapping[str, str]  # module of the model -> name after the prefix; `layer` is the decoder layer
    hidden_first: bool = False  # the joined input begins with the hidden state, not with the embedding
    sglang: Reading = Reading()
    vllm: Reading = Reading()
    fields: tuple[str, ...] = ("num_nextn_predict_layers",)  # of config.json, that count the head's layers
    copies: tuple[str, ...] = ()  # names of tensors that engines replace by the target's

    def reading(self, engine: str) -> Reading:
        return self.vllm if engine == "vllm" else self.sglang

    def file_name(self, name: str, layers: int) -> str:
        """Return the name in a checkpoint of a parameter of the model. layers: how many the target has."""
        module = next(module for module in self.names if name.startswith(f"{module}."))
        renamed = f"{self.names[module]}.{name.removeprefix(module)[1:]}".lstrip(".")
        return self.prefix.format(layers=layers) + renamed


_NEXTN = {"embed_norm": "enorm", "hidden_norm": "hnorm", "join": "eh_proj", "norm": "shared_head.norm", "layer": ""}
_COPIES = ("embed_tokens.weight", "shared_head.head.weight")
_QWEN = {
    "embed_norm": "pre_fc_norm_embedding",
    "hidden_norm": "pre_fc_norm_hidden",
    "join": "fc",
    "norm": "norm",
    "layer": "layers.0",
}
# by `model_type` of the target's text config; a MiMo is a Qwen2
FAMILIES: dict[str, Family] = {
    "mimo": Family(
        ("MiMoForCausalLM",),
        "model.mtp_layers.0.",
        {
            "embed_norm": "token_layernorm",
            "hidden_norm": "hidden_layernorm",
            "join": "input_proj",
            "norm": "final_layernorm",
            "layer": "",
        },
        hidden_first=True,
        sglang=Reading(zeroes_first=True),
        vllm=Reading(target_normed=False, zeroes_first=True),
    ),
    "glm4_moe": Family(
        ("Glm4MoeForCausalLM",),
        "model.layers.{layers}.",
        _NEXTN,
        vllm=Reading(own_normed=False, zeroes_first=True),
        copies=_COPIES,
    ),
    "deepseek_v3": Family(
        ("DeepseekV3ForCausalLM",),
        "model.layers.{layers}.",
        _NEXTN,
        vllm=Reading(zeroes_first=True),
        copies=_COPIES,
    ),
    "qwen3_next": Family(("Qwen3NextForCausalLM",), "mtp.", _QWEN),
    "qwen3_5_text": Family(
        ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"), "mtp.", _QWEN, fields=("mtp_num_hidden_layers",)
    ),
}
ARCHITECTURES = tuple(name for family in FAMILIES.values() for name in family.architectures)
ENGINE_FIELD = "mtp_engine"  # of a head's own config.json
_HEAD = re.compile(r"(^|\.)(mtp\w*|nextn\w*|eh_proj)\.")  # in names of tensors of any family's head
_QUANTISED = re.compile(r"(_scale|_scale_inv|_packed|qweight|_zero_point)$")


@dataclass(frozen=True)
class HeadFiles:
    """The tensors of a head in a folder, and the files that hold them."""

    folder: Path
    family: Family
    prefix: str
    files: Mapping[str, Path] = field(default_factory=dict)  # tensor -> file


def family_of(config: Any) -> Family | None:
    """Return the family of a target's text config; None if it is not supported."""
    mimo = "MiMoForCausalLM" in (getattr(config, "architectures", None) or ())
    return FAMILIES.get("mimo" if mimo else config.model_type)


def find_head(folder: Path, config: Any) -> HeadFiles | None:
    """Return the head in a checkpoint, or None if it has none. Reads headers only.

    config: the target's text config. Raises DraftsmithError if the head's family is not supported, if it has
    several layers, or if it is quantised.
    """
    family, files = family_of(config), _tensor_files(folder)
    if family is None:
        if (name := next(filter(_HEAD.search, sorted(files)), None)) is None:
            return None
        raise DraftsmithError(
            f"{files[name]}: {name} belongs to an MTP head of {config.model_type}, and its layout is not known here. "
            f"Known are those of {', '.join(FAMILIES)}."
        )
    prefix = family.prefix.format(layers=config.num_hidden_layers)
    copies = {prefix + name for name in family.copies}
    tensors = {name: path for name, path in files.items() if name.startswith(prefix) and name not in copies}
    if not tensors:
        return None
    layers = next((count for name in family.fields if (count := getattr(config, name, None))), 1)
    if layers != 1:
        raise DraftsmithError(
            f"{folder / 'config.json'}: {family.fields[0]} is {layers}, and only heads of one layer are supported."
        )
    if quantised := [name for name in tensors if _QUANTISED.search(name)]:
        raise DraftsmithError(
            f"{tensors[min(quantised)]}: {min(quantised)} shows that the MTP head is quantised, which is not "
            "supported. Use the checkpoint that is not quantised."
        )
    return HeadFiles(folder, family, prefix, tensors)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return tensor -> file for all tensors of a checkpoint. Files that an index names are not opened."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    read = index if index.is_file() else single
    if not read.is_file():
        return {}
    try:
        if read == index:
            return {name: folder / file for name, file in json.loads(index.read_bytes())["weight_map"].items()}
        with safe_open(single, framework="np") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DraftsmithError(f"{read}: cannot be read ({error}). Copy or download the checkpoint again.") from error
