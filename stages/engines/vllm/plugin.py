"""A plug-in for vLLM's servers: vLLM's update of draft weights reads a drafter's folder.

vLLM loads it by the entry-point group `vllm.general_plugins`, in an environment that has this project installed without
its dependencies. It registers a backend in addition to `nccl` and `ipc`, whose senders need one of the server's GPUs.
"""

from __future__ import annotations

from contextlib import suppress

BACKEND = "draftsmith"  # of --weight-transfer-config


def activate() -> None:
    """Register the backend."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory  # plug-ins load before vLLM does

    with suppress(ValueError):  # it is registered already
        WeightTransferEngineFactory.register_engine(BACKEND, f"{__package__}.plugin_swap", "FolderBackend")
