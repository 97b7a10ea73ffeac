"""Drafters of random weights that sample their proposals from their own distribution, where real ones take argmaxes."""

from __future__ import annotations

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed import random_target
from tests.testbed.eagle3 import random_eagle3


class SamplingDFlash(DFlashDrafter):
    """A sampling drafter whose offsets do not see each other."""

    samples_proposals = True


class SamplingEagle3(Eagle3Drafter):
    """A sampling drafter whose offsets see the proposals before them, with a reduced vocabulary."""

    samples_proposals = True


def sampling_dflash(target: Target) -> Drafter:
    """Return a drafter of block 5."""
    drafter = random_target.random_drafter(target)
    drafter.__class__ = SamplingDFlash
    return drafter


def sampling_eagle3(target: Target) -> Drafter:
    """Return a drafter of block 5."""
    drafter = random_eagle3(target)
    drafter.__class__ = SamplingEagle3
    return drafter
