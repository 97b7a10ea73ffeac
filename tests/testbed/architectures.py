"""Drafters of random weights, one of every architecture and form, for the shared checks.

A new architecture adds a line here. Its own folder of tests holds it against a plain reference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.dflash2 import random_dflash2
from tests.testbed.dspark import random_dspark
from tests.testbed.eagle3 import random_eagle3
from tests.testbed.random_target import random_drafter, windows

# of a target of random weights (`random_target.py`) and a seed; blocks of 5 on layers that the target has
RANDOM: dict[str, Callable[[Target], Drafter]] = {
    "dflash": random_drafter,
    "dflash, windows": partial(random_drafter, **windows(3, "sliding_attention", "full_attention")),
    "dflash2": random_dflash2,
    "dflash2 with windows, without convolutions": partial(
        random_dflash2, **windows(3), conv_kernel_size=0, conv_group_size=0
    ),
    # without a confidence head, whose loss asks the target too
    "dspark": partial(random_dspark, confidence_head=False),
    "dspark, upgraded": partial(random_dspark, confidence_head=False, from_anchor=False),
    "eagle3": random_eagle3,
}
