"""The GPUs that a run sees."""

from __future__ import annotations

import pytest

from draftsmith.artifacts import host
from draftsmith.artifacts.host import Gpu
from draftsmith.flows.execution.machine import gpu_model, gpu_names, gpus

GPUS = [("GPU-a1", 24, "RTX 4090"), ("GPU-b2", 80, "H100")]


@pytest.mark.parametrize(
    ("visible", "seen", "memory", "model"),
    [
        ("GPU-b2,0", ["GPU-a1", "GPU-b2"], [80, 24], "H100"),
        ("MIG-7f/1/0", ["MIG-7f/1/0"], [24], "RTX 4090"),
        ("1,2,0", ["GPU-b2"], [80], "H100"),
        ("GPU-b", ["GPU-b2"], [80], "H100"),
        ("", [], [], None),
    ],
)
def test_gpus_are_identified_by_uuid(
    visible: str | None,
    seen: list[str],
    memory: list[int],
    model: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine with several kinds of GPU. CUDA ignores the names after one that does not exist."""
    monkeypatch.setattr(host, "all_gpus", lambda: tuple(Gpu(uuid, gib * 2**30, name) for uuid, gib, name in GPUS))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_names() == seen
    assert gpus() == tuple(gib * 2**30 for gib in memory)
    assert gpu_model() == model
