"""The servers of one engine: launched or given by address, checked, and stopped at the end."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.results.evaluation import TargetDifference
from draftsmith.stages.engines.config import ServerEngineConfig
from draftsmith.stages.engines.servers.api import ServerApi, ServerInfo
from draftsmith.stages.engines.servers.dispatch import DeathLog, Server, ServerPool
from draftsmith.stages.engines.servers.http import key_header
from draftsmith.stages.engines.servers.process import ServerProcess, free_ports
from draftsmith.stages.engines.servers.requirements import ServerRequirements

_CONNECT_TIMEOUT_S = 10.0
_KEEP_ALIVE_S = 2.0  # less than a server's own, or requests would be sent on connections that it is closing
_POLL_S = 0.5


class Fleet:
    """The servers of one engine. Everything but the properties runs in the engine's event loop."""

    def __init__(
        self,
        api: ServerApi,
        config: ServerEngineConfig,
        required: ServerRequirements,
        folder: Path,
        log: Callable[[str], None],
    ):
        """Prepare servers, which `start` starts. Raises DraftsmithError if the config cannot be met."""
        self.api, self.log = api, log
        self._config, self._required, self._folder = config, required, folder
        self._api_key, self._processes = config.api_key(), list[ServerProcess]()
        if config.launch is not None:
            self._api_key = secrets.token_hex(32)
            self._processes = api.processes(folder, self._api_key)
        self._info: dict[str, ServerInfo] = {}  # by address
        self._records_through_routers = True
        self._client = httpx.AsyncClient(
            headers=key_header(self._api_key),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=not self._processes,  # no proxy for servers on this machine
        )
        deaths, first_token = DeathLog(folder / "deaths.json"), required.measure_first_token
        self.pool = ServerPool(api, self._client, [], config, deaths, log, stream=first_token)

    @property
    def name(self) -> str:
        """Return the kind of the servers with their versions, such as "sglang 0.5.23"."""
        return f"{self._config.kind} " + ", ".join(sorted({info.version for info in self._info.values()}))

    @property
    def records_trace(self) -> bool:
        return self._records_through_routers and all(info.records_trace for info in self._info.values())

    @property
    def target_difference(self) -> TargetDifference | None:
        """Return the largest difference of a server's target from transformers'; None if no setting differs."""
        differences = [info.target_difference for info in self._info.values() if info.target_difference is not None]
        return max(differences, key=lambda one: math.inf if one.mean is None else one.mean, default=None)

    @property
    def greedy_only(self) -> bool:
        return any(info.greedy_only for info in self._info.values())

    async def start(self) -> None:
        """Launch the servers if there are none yet, and check them all. Raises DraftsmithError if one is wrong.

        If one of several does not start or answer, the others serve.
        """
        if self._processes:
            started = time.monotonic()
            self.log(f"starting {len(self._processes)} {self.api.title} server(s), logs in {self._folder}")
            opening = [self._open_launched(process) for process in self._processes]
        else:
            opening = [self._open_given(url) for url in dict.fromkeys(url.rstrip("/") for url in self._config.urls)]
        opened = await asyncio.gather(*opening, return_exceptions=True)
        servers = [result for result in opened if isinstance(result, Server)]
        errors = [result for result in opened if isinstance(result, BaseException)]
        if wrong := [result for result in errors if not isinstance(result, RetryableError)]:
            raise wrong[0]
        if not servers:
            raise errors[0]
        for error in errors:
            self.log(f"not used: {error}")
        if self._processes:
            self.log(f"{self.api.title} is ready after {time.monotonic() - started:.0f} s")
        if self._required.drafter_folder is not None and not self.records_trace:
            self.log(f"{self.api.no_trace}: verify steps are not recorded, mining replays them")
        self.pool.servers += servers

    async def _open_given(self, url: str) -> Server:
        """Check the server at an address, or all servers of the router there, since any of them may answer."""
        workers = await self.api.workers(self._client, url)
        if workers is None:
            return Server(url, (await self._check(url, ours=False)).replicas)
        if not workers:
            raise RetryableError(f"engine.urls: the router {url} has no healthy server. Start them, then run again.")
        infos = await asyncio.gather(*(self._check(worker, ours=False) for worker in workers))
        self._records_through_routers &= await self.api.router_passes_records(self._client, url)
        self.log(f"{url} routes to {len(workers)} servers")
        return Server(url, sum(info.replicas for info in infos), tuple(workers))

    async def _open_launched(self, process: ServerProcess) -> Server:
        """Start and check a server; one that fails is started once more, or its GPU would idle for hours."""
        try:
            return await self._started(process)
        except RetryableError as error:
            process.use_port(*free_ports(1))  # the first may have been taken meanwhile
            self.log(f"started once more, on another port: {error}")
            return await self._started(process)

    async def _started(self, process: ServerProcess) -> Server:
        try:
            await self._launch(process)
            info = await self._check(process.url, ours=True)
        except RetryableError:
            await asyncio.to_thread(process.stop, 0)  # its GPU may be needed by others
            raise
        return Server(process.url, info.replicas, process=process)

    async def _check(self, url: str, *, ours: bool) -> ServerInfo:
        self._info[url] = info = await self.api.check(self._client, url, ours=ours)
        for remark in info.remarks:
            self.log(remark)
        return info

    async def _launch(self, process: ServerProcess) -> None:
        """Start a server and wait until it is healthy. Raises RetryableError with its log if that does not happen."""
        assert self._config.launch is not None
        limit = self._config.launch.start_timeout_s
        deadline = time.monotonic() + limit
        process.start()
        while True:
            if ended := process.ended():
                if process.refused_options:
                    self.log(f"the end of {process.log_path}:\n{process.tail()}")
                    raise DraftsmithError(
                        f"engine.launch.options: {self.api.title} does not understand its command. Correct the "
                        f"section launch; the reason is at the end of {process.log_path}."
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
        self.log(f"the end of {process.log_path}:\n{process.tail()}")
        return RetryableError(
            f"engine.launch: the {self.api.title} server {what} while it started. See its log {process.log_path}."
        )

    async def flush_cache(self) -> None:
        """Empty the prefix cache of every server that is not lost; waits until it is idle."""
        alive = [server.url for server in self.pool.servers if server.lost is None]
        await asyncio.gather(*(self.api.flush_cache(self._client, url) for url in alive))

    async def stop(self) -> None:
        """Abort what is in flight, then stop the servers that were started here."""
        for task in (in_flight := asyncio.all_tasks() - {asyncio.current_task()}):
            task.cancel()
        await asyncio.gather(*in_flight, return_exceptions=True)
        await self._client.aclose()
        await asyncio.gather(*(asyncio.to_thread(process.stop) for process in self._processes))
        self.api.close()
