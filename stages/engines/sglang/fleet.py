"""The servers of one engine: given by address or launched, checked, started again when they die, stopped at the end."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.sglang.admission import Admission
from draftsmith.stages.engines.sglang.client import key_header
from draftsmith.stages.engines.sglang.expected import Expected
from draftsmith.stages.engines.sglang.health import Server, State
from draftsmith.stages.engines.sglang.pool import ServerPool
from draftsmith.stages.engines.sglang.protocol import ENVIRONMENT
from draftsmith.stages.engines.sglang.router import router_command, wait_for_workers
from draftsmith.stages.engines.sglang.server import ServerProcess, command, free_port, server_processes

if TYPE_CHECKING:
    import httpx

_CONNECT_TIMEOUT_S = 10.0
_KEEP_ALIVE_S = 2.0  # less than a server's own, or requests would be sent on connections that it is closing
_POLL_S = 0.5
_FLUSH_TIMEOUT_S = 60.0


class Fleet:
    """See the module. Everything but `name`, `records_trace` and `greedy_only` runs in the engine's event loop."""

    def __init__(
        self,
        config: SGLangEngineConfig,
        expected: Expected,
        processes: list[ServerProcess],
        log: Callable[[str], None],
        api_key: str | None = None,
    ):
        self._api_key = api_key
        self._config, self._expected, self._log = config, expected, log
        self._processes = processes
        self._process_of: dict[Server, ServerProcess] = {}
        self._ports: set[int] = set()  # given to processes, which bind them when their models are loaded
        self._router: ServerProcess | None = None
        self._watching: asyncio.Task[None] | None = None
        self._restarts_left = config.restarts
        self._client: httpx.AsyncClient | None = None
        self._admission: Admission | None = None
        self._pool: ServerPool | None = None

    @property
    def name(self) -> str:
        """sglang and the version, or versions, of the servers."""
        return "sglang " + ", ".join(sorted({facts.version for facts in self._admitted.facts.values()}))

    @property
    def records_trace(self) -> bool:
        return self._admitted.records_trace

    @property
    def greedy_only(self) -> bool:
        return self._admitted.greedy_only

    async def start(self) -> ServerPool:
        """Start what is to be started, check every server. Raises DraftsmithError if one is wrong."""
        import httpx

        self._client = client = httpx.AsyncClient(
            headers=key_header(self._api_key),
            timeout=httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=not self._processes,  # no proxy between this machine and itself
        )
        self._admission = Admission(client, self._expected, self._log)
        if self._processes:
            started = time.monotonic()
            self._log(f"starting {len(self._processes)} SGLang server(s), logs in {self._processes[0].log_path.parent}")
            await self._launch_all()
            self._log(f"SGLang answers after {time.monotonic() - started:.0f} s")
            servers = [Server(process.url, launched=True) for process in self._processes]
            self._process_of = dict(zip(servers, self._processes, strict=True))
            servers = await self._admit_launched(servers)
            if self._config.launch is not None and self._config.launch.router is not None:
                servers = [await self._launch_router(servers)]
        else:
            servers = [Server(url) for url in dict.fromkeys(url.rstrip("/") for url in self._config.urls)]
            await self._admitted.admit(servers)
        self._say_whether_traced()
        self._pool = ServerPool(
            client,
            servers,
            concurrency=self._config.concurrency,
            timeout_s=self._config.request_timeout_s,
            retries=self._config.retries,
            log=self._log,
            revive=self._revive,
            check=self._admitted.check,
            follow=self._admitted.follow,
            stream=self._expected.stream,
        )
        return self._pool

    async def _admit_launched(self, servers: list[Server]) -> list[Server]:
        """Those that pass the handshake; one of several that does not answer it is started again, as if it had died."""
        passed = await self._admitted.admit(servers)
        for server in servers:
            if server.state is State.DOWN:
                if await self._revive(server):
                    server.state = State.UP
                    passed.append(server)
                else:
                    self._log(f"SGLang server {server.url} is left out: {server.reason}")
                    await asyncio.to_thread(self._process_of[server].stop, 0)  # others may need its GPU
        return passed

    async def _launch_router(self, workers: list[Server]) -> Server:
        """In front of launched servers, which keep their ports from here on."""
        assert self._config.launch is not None
        folder = self._processes[0].log_path.parent
        line = router_command(self._config, [worker.url for worker in workers], self._free_port())
        self._router = ServerProcess(line, self._config.launch.environment, folder / "router.log", self._api_key)
        await self._start_router(len(workers))
        router = Server(self._router.url, launched=True)
        await self._admitted.admit_router(router, workers)
        self._process_of[router] = self._router
        self._watching = asyncio.create_task(self._watch(workers))
        return router

    async def _start_router(self, workers: int) -> None:
        assert self._router is not None and self._config.launch is not None
        await self._launch(self._router)
        await wait_for_workers(self._client_here, self._router.url, workers, self._config.launch.start_timeout_s)

    async def _watch(self, workers: list[Server]) -> None:
        """A router asks others when a server is lost: it is started again here, as often as `engine.restarts` allows.
        When none is left, the router ends, which its requests hear."""
        assert self._router is not None
        while any(worker.state is State.UP for worker in workers):
            await asyncio.sleep(_POLL_S)
            for worker in workers:
                if worker.state is State.UP and self._process_of[worker].ended():
                    try:
                        worker.state = State.UP if await self._revive(worker) else State.DOWN
                    except Exception as error:  # whatever it was, the others go on
                        worker.state, worker.reason = State.DOWN, str(error)
                    if worker.state is State.DOWN:
                        self._log(f"SGLang server {worker.url} is lost: {worker.reason}")
                        # It may answer all the same, and the router would ask it.
                        await asyncio.to_thread(self._process_of[worker].stop, 0)
        self._restarts_left = 0
        await asyncio.to_thread(self._router.stop, 0)

    def _say_whether_traced(self) -> None:
        if self._expected.trace and self._expected.drafter_folder and not self.records_trace:
            self._log("no plug-in on the servers: verify steps are not recorded, mining replays them")

    def _free_port(self) -> int:
        """One that no process of this fleet has: they bind theirs when their models are loaded."""
        while (port := free_port()) in self._ports:
            pass
        self._ports.add(port)
        return port

    async def _launch_all(self) -> None:
        launches = [asyncio.create_task(self._launch_among(process)) for process in self._processes]
        try:
            await asyncio.gather(*launches)
        finally:
            for launch in launches:
                launch.cancel()

    async def _launch_among(self, process: ServerProcess) -> None:
        """One of several may fail for a reason of its own: it is started again, as often as `restarts` allows. A single
        one would fail again."""
        while True:
            try:
                return await self._launch(process)
            except RetryableError as error:
                if len(self._processes) == 1 or self._restarts_left == 0:
                    raise
                self._restarts_left -= 1
                self._log(f"{error}; starting it again ({self._restarts_left} restarts left)")
                await asyncio.to_thread(process.stop, 0)

    async def _launch(self, process: ServerProcess, port: int | None = None) -> None:
        """Start a server and wait until it is healthy. Raises RetryableError with its log if that does not happen."""
        import httpx

        assert self._client is not None and self._config.launch is not None
        limit = self._config.launch.start_timeout_s
        deadline = time.monotonic() + limit
        process.start(port or self._free_port())
        while True:
            if ended := process.ended():
                lost = self._not_started(process, ended)
                if process.refused_options:
                    part = "router" if process is self._router else "options"
                    raise DraftsmithError(
                        f"engine.launch.{part}: SGLang does not understand its command, see the end of "
                        f"{process.log_path}; correct the section launch"
                    )
                raise lost
            if time.monotonic() > deadline:
                process.stop(grace_s=0)
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

    async def _revive(self, server: Server) -> bool:
        """Start a launched server again, as often as `engine.restarts` allows. Whether it is back."""
        process = self._process_of.get(server)
        if process is None:
            return False
        how = process.ended() or server.reason or "does not answer"
        server.reason = f"{how} (log: {process.log_path})"
        self._log(f"SGLang server {server.url}: {how}; the end of {process.log_path}:\n{process.tail()}")
        while self._restarts_left > 0:
            self._restarts_left -= 1
            self._log(f"starting it again ({self._restarts_left} restarts left)")
            await asyncio.to_thread(process.stop, 0)
            try:
                if server.behind:
                    await self._start_router(1)
                else:
                    port = urlsplit(server.url).port if self._router is not None else None  # as the router knows it
                    await self._launch(process, port)
                server.url = process.url
                if not server.behind:
                    await self._admitted.check(server)
            except RetryableError as error:
                server.reason = str(error)
                continue
            return True
        server.reason += f"; engine.restarts: {self._config.restarts} used up"
        return False

    @property
    def _admitted(self) -> Admission:
        assert self._admission is not None
        return self._admission

    @property
    def _client_here(self) -> httpx.AsyncClient:
        assert self._client is not None
        return self._client

    async def flush_cache(self) -> None:
        """POST /flush_cache to every server that is there; waits until it is idle."""
        assert self._pool is not None
        await asyncio.gather(*(self._flush(server.url) for server in self._pool.servers if server.state is State.UP))

    async def _flush(self, url: str) -> None:
        import httpx

        deadline = time.monotonic() + _FLUSH_TIMEOUT_S
        while True:
            try:
                response = await self._client_here.post(f"{url}/flush_cache", timeout=_FLUSH_TIMEOUT_S)
                if response.status_code == 200:
                    return
                reason = f"status {response.status_code}: {' '.join(response.text.split())[:200]}"
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__} {error}"
            if time.monotonic() > deadline:
                raise RetryableError(f"engine: {url}/flush_cache did not succeed in {_FLUSH_TIMEOUT_S:g} s: {reason}")
            await asyncio.sleep(_POLL_S)

    async def stop(self) -> None:
        """Abort what is in flight, then stop the servers that were started here."""
        if self._watching is not None:
            self._watching.cancel()
        if self._pool is not None:
            await self._pool.close()
        if self._client is not None:
            await self._client.aclose()
        routers = [self._router] if self._router is not None else []
        await asyncio.gather(*(asyncio.to_thread(process.stop) for process in (*routers, *self._processes)))


def open_fleet(config: SGLangEngineConfig, expected: Expected, folder: Path, log: Callable[[str], None]) -> Fleet:
    """The servers that a config means, not started yet. Raises DraftsmithError if they cannot be."""
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
    return Fleet(config, expected, processes, log, api_key)
