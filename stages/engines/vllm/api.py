"""The endpoints of vLLM's servers, for the server engine."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx

from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.config import VLLMEngineConfig
from draftsmith.stages.engines.servers.api import ServerApi, ServerInfo
from draftsmith.stages.engines.servers.http import (
    Json,
    ServerAnswer,
    check_status,
    health_check,
    lost_unless_readable,
    post,
    read_stream,
)
from draftsmith.stages.engines.servers.process import ServerProcess, server_processes
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.vllm.handshake import check_server
from draftsmith.stages.engines.vllm.records import (
    UnreadStepsError,
    completion_payload,
    drafting_metrics,
    read_completion,
    read_steps,
)
from draftsmith.stages.engines.vllm.server import server_command

_HEALTH_LIMIT_S = 60.0
_STREAM_INTERVAL = 1 << 30  # only the first tokens, then all others in one piece


class VLLMApi(ServerApi):
    """vLLM's servers of one engine."""

    title = "vLLM"
    no_trace = "the servers do not report verify steps one by one (--per-request-spec-decode-metrics detailed)"
    id_field = "request_id"

    def __init__(self, config: VLLMEngineConfig, required: ServerRequirements, log: Callable[[str], None]):
        self._config, self._required, self._log = config, required, log
        self._exported: Path | None = None  # folder of the drafter in vLLM's layout
        self._salt: str | None = None
        self._unread: set[str] = set()  # reasons that were logged

    def processes(self, folder: Path, api_key: str) -> list[ServerProcess]:
        launch = self._config.launch
        assert launch is not None
        self._exported = folder / "drafter"
        command = server_command(self._config, self._required, self._exported)
        environment = {"VLLM_NO_USAGE_STATS": "1", **launch.environment, "VLLM_API_KEY": api_key}
        return server_processes(launch, command, environment, folder / "vllm.log")

    def close(self) -> None:
        if self._exported is not None:  # with the target's embedding and head it has gigabytes
            shutil.rmtree(self._exported, ignore_errors=True)

    async def check(self, client: httpx.AsyncClient, url: str, *, ours: bool) -> ServerInfo:
        launch = self._config.launch
        options = None if launch is None else launch.options
        return await check_server(client, url, self._required, self._log, ours=ours, options=options)

    def payload(self, request: Request, *, traced: bool) -> Json:  # noqa: ARG002  (it always reports the steps)
        payload = completion_payload(request, self._required.target.eos_ids)
        return payload if self._salt is None else payload | {"cache_salt": self._salt}

    async def generate(
        self, client: httpx.AsyncClient, url: str, name: str, payload: Json, *, stream: bool = False
    ) -> ServerAnswer:
        """Send a request; join the events of a streamed answer into one body."""
        started, endpoint = time.perf_counter(), f"{url}/v1/completions"
        first_token, body, choice = float("nan"), Json(), Json()
        tokens: list[int] = []

        def receive(event: Json) -> None:
            nonlocal first_token
            for part in event.pop("choices"):
                if part.get("token_ids") and not tokens:
                    first_token = time.perf_counter() - started
                tokens.extend(part.pop("token_ids", None) or ())
                choice.update({key: value for key, value in part.items() if value is not None})
            body.update(event)

        with lost_unless_readable():
            if stream:
                payload = payload | {
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "stream_interval": _STREAM_INTERVAL,
                }
                await read_stream(client, endpoint, name, payload, receive)
                body["choices"] = [choice | {"token_ids": tokens}]
            else:
                body = await post(client, endpoint, name, payload)
        return ServerAnswer(body, time.perf_counter() - started, first_token, url)

    def completion(self, request: Request, answer: ServerAnswer, *, traced: bool) -> Completion:
        completion = read_completion(request, answer, self._required.target)
        metrics = drafting_metrics(answer.body)
        if metrics is not None and traced:
            try:
                completion.steps = read_steps(request, completion.response_ids, metrics)
            except UnreadStepsError as reason:
                completion.retractions = 1  # their number cannot be compared with replay's either
                if str(reason) not in self._unread:
                    self._unread.add(str(reason))
                    self._log(f"verify steps of {request.request_id} (and of others like it) are dropped: {reason}")
        return completion

    async def check_health(self, client: httpx.AsyncClient, url: str) -> None:
        """Check that the engine lives, and that it gives a token in time."""
        async with health_check(_HEALTH_LIMIT_S):
            response = await client.get(f"{url}/health")
            check_status("of the health check", url, response.status_code, response.text)
            await self.generate(client, url, "of the health check", completion_payload(Request("", [0], 1), ()))

    async def flush_cache(self, client: httpx.AsyncClient, url: str) -> None:  # noqa: ARG002
        """Give the next requests another salt, since a stock server has no endpoint that empties its prefix cache."""
        self._salt = uuid.uuid4().hex
