"""A stand-in, in plain torch, for the operations of `sgl_kernel` that SGLang calls when it serves on a CPU.

PyPI's wheel of `sgl_kernel` holds CUDA kernels only, while SGLang's CPU path (SGLANG_USE_CPU_ENGINE=1) is Python on top
of a dozen small C++ operations of that package. They are written here in torch: `attention` (two operations), `cache`
(which slots of the key/value pool belong to whom), `chain` (verifying a chain of drafts). No arithmetic of a model is
replaced but attention, which becomes torch's own.

Covered: float32 and bfloat16, full attention, DFLASH and EAGLE3 chains (top-k 1). Anything else raises
NotImplementedError, and an operation that is not here cannot be imported. Loops over requests: right, not fast.

Only for tests: with a GPU SGLang must have the real package, so this one refuses to be imported there.
"""

# ruff: noqa: F401  (SGLang imports them from here)

import torch

if torch.cuda.is_available():
    raise ImportError(
        "this sgl_kernel is draftsmith's stand-in for machines without a GPU, and torch sees a GPU here: "
        "uninstall draftsmith-sglang-cpu and install SGLang with its own dependencies (make sglang-gpu)"
    )

from .attention import decode_attention_cpu, extend_attention_cpu
from .cache import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
)
from .chain import (
    build_tree_kernel_efficient_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    rotate_input_ids_cpu,
    verify_tree_greedy_cpu,
)

# The attention backend looks these two up as torch operations. A plain attribute of the namespace is found the same way
# and needs no schema, since nothing is compiled here.
torch.ops.sgl_kernel.decode_attention_cpu = decode_attention_cpu  # type: ignore[attr-defined]
torch.ops.sgl_kernel.extend_attention_cpu = extend_attention_cpu  # type: ignore[attr-defined]
