"""Stands in for SGLang in tests of start and stop: answers like `http_server`, has a child, ends as asked.

STAND_IN says how it behaves; STAND_IN_REPLIES, a JSON object by path, its answers to other requests than
/health and /generate.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.stages.engines.http_server import HttpServer, Reply, answer


def first() -> bool:
    """Of all that are started in this folder?"""
    try:
        Path("failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def fixed(body: object) -> Reply:
    return lambda _: body  # type: ignore[return-value]


def main() -> None:
    mode = os.environ.get("STAND_IN", "serve")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    found = {"path": os.environ.get("PYTHONPATH"), "home": os.environ.get("PYTHONHOME"), "child": child.pid}
    found["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF")
    print(json.dumps(found), flush=True)
    replies = {"/health": fixed({}), "/model_info": fixed({}), "/generate": answer}
    replies |= {path: fixed(body) for path, body in json.loads(os.environ.get("STAND_IN_REPLIES", "{}")).items()}
    server = HttpServer(replies, url=f"http://127.0.0.1:{sys.argv[sys.argv.index('--port') + 1]}")
    if mode == "key":  # as SGLang takes and logs it
        server.api_key = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text().partition(": ")[2])
        print(f"server_args={{api_key='{server.api_key}'}}", flush=True)
    if mode == "refuse":
        sys.exit(2)  # as argparse does
    if mode == "fail":
        sys.exit("no CUDA device here")
    if mode == "fail once" and first():
        sys.exit("the port is taken")
    if mode == "one lives":
        try:
            fcntl.flock(os.open("alive", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit("another one lives")
    if mode == "silent once" and first():
        replies["/model_info"] = fixed(None)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "polite":
        signal.signal(signal.SIGTERM, lambda *_: (print("said goodbye", flush=True), os._exit(0)))
    if mode != "mute":
        server.start()
    time.sleep(600)


main()
