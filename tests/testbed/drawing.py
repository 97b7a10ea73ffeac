"""Drafters of random weights that draw their proposals from a q of their own, where the real ones propose argmaxes."""

from __future__ import annotations

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.target.causal_lm import Target
from tests.testbed import random_target
from tests.testbed.eagle3 import random_eagle3


class DrawingDFlash(DFlashDrafter):
    """Whose offsets do not see each other."""

    samples_proposals = True


class DrawingEagle3(Eagle3Drafter):
    """Whose offsets see the proposals before them, and whose vocabulary is a part of the target's."""

    samples_proposals = True


def drawing_dflash(target: Target) -> Drafter:
    """Block 5."""
    drafter = random_target.random_drafter(target)
    drafter.__class__ = DrawingDFlash
    return drafter


def drawing_eagle3(target: Target) -> Drafter:
    """Block 5."""
    drafter = random_eagle3(target)
    drafter.__class__ = DrawingEagle3
    return drafter
