"""Servers for tests of the engine: in this process by `http_server`, or launched in place of SGLang."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch
from safetensors.torch import load_file, save_file

from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.servers.api import ServerInfo
from draftsmith.stages.engines.servers.engine import ServerEngine
from draftsmith.stages.engines.servers.requirements import ServerRequirements, server_requirements
from draftsmith.stages.engines.sglang.handshake import check_server
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.describe import describe
from draftsmith.stages.targets.info import model_path, write_target_info
from tests.stages.engines.http_server import HttpServer, Refusal, Reply, answer, is_probe, serving
from tests.testbed.drafter import DrafterArtifacts

# PYTHONPATH of a process that runs the tests' module `sglang.launch_server`
STAND_IN = os.pathsep.join(map(str, (Path(__file__).with_name("stand_in"), Path(__file__).parents[3])))

T = TypeVar("T")
# of the fixtures `opened` and `engine_on`
Opened = Callable[..., AbstractContextManager[ServerEngine]]
EngineOn = Callable[..., AbstractContextManager[tuple[HttpServer, ServerEngine]]]


def living(folder: Path) -> list[int]:
    """Return the processes started in this folder: servers and their descendants."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder.resolve():
                found.append(int(entry.name))
        except OSError:
            continue  # ended meanwhile, or a zombie
    return found


def requirements_of(made: DrafterArtifacts, drafter: Path | None) -> ServerRequirements:
    config = SGLangEngineConfig.model_validate({"kind": "sglang", "urls": ["http://x"]})
    return server_requirements(config, made.target, drafter, DraftingConfig(), 200)


def write_other_revision(made: DrafterArtifacts, folder: Path) -> Path:
    """Write a target artifact with slightly moved weights: same config, tokenizer and shapes. Return its folder."""
    shutil.copytree(model_path(made.target), folder / "model")
    weights = load_file(folder / "model" / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    moved = {name: w + 1e-3 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    save_file(moved, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    config = TargetConfig(source="org/model", dtype="float32")
    write_target_info(describe(folder / "model", config, kind="folder", location="model", revision=None), folder)
    return folder


def good_model(expected: ServerRequirements) -> dict[str, Any]:
    return {"model_path": str(expected.model_folder)}


def good_server(expected: ServerRequirements) -> dict[str, Any]:
    drafting = {
        "speculative_algorithm": "DFLASH",
        "speculative_draft_model_path": str(expected.drafter_folder),
        "speculative_num_draft_tokens": 8,
    }
    room = {"max_req_input_len": 1018, "max_total_num_tokens": 4096, "page_size": 1}
    return {"version": "0.5.20", "device": "cuda", **room, **(drafting if expected.drafter_folder else {})}


def speculating(payload: dict[str, Any], digest: str | None = None) -> dict[str, Any]:
    """Return an answer of one step with all proposals accepted: tokens of `answer`, or sampled from [20, 800)."""
    done = answer(payload, spec_verify_ct=1)
    sampling = payload["sampling_params"]
    if sampling["temperature"] > 0:
        generator = random.Random(sampling["sampling_seed"])
        done["output_ids"] = [generator.randrange(20, 800) for _ in done["output_ids"]]
    tokens, prompt = done["output_ids"], len(payload["input_ids"])
    if digest is not None and sampling.get("custom_params"):
        identity = {"v": "1", "drafter": digest}
        step = identity | {"anchor": prompt, "block": tokens[1:], "accepted": len(tokens) - 1, "bonus": 5}
        done["meta_info"]["draftsmith_trace"] = [identity, step, *[None] * (len(tokens) - 2)]
    return done


@contextmanager
def server_of(
    expected: ServerRequirements,
    *,
    model: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    tokens: list[int] | None = None,
    digest: str | None = None,
    generate: Reply | None = None,
) -> Iterator[HttpServer]:
    """Run a server that meets the requirements but for some differences."""
    if generate is None:
        generate = (lambda p: speculating(p, digest)) if expected.drafter_folder else answer
    replies = {
        "model_info": lambda _: good_model(expected) | (model or {}),
        "server_info": lambda _: good_server(expected) | (server or {}),
        "tokenize": lambda _: {"tokens": expected.probe_ids if tokens is None else tokens},
    }
    with serving(generate, **replies) as running:
        yield running


def with_client(ask: Callable[[httpx.AsyncClient], Awaitable[T]]) -> T:
    """Return what is asked with a client."""

    async def run() -> T:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await ask(client)

    return asyncio.run(run())


def check(
    server: HttpServer, expected: ServerRequirements, *, ours: bool = False, logs: list[str] | None = None
) -> ServerInfo:
    log = (logs if logs is not None else []).append
    return with_client(lambda client: check_server(client, server.url, expected, log, ours=ours))


def refusing(
    status: int, text: str = "told to", which: Callable[[list[int]], bool] = lambda _ids: True, **headers: str
) -> Reply:
    """Return a reply that refuses requests with such a prompt, and everything else but probes."""

    def reply(payload: dict[str, Any]) -> dict[str, Any]:
        if "input_ids" not in payload or (not is_probe(payload) and which(payload["input_ids"])):
            raise Refusal(status, text, **headers)
        return answer(payload)

    return reply


def asked_for(server: HttpServer) -> list[list[int]]:
    """Return the prompts of the requests that the server got."""
    return [p["input_ids"] for path, p in server.asked if path == "/generate" and not is_probe(p)]
