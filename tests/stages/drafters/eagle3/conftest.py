"""The checkpoint that the tests of this folder damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftsmith.stages.drafters.base import DrafterInfo
from draftsmith.stages.drafters.checkpoint import (
    save_drafter,
)
from draftsmith.stages.target.causal_lm import Target
from tests.testbed import random_target
from tests.testbed.eagle3 import random_eagle3


@pytest.fixture
def saved(tmp_path: Path, plain_target: Target) -> Path:
    """Return a valid checkpoint."""
    drafter = random_eagle3(plain_target)
    drafter.frequent_tokens = torch.arange(random_target.VOCAB_SIZE).flip(0)
    drafter.info = DrafterInfo(plain_target.info.digest, "here", ("a", "b"), {"stage": "sft", "steps": 3})
    save_drafter(drafter, tmp_path / "drafter", torch.float32)
    return tmp_path / "drafter"
