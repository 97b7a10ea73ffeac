"""Servers of a target with LoRA adapters: their options, their requests, and the handshake."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.config import SGLangEngineConfig, VLLMEngineConfig
from draftsmith.stages.engines.servers.identity import own_logprobs
from draftsmith.stages.engines.servers.requirements import ServerRequirements, server_requirements
from draftsmith.stages.engines.sglang.handshake import check_server as check_sglang
from draftsmith.stages.engines.sglang.records import generate_payload
from draftsmith.stages.engines.sglang.server import server_command as sglang_command
from draftsmith.stages.engines.vllm.handshake import check_server as check_vllm
from draftsmith.stages.engines.vllm.records import completion_payload
from draftsmith.stages.engines.vllm.server import server_command as vllm_command
from tests.stages.engines.http_server import HttpServer, answer, serving
from tests.stages.engines.stand_ins import good_server, with_client
from tests.stages.engines.vllm.test_engine import completion
from tests.testbed.adapters import ALL, adapted_artifact

ASKED = Request("r", [1, 2], 4, adapter="b")


@pytest.fixture(scope="module")
def required(tmp_path_factory: pytest.TempPathFactory) -> ServerRequirements:
    """Return the requirements of a random target with adapters a and b, on servers that do not name its revision."""
    artifact = adapted_artifact(tmp_path_factory.mktemp("adapted"), a=3, b=24)
    engine = SGLangEngineConfig.model_validate({"kind": "sglang", "urls": ["http://x"]})
    found = server_requirements(engine, artifact, None, DraftingConfig(), 100)
    return replace(found, scored_ids=list(range(40)))  # its tokenizer knows no words of a text


def test_launched_servers_get_the_artifacts_copies(required: ServerRequirements, tmp_path: Path) -> None:
    named = [f"{name}={required.target_folder / 'adapters' / name}" for name in "ab"]
    launch = {"python": sys.executable, "launch": {}}
    sglang = SGLangEngineConfig.model_validate({"kind": "sglang", **launch})
    alone = replace(required, adapters={})
    words = sglang_command(sglang, required)
    assert words[-6:] == ["--enable-lora", "--max-loras-per-batch", "3", "--lora-paths", *named]
    assert not [word for word in sglang_command(sglang, alone) if "lora" in word]
    vllm = VLLMEngineConfig.model_validate({"kind": "vllm", **launch})
    words = vllm_command(vllm, required, tmp_path)
    maps = ["--lora-target-modules", *sorted(each.rpartition(".")[2] for each in ALL)]
    assert words[-16:] == [
        "--enable-lora",
        "--max-loras",
        "2",
        "--max-lora-rank",
        "32",
        *maps,
        "--lora-modules",
        *named,
    ]
    assert not [word for word in vllm_command(vllm, alone, tmp_path) if "lora" in word]


def test_a_request_names_its_adapter() -> None:
    alone = replace(ASKED, adapter="")
    assert generate_payload(ASKED, (), traced=False) == generate_payload(alone, (), traced=False) | {"lora_path": "b"}
    assert "lora_path" not in generate_payload(alone, (), traced=False)
    assert completion_payload(ASKED, ()) == completion_payload(alone, ()) | {"model": "b"}
    assert "model" not in completion_payload(alone, ())


@contextmanager
def server(required: ServerRequirements, served: dict[str, str]) -> Iterator[HttpServer]:
    """Run a server of both kinds. served: name -> the adapter that it has under this name."""
    ours = own_logprobs(required.target_folder, required.scored_ids, print)
    cards = [{"id": "m", "root": str(required.model_folder)}] + [{"id": n, "parent": "m"} for n in served]

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        done = answer(payload)
        if payload.get("return_logprob"):
            logprobs = ours[served.get(payload.get("lora_path", ""), "")]
            scored = zip([None, *logprobs], payload["input_ids"], strict=True)
            done["meta_info"]["input_token_logprobs"] = [[value, token, None] for value, token in scored]
        done["output_ids"] = [token % 62 for token in done["output_ids"]]
        return done

    def complete(payload: dict[str, Any]) -> dict[str, Any]:
        done = completion(payload)
        done["choices"][0]["token_ids"] = [1] * payload["max_tokens"]
        if "prompt_logprobs" in payload:
            logprobs = ours[served.get(payload.get("model", ""), "")]
            scored = zip(payload["prompt"][1:], logprobs, strict=True)
            done["choices"][0]["prompt_logprobs"] = [None, *({str(t): {"logprob": v}} for t, v in scored)]
        return done

    replies: dict[str, Any] = {
        "model_info": lambda _: {"model_path": str(required.model_folder)},
        "server_info": lambda _: good_server(required) | {"dtype": "float32"},
        "tokenize": lambda _: {"tokens": required.probe_ids},
        "version": lambda _: {"version": "0.32.0"},
        "v1/models": lambda _: {"data": cards},
        "v1/completions": complete,
    }
    with serving(generate, **replies) as running:
        yield running


@pytest.mark.parametrize("check_server", [check_sglang, check_vllm])
def test_the_handshake_compares_every_adapter(check_server: Any, required: ServerRequirements) -> None:
    def check(served: dict[str, str], *, ours: bool = False) -> list[str]:
        with server(required, served) as running:
            asked = with_client(lambda client: check_server(client, running.url, required, print, ours=ours))
            return list(asked.remarks)

    remarks = check({"a": "a", "b": "b"})
    for what in (f"serves {required.model_folder}", *(f"serves adapter {name} on " for name in "ab")):
        assert sum(what in remark and "nats from the target's" in remark for remark in remarks) == 1
    with pytest.raises(DraftsmithError, match=r"serves no adapter b\. Start it with all of target\.adapters\."):
        check({"a": "a"}, ours=True)
    with pytest.raises(DraftsmithError, match=r"serves adapter a on .* with other weights"):
        check({"a": "b", "b": "b"})
