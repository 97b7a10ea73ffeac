"""The server engines by the kind of their config section."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from draftsmith.stages.engines.config import ServerEngineConfig, SGLangEngineConfig, VLLMEngineConfig
from draftsmith.stages.engines.servers.api import ServerApi
from draftsmith.stages.engines.servers.engine import LoopThread, ServerEngine, proceed
from draftsmith.stages.engines.servers.fleet import Fleet
from draftsmith.stages.engines.servers.http import key_header, reachable
from draftsmith.stages.engines.servers.identity import ServedTarget, launched_target
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang.api import SGLangApi
from draftsmith.stages.engines.sglang.handshake import reported_target as target_of_sglang
from draftsmith.stages.engines.sglang.handshake import served_block_size as block_size_of_sglang
from draftsmith.stages.engines.vllm.api import VLLMApi
from draftsmith.stages.engines.vllm.handshake import is_vllm
from draftsmith.stages.engines.vllm.handshake import reported_target as target_of_vllm
from draftsmith.stages.engines.vllm.handshake import served_block_size as block_size_of_vllm
from draftsmith.stages.targets.info import TargetInfo


@contextmanager
def open_servers(
    config: ServerEngineConfig,
    required: ServerRequirements,
    work: Path,
    log: Callable[[str], None],
    check: Callable[[], None] = proceed,
) -> Iterator[ServerEngine]:
    """Open servers that meet the requirements; those started here are stopped on exit.

    work: launched servers' logs go to its folder `servers`. check: called while waiting for servers; its
    exception ends the wait.
    Raises DraftsmithError for a config, server or drafter that does not fit, RetryableError if no server answers.
    """
    api: ServerApi
    if isinstance(config, VLLMEngineConfig):
        api = VLLMApi(config, required, log)
    else:
        assert isinstance(config, SGLangEngineConfig)
        api = SGLangApi(config, required, log)
    loop = LoopThread()
    try:
        fleet = Fleet(api, config, required, work / "servers", log)
        try:
            loop.run(fleet.start(), check)
            yield ServerEngine(loop, fleet, check)
        finally:
            loop.run(fleet.stop())
    finally:
        loop.close()


def differing_settings(config: ServerEngineConfig, target: TargetInfo) -> list[str]:
    """Return the settings that make servers compute the target differently from transformers.

    For servers to be launched, by their options; for running ones, as they report, if they answer and are no router.
    """
    if config.launch is not None:
        return launched_target(config.launch.options).differs(target)
    ask = target_of_vllm if isinstance(config, VLLMEngineConfig) else target_of_sglang

    async def reported() -> list[ServedTarget | BaseException]:
        async with httpx.AsyncClient(headers=key_header(config.api_key())) as client:
            return await asyncio.gather(*(ask(client, url) for url in config.urls), return_exceptions=True)

    differences = [state.differs(target) for state in asyncio.run(reported()) if isinstance(state, ServedTarget)]
    return list(dict.fromkeys(setting for settings in differences for setting in settings))


def identify(url: str, api_key_env: str | None) -> tuple[ServerEngineConfig, int | None]:
    """Return the section of a running server, and the tokens of a verify step that it reports, None if it drafts none.

    Raises RetryableError if it does not answer, DraftsmithError if it is no server of an engine or refuses the key.
    """
    engine = SGLangEngineConfig(kind="sglang", urls=(url,), api_key_env=api_key_env)

    async def ask() -> tuple[ServerEngineConfig, int | None]:
        async with httpx.AsyncClient(headers=key_header(engine.api_key())) as client:
            if await is_vllm(client, url):
                vllm = VLLMEngineConfig(kind="vllm", urls=(url,), api_key_env=api_key_env)
                return vllm, await block_size_of_vllm(client, url)
            return engine, await block_size_of_sglang(client, url)

    with reachable(url):
        return asyncio.run(ask())
