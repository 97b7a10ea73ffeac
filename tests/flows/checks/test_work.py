"""The arithmetic of a training step, against what torch counts while a real one runs in small shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.flows.checks import work
from draftsmith.flows.checks.work import _BLOCKS_A_STEP, GPUS, Work, describe, step_work
from draftsmith.stages.drafters import block_attention
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.replay import chains
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.estimate import AnswerCounts, StageUse
from draftsmith.stages.training.config import OpdConfig
from draftsmith.stages.training.loop import Accumulation
from draftsmith.stages.training.lora import Adapter
from draftsmith.stages.training.opd.anchor_sources import TableAnchors
from draftsmith.stages.training.opd.trainer import MinedData, OpdTraining
from draftsmith.stages.training.opd.verify_steps import MinedTable
from draftsmith.stages.training.trainer import loaded_sizes
from tests.benchmarks.sft_step import invented_steps
from tests.flows.checks.test_resources import qwen_sizes
from tests.gpu.trainings import Training, make_training
from tests.gpu.world import Scale, make_drafter, make_target, make_trajectories
from tests.stages.kernel_flops import KERNEL_FLOPS

SMALL = Scale(
    "small",
    {
        "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    },
    DFlashConfig(num_layers=3, block_size=8, target_layer_ids=(4, 2, 0), mask_token=1023),
    {"sequences_per_step": 3, "anchors_per_sequence": 8, "feature_memory_mb": 1e-3},  # the target reads every batch
    prompt=8,
    longest=72,
    answers=3,
)  # fmt: skip
PAPER = {"loss": "paper", "anchors": "errors", "remine_every": 1}
OPERATIONS_WITHIN, OTHERS_WITHIN = 0.1, 0.15


class Counted(TorchDispatchMode):
    """Counts the kernels that run, and the bytes of those which are no products."""

    PRODUCTS = ("mm", "bmm", "addmm", "_scaled_dot_product", "_linear_pointwise")
    NO_KERNEL = ("empty", "new_empty", "detach", "_local_scalar_dense", "_unsafe_view", "lift_fresh")

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.launches = 0, 0

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if not func.is_view and not name.startswith(self.NO_KERNEL):
            self.launches += 1
            if not name.startswith(self.PRODUCTS):
                every = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
                tensors = {id(x): x for x in every if x.layout == torch.strided}  # packed weights are products'
                self.bytes += sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors.values())
        return out


def counted(training: Training, target: Target, step: int) -> Work:
    """Run a step, its optimiser left out, and return what torch counts."""
    flops = FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS)
    accumulation = Accumulation()
    with Counted() as kernels, flops, torch.autocast(target.device.type, torch.bfloat16):
        for report in training.micro_batches(step, None):
            with torch.autocast(target.device.type, enabled=False):
                accumulation.add(report)
    return Work(flops.get_total_flops(), kernels.bytes, kernels.launches)


def mined_steps(training: OpdTraining) -> float:
    """Return the verify steps of all answers under the drafter's weights, as the step has mined them."""
    assert isinstance(training.memory, TableAnchors)
    return float(sum(len(training.memory.steps(i).anchors) for i in range(SMALL.answers)))


@pytest.mark.parametrize("kind", ["SFT", "SFT of an adapter", "OPD", "OPD, mined again"])
def test_a_step_takes_what_torch_counts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make_target(SMALL, "cpu", "bfloat16")
    drafter, answers = make_drafter(SMALL.drafter, target), make_trajectories(SMALL)
    mines, adapted = kind == "OPD, mined again", kind == "SFT of an adapter"
    if mines:
        rng, K = np.random.default_rng(0), drafter.block_size - 1
        table = MinedTable([invented_steps(t, K, 1.0, rng) for t in answers], K)  # a step a token, as random weights
        mined = MinedData(trajectories=answers, mined=table)
        training: Training = OpdTraining(drafter, target, mined, OpdConfig.model_validate({**SMALL.step, **PAPER}))
    else:
        fields = {**SMALL.step, **({"lora": {"rank": 8}} if adapted else {})}
        training = make_training("OPD" if kind == "OPD" else "SFT", drafter, target, answers, fields)
    if training.config.lora is not None:
        Adapter(drafter, training.config.lora, "bfloat16", 0)
    monkeypatch.setattr(block_attention, "_MASK_ENTRIES", 1)  # no block is read beyond its anchor
    operations = counted(training, target, 1).operations
    monkeypatch.undo()
    others = counted(training, target, 2)
    steps = mined_steps(training) if isinstance(training, OpdTraining) and mines else 0.0
    sizes = replace(loaded_sizes(target, drafter, SMALL.longest), longest_prompt=SMALL.prompt)
    use = StageUse(sizes, answers=AnswerCounts(SMALL.longest, SMALL.answers, steps / _BLOCKS_A_STEP))
    phases = step_work(training.config, use, mines=mines, scores=mines, rows_at_once=SMALL.answers)
    del phases["update"]
    expected = sum(phases.values(), Work())
    assert expected.operations == pytest.approx(operations, rel=OPERATIONS_WITHIN)
    assert expected.bytes == pytest.approx(others.bytes, rel=OTHERS_WITHIN)
    assert expected.launches == pytest.approx(others.launches, rel=OTHERS_WITHIN)


def test_an_answer_is_read_once_where_its_keys_are_kept() -> None:
    sizes = qwen_sizes()
    use = StageUse(sizes, answers=AnswerCounts(4608, 16000))
    fields = {"loss": "paper", "anchors": "errors", "sequences_per_step": 3, "anchors_per_sequence": 512}
    once, twice = (
        step_work(OpdConfig.model_validate({**fields, "feature_memory_mb": memory}), use, mines=True, scores=True)
        for memory in (2048, 1900)  # keys and values of 3 · 4,608 tokens take 1,944 MB
    )
    assert once["target"] == twice["target"]
    read = twice["scoring"].operations - once["scoring"].operations
    assert read == pytest.approx(once["target"].operations)


def test_rounds_of_mining_are_those_of_a_gpu() -> None:
    assert chains.BLOCKS_PER_ROUND["cuda"] == work._BLOCKS_PER_ROUND


def test_a_step_is_as_slow_as_its_slowest_resource() -> None:
    gpu = GPUS["H100"]
    assert gpu.seconds(Work(operations=gpu.products)) == pytest.approx(1)
    assert gpu.seconds(Work(gpu.products, gpu.bandwidth)) == pytest.approx(2)
    assert gpu.seconds(Work(gpu.products, launches=1e6)) == pytest.approx(5)
    assert "MFU 66%" in describe({"target": Work(gpu.products)}, gpu)
