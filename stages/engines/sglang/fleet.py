"""The servers of one engine: given by address or launched, checked, stopped at the end."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.retry import retry_on
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.sglang.client import key_header
from draftsmith.stages.engines.sglang.handshake import Expected, ServerInfo, check_server, records_through
from draftsmith.stages.engines.sglang.pool import Deaths, Server, ServerPool
from draftsmith.stages.engines.sglang.protocol import ENVIRONMENT
from draftsmith.stages.engines.sglang.router import router_command, wait_for_workers, workers_behind
from draftsmith.stages.engines.sglang.server import ServerProcess, command, free_ports, server_processes

if TYPE_CHECKING:
    import httpx

_CONNECT_TIMEOUT_S = 10.0
_KEEP_ALIVE_S = 2.0  # less than a server's own, or requests would be sent on connections that it is closing
_POLL_S = 0.5
_FLUSH_TIMEOUT_S = 60.0


class Fleet:
    """See the module. Everything but the properties runs in the engine's event loop."""

    def __init__(
        self,
        config: SGLangEngineConfig,
        expected: Expected,
        processes: list[ServerProcess],
        folder: Path,
        log: Callable[[str], None],
        api_key: str | None = None,
    ):
        self._config, self._expected, self._log, self._folder = config, expected, log, folder
        self._processes = processes
        self._info: dict[str, ServerInfo] = {}  # by address
        self._api_key = api_key
        self._records_through_routers = True
        self._http: httpx.AsyncClient | None = None
        self._pool: ServerPool | None = None

    @property
    def name(self) -> str:
        """Return sglang and the version, or versions, of the servers."""
        return "sglang " + ", ".join(sorted({info.version for info in self._info.values()}))

    @property
    def records_trace(self) -> bool:
        return self._records_through_routers and all(info.records_trace for info in self._info.values())

    @property
    def greedy_only(self) -> bool:
        return any(info.greedy_only for info in self._info.values())

    @property
    def _client(self) -> httpx.AsyncClient:
        assert self._http is not None
        return self._http

    async def start(self) -> ServerPool:
        """Start what is to be started, check every server. Raises DraftsmithError if one is wrong.

        One of several that does not start or answer is left out.
        """
        import httpx

        self._http = httpx.AsyncClient(
            headers=key_header(self._api_key),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=not self._processes,  # no proxy between this machine and itself
        )
        if self._processes:
            started = time.monotonic()
            self._log(f"starting {len(self._processes)} SGLang server(s), logs in {self._folder}")
            opening = [self._open_launched(process) for process in self._processes]
        else:
            opening = [self._open_given(url) for url in dict.fromkeys(url.rstrip("/") for url in self._config.urls)]
        found = await asyncio.gather(*opening, return_exceptions=True)
        servers = [each for each in found if isinstance(each, Server)]
        errors = [each for each in found if isinstance(each, BaseException)]
        if wrong := [each for each in errors if not isinstance(each, RetryableError)]:
            raise wrong[0]
        if not servers:
            raise errors[0]
        for error in errors:
            self._log(f"left out: {error}")
        if self._processes:
            self._log(f"SGLang answers after {time.monotonic() - started:.0f} s")
        if self._config.launch is not None and self._config.launch.router is not None:
            servers = [await self._open_router(servers)]
        if self._expected.trace and self._expected.drafter_folder and not self.records_trace:
            self._log("no plug-in on the servers: verify steps are not recorded, mining replays them")
        self._pool = ServerPool(
            self._client,
            servers,
            concurrency=self._config.concurrency,
            timeout_s=self._config.request_timeout_s,
            deaths=Deaths(self._folder / "deaths.json"),
            log=self._log,
            stream=self._expected.stream,
        )
        return self._pool

    async def _open_given(self, url: str) -> Server:
        """Check what answers at an address; all servers behind a router, for any of them may answer."""
        workers = await workers_behind(self._client, url)
        if workers is None:
            return Server(url, (await self._check(url, ours=False)).replicas)
        if not workers:
            raise RetryableError(f"engine.urls: the router {url} has no healthy server. Start them, then run again.")
        infos = await asyncio.gather(*(self._check(worker, ours=False) for worker in workers))
        return await self._behind_router(url, workers, sum(info.replicas for info in infos))

    async def _open_launched(self, process: ServerProcess) -> Server:
        try:
            await self._launch(process, "options")
            info = await self._check(process.url, ours=True)
        except RetryableError:
            await asyncio.to_thread(process.stop, 0)  # others may need its GPU
            raise
        return Server(process.url, info.replicas, processes=(process,))

    async def _open_router(self, servers: list[Server]) -> Server:
        """Start a router in front of launched servers."""
        assert self._config.launch is not None
        port, metrics_port = free_ports(2)
        line = router_command(self._config, [server.url for server in servers], metrics_port)
        router = ServerProcess(line, self._config.launch.environment, self._folder / "router.log", port, self._api_key)
        self._processes.append(router)
        await self._launch(router, "router")
        await wait_for_workers(self._client, router.url, len(servers), self._config.launch.start_timeout_s)
        replicas = sum(server.replicas for server in servers)
        found = await self._behind_router(router.url, [server.url for server in servers], replicas)
        found.processes = (router, *(process for server in servers for process in server.processes))
        return found

    async def _behind_router(self, url: str, workers: list[str], replicas: int) -> Server:
        self._records_through_routers &= await records_through(self._client, url, self._expected)
        self._log(f"{url} routes to {len(workers)} servers")
        return Server(url, replicas, tuple(workers))

    async def _check(self, url: str, *, ours: bool) -> ServerInfo:
        self._info[url] = info = await check_server(self._client, url, self._expected, self._log, ours=ours)
        for remark in info.remarks:
            self._log(remark)
        return info

    async def _launch(self, process: ServerProcess, section: str) -> None:
        """Start a server and wait until it is healthy. Raises RetryableError with its log if that does not happen."""
        import httpx

        assert self._config.launch is not None
        limit = self._config.launch.start_timeout_s
        deadline = time.monotonic() + limit
        process.start()
        while True:
            if ended := process.ended():
                if process.refused_options:
                    self._log(f"the end of {process.log_path}:\n{process.tail()}")
                    raise DraftsmithError(
                        f"engine.launch.{section}: SGLang does not understand its command, see the end of "
                        f"{process.log_path}. Correct the section launch."
                    )
                raise self._not_started(process, ended)
            if time.monotonic() > deadline:
                raise self._not_started(process, f"gave no answer in {limit:g} s (engine.launch.start_timeout_s)")
            try:
                response = await self._client.get(f"{process.url}/health", timeout=_CONNECT_TIMEOUT_S)
                if response.status_code == 200:
                    process.answers()
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(_POLL_S)

    def _not_started(self, process: ServerProcess, what: str) -> RetryableError:
        self._log(f"the end of {process.log_path}:\n{process.tail()}")
        return RetryableError(f"engine.launch: the SGLang server {what} while it started (log: {process.log_path})")

    async def flush_cache(self) -> None:
        """POST /flush_cache to every server that is there; waits until it is idle."""
        assert self._pool is not None
        await asyncio.gather(*(self._flush(server.url) for server in self._pool.servers if server.lost is None))

    async def _flush(self, url: str) -> None:
        import httpx

        @retry_on(
            httpx.HTTPError,
            give_up=lambda _error, _attempts, seconds: seconds > _FLUSH_TIMEOUT_S,
            pause_s=lambda _error, _attempts: _POLL_S,
        )
        async def flush() -> None:
            (await self._client.post(f"{url}/flush_cache", timeout=_FLUSH_TIMEOUT_S)).raise_for_status()

        try:
            await flush()
        except httpx.HTTPError as error:
            raise RetryableError(
                f"engine: {url}/flush_cache did not succeed in {_FLUSH_TIMEOUT_S:g} s: {error}"
            ) from error

    async def stop(self) -> None:
        """Abort what is in flight, then stop the servers that were started here."""
        if self._pool is not None:
            await self._pool.close()
        if self._http is not None:
            await self._http.aclose()
        await asyncio.gather(*(asyncio.to_thread(process.stop) for process in self._processes))


def open_fleet(config: SGLangEngineConfig, expected: Expected, folder: Path, log: Callable[[str], None]) -> Fleet:
    """Return the servers that a config means, not started yet. Raises DraftsmithError if they cannot be."""
    processes = []
    api_key = config.api_key()
    if config.launch is not None:
        api_key = secrets.token_hex(32)
        line = command(
            config,
            model_folder=expected.model_folder,
            dtype=expected.target.dtype,
            drafter_folder=expected.drafter_folder,
            algorithm=expected.algorithm,
            block_size=expected.block_size,
        )
        launch = config.launch
        if launch.router is not None and expected.trace:  # it does not pass on that a request asks
            launch = launch.model_copy(update={"environment": {ENVIRONMENT: "1", **launch.environment}})
        processes = server_processes(launch, line, folder, api_key)
    return Fleet(config, expected, processes, folder, log, api_key)
