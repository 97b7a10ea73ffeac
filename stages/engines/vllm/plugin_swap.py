"""The backend of vLLM's weight updates that reads a drafter's checkpoint, in the server's own processes.

`POST /update_weights` with `{"update_info": {"drafter": digest, "folder": path, "upload": "runs:/ID/drafter", "served":
digest before}}`, between `/start_draft_weight_update` and `/finish_weight_update`, writes it. Every rank reads the
files, and vLLM's own loader copies its part of them into the served parameters. Those that the drafter shares with the
target are not written. If a rank cannot, all ranks write their previous weights back and the request fails; no step
runs meanwhile. The weights before the last update are kept in memory, so that writing them back needs no files.

DFlash and DSpark also hold copies of parameters, such as the key/value projections of all layers in one. vLLM's loader
makes new copies before every layer is restored (0.32.0), and captured graphs keep the addresses of the old ones. So
they are made again, and copied into the old ones.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors.torch import load
from vllm.distributed.parallel_state import get_tp_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from draftsmith.stages.engines.servers.drafter_files import gather, read_drafter, reason_of, wanted_drafter


@dataclass
class NoInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class Checkpoint(WeightTransferUpdateInfo):
    """The fields of a `WantedDrafter`, and the digest of the drafter served before."""

    drafter: str
    folder: str
    upload: str
    served: str


class FolderBackend(WeightTransferEngine[NoInfo, Checkpoint]):
    """Reads a drafter's folder."""

    init_info_cls = NoInfo
    update_info_cls = Checkpoint

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._written = ""  # digest of the last drafter that was written
        # digest and parameters, on the CPU, before the last update
        self._before: tuple[str, dict[str, torch.Tensor]] | None = None

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        """Do nothing."""

    def start_weight_update(self) -> None:
        """Refuse an update of the target."""
        if self.model is self._default_model:
            raise RuntimeError("this backend writes only drafters. Use /start_draft_weight_update")

    def receive_weights(self, update_info: Checkpoint) -> None:
        """Write the drafter, or change nothing if its files are the wrong ones or do not fit on a rank."""
        served = dict(self.model.named_parameters())
        targets = {parameter.data_ptr() for parameter in self._default_model.parameters()}
        unshared = {name: parameter for name, parameter in served.items() if parameter.data_ptr() not in targets}
        before = {name: parameter.detach().to("cpu", copy=True) for name, parameter in unshared.items()}
        copies = {name: value for name, value in vars(self.model.model).items() if isinstance(value, torch.Tensor)}
        failed: Exception | None = None
        with torch.no_grad():
            try:
                wanted = wanted_drafter(asdict(update_info))
                if self._before is not None and self._before[0] == wanted.drafter:
                    _put(self._before[1], unshared)
                elif wanted.drafter != self._written:
                    tensors = load(read_drafter(wanted)["model.safetensors"])
                    shared = served.keys() - unshared.keys()
                    self._load({n: t for n, t in tensors.items() if not {n, f"model.{n}"} & shared})
            except Exception as error:  # any kind: a rank that raises would leave the others waiting
                failed = error
            states = gather("" if failed is None else reason_of(failed), get_tp_group().cpu_group)
            if problem := next(filter(None, states), None):
                _put(before, unshared)
            self._derive(copies)
        if problem:
            raise RuntimeError(problem) from None
        if update_info.drafter != self._written:
            self._before = self._written or update_info.served, before
        self._written = update_info.drafter

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(tensors.items())
        finally:
            finalize_layerwise_reload(self.model, self.model_config)

    def _derive(self, copies: dict[str, torch.Tensor]) -> None:
        """Make the copies of parameters again, at the addresses of `copies`."""
        inner = self.model.model
        if hasattr(inner, "_build_fused_kv_buffers"):
            inner._build_fused_kv_buffers()
        for name, tensor in copies.items():
            tensor.copy_(getattr(inner, name))
            setattr(inner, name, tensor)

    def finish_weight_update(self) -> None:
        """Do nothing: the weights are complete."""

    def shutdown(self) -> None:
        """Do nothing."""


def _put(values: dict[str, torch.Tensor], parameters: dict[str, torch.Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)
