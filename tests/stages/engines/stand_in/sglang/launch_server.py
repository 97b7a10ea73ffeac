"""A process in the place of SGLang, to test starting and stopping: serves /health, has a child, ends as told."""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

API_KEY = ""


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        shown = self.headers.get("Authorization") == f"Bearer {API_KEY}"
        self.send_response(200 if self.path == "/health" or shown or not API_KEY else 401)
        self.end_headers()


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
    if mode == "fail once":  # the first of all that are started in this folder
        try:
            Path("failed").touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            sys.exit("the port is taken")
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "polite":
        signal.signal(signal.SIGTERM, lambda *_: (print("said goodbye", flush=True), os._exit(0)))
    if mode == "mute":
        time.sleep(600)
    HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Health).serve_forever()


main()
