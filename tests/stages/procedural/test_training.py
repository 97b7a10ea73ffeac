"""What a target made of procedural text refuses before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.procedural.training import ShapeConfig, TrainingTextConfig, train_target

SHAPE = ShapeConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate_size=32, vocab_size=300)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"documents": 2, "row_tokens": 2000}, "documents: 2 fill no row of 2000 tokens; raise documents"),
        ({"documents": 40, "row_tokens": 8}, "row_tokens: rows of 8 tokens end within the prompt; raise row_tokens"),
    ],
)
def test_rows_that_teach_nothing_are_one_clear_error(tmp_path: Path, text: dict[str, Any], expected: str) -> None:
    with pytest.raises(DraftsmithError, match=expected):
        train_target(tmp_path / "model", TrainingTextConfig(steps=2, rows_per_step=1, **text), SHAPE)
    assert not (tmp_path / "model").exists()
