"""What is shown while packages are installed, with a real pip and an index on this machine."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.pip_install import install

SLOW_S = 1.0


class Slow(SimpleHTTPRequestHandler):
    """Waits before it sends a wheel."""

    def do_GET(self) -> None:
        if self.path.endswith(".whl"):
            time.sleep(SLOW_S)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an index with one package, `small-thing` 1.5."""
    folder = tmp_path_factory.mktemp("index")
    (folder / "small-thing").mkdir()
    wheel = folder / "small-thing" / "small_thing-1.5-py3-none-any.whl"
    info = "small_thing-1.5.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small_thing.py", "x = 1\n" * 10_000)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.5\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (folder / "small-thing" / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Slow, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_each_download_has_a_line_with_its_size(index: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--isolated", "--no-cache-dir", "--index-url", index, "--target", str(tmp_path / "there")]
    assert install([*options, "small-thing"], every_s=SLOW_S / 4) == 0
    assert (tmp_path / "there" / "small_thing.py").is_file()
    out, err = capfd.readouterr()
    lines = [line.strip() for line in err.splitlines()]
    assert "small_thing 1.5, 0.1 MB" in lines and not out
    assert sum(line.startswith("…") for line in lines) >= 2, "nothing was shown while it waited"


def test_pip_s_exit_code_and_error_come_through(index: str) -> None:
    script = Path(__file__).with_name("pip_install.py")
    command = [sys.executable, str(script), "--isolated", "--index-url", index, "no-such-thing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ERROR" in done.stderr and "no-such-thing" in done.stderr
