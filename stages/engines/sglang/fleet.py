"""The servers of one engine: launched or given by address, checked, and stopped at the end."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.retry import retry_on
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.sglang.client import key_header
from draftsmith.stages.engines.sglang.handshake import ServerInfo, check_server, router_passes_records
from draftsmith.stages.engines.sglang.pool import DeathLog, Server, ServerPool
from draftsmith.stages.engines.sglang.protocol import ENVIRONMENT
from draftsmith.stages.engines.sglang.requirements import ServerRequirements
from draftsmith.stages.engines.sglang.router import router_command, router_workers, wait_for_workers
from draftsmith.stages.engines.sglang.server import ServerProcess, free_ports, server_command, server_processes

_CONNECT_TIMEOUT_S = 10.0
_KEEP_ALIVE_S = 2.0  # less than a server's own, or requests would be sent on connections that it is closing
_POLL_S = 0.5
_FLUSH_TIMEOUT_S = 60.0


class Fleet:
    """The servers of one engine. Everything but the properties runs in the engine's event loop."""

    def __init__(
        self,
        config: SGLangEngineConfig,
        required: ServerRequirements,
        processes: list[ServerProcess],
        folder: Path,
        log: Callable[[str], None],
        api_key: str | None = None,
    ):
        self._config, self._required, self._log, self._folder = config, required, log, folder
        self._processes = processes
        self._info: dict[str, ServerInfo] = {}  # by address
        self._api_key = api_key
        self._records_through_routers = True
        self._http: httpx.AsyncClient | None = None
        self._pool: ServerPool | None = None

    @property
    def name(self) -> str:
        """Return "sglang" with the versions of the servers."""
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
        """Launch the servers if there are none yet, and check each. Raises DraftsmithError if one is wrong.

        If one of several does not start or answer, the others serve.
        """
        self._http = httpx.AsyncClient(
            headers=key_header(self._api_key),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=not self._processes,  # no proxy for servers on this machine
        )
        if self._processes:
            started = time.monotonic()
            self._log(f"starting {len(self._processes)} SGLang server(s), logs in {self._folder}")
            opening = [self._open_launched(process) for process in self._processes]
        else:
            opening = [self._open_given(url) for url in dict.fromkeys(url.rstrip("/") for url in self._config.urls)]
        opened = await asyncio.gather(*opening, return_exceptions=True)
        servers = [each for each in opened if isinstance(each, Server)]
        errors = [each for each in opened if isinstance(each, BaseException)]
        if wrong := [each for each in errors if not isinstance(each, RetryableError)]:
            raise wrong[0]
        if not servers:
            raise errors[0]
        for error in errors:
            self._log(f"left out: {error}")
        if self._processes:
            self._log(f"SGLang is ready after {time.monotonic() - started:.0f} s")
        if self._config.launch is not None and self._config.launch.router is not None:
            servers = [await self._open_router(servers)]
        if self._required.trace and self._required.drafter_folder and not self.records_trace:
            self._log("the servers have no plug-in: verify steps are not recorded, mining replays them")
        self._pool = ServerPool(
            self._client,
            servers,
            self._config,
            DeathLog(self._folder / "deaths.json"),
            self._log,
            stream=self._required.measure_first_token,
        )
        return self._pool

    async def _open_given(self, url: str) -> Server:
        """Check the server at an address, or all servers of the router there, since any of them may answer."""
        workers = await router_workers(self._client, url)
        if workers is None:
            return Server(url, (await self._check(url, ours=False)).replicas)
        if not workers:
            raise RetryableError(f"engine.urls: the router {url} has no healthy server. Start them, then run again.")
        infos = await asyncio.gather(*(self._check(worker, ours=False) for worker in workers))
        return await self._router_server(url, workers, sum(info.replicas for info in infos))

    async def _open_launched(self, process: ServerProcess) -> Server:
        try:
            await self._launch(process, "options")
            info = await self._check(process.url, ours=True)
        except RetryableError:
            await asyncio.to_thread(process.stop, 0)  # its GPU may be needed by others
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
        server = await self._router_server(router.url, [server.url for server in servers], replicas)
        server.processes = (router, *(process for worker in servers for process in worker.processes))
        return server

    async def _router_server(self, url: str, workers: list[str], replicas: int) -> Server:
        self._records_through_routers &= await router_passes_records(self._client, url, self._required)
        self._log(f"{url} routes to {len(workers)} servers")
        return Server(url, replicas, tuple(workers))

    async def _check(self, url: str, *, ours: bool) -> ServerInfo:
        self._info[url] = info = await check_server(self._client, url, self._required, self._log, ours=ours)
        for remark in info.remarks:
            self._log(remark)
        return info

    async def _launch(self, process: ServerProcess, section: str) -> None:
        """Start a server and wait until it is healthy. Raises RetryableError with its log if that does not happen."""
        assert self._config.launch is not None
        limit = self._config.launch.start_timeout_s
        deadline = time.monotonic() + limit
        process.start()
        while True:
            if ended := process.ended():
                if process.refused_options:
                    self._log(f"the end of {process.log_path}:\n{process.tail()}")
                    raise DraftsmithError(
                        f"engine.launch.{section}: SGLang does not understand its command. Correct the section "
                        f"launch; the reason is at the end of {process.log_path}."
                    )
                raise self._start_error(process, ended)
            if time.monotonic() > deadline:
                raise self._start_error(process, f"gave no answer in {limit:g} s (engine.launch.start_timeout_s)")
            try:
                response = await self._client.get(f"{process.url}/health", timeout=_CONNECT_TIMEOUT_S)
                if response.status_code == 200:
                    process.remove_key_file()
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(_POLL_S)

    def _start_error(self, process: ServerProcess, what: str) -> RetryableError:
        self._log(f"the end of {process.log_path}:\n{process.tail()}")
        return RetryableError(
            f"engine.launch: the SGLang server {what} while it started. See its log {process.log_path}."
        )

    async def flush_cache(self) -> None:
        """Empty the prefix cache of every server that is not lost; waits until it is idle."""
        assert self._pool is not None
        await asyncio.gather(*(self._flush(server.url) for server in self._pool.servers if server.lost is None))

    async def _flush(self, url: str) -> None:
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
                f"engine: {url}/flush_cache did not succeed in {_FLUSH_TIMEOUT_S:g} s ({error}). Run the same "
                "command again."
            ) from error

    async def stop(self) -> None:
        """Abort what is in flight, then stop the servers that were started here."""
        if self._pool is not None:
            await self._pool.close()
        if self._http is not None:
            await self._http.aclose()
        await asyncio.gather(*(asyncio.to_thread(process.stop) for process in self._processes))


def open_fleet(
    config: SGLangEngineConfig, required: ServerRequirements, folder: Path, log: Callable[[str], None]
) -> Fleet:
    """Return the servers of a config, not started yet. Raises DraftsmithError if the config cannot be met."""
    processes = []
    api_key = config.api_key()
    if config.launch is not None:
        api_key = secrets.token_hex(32)
        line = server_command(
            config,
            model_folder=required.model_folder,
            dtype=required.target.dtype,
            drafter_folder=required.drafter_folder,
            algorithm=required.algorithm,
            block_size=required.block_size,
        )
        launch = config.launch
        if launch.router is not None and required.trace:  # a router drops the request's own parameter
            launch = launch.model_copy(update={"environment": {ENVIRONMENT: "1", **launch.environment}})
        processes = server_processes(launch, line, folder, api_key)
    return Fleet(config, required, processes, folder, log, api_key)
