"""Servers whose verification takes the argmax whatever the temperature are found, on whatever device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.sglang.engine import open_sglang
from draftsmith.stages.engines.sglang.expected import Expected
from draftsmith.stages.stored import DRAFTER_FOLDER
from tests.stages.engines.http_server import answer
from tests.stages.engines.test_sglang_handshake import expected_of, server_of, shake, speculating
from tests.testbed.drafter import DrafterArtifacts


@pytest.fixture
def assisted(tiny_drafter: DrafterArtifacts) -> Expected:
    return expected_of(tiny_drafter, tiny_drafter.drafter / DRAFTER_FOLDER)


def greedy_behind_the_first(payload: dict[str, Any], ties: int = 0) -> dict[str, Any]:
    """As SGLang without a kernel that samples: the prompt's token is drawn, verify steps take what `answer` counts.

    ties: of this many first answers a near-tie falls otherwise.
    """
    done = speculating(payload)
    first, count = done["output_ids"][0], len(done["output_ids"])
    done["output_ids"] = list(range(first, first + count))
    if payload["sampling_params"].get("sampling_seed", ties) < ties:
        done["output_ids"][2] += 7
    return done


@pytest.mark.parametrize("device", ["cuda", "xpu", "npu"])
@pytest.mark.parametrize("ties", [0, 2])
def test_greedy_verification_is_found_by_its_tokens(device: str, ties: int, assisted: Expected) -> None:
    with server_of(assisted, server={"device": device}, generate=lambda p: greedy_behind_the_first(p, ties)) as server:
        assert shake(server, assisted).greedy_only


def test_a_server_that_draws_is_not_taken_for_a_greedy_one(assisted: Expected) -> None:
    with server_of(assisted, server={"device": "xpu"}) as server:
        assert not shake(server, assisted).greedy_only
        temperatures = [
            payload["sampling_params"]["temperature"] for path, payload in server.asked if payload.get("input_ids")
        ]
    assert max(temperatures) >= 1e3


def test_on_a_cpu_a_speculating_server_is_greedy_only_without_being_asked(
    assisted: Expected, tiny_drafter: DrafterArtifacts
) -> None:
    with server_of(assisted, server={"device": "cpu"}) as server:
        assert shake(server, assisted, ours=True).greedy_only
        assert server.count("/generate") == 1
    plain = expected_of(tiny_drafter, None)
    with server_of(plain, server={"device": "cpu"}, generate=answer) as server:
        assert not shake(server, plain).greedy_only


def test_a_sampled_rollout_on_such_servers_is_refused_and_a_greedy_one_is_not(
    assisted: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    with (
        server_of(assisted, generate=greedy_behind_the_first) as server,
        open_sglang(
            SGLangEngineConfig.model_validate({"kind": "sglang", "urls": [server.url]}),
            target_folder=tiny_drafter.target,
            drafter_folder=tiny_drafter.drafter / DRAFTER_FOLDER,
            drafting=DraftingConfig(),
            longest=100,
            work=tmp_path,
            log=print,
        ) as engine,
    ):
        assert len(list(engine.generate([Request("greedy", [5], SamplingParams(3))]))) == 1
        with pytest.raises(DraftsmithError, match=r"sampling\.temperature: SGLang verifies greedily on this device"):
            list(engine.generate([Request("sampled", [5], SamplingParams(3, 1.0))]))
