"""Run `pip install` and show what it does: a line for each download, and a sign of life where nothing ends.

Usage: `python tests/pip_install.py [arguments of pip install]`. It ends with pip's exit code. Everything goes to
stderr, for targets of make whose stdout is read. Only Python's own library: nothing else is installed yet.
"""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import IO

_SIGN_OF_LIFE_S = 10.0
_FILE = re.compile(r"\s*(?P<how>Downloading|Using cached) (?P<file>\S+) \((?P<size>[\d.]+) (?P<unit>bytes|kB|MB|GB)\)")
_HERE = re.compile(r"\s*Processing (?P<file>\S+\.whl)")
_BYTES = {"bytes": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}  # as pip counts
_LAST_LINES = 20  # shown where pip fails


class Progress:
    """Turns pip's lines into fewer."""

    def __init__(self) -> None:
        self.doing = "starting pip"
        self.collected = self.files = self.bytes = self.cached_bytes = 0

    def line(self, text: str) -> str | None:
        """Return the line to show for one of pip's, or None."""
        if match := _FILE.match(text):
            return None if match["file"].endswith(".metadata") else self._file(match)
        if match := _HERE.match(text):
            return f"{_name(match['file'])}, a file on this machine"
        if text.startswith("Collecting "):
            self.collected += 1
            self.doing = f"choosing versions, {self.collected} packages so far"
        elif text.startswith("Installing collected packages: "):
            count = text.count(",") + 1
            self.doing = f"unpacking {count} packages"
            loaded = f"{_size(self.bytes)} downloaded, {_size(self.cached_bytes)} from pip's cache"
            return f"{self.files} files: {loaded}. Unpacking {count} packages."
        elif text.startswith("Successfully installed "):
            return f"Installed {len(text.split()) - 2} packages."
        elif text.endswith(": started"):  # of a build
            self.doing = text.strip().removesuffix(": started")
        elif text.startswith("INFO: "):
            return text
        return None

    def _file(self, match: re.Match[str]) -> str:
        size, cached = int(float(match["size"]) * _BYTES[match["unit"]]), match["how"] == "Using cached"
        name = _name(match["file"])
        self.files += 1
        self.bytes, self.cached_bytes = self.bytes + size * (not cached), self.cached_bytes + size * cached
        self.doing = f"{'taking' if cached else 'downloading'} {name} ({_size(size)})"
        return f"{name}, {_size(size)}{' from the cache' if cached else ''}"


def _name(file: str) -> str:
    """Name and version of a wheel or source archive."""
    return " ".join(file.rpartition("/")[2].removesuffix(".tar.gz").split("-")[:2])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def install(arguments: Sequence[str], every_s: float = _SIGN_OF_LIFE_S) -> int:
    """Run pip, show its progress, and return its exit code. every_s: the longest silence."""
    command = [sys.executable, "-P", "-m", "pip", "install", "--progress-bar", "off", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    began, progress, last = time.monotonic(), Progress(), deque[str](maxlen=_LAST_LINES)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, errors="replace") as process:
        assert process.stdout is not None
        before = signal.signal(
            signal.SIGTERM, lambda *_: process.terminate()
        )  # otherwise pip would go on without its parent
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        shown_at = time.monotonic()
        while True:
            try:
                text = lines.get(timeout=max(0.0, shown_at + every_s - time.monotonic()))
            except queue.Empty:
                show: str | None = f"… {progress.doing}; {time.monotonic() - began:.0f} s so far"
            else:
                if text is None:
                    break
                last.append(text)
                show = progress.line(text)
            if show is not None:
                print(f"  {show}", file=sys.stderr, flush=True)
                shown_at = time.monotonic()
    signal.signal(signal.SIGTERM, before)
    if process.returncode:
        print(f"pip failed with exit code {process.returncode}. Its last lines:", *last, sep="\n", file=sys.stderr)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for text in stream:
        lines.put(text.rstrip("\n"))
    lines.put(None)


if __name__ == "__main__":
    try:
        sys.exit(install(sys.argv[1:]))
    except KeyboardInterrupt:  # pip has had it too
        sys.exit(130)
