"""One step of OPD: draw anchors, draft their blocks with gradient, know their verify steps, take the loss."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from stages.drafters.base import Drafter
from stages.targets.causal_lm import Target
from stages.training.batches import Batch
from stages.training.config import TrainingConfig
from stages.training.distillation import opd_loss
from stages.training.loss_config import LossConfig
from stages.training.objectives import LossReport, block_hidden
from stages.training.sources import AnchorSource
from stages.training.steps import judge, with_scores
from stages.training.vocabulary import training_head


class OpdStep:
    """The parts that all steps share."""

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        source: AnchorSource,
        objective: LossConfig,
        config: TrainingConfig,
        proposals: int,
    ):
        """objective: resolved. proposals: of a served block, at most those of the trained one."""
        self.drafter, self.target, self.source = drafter, target, source
        self.objective, self.config, self.proposals = objective, config, proposals

    def loss(self, step: int, indices: Sequence[int], batch: Batch, rng: np.random.Generator) -> LossReport:
        """batch: of the trajectories `indices`. The source learns what the drafter did."""
        chunk = self.config.positions_per_chunk
        started = time.perf_counter()
        weight, frequent = self.target.head_weight, self.drafter.frequent_tokens
        head = training_head(weight, frequent, self.config, rng, [batch.tokens])
        selected = time.perf_counter()
        drawn = self.source.draw(step, indices, batch, head, rng)
        mined = time.perf_counter()
        hidden = block_hidden(self.drafter, batch, drawn.anchors)
        drafted = time.perf_counter()
        steps, scoring = drawn.steps, 0.0
        if steps is None:
            steps = judge(hidden, batch, drawn.anchors, head, proposals=self.proposals, positions_per_chunk=chunk)
            if self.objective.needs_scores:
                before = time.perf_counter()
                steps = with_scores(steps, self.target, batch, drawn.anchors, self.proposals)
                scoring = time.perf_counter() - before
        if self.objective.needs_scores:  # the rejected stream's tokens must be in it too
            head = training_head(weight, frequent, self.config, rng, [batch.tokens, steps.proposed])
        report = opd_loss(hidden, batch, drawn.anchors, steps, head, weight, self.objective, positions_per_chunk=chunk)
        self.source.trained(indices, batch, drawn.anchors, steps, rng)
        if drawn.steps is None:  # judged by this very forward
            del report.figures["steps_changed_share"]
        report.figures |= drawn.figures
        report.seconds = {
            "mining": mined - selected + scoring,
            "drafter": drafted - mined,
            "head_and_loss": time.perf_counter() - drafted - scoring + selected - started,
        }
        return report
