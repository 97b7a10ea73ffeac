"""Stage `diagnosis`: what is wrong with the question is no fault of the server."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages import diagnosis
from draftsmith.stages.diagnosis import STAGE, DiagnosisConfig
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts


def asked(made: DrafterArtifacts, **fields: object) -> DiagnosisConfig:
    return DiagnosisConfig.model_validate(
        {"url": "http://127.0.0.1:9", "drafter": str(made.drafter / "drafter"), **fields}
    )


def test_an_answer_that_does_not_fit_is_not_told_by_the_server(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "_server_info", lambda *_: {"speculative_num_draft_tokens": 4})
    ctx = RecordingContext.under(tmp_path, {"target": tiny_drafter.target, "prompts": tiny_drafter.prompts})
    with pytest.raises(DraftsmithError, match="max_new_tokens"):
        STAGE.run(ctx, asked(tiny_drafter, sampling={"max_new_tokens": 100_000}))
    assert not list(ctx.out.iterdir())


def test_an_address_that_is_none_is_bad_input(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    ctx = RecordingContext.under(tmp_path, {"target": tiny_drafter.target, "prompts": tiny_drafter.prompts})
    with pytest.raises(DraftsmithError, match="http://localhost:abc: no address of a server"):
        STAGE.run(ctx, asked(tiny_drafter, url="http://localhost:abc"))
