"""A cache of folders that take long to build, kept between test runs, safe for parallel test workers."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType


def root() -> Path:
    """Return `DRAFTSMITH_TEST_CACHE`, or `tests/.cache`."""
    return Path(os.environ.get("DRAFTSMITH_TEST_CACHE") or Path(__file__).parents[1] / ".cache").resolve()


def source_digest(*modules: ModuleType, extra: str = "") -> str:
    """Return 16 digits of sha256 over the modules' source, the versions of torch and transformers, and `extra`."""
    import torch
    import transformers

    digest = hashlib.sha256(f"{torch.__version__} {transformers.__version__} {extra}".encode())
    for module in modules:
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    return digest.hexdigest()[:16]


def cached(name: str, build: Callable[[Path], None], *, code: Iterable[ModuleType] = (), extra: str = "") -> Path:
    """Return the folder that `build(folder)` fills; build it if it is missing, or if `code` or `extra` changed.

    It is built with one thread of torch. One process builds while the others wait (flock, dropped by the kernel if the
    builder dies); a folder gets its final name only when it is complete.
    """
    import torch

    base = root()
    base.mkdir(parents=True, exist_ok=True)
    final = base / f"{name}-{source_digest(*code, extra=extra)}"
    if final.exists():  # nobody waits for another folder of this name to be built
        return final
    with (base / f".lock-{name}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not final.exists():
            partial = base / f".partial-{final.name}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                build(partial)
            finally:
                torch.set_num_threads(threads)
            partial.rename(final)
    return final
