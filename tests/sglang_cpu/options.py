"""Options and environment variables of a server on a device, as in `LaunchConfig.options` and `.environment`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from draftsmith.artifacts.host import visible_gpus
from draftsmith.stages.engines.config import OptionValue

CPU_OPTIONS: dict[str, OptionValue] = {
    "device": "cpu",
    "attention-backend": "torch_native",
    # both by the backend whose two operations the stand-in `sgl_kernel` implements
    "prefill-attention-backend": "intel_amx",
    "decode-attention-backend": "intel_amx",
    "disable-cuda-graph": True,
    "disable-overlap-schedule": True,
    "max-total-tokens": 4096,  # positions in the key/value pool; without it SGLang takes most of the memory
    "skip-server-warmup": True,
    "sleep-on-idle": True,  # a server without requests would keep a core busy
}

CPU_ENVIRONMENT: dict[str, str] = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_OMP_THREADS_BIND": "0",  # one core a rank; without it SGLang counts the machine's NUMA nodes
    "OMP_NUM_THREADS": "1",  # several servers and the tests share the cores
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than serving a tiny model
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Device:
    """What a server needs on its device."""

    dtype: str
    options: Mapping[str, OptionValue]
    environment: Mapping[str, str]


CPU = Device("float32", CPU_OPTIONS, CPU_ENVIRONMENT)
# by kernels that SGLang and Triton compile themselves; on a GPU SGLang's DFLASH computes in bfloat16 only
GPU = Device(
    "bfloat16",
    {
        "attention-backend": "triton",
        "speculative-draft-attention-backend": "triton",
        "sampling-backend": "pytorch",
        "skip-server-warmup": True,
    },
    {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
)
HERE = GPU if visible_gpus() else CPU
