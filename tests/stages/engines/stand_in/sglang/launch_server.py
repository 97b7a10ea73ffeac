"""A process in the place of SGLang, to test starting and stopping: serves /health, has a child, ends as told.

With STAND_IN_REPLIES, a JSON object by path, it answers these too, and /generate by counting on from the prompt.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

API_KEY = ""
REPLIES = json.loads(os.environ.get("STAND_IN_REPLIES", "{}"))
SILENT: set[str] = set()


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path in SILENT:
            pass
        elif self.path in REPLIES:
            self._answer(REPLIES[self.path])
        elif REPLIES and self.path != "/health":
            self.send_error(404)
        else:
            self._well()

    def _well(self) -> None:
        shown = self.headers.get("Authorization") == f"Bearer {API_KEY}"
        self.send_response(200 if self.path == "/health" or shown or not API_KEY else 401)
        self.end_headers()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}")
        if self.path != "/generate":
            self._answer(REPLIES[self.path])
            return
        first, count = asked["input_ids"][-1] + 1, asked["sampling_params"]["max_new_tokens"]
        meta = {"finish_reason": {"type": "length", "length": count}, "prompt_tokens": len(asked["input_ids"])}
        self._answer({"output_ids": list(range(first, first + count)), "meta_info": meta})

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def first() -> bool:
    """Of all that are started in this folder?"""
    try:
        Path("failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def main() -> None:
    mode = os.environ.get("STAND_IN", "serve")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    found = {"path": os.environ.get("PYTHONPATH"), "home": os.environ.get("PYTHONHOME"), "child": child.pid}
    print(json.dumps(found), flush=True)
    if mode == "key":  # as SGLang takes and logs it
        global API_KEY
        API_KEY = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text().partition(": ")[2])
        print(f"server_args={{api_key='{API_KEY}'}}", flush=True)
    if mode == "refuse":
        sys.exit(2)  # as argparse does
    if mode == "fail":
        sys.exit("no CUDA device here")
    if mode == "fail once" and first():
        sys.exit("the port is taken")
    if mode == "silent once" and first():
        SILENT.add("/model_info")
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "polite":
        signal.signal(signal.SIGTERM, lambda *_: (print("said goodbye", flush=True), os._exit(0)))
    if mode == "mute":
        time.sleep(600)
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()


main()
