"""Checks of a running server's weights, by the hub's revision or by log-probs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.servers import identity
from draftsmith.stages.engines.servers.identity import QUANTISED_TOLERANCE, own_logprobs
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from tests.stages.engines.http_server import answer
from tests.stages.engines.stand_ins import check, server_of, write_other_revision
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
    ours, others = (own_logprobs(folder, plain.scored_ids, print) for folder in (plain.target_folder, other_revision))
    assert len(ours) > 80
    says: dict[str, Any] = {"model": {"model_path": path}, "server": {"revision": revision, "dtype": "float32"}}
    with server_of(expected, **says, generate=scoring([value + 9e-4 for value in ours])) as server:
        (remark,) = check(server, expected).remarks
    assert f"serves {path}: log-probs of {len(ours)} fixed tokens are 0.0009 nats from the target's" in remark
    with (
        server_of(expected, **says, generate=scoring(others)) as server,
        pytest.raises(DraftsmithError, match=rf"differ from those of the target org/model by .*revision {COMMIT}"),
    ):
        check(server, expected)


def reporting(ours: list[float], moved: float) -> Any:
    """Return a reply with log-probs that are `moved` from ours in the mean, twice that at most."""
    return scoring([value + moved * (2 if i % 2 else 0) for i, value in enumerate(ours)])


@pytest.mark.parametrize(
    ("says", "setting"),
    [
        ({"quantization": "fp8"}, "quantization fp8"),
        ({"torchao_config": "int8wo"}, "quantization int8wo"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "kv_cache_dtype fp8_e4m3"),
        ({"kv_cache_dtype": "bf16"}, "kv_cache_dtype bfloat16"),
        ({"dtype": "bfloat16"}, "dtype bfloat16"),
    ],
)
@pytest.mark.parametrize("how", ["ours", "commit", "unknown"])
def test_a_setting_that_differs_is_measured(
    plain: ServerRequirements, says: dict[str, Any], setting: str, how: str
) -> None:
    expected = of_hub(plain)
    ours = own_logprobs(plain.target_folder, plain.scored_ids, print)
    model = {"model_path": "org/model"}
    server = {"dtype": "float32", "revision": COMMIT if how == "commit" else None, **says}
    with server_of(expected, model=model, server=server, generate=reporting(ours, 0.05)) as running:
        found = check(running, expected, ours=how == "ours")
    (remark,), difference = found.remarks, found.target_difference
    assert difference is not None and difference.settings == [setting]
    assert difference.mean == pytest.approx(0.05, rel=0.02) and difference.largest == pytest.approx(0.1, rel=0.02)
    assert f"with {setting}: log-probs of {len(ours)} fixed tokens are 0.05 nats" in remark and "0.1 at most" in remark


def test_the_targets_own_quantisation_is_no_difference(plain: ServerRequirements) -> None:
    expected = replace(plain, target=plain.target.model_copy(update={"quantisation": "fp8"}))
    server = {"quantization": "fp8", "kv_cache_dtype": "auto", "dtype": "float32"}
    with server_of(expected, server=server) as running:
        assert check(running, expected, ours=True).target_difference is None


def test_other_weights_are_refused_though_the_server_quantises(plain: ServerRequirements) -> None:
    """Unless it is known that they are the target's: then the difference is measured, however large."""
    expected = of_hub(plain)
    ours = own_logprobs(plain.target_folder, plain.scored_ids, print)
    server = {"quantization": "fp8", "dtype": "float32"}
    with server_of(expected, server=server, generate=reporting(ours, QUANTISED_TOLERANCE * 1.1)) as running:
        with pytest.raises(DraftsmithError, match=f"other weights: .*at most {QUANTISED_TOLERANCE}"):
            check(running, expected)
        found = check(running, expected, ours=True).target_difference
    assert found is not None and found.mean is not None and found.mean > QUANTISED_TOLERANCE


def test_a_difference_that_cannot_be_measured_is_still_one(
    plain: ServerRequirements, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_OWN_LOGPROBS", {})
    monkeypatch.setattr(identity, "free_memory_bytes", lambda: 0)
    ours = [0.0] * (len(plain.scored_ids) - 1)
    with server_of(plain, server={"quantization": "fp8"}, generate=scoring(ours)) as running:
        found = check(running, plain, ours=True)
    assert found.target_difference is not None and found.target_difference.mean is None
    assert "could not be compared" in found.target_difference.text and "memory" in found.remarks[0]
