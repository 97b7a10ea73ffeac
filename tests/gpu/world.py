"""Models with random weights in the shapes of real ones, made on the device, without disk or network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import create_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.drafters.registry import DrafterConfig
from draftsmith.stages.targets.attention import register
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import TargetInfo
from tests.stages.training.fake_step import TARGETS
from tests.testbed import random_target


@dataclass(frozen=True)
class Scale:
    """The sizes of models, answers and steps."""

    name: str
    target: Mapping[str, Any]  # fields of Qwen3Config
    drafter: DFlashConfig
    step: Mapping[str, Any]  # fields of TrainingConfig
    prompt: int  # tokens
    longest: int  # tokens of a trajectory, prompt included
    answers: int


# 16-wide heads are the least that flex attention's kernels take
TINY = Scale(
    "tiny",
    {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    },
    DFlashConfig(num_layers=2, block_size=5, target_layer_ids=(2, 0), mask_token=255),
    {"sequences_per_step": 3, "anchors_per_sequence": 4, "feature_memory_mb": 1e-3},  # read again in every step
    prompt=4,
    longest=40,
    answers=6,
)  # fmt: skip
# a step of Draft-OPD: 21 answers of 4,096 tokens after prompts of 512
QWEN3_4B = Scale(
    "qwen3-4b",
    TARGETS["Qwen3-4B"],
    DFlashConfig(mask_token=151669),
    {"sequences_per_step": 21, "anchors_per_sequence": 512},
    prompt=512,
    longest=512 + 4096,
    answers=63,
)
# as long as answers with thinking are, three at once
QWEN3_8B = Scale(
    "qwen3-8b",
    TARGETS["Qwen3-8B"],
    DFlashConfig(mask_token=151669),
    {"sequences_per_step": 3, "anchors_per_sequence": 512},
    prompt=512,
    longest=16384,
    answers=9,
)
SCALES = {scale.name: scale for scale in (TINY, QWEN3_4B, QWEN3_8B)}
EAGLE3 = Eagle3Config(kind="eagle3", block_size=4, target_layer_ids=(0, 1, 2), draft_vocab_size=200)


def make_target(scale: Scale, device: str, dtype: str, *, alike: bool = False) -> Target:
    """Return a target. alike: with weights that are the same on any device, and large enough that each matters."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    tied = scale is not QWEN3_8B
    config = Qwen3Config(**scale.target, tie_word_embeddings=tied, max_position_embeddings=40960, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=register())
    if alike:
        random_target.fill(model, seed=0)
    info = TargetInfo(
        source="random weights",
        kind="folder",
        location="",
        revision=None,
        dtype=dtype,  # type: ignore[arg-type]
        digest="",
        tokenizer_digest="",
        architecture=type(model).__name__,
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        max_positions=config.max_position_embeddings,
        eos_ids=[],
        mask_candidates=[],
        chat_template=False,
        tied_embeddings=tied,
    )
    return Target(model, None, info)


def make_drafter(shape: DrafterConfig, target: Target, *, alike: bool = False) -> Drafter:
    """Make a drafter in float32, as in training, with all tokens equally frequent. alike: same as in `make_target`."""
    frequent = torch.arange(target.info.vocab_size)
    drafter = create_drafter(shape, target, seed=0, frequent=frequent)
    drafter.frequent_tokens = frequent.to(target.device)
    if alike:
        random_target.randomise(drafter, seed=0)
    return drafter


def make_trajectories(scale: Scale, *, equally_long: bool = True, seed: int = 0) -> list[Trajectory]:
    """Random tokens, all as long as they may be, or of any length."""
    rng = np.random.default_rng(seed)
    lengths = np.full(scale.answers, scale.longest)
    if not equally_long:
        lengths = rng.integers(scale.prompt + 6, scale.longest + 1, scale.answers)
    vocabulary = scale.target["vocab_size"] - 1  # the last one is TINY's mask
    return [
        Trajectory(f"{i}/0", rng.integers(0, vocabulary, int(n)).tolist(), scale.prompt) for i, n in enumerate(lengths)
    ]
