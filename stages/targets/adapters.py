"""LoRA adapters of a target, in peft's format: each row of a batch goes through its own, in one forward.

An adapted map computes W x + s · B A x with the A and B of the row's adapter, and W x for the target alone. peft's own
batches of several adapters take the first dimension of an input for the rows, which a decoder may have joined with the
positions, and multiply one adapter after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.targets.config import ADAPTER_FILES
from draftsmith.stages.targets.layers import causal_lm_of, decoder_of

_PREFIX = "base_model.model."  # of peft's names of tensors
# What is not W x + lora_alpha / r · B A x. SGLang and vLLM refuse it too, or compute something else (rsLoRA).
_REFUSED = (
    "use_dora",
    "use_rslora",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
Factors = tuple[torch.Tensor, torch.Tensor]  # A [r, in], and s · B [out, r]


class Adapters:
    """The adapters of a loaded target, and which of them each row of the current forward has."""

    def __init__(self, names: Sequence[str] = ()):
        self.names = tuple(names)
        self.rows: torch.Tensor | None = None  # [n] index of a name + 1, 0: the target alone; None: all rows alone

    def index(self, names: Sequence[str]) -> list[int]:
        """Return the value of `rows` for adapters by name, "" for none. Raises DraftsmithError for an unknown one."""
        if unknown := sorted(set(names) - {"", *self.names}):
            has = ", ".join(self.names) or "none"
            raise DraftsmithError(f"adapter {unknown[0]}: the target has {has}. Add it to target.adapters.")
        return [self.names.index(name) + 1 if name else 0 for name in names]


class AdaptedLinear(nn.Module):
    """A frozen linear map with the factors of M adapters. No gradient."""

    def __init__(self, base: nn.Module, factors: Sequence[Factors | None], adapters: Adapters, like: torch.Tensor):
        """Take a map's module and its factors in each adapter. like: a tensor of the target's dtype and device."""
        super().__init__()
        self.base, self.adapters = base, adapters
        self.down: torch.Tensor  # [in, R] of all adapters side by side
        self.up: torch.Tensor  # [R, out]
        self.owner: torch.Tensor  # [R] whose each rank is, as in `Adapters.rows`
        given = [(index, *each) for index, each in enumerate(factors, start=1) if each is not None]
        owner = [index for index, a, _ in given for _ in a]
        self.register_buffer("down", torch.cat([a for _, a, _ in given]).T.to(like).contiguous())
        self.register_buffer("up", torch.cat([b for *_, b in given], 1).T.to(like).contiguous())
        self.register_buffer("owner", torch.tensor(owner, device=like.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [n, T, in], or [n * T, in] row by row.

        Every row is multiplied by all adapters, and the others' products are dropped: for a few adapters that is faster
        than to gather the factors of each row.
        """
        product: torch.Tensor = self.base(x)
        rows = self.adapters.rows
        if rows is None:
            return product
        lowered = (x @ self.down).view(len(rows), -1, len(self.owner))
        return product + ((lowered * (rows[:, None, None] == self.owner)) @ self.up).view_as(product)


def linear_maps(model: nn.Module) -> dict[str, Any]:
    """Return the linear maps of a model's decoder that an adapter may adapt, by name."""
    inside = set(decoder_of(causal_lm_of(model)).modules())
    return {
        name: module
        for name, module in model.named_modules()
        # experts read some tokens of a batch, in another order; routers may return more than a product
        if module in inside and hasattr(module, "in_features") and not {"experts", "router"} & set(name.split("."))
    }


def read_adapter(name: str, folder: Path, maps: Mapping[str, Any]) -> dict[str, Factors]:
    """Return the factors of each map that an adapter adapts. maps: of `linear_maps`, on any device.

    Raises DraftsmithError for a folder without a LoRA adapter, or for one that does not fit the model.
    """
    where = f"target.adapters.{name}: {folder}"
    try:
        config = dict(json.loads((folder / ADAPTER_FILES[0]).read_text(encoding="utf-8")))
        tensors = load_file(folder / ADAPTER_FILES[1])
        kind, rank, scale = config["peft_type"], int(config["r"]), config["lora_alpha"] / config["r"]
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError, SafetensorError) as error:
        raise DraftsmithError(f"{where} is no LoRA adapter ({type(error).__name__}: {error}). Copy it again.") from None
    uses = [field for field in _REFUSED if config.get(field)]
    uses += ["bias"] if config.get("bias") not in (None, "none") else []
    if kind != "LORA" or uses:
        what = f"has {uses[0]}" if kind == "LORA" else f"is of type {kind}"
        raise DraftsmithError(f"{where} {what}. Give a LoRA adapter of linear maps alone, without such an option.")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, factor = key.removeprefix(_PREFIX).rpartition(".lora_")
        if factor not in ("A.weight", "B.weight") or module not in maps:
            raise DraftsmithError(
                f"{where} has {key}, which adapts no linear map of the target's layers. Leave it out."
            )
        found.setdefault(module, {})[factor[0]] = tensor
    for module, factors in found.items():
        needs = {"A": (rank, maps[module].in_features), "B": (maps[module].out_features, rank)}
        if (has := {factor: tuple(tensor.shape) for factor, tensor in factors.items()}) != needs:
            raise DraftsmithError(f"{where} has {module} of shapes {has}, the target needs {needs}. Give its adapter.")
    if not found:
        raise DraftsmithError(f"{where} adapts nothing. Copy it again.")
    return {module: (each["A"].float(), each["B"].float() * scale) for module, each in found.items()}


def add_adapters(model: nn.Module, folders: Mapping[str, Path], like: torch.Tensor) -> Adapters:
    """Replace the maps of a model that some adapter adapts. like: a tensor of the model's dtype and device.

    Raises DraftsmithError as `read_adapter`.
    """
    maps, adapters = linear_maps(model), Adapters(list(folders))
    factors = [read_adapter(name, folder, maps) for name, folder in folders.items()]
    for module in {name for each in factors for name in each}:
        parent, _, child = module.rpartition(".")
        adapted = AdaptedLinear(maps[module], [each.get(module) for each in factors], adapters, like)
        setattr(model.get_submodule(parent), child, adapted)
    return adapters
