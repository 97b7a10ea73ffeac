"""One step of OPD: draw anchors, draft their blocks with gradient, know their verify steps, take the loss."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.blocks import (
    Anchors,
    LossReport,
    View,
    block_hidden,
    block_hidden_on,
    context_of,
    operations_of,
)
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.loss_config import LossConfig
from draftsmith.stages.training.on_policy.loss import opd_loss
from draftsmith.stages.training.on_policy.sources import AnchorSource
from draftsmith.stages.training.on_policy.verify_steps import judge, with_scores
from draftsmith.stages.training.vocabulary import HeadSource


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
        self.heads = HeadSource(drafter, target.head_weight, config)

    def loss(self, step: int, indices: Sequence[int], batch: Batch, rng: np.random.Generator) -> LossReport:
        """batch: of the trajectories `indices`. The source learns what the drafter did."""
        chunk = self.config.positions_per_chunk
        started = time.perf_counter()
        heads = self.heads.draw(rng, [batch.tokens])
        selected = time.perf_counter()
        context = context_of(self.drafter, batch)
        encoded = time.perf_counter()
        drawn = self.source.draw(step, indices, View(batch, context, heads.drafter), rng)
        mined = time.perf_counter()
        hidden = block_hidden(self.drafter, context, batch, drawn.anchors)
        own_chains = self.drafter.autoregressive and self.objective.needs_scores
        steps, scoring, on_proposals = drawn.steps, 0.0, None
        if steps is None and self.objective.reads_steps:  # else the loss finds what was accepted
            proposed = self._propose(context, batch, drawn.anchors, heads.drafter) if own_chains else None
            steps = judge(
                hidden,
                batch,
                drawn.anchors,
                heads.drafter,
                proposals=self.proposals,
                proposed=proposed,
            )
            if self.objective.needs_scores:
                before = time.perf_counter()
                steps = with_scores(
                    steps, self.target, batch, drawn.anchors, self.proposals, self.config.tokens_per_target_forward
                )
                scoring = time.perf_counter() - before
        if own_chains:
            assert steps is not None
            on_proposals = block_hidden_on(self.drafter, context, batch, drawn.anchors, steps.proposed)
        drafted = time.perf_counter()
        if self.objective.needs_scores and steps is not None:  # the rejected stream's tokens must be in it too
            heads = self.heads.draw(rng, [batch.tokens, steps.proposed])
        report = opd_loss(
            hidden,
            batch,
            drawn.anchors,
            steps,
            heads,
            self.target.head_weight,
            self.objective,
            on_proposals=on_proposals,
            proposals=self.proposals,
            positions_per_chunk=chunk,
        )
        report.operations = operations_of(self.drafter, batch, drawn.anchors, report.positions, heads.drafter)
        if on_proposals is not None:  # the chains were drafted twice; nothing more went through the head
            report.operations += operations_of(self.drafter, batch, drawn.anchors, 0, heads.drafter, prefixes=0)
        if drawn.steps is None:  # judged by this very forward, or not at all
            report.figures.pop("steps_changed_share", None)
        report.figures |= drawn.figures
        report.seconds = {
            "mining": mined - encoded + scoring,
            "drafter": drafted - mined - scoring + encoded - selected,
            "head_and_loss": time.perf_counter() - drafted + selected - started,
        }
        return report

    def _propose(self, context: Context, batch: Batch, anchors: Anchors, head: Head) -> torch.Tensor:
        """[B, A, K] of the current weights."""
        tokens = batch.tokens.gather(1, anchors.positions)
        size = self.drafter.block_size
        return self.drafter.propose(context, tokens, anchors.positions, size, head, with_logprobs=False).tokens
