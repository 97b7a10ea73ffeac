"""One step of OPD: draw anchors, draft their blocks with gradient, know their verify steps, take the loss."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.chains import committed_tokens, draft
from draftsmith.stages.replay.sampled import TargetSampler
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.batches import Batch, Portion
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
from draftsmith.stages.training.lm_heads import Heads, HeadSource
from draftsmith.stages.training.loss_config import LossConfig
from draftsmith.stages.training.opd.anchor_sources import AnchorSource, Drawn
from draftsmith.stages.training.opd.loss import opd_loss, stream_weights
from draftsmith.stages.training.opd.verify_steps import Unscored, VerifySteps, all_scored, judge


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
        sampling: SamplingParams = GREEDY,
    ):
        """objective: resolved. proposals: of a served block, at most those of the trained one. sampling: that the texts
        were drawn with, if the drafter draws its proposals under it."""
        self.drafter, self.target, self.source = drafter, target, source
        self.objective, self.config, self.proposals = objective, config, proposals
        self.sampling = sampling
        self.heads = HeadSource(drafter, target.head_weight, config)

    def loss(self, step: int, indices: Sequence[int], batch: Batch, rng: np.random.Generator) -> LossReport:
        """batch: of the trajectories `indices`. The source learns what the drafter did."""
        (report,) = self.micro_batches(step, indices, batch, rng, [slice(0, len(indices))])
        return report

    def micro_batches(
        self,
        step: int,
        indices: Sequence[int],
        batch: Batch,
        rng: np.random.Generator,
        parts: Sequence[slice],
        portion: Portion | None = None,
    ) -> Iterator[LossReport]:
        """The same in parts, rows of the batch. Of several parts all anchors are drawn first, under the same weights as
        the loss: the head is the same for all, and so is what two streams are divided by.

        portion: which rows of the step the batch has, where other ranks train the rest; left out: all.
        """
        clock, portion = _Clock(), portion or Portion.of_all(batch)
        heads = self.heads.draw(rng, [portion.tokens])
        phases = rng.random((portion.count, self.source.numbers))[portion.rows]
        clock.spent("head_and_loss")
        alone = len(parts) == portion.ranks.world == 1
        drawn, context = [], None
        for part in parts:
            rows = batch.rows(part)
            with torch.set_grad_enabled(alone and torch.is_grad_enabled()):
                context = context_of(self.drafter, rows)
                clock.spent("drafter")
                text = self._text(rows, step)
                view = View(rows, context, heads.drafter, text)
                found = self.source.draw(step, indices[part], view, phases[part])
                clock.spent("mining")
                if not alone and found.steps is None and self.objective.needs_scores:
                    hidden = block_hidden(self.drafter, context, rows, found.anchors)
                    judged = self._judged(hidden, context, rows, found.anchors, heads, clock, text)
                    found = replace(found, judged=judged, unscored=range(len(rows.trajectories)))
            drawn.append(found)
        self.source.share(portion.ranks)
        if self.objective.needs_scores:
            drawn = self._scored(drawn, [batch.trajectories[part] for part in parts], portion.ranks)
        whole = None
        if not alone:
            context = None
            if self.objective.needs_scores:
                heads = self._with_rejected(rng, drawn, portion)
                of_parts = [
                    stream_weights(batch.rows(part), found.anchors, _steps_of(found), heads, self.objective)
                    for part, found in zip(parts, drawn, strict=True)
                ]
                of_ranks = portion.ranks.gather([sum(weights) for weights in zip(*of_parts, strict=True)])
                whole = tuple(sum(weights) for weights in zip(*of_ranks, strict=True))
        clock.spent("mining")
        for part, found in zip(parts, drawn, strict=True):
            clock.resume()
            report = self._trained(batch.rows(part), context, found, heads, rng if alone else None, clock, step)
            report.alone, report.whole = alone, whole
            report.seconds = clock.take()
            yield report

    def _scored(
        self, drawn: Sequence[Drawn], trajectories: Sequence[Sequence[Trajectory]], ranks: Ranks
    ) -> list[Drawn]:
        """What was drawn of these trajectories, with what the target says of its steps where that is not known yet."""
        asked = [
            Unscored(_steps_of(found), of_part, found.anchors, found.unscored)
            for found, of_part in zip(drawn, trajectories, strict=True)
            if found.steps is not None or found.judged is not None
        ]
        if not asked:  # of one batch alone, whose blocks are judged where they are trained
            return list(drawn)
        scored = all_scored(asked, self.target, self.proposals, self.config.tokens_per_target_forward, ranks)
        return [
            replace(found, steps=steps) if found.judged is None else replace(found, judged=steps)
            for found, steps in zip(drawn, scored, strict=True)
        ]

    def _with_rejected(self, rng: np.random.Generator, drawn: Sequence[Drawn], portion: Portion) -> Heads:
        """The heads of a step that also hold what any rank's verify steps rejected."""
        needed = [portion.tokens]
        if self.heads.sampled:
            proposed = torch.cat([_steps_of(found).proposed.unique() for found in drawn]).cpu()
            needed += [ids.to(portion.tokens.device) for ids in portion.ranks.gather(proposed)]
        return self.heads.draw(rng, needed)

    def _trained(
        self,
        batch: Batch,
        context: Context | None,
        drawn: Drawn,
        heads: Heads,
        rng: np.random.Generator | None,
        clock: _Clock,
        step: int,
    ) -> LossReport:
        """context: of the batch, with gradient, where it is there already. rng: for a head that also holds what is
        rejected, where this is not known yet."""
        if context is None:
            context = context_of(self.drafter, batch)
        hidden = block_hidden(self.drafter, context, batch, drawn.anchors)
        clock.spent("drafter")
        steps = drawn.steps or drawn.judged
        # else the loss finds what was accepted: argmaxes that are the text's
        judges = self.objective.reads_steps if self.sampling.greedy else self.objective.reads_committed
        if steps is None and judges:
            steps = self._judged(hidden, context, batch, drawn.anchors, heads, clock, self._text(batch, step))
            if self.objective.needs_scores:
                asked = Unscored(steps, batch.trajectories, drawn.anchors, range(len(batch.trajectories)))
                (steps,) = all_scored([asked], self.target, self.proposals, self.config.tokens_per_target_forward)
                clock.spent("mining")
        on_proposals = None
        if self.drafter.autoregressive and self.objective.needs_scores:
            assert steps is not None
            on_proposals = block_hidden_on(self.drafter, context, batch, drawn.anchors, steps.proposed)
        clock.spent("drafter")
        if rng is not None and self.objective.needs_scores and steps is not None:
            heads = self.heads.draw(rng, [batch.tokens, steps.proposed])
        report = opd_loss(
            hidden,
            batch,
            drawn.anchors,
            steps,
            heads,
            self.target.head_weight,
            self.objective,
            sampling=self.sampling,
            on_proposals=on_proposals,
            proposals=self.proposals,
            positions_per_chunk=self.config.positions_per_chunk,
        )
        report.operations = operations_of(self.drafter, batch, drawn.anchors, report.positions, heads.drafter)
        if on_proposals is not None:  # the chains were drafted twice; nothing more went through the head
            report.operations += operations_of(self.drafter, batch, drawn.anchors, 0, heads.drafter, prefixes=0)
        if drawn.steps is None or not self.sampling.greedy:  # judged by this very forward, not at all, or drawn
            report.figures.pop("steps_changed_share", None)
        report.figures |= drawn.figures
        clock.spent("head_and_loss")
        return report

    def _judged(
        self,
        hidden: torch.Tensor,
        context: Context,
        batch: Batch,
        anchors: Anchors,
        heads: Heads,
        clock: _Clock,
        text: TargetSampler | None,
    ) -> VerifySteps:
        """The verify steps of blocks with hidden states [B, A, K, H]; the target has not scored them."""
        own_chains = (self.drafter.autoregressive or text is not None) and self.objective.needs_scores
        proposed = self._propose(context, batch, anchors, heads.drafter, text) if own_chains else None
        steps = judge(
            hidden,
            batch,
            anchors,
            heads.drafter,
            proposals=self.proposals,
            proposed=proposed,
            chooser=heads.chooser,
            text=text,
        )
        clock.spent("drafter")
        return steps

    def _propose(
        self, context: Context, batch: Batch, anchors: Anchors, head: Head, text: TargetSampler | None
    ) -> torch.Tensor:
        """[B, A, K] of the current weights."""
        size = self.drafter.block_size
        tokens = committed_tokens(batch.trajectories, size - 1, batch.tokens.device)
        found = draft(self.drafter, context, tokens, anchors.positions, size, head, text=text)
        return found.proposed

    def _text(self, batch: Batch, step: int) -> TargetSampler | None:
        """What decides about proposals that are drawn; other numbers in every step."""
        if self.sampling.greedy:
            return None
        assert batch.hidden is not None
        proposals = self.drafter.block_size - 1
        return TargetSampler.for_trajectories(
            self.target, batch.hidden, batch.trajectories, self.sampling, proposals, salt=step + 1
        )


def _steps_of(drawn: Drawn) -> VerifySteps:
    steps = drawn.steps or drawn.judged
    assert steps is not None, "a rejected stream needs verify steps"
    return steps


class _Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self._since, self._seconds = time.perf_counter(), dict.fromkeys(("mining", "drafter", "head_and_loss"), 0.0)

    def spent(self, what: str) -> None:
        """On this, since the last call."""
        now = time.perf_counter()
        self._seconds[what] += now - self._since
        self._since = now

    def resume(self) -> None:
        """Leave out what was done since the last call: the gradient of another part."""
        self._since = time.perf_counter()

    def take(self) -> dict[str, float]:
        """What was spent since this was asked."""
        taken, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return taken
