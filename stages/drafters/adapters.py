"""Adds low-rank adapters to a drafter's weights. The plug-ins in servers do it too: torch and safetensors alone.

The result has the same bits on every machine and device, so that its digest proves it: products of float32 are exact in
float64, and are added there in the order of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save

from draftsmith.stages.drafters.digest import DIGESTED, WEIGHTS_FILE

ADAPTERS = "adapters"  # folder of an upload without weights: 0/, 1/, … in the order in which they are added
_PREFIX = "base_model.model."
_ROWS = 32  # of a product at a time, so that it stays in the processor's cache


def adapted(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return W + B A, float32 [out, in]. weight: [out, in]. a: [rank, in] and b: [out, rank], float32."""
    total, a, b = weight.double(), a.double(), b.double()
    for rows, columns in zip(total.split(_ROWS), b.split(_ROWS), strict=True):
        for column, row in zip(columns.T, a, strict=True):
            rows.addr_(column, row)
    return total.float()


def assemble(folders: Iterable[Path]) -> dict[str, bytes]:
    """Return the files of the last folder's drafter that its proposals depend on, by name.

    folders: a whole checkpoint, then folders that have adapters in place of weights, each of the drafter before.
    """
    content: dict[str, bytes] = {}
    for folder in folders:
        weights = content.get(WEIGHTS_FILE, b"")
        content = {name: path.read_bytes() for name in DIGESTED if (path := folder / name).exists()}
        for path in sorted(folder.glob(f"{ADAPTERS}/*/*.safetensors")):
            weights = content[WEIGHTS_FILE] = _merged(weights, load_file(path))
    return content


def _merged(weights: bytes, factors: dict[str, torch.Tensor]) -> bytes:
    """Return a checkpoint's weights with an adapter, in the dtype that they have."""
    tensors = load(weights)
    for key, a in factors.items():
        if key.endswith(".lora_A.weight"):
            name = f"{key.removeprefix(_PREFIX).removesuffix('.lora_A.weight')}.weight"
            b = factors[key.replace(".lora_A.", ".lora_B.")]
            tensors[name] = adapted(tensors[name], a, b).to(tensors[name].dtype)
    return save(tensors, metadata={"format": "pt"})
