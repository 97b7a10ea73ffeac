"""SGLang plug-in that closes the gaps of DFLASH and DSPARK on a CPU. Tests only: on a GPU none of it is needed.

SGLang loads it through the entry-point group `sglang.srt.plugins` in each of its processes. Each function names the
part of SGLang 0.5.20 … 0.5.23 that it replaces, and why that fails on a CPU.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

BACKEND = "intel_amx"  # the attention backend of SGLang's CPU path
DSPARK_WORKER = "speculative.dspark_components.dspark_worker_v2.DSparkWorkerV2"


def activate() -> None:
    """Register the hooks. Called by SGLang before it reads its own options."""
    import sgl_kernel  # noqa: F401  (refuses to be imported where there is a GPU)
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    allow_draft_backend()
    ignore_streams()
    name_chain_topk()
    fork_processes()
    hooks: list[tuple[str, Callable[..., Any], HookType]] = [
        ("arg_groups.speculative_hook._handle_dflash", let_drafter_pass, HookType.AROUND),
        ("arg_groups.speculative_hook._handle_dspark", let_drafter_pass, HookType.AROUND),
        (f"{DSPARK_WORKER}.forward_batch_generation", leave_pipeline_out, HookType.AROUND),
        ("model_executor.model_runner.ModelRunner._extend_forward_kwargs", keep_dtype, HookType.AFTER),
        ("models.dflash.DFlashAttention.__init__", leave_fused_kernel_out, HookType.AFTER),
    ]
    for name, hook, kind in hooks:
        HookRegistry.register(f"sglang.srt.{name}", hook, kind)


def fork_processes() -> None:
    """entrypoints/engine.py spawns its processes, as CUDA needs it: each imports everything again."""
    start_method = multiprocessing.set_start_method

    def forked(method: str | None, force: bool = False) -> None:
        start_method("fork" if method == "spawn" else method, force)

    multiprocessing.set_start_method = forked


def allow_draft_backend() -> None:
    """arg_groups/choices.py: the list of a drafter's attention backends has none for a CPU."""
    from sglang.srt.arg_groups import choices

    if BACKEND not in choices.DRAFT_ATTENTION_BACKEND_CHOICES:
        choices.add_draft_attention_backend_choices([BACKEND])


def ignore_streams() -> None:
    """speculative/dflash_worker_v2.py records a stream on `seq_lens`; tensors of a CPU have none and torch raises."""
    record_stream = torch.Tensor.record_stream

    def recorded(self: torch.Tensor, stream: Any) -> None:
        if self.device.type != "cpu":
            record_stream(self, stream)

    torch.Tensor.record_stream = recorded  # type: ignore[method-assign, assignment]
    if not torch.cuda.is_available():  # models with experts wait for it after loading
        torch.cuda.synchronize = lambda *_args, **_kwargs: None


def name_chain_topk() -> None:
    """layers/attention/intel_amx_backend.py asks the verified block for `tree_topk`; DFLASH's lacks it. 1 = a chain."""
    from sglang.srt.speculative.dflash_info import DFlashVerifyInput

    if not hasattr(DFlashVerifyInput, "tree_topk"):
        DFlashVerifyInput.tree_topk = 1


def keep_dtype(kwargs: dict[str, Any], runner: Any, forward_batch: Any, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
    """model_runner.py casts a drafter's input embeddings to bfloat16, whatever dtype the model has."""
    if "input_embeds" in kwargs and forward_batch.input_embeds is not None:
        kwargs["input_embeds"] = forward_batch.input_embeds.to(runner.dtype)
    return kwargs


def leave_fused_kernel_out(_result: None, attention: Any, *_args: Any, **_kwargs: Any) -> None:
    """models/dflash.py takes a CUDA kernel for norm and rotation in bfloat16; this is the same in torch."""
    attention.use_table_qk_norm_rope = False


def leave_pipeline_out(run: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Without overlap, which a CPU has not, the scheduler hands tensors of a pipeline to a worker that takes none in
    0.5.20. There are none either."""
    if kwargs.get("pp_proxy_tensors", ...) is None:
        del kwargs["pp_proxy_tensors"]
    return run(worker, *args, **kwargs)


def let_drafter_pass(handle: Callable[..., None], server_args: Any, *args: Any, **kwargs: Any) -> None:
    """arg_groups/speculative_hook.py lets drafters of blocks pass on named devices only. The CPU stands in for one.

    0.5.23 asks the platform, which may be a foreign one that answers for itself; for DSPARK, and 0.5.20 for DFLASH too,
    the device's name is compared, which decides nothing else there (without data-parallel attention).
    """
    from sglang.srt.arg_groups import speculative_hook as module

    view, platform = module.resolving_view, getattr(module, "current_platform", None)
    with ExitStack() as stack:
        if platform is not None:
            stack.enter_context(patch.object(module, "current_platform", ForeignPlatform(platform)))
        if platform is None or handle.__name__ == "_handle_dspark":
            stack.enter_context(patch.object(module, "resolving_view", lambda requested: CudaView(view(requested))))
        handle(server_args, *args, **kwargs)


class _Around:
    """Everything that is not defined in the subclass is the wrapped object's."""

    def __init__(self, wrapped: Any):
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


class CudaView(_Around):
    """Server arguments whose device reads as one that is supported."""

    device = "cuda"


class ForeignPlatform(_Around):
    """A platform from outside SGLang, which declares what it supports."""

    def is_out_of_tree(self) -> bool:
        return True

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm in ("DFLASH", "DSPARK")

    def supports_speculative_draft_attention_backend(self, _algorithm: str, backend: str) -> bool:
        return backend == BACKEND

    def get_default_speculative_draft_attention_backend(self, _algorithm: str) -> str:
        return BACKEND
