"""Attention of blocks on the device (on CUDA: flex attention, compiled) against the dense form in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.stages.drafters.test_block_attention import BFLOAT16, make_case

CASES: dict[str, dict[str, Any]] = {
    "whole prefix": {},
    "one key head": {"heads": (1, 4)},
    "one query a block": {"S": 1, "J": 3},
    "window": {"window": 70, "causal": True},
    "bounded": {"before": 130},
    "one block": {"A": 1},
    "long": {"T": 700, "A": 40},
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1.5 * BFLOAT16}  # of the largest value


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_block_attention_and_its_gradients_equal_the_dense_form(
    name: str, dtype: torch.dtype, device: str, record_property: Callable[[str, object], None]
) -> None:
    shape: dict[str, Any] = {"B": 2, "heads": (2, 2), "T": 300, "A": 7, "S": 8, "J": 8, "D": 64}
    case = make_case(**shape | CASES[name])
    moved = case.to(device, dtype)
    results = [moved.attended(), *moved.gradients("parts")]
    deviations = []
    for ours, expected in zip(results, [case.dense(), *case.gradients("dense")], strict=True):
        assert ours.dtype == dtype
        assert ours.device.type == device
        deviations.append(float((ours.cpu().float() - expected).abs().max() / expected.abs().max()))
    record_property("deviation", max(deviations))
    assert max(deviations) < TOLERANCE[dtype]
