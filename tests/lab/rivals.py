"""A training of the refresh benchmark that is none of the product's: answers chosen by their mined errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import lineage_from, load_drafter
from draftsmith.stages.runtime.ranks import ALONE
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.config import OpdConfig
from draftsmith.stages.training.opd.body import MinedData, OpdTraining
from draftsmith.stages.training.opd.verify_steps import load_mined
from draftsmith.stages.training.trainer import load_answers

TIMES = (1, 2, 3)  # how often an answer of each third is trained, by errors a token


def run(ctx: StageContext, name: str, config: Mapping[str, Any]) -> None:
    """Continue training the drafter that is the input, as stage `opd` does."""
    stored, target = load_answers(ctx, ALONE), Target.load(ctx.inputs["target"])
    folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = load_drafter(folder, target, torch.float32)
    table = load_mined(ctx.inputs["mined"], stored.trajectories, drafter.block_size, whole=True)
    mined = MinedData(trajectories=stored.trajectories, sampling=stored.sampling, mined=table)
    training = ChosenAnswers(drafter, target, mined, OpdConfig.model_validate(config), seed=ctx.seed)
    totals = training.train(ctx)
    training.save(ctx, name, lineage_from(folder), totals)
    ctx.summary(**totals)


class ChosenAnswers(OpdTraining):
    """OPD that trains answers with many mined errors more often: `TIMES` as often by thirds."""

    def _resolve(self) -> None:
        super()._resolve()
        tokens = np.array([t.last_anchor - t.first_anchor + 1 for t in self.trajectories])
        self.usable = repeated(self.mined.counts("errors") / tokens)


def repeated(errors: np.ndarray) -> list[int]:
    """Return the indices of answers with these errors a token, those of each third of the ranks `TIMES` times."""
    ranks = np.argsort(np.argsort(errors, kind="stable"), kind="stable")
    times = np.array(TIMES)[len(TIMES) * ranks // len(errors)]
    return [int(i) for i in np.repeat(np.arange(len(errors)), times)]
