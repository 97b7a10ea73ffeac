"""Checks of a running server's weights, by the hub's revision or by log-probs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.servers.identity import own_logprobs
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from tests.stages.engines.http_server import answer
from tests.stages.engines.servers import check, server_of, write_other_revision
from tests.testbed.drafter import DrafterArtifacts

COMMIT, OTHER = "a1" * 20, "b2" * 20


def of_hub(expected: ServerRequirements) -> ServerRequirements:
    return replace(expected, target=expected.target.model_copy(update={"source": "org/model", "revision": COMMIT}))


def scoring(logprobs: list[float]) -> Any:
    """Return a reply with these log-probs of the fixed tokens after the first."""

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        done = answer(payload)
        if payload.get("return_logprob"):
            tokens = payload["input_ids"]
            scored = [[value, token, None] for value, token in zip([None, *logprobs], tokens, strict=True)]
            done["meta_info"]["input_token_logprobs"] = scored
        return done

    return generate


@pytest.fixture(scope="module")
def other_revision(tiny_drafter: DrafterArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_other_revision(tiny_drafter, tmp_path_factory.mktemp("other-revision"))


def test_a_server_of_the_same_commit_of_the_hub_is_accepted_and_of_another_refused(plain: ServerRequirements) -> None:
    expected = of_hub(plain)
    with server_of(expected, model={"model_path": "org/model"}, server={"revision": COMMIT}) as server:
        assert check(server, expected).remarks == []
        assert not any("return_logprob" in payload for _, payload in server.asked)
    with (
        server_of(expected, model={"model_path": "org/model"}, server={"revision": OTHER}) as server,
        pytest.raises(DraftsmithError, match=f"of revision {OTHER}, .*--revision {COMMIT}"),
    ):
        check(server, expected)


@pytest.mark.parametrize(
    ("path", "revision"), [("org/model", None), ("org/model", "main"), ("/on/another/machine", None)]
)
def test_without_a_commit_a_server_is_identified_by_its_log_probs(
    plain: ServerRequirements, other_revision: Path, path: str, revision: str | None
) -> None:
    expected = of_hub(plain)
    ours, others = (
        own_logprobs(folder, plain.scored_ids, print)[""] for folder in (plain.target_folder, other_revision)
    )
    assert len(ours) > 80
    says: dict[str, Any] = {"model": {"model_path": path}, "server": {"revision": revision, "dtype": "float32"}}
    with server_of(expected, **says, generate=scoring([value + 9e-4 for value in ours])) as server:
        (remark,) = check(server, expected).remarks
    assert f"serves {path}: log-probs of {len(ours)} fixed tokens are 0.0009 nats from the target's" in remark
    with (
        server_of(expected, **says, generate=scoring(others)) as server,
        pytest.raises(DraftsmithError, match=rf"nats from those of the target org/model .*revision {COMMIT}"),
    ):
        check(server, expected)


def test_quantised_weights_are_not_compared_and_that_is_a_remark(plain: ServerRequirements) -> None:
    expected = of_hub(plain)
    says: dict[str, Any] = {"model": {"model_path": "org/model"}, "server": {"quantization": "fp8"}}
    with server_of(expected, **says) as server:
        (remark,) = check(server, expected).remarks
    assert "quantised (fp8): its weights could not be compared" in remark
