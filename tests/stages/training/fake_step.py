"""A training step in any model's shapes, without its memory: torch's tracker reports what it would take.

Floating-point tensors are fake (only shapes), bookkeeping is real: anchors, tokens, verify steps. What runs is the
training's own code, with the gradients of other micro-batches and AdamW's moments there already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen3Config, Qwen3ForCausalLM

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters import block_attention
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import plan_of_new
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.drafters.mtp.config import MtpConfig
from draftsmith.stages.drafters.mtp.model import MtpDrafter
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.estimate import ModelSize, Sizes
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.lora import Adapter
from draftsmith.stages.training.loss_report import LossReport, Ratio, WeightedMean
from draftsmith.stages.training.opd.anchor_sources import ChainAnchors, RandomAnchors
from draftsmith.stages.training.opd.step import OpdStep, StepOptions
from draftsmith.stages.training.opd.verify_steps import StepAnchors
from draftsmith.stages.training.optimiser import Accumulation
from draftsmith.stages.training.sft.body import sft_loss
from draftsmith.stages.training.softmax_heads import HeadSource, LossContext
from tests.stages.training.case import whole_step

_CPU = torch.device("cpu")
_OF_KIND = {"dflash": DFlashDrafter, "dflash2": DFlash2Drafter, "dspark": DSparkDrafter, "mtp": MtpDrafter}
_SHARED = {"vocab_size": 151936, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
TARGETS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _SHARED
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "with a head": _SHARED
    | {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "architectures": ["MiMoForCausalLM"],
    },
    "Qwen3-4B": _SHARED | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36},
    "Qwen3-8B": _SHARED | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
}


@dataclass(frozen=True)
class FakeStep:
    """A training of answers that are all `longest` tokens long, prompt included."""

    target: str
    config: TrainingConfig  # of SFT or OPD
    drafter: DFlashConfig | Eagle3Config | MtpConfig
    longest: int
    prompt: int = 512
    sampling: SamplingParams = GREEDY  # of SFT's answers

    def sizes(self, device_memory: float) -> Sizes:
        """Return the sizes that `draftsmith check` reads."""
        target = Qwen3Config(**TARGETS[self.target], tie_word_embeddings=self.target != "Qwen3-8B")
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Qwen3ForCausalLM(target).parameters())
        plan = self._plan(target)
        return Sizes(
            ModelSize.from_config(target, parameters),
            ModelSize.from_config(plan.config, plan.parameters, map_sizes=plan.map_sizes),
            features=len(plan.target_layer_ids),
            block_size=plan.block_size,
            itemsize=2,
            longest_prompt=self.prompt,
            positions=self.longest,
            kind=plan.kind,
            deepest=max(plan.target_layer_ids) + 1,
            operations=plan.operations,
            device_memory=device_memory,
        )

    def _plan(self, target: Any) -> Any:
        return plan_of_new(self.drafter, target, lambda: SimpleNamespace(convert_ids_to_tokens=lambda _: None))

    def peak_bytes(self, rows_at_once: int, mask_entries: int = block_attention._MASK_ENTRIES) -> float:
        """Return the peak of a step's last micro-batch, in its forward or its backward.

        mask_entries: blocks of the CPU's attention at once; more are fewer calls to follow.
        """
        config, B, T = self.config, self.config.sequences_per_step, self.longest
        shape = Qwen3Config(**TARGETS[self.target], tie_word_embeddings=self.target != "Qwen3-8B")
        plan = self._plan(shape)
        with FakeTensorMode(allow_non_fake_inputs=True):
            torch.set_default_dtype(torch.bfloat16)
            try:
                target = Qwen3ForCausalLM(shape).requires_grad_(False)
            finally:
                torch.set_default_dtype(torch.float32)
            embedding = target.get_input_embeddings().weight
            features = torch.empty(B, T, len(plan.target_layer_ids) * shape.hidden_size, dtype=torch.bfloat16)
            hidden = torch.empty(B, T, shape.hidden_size, dtype=torch.bfloat16)
            if isinstance(self.drafter, Eagle3Config):
                drafter: Drafter = Eagle3Drafter(plan.config, embedding, torch.empty(0))
            else:
                with patch.object(torch.nn.Module, "to_empty", _to_empty):
                    drafter = _OF_KIND[plan.kind](plan.config, embedding)
                if isinstance(drafter, MtpDrafter):
                    drafter.follow(target.model.norm)
            if config.lora is not None:
                saved_in_bfloat16 = patch.object(torch.Tensor, "equal", lambda *_: True)
                stays = patch.object(torch.nn.Module, "to", lambda module, *_, **__: module)  # fake ones cannot move
                with saved_in_bfloat16, stays:
                    Adapter(drafter, config.lora, config.compute_dtype, seed=0)
            trained = [p for p in drafter.parameters() if p.requires_grad]
            gradients = [torch.empty_like(p) for p in trained]
            moments = [torch.empty_like(p) for p in trained for _ in range(2)]
        if isinstance(drafter, Eagle3Drafter):
            drafter.draft_tokens = torch.arange(plan.config.draft_vocab_size)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        trajectories = [Trajectory(str(row), [1] * T, self.prompt) for row in range(B)]
        tokens, positions = torch.ones(B, T, dtype=torch.long), torch.arange(T).expand(B, -1)
        batch = Batch(trajectories, tokens, features, hidden, positions)
        parts = [slice(start, min(start + rows_at_once, B)) for start in range(0, B, rows_at_once)]
        tracker = _Peak()
        tracker.track_external(target, drafter, features, hidden, *gradients, *moments)
        accumulation = Accumulation()
        no_number = patch.object(WeightedMean, "ratio", lambda _: Ratio(0, 1))  # a fake one cannot be read
        with no_number, patch.object(block_attention, "_MASK_ENTRIES", mask_entries), tracker:
            reports = self._reports(drafter, target.get_output_embeddings().weight, batch, parts)
            for _ in range(min(2, len(parts))):
                with torch.autocast("cpu", torch.bfloat16, enabled=config.compute_dtype == "bfloat16"):
                    report = next(reports)
                accumulation.add(report)
        return float(sum(device["Total"] for device in tracker.get_tracker_snapshot("peak").values()))

    def _reports(
        self, drafter: Drafter, head: torch.Tensor, batch: Batch, parts: Sequence[slice]
    ) -> Iterator[LossReport]:
        rng, config = np.random.default_rng(0), self.config
        if isinstance(config, OpdConfig):
            objective = config.loss.resolved(drafter.recipe, False, 0.0)
            count, proposals = config.anchors_per_sequence, drafter.block_size - 1
            source = _Chains(count) if config.anchors == "chains" else _Rejected(count, proposals)
            options = StepOptions(config, objective, proposals)
            step = OpdStep(drafter, SimpleNamespace(head_weight=head), source, options)  # type: ignore[arg-type]
            whole = whole_step(range(len(batch.trajectories)), batch, parts)
            yield from step.micro_batches(0, whole, rng)
            return
        assert isinstance(config, SftConfig)
        shifts = rng.random(len(batch.trajectories))
        heads = HeadSource(drafter, head, config).sample(rng, [])
        context = LossContext(heads, head, config.positions_per_chunk, self.sampling)
        stream = config.stream(drafter.recipe, sampled=True)
        for part in islice(parts, 2):
            rows = batch.select(part)
            anchors = position_anchors(rows.trajectories, config.anchors_per_sequence, shifts[part], _CPU)
            report = sft_loss(drafter, rows, anchors, context, stream, temperature=1.0)
            report.is_full_step = len(parts) == 1
            yield report


def _to_empty(model: torch.nn.Module, *, device: torch.device) -> None:
    """Give every part of a model values, as `Module.to_empty`, which cannot exchange fake ones."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty_like(parameter, device=device))


class _Chains(ChainAnchors):
    """Chains of equal rounds that lead anywhere: what was accepted cannot be read."""

    def following(
        self,
        trajectories: Sequence[Trajectory],
        drafted: Any,  # noqa: ARG002
        committed: torch.Tensor,
        shifts: np.ndarray,
    ) -> torch.Tensor:
        return position_anchors(trajectories, committed.shape[1], shifts[:, 0], _CPU)


class _Rejected(RandomAnchors):
    """Verify steps that accept a third of a block, so that both streams have positions."""

    def __init__(self, per_sequence: int, proposals: int):
        super().__init__(per_sequence)
        self.proposals = proposals

    def sample(self, step: int, indices: Sequence[int], view: Any, shifts: np.ndarray) -> StepAnchors:
        anchors = super().sample(step, indices, view, shifts).anchors
        return StepAnchors(anchors, _steps(view.batch, anchors, self.proposals))


def _steps(batch: Batch, anchors: torch.Tensor, K: int) -> Steps[torch.Tensor]:
    shape = anchors.shape
    accepted = torch.full(shape, K // 3)
    proposed = torch.ones(*shape, K, dtype=torch.long)
    lengths = torch.tensor([[len(t.tokens)] for t in batch.trajectories])
    return Steps(lengths, anchors, accepted, proposed, torch.full((*shape, K), -1.0))


class _Peak(MemTracker):
    """The tracker without metrics of single modules, which it refuses for one that is called twice."""

    def _pre_fw_hook(self, *_: Any) -> None: ...

    def _post_fw_hook(self, *_: Any) -> None: ...

    def _pre_bw_hook(self, *_: Any) -> None: ...

    def _post_bw_hook(self, *_: Any) -> None: ...
