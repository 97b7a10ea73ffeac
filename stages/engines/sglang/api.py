"""The endpoints of SGLang's servers, for the server engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import httpx

from draftsmith.artifacts.errors import RetryableError
from draftsmith.artifacts.retry import retry_on
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.servers.api import ServerApi, ServerInfo
from draftsmith.stages.engines.servers.http import (
    Json,
    ServerAnswer,
    ServerStalledError,
    check_status,
    health_check,
    lost_unless_readable,
    post,
    read_stream,
)
from draftsmith.stages.engines.servers.process import ServerProcess, server_processes
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang.handshake import check_server, router_passes_records
from draftsmith.stages.engines.sglang.records import generate_payload, read_completion
from draftsmith.stages.engines.sglang.server import cuda_environment, router_workers, server_command

_HEALTH_TIMEOUT_S = 30.0  # SGLang answers within 20
_CONNECT_TIMEOUT_S = 10.0
_HEALTH_GENERATION_TIMEOUT_S = 60.0
_STREAM_INTERVAL = 1 << 30  # only the first token, then all others in one piece
_ABORT_TIMEOUT_S = 5.0
_FLUSH_TIMEOUT_S = 60.0
_POLL_S = 0.5


class SGLangApi(ServerApi):
    """SGLang's servers of one engine."""

    title = "SGLang"
    no_trace = "the servers have no plug-in"
    id_field = "rid"

    def __init__(self, config: SGLangEngineConfig, required: ServerRequirements, log: Callable[[str], None]):
        self._config, self._required, self._log = config, required, log

    def processes(self, folder: Path, api_key: str) -> list[ServerProcess]:
        launch, required = self._config.launch, self._required
        assert launch is not None
        command = server_command(self._config, required)
        on_cuda = not launch.on_cpu
        environment = cuda_environment(Path(command[0]), launch, folder / "cuda") if on_cuda else launch.environment
        return server_processes(launch, command, environment, folder / "sglang.log", api_key)

    async def check(self, client: httpx.AsyncClient, url: str, *, ours: bool) -> ServerInfo:
        return await check_server(client, url, self._required, self._log, ours=ours)

    def payload(self, request: Request, *, traced: bool) -> Json:
        return generate_payload(request, self._required.target.eos_ids, traced)

    async def generate(
        self, client: httpx.AsyncClient, url: str, name: str, payload: Json, *, stream: bool = False
    ) -> ServerAnswer:
        started = time.perf_counter()
        first_token, body = float("nan"), Json()

        def receive(event: Json) -> None:
            nonlocal first_token, body
            body = event
            if first_token != first_token and body.get("output_ids"):  # NaN: none yet
                first_token = time.perf_counter() - started

        with lost_unless_readable():
            if stream:
                sampling = {**payload["sampling_params"], "stream_interval": _STREAM_INTERVAL}
                streamed = {**payload, "sampling_params": sampling, "stream": True}
                await read_stream(client, f"{url}/generate", name, streamed, receive)
            else:
                body = await post(client, f"{url}/generate", name, payload)
            reason = body["meta_info"]["finish_reason"]
            kind = reason["type"]
        if kind == "abort":
            check_status(name, url, int(reason.get("status_code") or 500), f"aborted: {reason.get('message')}")
        return ServerAnswer(body, time.perf_counter() - started, first_token, url)

    async def abort(self, client: httpx.AsyncClient, url: str, request_id: str) -> None:
        await client.post(f"{url}/abort_request", json={"rid": request_id}, timeout=_ABORT_TIMEOUT_S)

    def completion(self, request: Request, answer: ServerAnswer, *, traced: bool) -> Completion:
        # A full server may have retracted the answer and prefilled it again, which gives a token without a verify
        # step. Its tokens are right; its steps are not read, and mining replays them.
        retracted = int(answer.body.get("meta_info", {}).get("num_retractions") or 0)
        digests = self._required.reported_digests if traced and not retracted else ()
        return read_completion(request, answer, self._required.target, digests)

    async def check_health(self, client: httpx.AsyncClient, url: str) -> None:
        """Check that the server computes.

        GET /health_generate answers 200 as soon as the scheduler has returned anything, and 503 after 20 s
        without. A server without this endpoint gets a short generation.
        """
        name, limit = "of the health check", httpx.Timeout(_HEALTH_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
        payload = {"input_ids": [0], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        async with health_check(_HEALTH_GENERATION_TIMEOUT_S):
            response = await client.get(f"{url}/health_generate", timeout=limit)
            if response.status_code == 501 or 400 <= response.status_code < 500:  # a gateway that does not pass it on
                await self.generate(client, url, name, payload)
            elif response.status_code == 503:
                raise ServerStalledError("computes nothing")
            else:
                check_status(name, url, response.status_code, response.text)

    async def flush_cache(self, client: httpx.AsyncClient, url: str) -> None:
        """Empty the prefix cache of a server; waits until it is idle. Raises RetryableError if it stays busy."""

        @retry_on(
            RetryableError,
            give_up=lambda _error, _attempts, seconds: seconds > _FLUSH_TIMEOUT_S,
            pause_s=lambda _error, _attempts: _POLL_S,
        )
        async def flush() -> None:
            try:
                (await client.post(f"{url}/flush_cache", timeout=_FLUSH_TIMEOUT_S)).raise_for_status()
            except httpx.HTTPError as error:
                raise RetryableError(
                    f"engine: {url}/flush_cache did not succeed in {_FLUSH_TIMEOUT_S:g} s ({error}). Run the same "
                    "command again."
                ) from error

        await flush()

    async def workers(self, client: httpx.AsyncClient, url: str) -> list[str] | None:
        return await router_workers(client, url)

    async def check_router(self, client: httpx.AsyncClient, url: str) -> None:
        with lost_unless_readable():
            await client.get(f"{url}/workers", timeout=_ABORT_TIMEOUT_S)

    async def router_passes_records(self, client: httpx.AsyncClient, url: str) -> bool:
        return await router_passes_records(client, url, self._required)
