"""The trainer that SFT and OPD share: the answers of every step, micro-batches that fit into memory, the checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from draftsmith.artifacts.host import memory_bytes
from draftsmith.artifacts.tables.readers import MappedReader, RowReader
from draftsmith.artifacts.tables.schemas import TRAJECTORIES, TableSchema
from draftsmith.stages.data.trajectories import (
    DRAFTER_FOLDER,
    TOKEN_COLUMNS,
    StoredTrajectories,
    Trajectory,
    load_trajectories,
    pad_tokens,
    trajectory_lengths,
)
from draftsmith.stages.drafters.base import Drafter, DrafterInfo
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.replay.groups import tree_tokens_of
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.estimate import AnswerCounts, ModelSize, Sizes, StageUse
from draftsmith.stages.targets.loading import divided_parameters
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.batches import FeatureSource, RankSlice, split_rows, trajectories_of_step
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.estimate import fixed_memory, row_tokens, rows_at_once, rows_of_process
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.optimiser import MicroBatches, Resumable, train

if TYPE_CHECKING:
    from draftsmith.stages.training.lora import Adapter


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The answers that a drafter is trained on."""

    trajectories: Sequence[Trajectory]
    sampling: SamplingParams = GREEDY  # sampling of the answers


def mapped_reader(
    ctx: StageContext, ranks: Ranks, path: Path, schema: TableSchema, columns: Sequence[str]
) -> MappedReader:
    """Return a reader that reads `columns` without decoding: the first rank copies them to the scratch folder."""
    copy = ctx.work / f"{path.stem}.arrow"
    if ranks.is_main:
        RowReader(path, schema).write_copy(copy, columns)
    ranks.barrier()
    return MappedReader(path, schema, copy)


def load_answers(ctx: StageContext, ranks: Ranks) -> StoredTrajectories:
    """Load the answers to train on."""
    folder = ctx.inputs["trajectories"]
    reader = mapped_reader(ctx, ranks, folder / "trajectories.parquet", TRAJECTORIES, TOKEN_COLUMNS)
    return load_trajectories(folder, reader=reader)


AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)
AnyData = TypeVar("AnyData", bound=TrainingData)


class Trainer(ABC, Generic[AnyConfig, AnyData]):
    """Trains a drafter. `micro_batches` depends only on the step, the drafter's weights and `memory`."""

    usable: Sequence[int]  # indices of the trajectories that are trained
    memory: Resumable | None = None  # state that is kept between steps
    adapter: Adapter | None = None  # trained in place of the weights
    reads_target: bool  # batches need the target's hidden states, next to its features
    scores_proposals = False  # the target scores the drafter's proposals in a step

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        data: AnyData,
        config: AnyConfig,
        *,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ):
        """Train all trajectories. drafter: float32 weights."""
        self.drafter, self.target, self.data, self.config = drafter, target, data, config
        self.seed, self.ranks = seed, ranks
        self.trajectories, self.usable = data.trajectories, range(len(data.trajectories))
        self._resolve()

    @abstractmethod
    def _resolve(self) -> None:
        """Resolve the loss and its inputs; OPD narrows `usable` here."""

    @abstractmethod
    def micro_batches(self, step: int, limit: int | None) -> Iterator[LossReport]:
        """Yield the losses of a step, with gradient, in this rank's micro-batches of at most `limit` tokens."""

    @property
    def passes(self) -> float:
        """Return how often a trajectory is trained on average; SFT memorises answers if there are few."""
        return self.config.steps * self.config.sequences_per_step / len(self.usable)

    def rank_slice(self, step: int, limit: int | None) -> RankSlice:
        """Return this rank's part of a step, and start to read its next part."""
        indices = self._indices(step)
        rows = self._features.own_rows(indices, self.ranks)
        mine = [indices[row] for row in rows]
        batch = self._features.batch(mine, self._features.shared(indices, self.ranks))
        if step + 1 < self.config.steps:
            following = self._indices(step + 1)
            self._features.prefetch([following[row] for row in self._features.own_rows(following, self.ranks)])
        micro_batches = split_rows(batch, self._block_tokens, limit)
        tokens = batch.tokens
        if self.config.head_tokens is not None and len(mine) < len(indices):  # else no head needs other ranks' tokens
            tokens = pad_tokens([self.trajectories[i] for i in indices], self.target.device)
        return RankSlice(mine, batch, micro_batches, rows, len(indices), tokens, self.ranks)

    def _indices(self, step: int) -> list[int]:
        order = trajectories_of_step(len(self.usable), self.config.sequences_per_step, step, self.seed)
        return [self.usable[i] for i in order]

    @cached_property
    def _features(self) -> FeatureSource:
        return FeatureSource(
            self.target,
            self.drafter.target_layer_ids,
            self.trajectories,
            self.config,
            with_hidden=self.reads_target,
            tree_tokens=tree_tokens_of(self.drafter.block_size) if self.scores_proposals else 0,
        )

    @property
    def _block_tokens(self) -> int:
        """Return the tokens of a row's blocks."""
        return self.config.anchors_per_sequence * self.drafter.block_size

    def train(self, ctx: StageContext) -> dict[str, float]:
        """Run or continue all steps. Return additive totals, as `optimiser.train` does."""
        longest = int(trajectory_lengths(self.trajectories).max())
        limit = micro_batch_tokens(self.config, self.target, self.drafter, longest)
        if self.config.lora is not None:
            from draftsmith.stages.training.lora import Adapter  # imports peft, which only adapters need

            self.adapter = Adapter(self.drafter, self.config.lora, self.config.compute_dtype, self.seed)
        micro_batches = MicroBatches(self.micro_batches, limit, self._block_tokens, ctx)
        return train(ctx, self.drafter, self.config, micro_batches, self.memory, self.ranks)

    def save(self, ctx: StageContext, stage: str, parents: tuple[str, ...], totals: dict[str, float]) -> None:
        """Write the drafter in the layout that engines load, with its adapter merged.

        parents: digests of the drafters that it descends from; none for a target's own head.
        """
        trained: dict[str, Any] = {name: totals.get(name, 0) for name in ("blocks", "positions")}
        if self.adapter is not None:
            self.adapter.merge()
            trained["lora"] = {"rank": self.adapter.rank, "base": parents[-1] if parents else self.target.info.digest}
        training = {"stage": stage, "steps": self.config.steps, **trained}
        self.drafter.info = DrafterInfo(parents=parents, training=training).made_for(self.target.info)
        save_drafter(self.drafter, ctx.out / DRAFTER_FOLDER, self.target.dtype)


def micro_batch_tokens(config: TrainingConfig, target: Target, drafter: Drafter, longest: int) -> int:
    """Return how many tokens of trajectories and blocks go through the drafter at once on the target's device.

    The number comes from the config, or from the estimate of memory, and is at most a process's tokens in a step.
    longest: tokens of the longest trajectory.
    """
    whole = rows_of_process(config) * (longest + config.anchors_per_sequence * drafter.block_size)
    if config.micro_batch_tokens is not None:
        return min(config.micro_batch_tokens, whole)
    sizes = loaded_sizes(target, drafter, longest)
    fixed = sum(fixed_memory(config, StageUse(sizes, answers=AnswerCounts(longest))).values())
    return rows_at_once(config, sizes, longest, fixed) * row_tokens(config, sizes, longest)


def loaded_sizes(target: Target, drafter: Drafter, longest: int) -> Sizes:
    """Return the sizes of loaded models on the target's device. longest: tokens of the longest trajectory."""
    return Sizes(
        ModelSize.from_config(
            target.config, sum(p.numel() for p in target.model.parameters()), divided_parameters(target.model)
        ),
        ModelSize.from_config(
            drafter.config, sum(p.numel() for p in drafter.parameters()), map_sizes=drafter.map_sizes
        ),
        features=len(drafter.target_layer_ids),
        block_size=drafter.block_size,
        itemsize=target.dtype.itemsize,
        longest_prompt=longest,
        positions=longest,
        kind=drafter.kind,
        deepest=max(drafter.target_layer_ids) + 1,
        operations=drafter.operations,
        device_memory=_device_memory(target),
        accelerated=target.device.type == "cuda",
    )


def _device_memory(target: Target) -> float:
    """Return the bytes that this process may use on the target's device."""
    if target.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(target.device)  # a server may hold the rest
        return float(free + torch.cuda.memory_reserved(target.device))
    return memory_bytes()
