"""OPD put together: features, the mined table, anchors and loss of every step of a training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyarrow as pa

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.batches import FeatureSource, Portion, parts_of, step_rng, trajectories_of_step
from draftsmith.stages.training.blocks import LossReport
from draftsmith.stages.training.config import OpdConfig
from draftsmith.stages.training.opd.anchor_sources import AnchorSource, RandomAnchors, SuccessorAnchors, TableAnchors
from draftsmith.stages.training.opd.mined_table import Kind, MinedTable, match_steps
from draftsmith.stages.training.opd.remining import Remining
from draftsmith.stages.training.opd.step import OpdStep


class OpdTraining:
    """`loss(step)` depends on nothing but the step, the drafter's weights and `source`, which remembers."""

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        trajectories: Sequence[Trajectory],
        mined: MinedTable | pa.Table,
        config: OpdConfig,
        *,
        sampling: SamplingParams = GREEDY,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ):
        """drafter: float32 weights that are to be trained. mined: its steps on these trajectories (as a table,
        VERIFY_STEPS), on all of them where `config.reads_table`.

        sampling: that of the trajectories. Raises DraftsmithError if nothing of the config's kind was mined.
        """
        if isinstance(mined, pa.Table):
            mined = match_steps(mined, trajectories, drafter.block_size)
        self.config, self.mined, self.seed, self._block_size = config, mined, seed, drafter.block_size
        self.ranks, self._trajectories, self._device = ranks, trajectories, target.device
        self.kind: Kind = "errors" if config.anchors == "errors" else "visited"
        self.usable = mined.trajectories_with(self.kind) if config.reads_table else list(range(len(trajectories)))
        self.sampled = config.verification == "sampled" or (config.verification == "auto" and not sampling.greedy)
        drawn = sampling if self.sampled and drafter.samples_proposals else GREEDY
        self.objective = config.loss.resolved(
            drafter.recipe, self.sampled, sampling.temperature if drawn.greedy else 1.0
        )
        self.source = anchor_source(config, mined, drafter, scored=self.objective.needs_scores)
        self._features = FeatureSource(
            target,
            drafter.target_layer_ids,
            trajectories,
            tokens_per_group=config.tokens_per_target_forward,
            memory_mb=config.feature_memory_mb,
            with_hidden=self.objective.response.asks_target or drafter.has_confidence or not drawn.greedy,
        )
        self._step = OpdStep(drafter, target, self.source, self.objective, config, mined.proposals, drawn)

    @property
    def passes(self) -> float:
        """How often a trajectory is drawn, on average."""
        return self.config.passes(len(self.usable))

    def loss(self, step: int) -> LossReport:
        """Of optimiser step `step` as one batch, with gradient."""
        (report,) = self.micro_batches(step, limit=None)
        return report

    def micro_batches(self, step: int, limit: int | None) -> Iterator[LossReport]:
        """The same in parts of at most `limit` tokens, those of this rank."""
        chosen = self._chosen(step)
        portion = Portion.of_rank([self._trajectories[i] for i in chosen], self.ranks, self._device)
        own = [chosen[row] for row in portion.rows]
        batch = self._features.batch(own, self._features.shared(chosen, self.ranks))
        if step + 1 < self.config.steps:
            self._features.prefetch(self._features.own(self._chosen(step + 1), self.ranks))
        parts = parts_of(batch, self.config.anchors_per_sequence * self._block_size, limit)
        return self._step.micro_batches(step, own, batch, step_rng(self.seed, step), parts, portion)

    def _chosen(self, step: int) -> list[int]:
        places = trajectories_of_step(len(self.usable), self.config.sequences_per_step, step, self.seed)
        return [self.usable[i] for i in places]

    def __str__(self) -> str:
        """What is trained, in one line."""
        config, response = self.config, self.objective.response
        beyond = f", weight exp(-d/{response.beyond:g}) at d behind the correction" if response.beyond else ""
        return (
            f"verification {'sampled' if self.sampled else 'greedy'}: {response.loss} on {response.scope} offsets"
            f"{beyond}{', k3 on rejected ones' if self.objective.needs_scores else ''}; anchors {config.anchors}"
            f"{f' of {self.mined.count(self.kind)} mined steps' if config.reads_table else ''}; {len(self.usable)} "
            f"trajectories, each in {self.passes:.3g} steps on average"
            f"{f', mined again after {config.oldest_trace} steps' if config.oldest_trace else ''}"
        )


def anchor_source(config: OpdConfig, mined: MinedTable, drafter: Drafter, *, scored: bool) -> AnchorSource:
    """The source of anchors that a config asks for. scored: as of `Remining`."""
    count = config.anchors_per_sequence
    if config.anchors == "random":
        return RandomAnchors(count)
    if config.anchors == "successors":
        return SuccessorAnchors(drafter, mined.proposals, count)
    remining = Remining(mined, drafter, every=config.oldest_trace, scored=scored)
    return TableAnchors(remining, config.anchors, count)
