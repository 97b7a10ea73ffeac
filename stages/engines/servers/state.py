"""Reports of running servers of any kind about their drafter, and the reading of their metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.identifiers import Digest

STATE_VERSION = 1  # version of `SwapReport`: "v" in a plug-in's report
Time: TypeAlias = Annotated[str, Field(pattern=r"^[0-9TZ:.+-]{0,40}$")]  # ISO 8601, UTC
_KnownDrafter: TypeAlias = Digest | Literal[""]  # empty: its files are not on the server's host
_SAMPLE = re.compile(r"^([a-z_:]+)(?:\{.*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class TracedRequest:
    """A finished request whose verify steps the server summed up."""

    ended: int  # seconds since 1970, by the server's clock
    depths: Mapping[str, tuple[int, int]]  # name of an anchor's depth -> committed tokens, verify steps


@dataclass(frozen=True)
class ServerState:
    """A server's report about its drafter."""

    url: str
    engine: str  # kind
    version: str = ""
    dtype: str = ""
    algorithm: str | None = None  # None: it serves without a drafter
    block_size: int = 0  # tokens of a verify step
    tau: float | None = None  # over all verify steps since its start, by any drafter
    started_with: str = ""  # folder or hub id of the drafter in its options
    own_head: bool = False  # it drafts with the head in the target's own folder
    # for a server that can be swapped:
    digest: str | None = None  # of the drafter, empty if its files are not here; None: nothing can write another one
    since: str | None = None  # when it began to serve that drafter, ISO 8601, UTC
    before: str = ""  # digest of the drafter before the last swap
    pause_s: float = 0.0  # pause of the last swap
    traced: Mapping[str, Sequence[TracedRequest]] | None = None  # digest -> last ended requests; None: not traced


@dataclass(frozen=True)
class SwapReport:
    """A server plug-in's report about its drafter. A later plug-in may report more."""

    drafter: _KnownDrafter  # digest
    since: Time  # empty: not written yet
    before: _KnownDrafter  # digest of the drafter before the last swap, empty before the first one
    pause_s: Annotated[float, Field(ge=0)] = 0.0  # pause of the last swap


_REPORT = TypeAdapter(SwapReport)


def read_report(url: str, report: object) -> SwapReport:
    """Return the report of a server's plug-in. Raises DraftsmithError if its form is unknown."""
    try:
        return _REPORT.validate_python(report)
    except ValidationError as error:
        version = report.get("v", 0) if isinstance(report, dict) else "unknown"
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"][:1])) or "its form"
        raise DraftsmithError(
            f"{url}: the state of its plug-in (version {version}, here {STATE_VERSION}) cannot be read: {field}: "
            f"{first['msg']}. Install the same Draftsmith there and here, and start the server again."
        ) from error


@dataclass(frozen=True)
class Finished:
    """The requests that a server finished, in one window or since its start."""

    requests: float
    committed: float  # tokens, by verify steps; a request's first token comes from its prefill
    steps: float


@dataclass(frozen=True)
class NewDrafter:
    """A drafter that servers are to draft with."""

    digest: str
    folder: Path  # of the checkpoint, under the same path on the servers' hosts
    algorithm: str
    block_size: int  # tokens of a verify step, as trained
    upload: str = ""  # its address in MLflow's artifact store (`Version.uploaded`), for hosts without the folder


def sums(metrics: str, names: Sequence[str]) -> list[float]:
    """Return samples of Prometheus metrics, summed over their labels; 0 for a name without samples."""
    totals = dict.fromkeys(names, 0.0)
    for name, value in _SAMPLE.findall(metrics):
        if name in totals:
            totals[name] += float(value)
    return list(totals.values())
