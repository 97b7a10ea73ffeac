"""Stage `diagnosis`: errors in the config are not blamed on the server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.evaluation.diagnosis import body as step_differences
from draftsmith.stages.evaluation.diagnosis.stage import STAGE, DiagnosisConfig, preflight
from tests.stages.drafters.edits import cut, edit_config
from tests.stages.engines.http_server import Refusal, serving
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts


def asked(made: DrafterArtifacts, **fields: object) -> DiagnosisConfig:
    return DiagnosisConfig.model_validate(
        {"url": "http://127.0.0.1:9", "drafter": str(made.drafter / "drafter"), **fields}
    )


def test_answers_that_do_not_fit_are_our_error_and_not_the_servers(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = SGLangEngineConfig(kind="sglang", urls=("http://127.0.0.1:9",))
    monkeypatch.setattr(step_differences, "identify", lambda *_: (engine, 4))
    ctx = RecordingContext.under(tmp_path, {"target": tiny_drafter.target, "prompts": tiny_drafter.prompts})
    with pytest.raises(DraftsmithError, match="max_new_tokens"):
        STAGE.run(ctx, asked(tiny_drafter, sampling={"max_new_tokens": 100_000}))
    assert not list(ctx.out.iterdir())


def test_an_unreadable_drafter_is_an_error_before_the_server_is_asked(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    preflight(asked(tiny_drafter), tiny_drafter.target)
    shutil.copytree(tiny_drafter.drafter / "drafter", tmp_path / "drafter")
    broken = asked(tiny_drafter, drafter=str(tmp_path / "drafter"))
    for edit, message in (
        (cut("model.safetensors"), r"model\.safetensors: cannot be read"),
        (edit_config(lambda raw: raw.update(hidden_size=8)), r"hidden_size is 8"),
        (edit_config(lambda raw: raw.update(block_size="x")), r"block_size is x"),
    ):
        edit(tmp_path / "drafter")
        with pytest.raises(DraftsmithError, match=message):
            preflight(broken, tiny_drafter.target)


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, DraftsmithError, r"refuses .* with status 401: .*holds its API key in .*api_key_env"),
        (403, DraftsmithError, r"refuses .* with status 403: .*holds its API key in .*api_key_env"),
        (404, DraftsmithError, "has no /server_info"),
        (503, RetryableError, "answered with status 503"),
    ],
)
def test_a_server_that_refuses_its_info_is_an_error_with_a_remedy(
    status: int, kind: type[DraftsmithError], message: str, tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    def refuses(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(status)

    ctx = RecordingContext.under(tmp_path, {"target": tiny_drafter.target, "prompts": tiny_drafter.prompts})
    with serving(refuses, server_info=refuses) as server, pytest.raises(DraftsmithError, match=message) as caught:
        STAGE.run(ctx, asked(tiny_drafter, url=server.url))
    assert type(caught.value) is kind
