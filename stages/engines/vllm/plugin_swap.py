"""The backend of vLLM's weight updates that reads a drafter's checkpoint, in the server's own processes.

`POST /update_weights` with `{"update_info": {"folder": path, "drafter": digest}}`, between `/start_draft_weight_update`
and `/finish_weight_update`, writes it; with an empty folder, the drafter before the last one. Every rank reads the
files, and vLLM's own loader copies its part of them into the served parameters.

DFlash and DSpark also hold copies of parameters, such as the key/value projections of all layers in one. vLLM's loader
makes new copies before every layer is restored (0.32.0), and captured graphs keep the addresses of the old ones. So
they are made once more, and copied into the old ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from draftsmith.stages.drafters.digest import drafter_digest

_OF_THE_TARGET = ("embed_tokens.weight", "lm_head.weight")


@dataclass
class NoInfo(WeightTransferInitInfo):
    """Nothing is agreed on beforehand."""


@dataclass
class Checkpoint(WeightTransferUpdateInfo):
    """A drafter's files."""

    folder: str  # on the server's host
    drafter: str  # their digest


class FolderBackend(WeightTransferEngine[NoInfo, Checkpoint]):
    """Reads a drafter's folder."""

    init_info_cls = NoInfo
    update_info_cls = Checkpoint

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._speculative = self.vllm_config.speculative_config
        self._served = Path(self._speculative.model) if self._speculative else None
        self._before: Path | None = None

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Refuse an update of the target."""
        if self.model is self._default_model:
            raise RuntimeError("this backend writes drafters alone. Use /start_draft_weight_update")

    def receive_weights(self, update_info: Checkpoint) -> None:
        """Write the drafter, unless its files are others than they should be."""
        folder = Path(update_info.folder) if update_info.folder else self._before
        if folder is None:
            raise RuntimeError("no drafter was served before this one")
        if update_info.folder and drafter_digest(folder) != update_info.drafter:
            raise RuntimeError(f"{folder} on this host does not have the files of drafter {update_info.drafter[:12]}")
        tensors = load_file(folder / "model.safetensors")
        if self._speculative.method != "eagle3":  # others use the target's embedding and head
            tensors = {name: tensor for name, tensor in tensors.items() if name not in _OF_THE_TARGET}
        with torch.no_grad():
            self._write(tensors)
        if folder != self._served:
            self._served, self._before = folder, self._served

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        inner = self.model.model
        copies = {name: tensor for name, tensor in vars(inner).items() if isinstance(tensor, torch.Tensor)}
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(tensors.items())
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        if hasattr(inner, "_build_fused_kv_buffers"):
            inner._build_fused_kv_buffers()
        for name, tensor in copies.items():
            tensor.copy_(getattr(inner, name))
            setattr(inner, name, tensor)

    def finish_weight_update(self) -> None:
        """Do nothing: the weights are complete."""

    def shutdown(self) -> None:
        """Do nothing."""
