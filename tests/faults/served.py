"""The one real SGLang server of a series, on the CPU, behind a proxy."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from tests.faults.proxy import Proxy
from tests.sglang_cpu.server import running_server, sglang_python
from tests.testbed import target

SERVERS = ExitStack()  # closed when the series ends


@functools.cache
def proxy(folder: Path) -> Proxy:
    """Return the proxy in front of the one server of the series. folder: for the server's log."""
    python = sglang_python()
    if isinstance(python, str):
        raise SystemExit(python)
    url = SERVERS.enter_context(running_server(python, target.target_folder(), log=folder / "sglang.log"))
    address = urlsplit(url)
    return Proxy((str(address.hostname), int(address.port or 0)))


def urls(folder: Path) -> list[str]:
    """Return the arguments that send the command's rollout to the proxy."""
    return ["--set", f"rollout.engine.urls=[{proxy(folder).url}]"]
