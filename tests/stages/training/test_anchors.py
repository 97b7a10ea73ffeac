"""Anchors of answers that have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.replay.trace import Trajectory
from draftsmith.stages.training.anchors import position_anchors


def test_an_answer_of_one_token_is_named() -> None:
    answers = [Trajectory("two", [1, 2, 3], 1), Trajectory("one", [1, 2], 1)]
    anchors = position_anchors(answers[:1], 3, np.random.default_rng(0), torch.device("cpu"))
    assert anchors.positions.tolist() == [[1, 1, 1]]
    with pytest.raises(DraftsmithError, match="trajectory one: an answer of one token trains nothing"):
        position_anchors(answers, 3, np.random.default_rng(0), torch.device("cpu"))
