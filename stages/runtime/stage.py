"""The contract between a stage and whoever runs it: its declaration, and what its body may use."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import BaseModel, ConfigDict, PrivateAttr

SOURCES = "sources"  # a stage, and the input of another one that reads the files which it lists
LISTING = "sources.json"  # its file
INCONCLUSIVE = "inconclusive"  # in a stage's summary: what it measured says nothing, and the next run measures again
NOT_FETCHED = "not fetched"  # the version of something on the hub that could not be asked for its commit yet


class Operational:
    """Marks a field (`Annotated[int, Operational()]`) that says where or how fast, not what is computed.

    Such a field is no part of a stage's key: another address or time limit must not make an artifact again.
    """


class FilledIn:
    """Marks a field that a run fills in; a config file may not set it."""


@dataclass(frozen=True)
class Listing:
    """The files of rows that a stage reads in one run, and where its windows of time begin."""

    files: Sequence[str]  # absolute paths and addresses, sorted
    since: Mapping[str, str]  # window as it was written, such as 7d -> ISO time

    @staticmethod
    def read(folder: Path) -> Listing:
        """Read an artifact of stage `sources`."""
        return Listing(**json.loads((folder / LISTING).read_text("utf-8")))

    def text(self) -> str:
        """Return what the artifact holds."""
        return json.dumps({"files": self.files, "since": self.since}, indent=2, ensure_ascii=False) + "\n"


class Config(BaseModel):
    """Base of every config section: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)
    _listing: Listing | None = PrivateAttr(default=None)

    def reading(self, listing: Listing) -> Self:
        """Return this config reading the files of a listing and no others, though more have come meanwhile."""
        pinned = self.model_copy()
        pinned._listing = listing
        return pinned

    def listing(self) -> Listing | None:
        """Return what `reading` was given; None: all files that are there. Of stage `sources` what is there, then.

        Raises DraftsmithError for a pattern that matches nothing, RetryableError for a bucket that does not answer.
        """
        return self._listing

    @property
    def listed_files(self) -> frozenset[str] | None:
        """The files of the listing."""
        return None if self._listing is None else frozenset(self._listing.files)

    @classmethod
    def filled_in(cls) -> list[str]:
        """Return the names of the fields that a run fills in."""
        return [n for n, field in cls.model_fields.items() if any(isinstance(m, FilledIn) for m in field.metadata)]

    def key_material(self) -> dict[str, Any]:
        """What of this config decides the result, as JSON values."""
        return _decisive(self, self.model_dump(mode="json"))

    def external_files(self) -> list[Path]:
        """Files outside the store that the stage reads: their content belongs into its key."""
        return []

    def external_versions(self) -> dict[str, str]:
        """Such files that are not on this machine: address and what changes with the content, which the key holds."""
        return {}

    def programs(self) -> dict[str, str]:
        """Versions of programs of other environments that would decide the result now, as far as they can be asked."""
        return {}


def _decisive(config: BaseModel, dumped: dict[str, Any]) -> dict[str, Any]:
    """Return `dumped` without the operational fields of `config` and of the configs directly inside it."""
    kept = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if any(isinstance(mark, Operational) for mark in info.metadata):
            continue
        kept[name] = _decisive(value, dumped[name]) if isinstance(value, BaseModel) else dumped[name]
    return kept


@dataclass(frozen=True)
class Shard:
    """One of several parts of a stage's work, which are made beside each other. Every process cuts them alike."""

    index: int = 0
    of: int = 1

    def takes(self, number: int) -> bool:
        """Whether a piece of the work, counted from 0, is in it."""
        return number % self.of == self.index


WHOLE = Shard()


class StageContext(Protocol):
    """What a stage may use: `stages/runtime/process.py` implements it for a run, plain objects do for tests."""

    out: Path  # its content becomes the artifact; kept between attempts until the artifact is complete
    work: Path  # shards and checkpoints of an unfinished attempt; dropped when the artifact is complete
    inputs: Mapping[str, Path]  # input name -> folder of a complete artifact
    seed: int
    shards: Sequence[Path]  # artifacts of all shards of this stage's work; none: nobody has made them

    def log(self, message: str) -> None:
        """One line for the log of the run."""

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        """Work done so far; the runner adds rate and time left. `figures` are shown beside it, e.g. loss=2.1."""

    def metrics(self, step: int, **values: float) -> None:
        """Values over steps (written to `metrics.jsonl`, and to MLflow by the flow)."""

    def rewind_metrics(self, step: int) -> None:
        """Drop metrics at `step` and later: a resumed stage writes them again."""

    def summary(self, **values: float) -> None:
        """Final figures of the stage: kept in the manifest, shown in the plan and in MLflow."""

    @property
    def interrupted(self) -> bool:
        """Was the stage asked to stop? Save, then call `check_interrupted`."""

    def check_interrupted(self) -> None:
        """Raise `StageInterrupted` if the stage was asked to stop. Call it where everything is saved."""


def follow(ctx: StageContext, unit: str) -> Callable[[int, int], None]:
    """For a loop that knows no stage: shows how far it is, and ends it between two parts if that was asked for."""

    def progress(done: int, total: int) -> None:
        ctx.progress(done, total, unit)
        ctx.check_interrupted()

    return progress


class Compute(StrEnum):
    """What a stage needs of the machine's devices."""

    LIGHT = "light"  # tables and files
    HEAVY = "heavy"  # loads a model
    TIMED = "timed"  # measures speed: nothing else may compute there


class Parallel(Protocol):
    """How many processes run a stage together (`stages/runtime/parallel_config.py`)."""

    @property
    def processes(self) -> int:
        """On each node."""

    @property
    def nodes(self) -> int: ...

    @property
    def target_parallel(self) -> int:
        """That share one copy of the target."""

    @property
    def world(self) -> int:
        """In all."""

    def endpoint(self) -> tuple[str, int]:
        """Host and port where nodes meet. Raises DraftsmithError if nobody says it."""


@dataclass(frozen=True)
class Stage:
    """A stage as its module declares it: `STAGE = Stage(...)`."""

    name: str
    config: type[Config]
    inputs: tuple[str, ...]  # names of the artifacts that it reads; "name?": optional, "name*": all that begin so
    body: str  # module whose function `run(ctx, config)` does the work; imported by the stage's own process alone
    # Cheap checks of the config against the resolved target (folder with target.json); no weights are loaded.
    preflight: Callable[[Any, Path], None] | None = None
    compute: Compute | Callable[[Any], Compute] = Compute.LIGHT  # or what says it of a config
    # How many processes run it together, as ranks that know each other; left out: one.
    parallel: Callable[[Any], Parallel] | None = None
    # Files that are no part of the content: timings, origins.
    volatile: tuple[str, ...] = field(default=("metrics.jsonl",))
    # Inputs of which it reads volatile files too. Where these were measured anew, with the same content, it is made
    # again under its key.
    reads_volatile: tuple[str, ...] = ()
    # Whether the body has `shard(ctx, config, shard)`, which makes one shard of the work as an artifact of its own, in
    # another process or on another host. `run` then finds all of them in `StageContext.shards` and makes of them what
    # it makes alone, to the bit, however many there are.
    sharded: bool = False
    joins: Compute | None = None  # what `run` needs where shards have done the rest; None: as without them

    def run(self, ctx: StageContext, config: Config) -> None:
        """Do the work in this process."""
        importlib.import_module(self.body).run(ctx, config)

    def shard(self, ctx: StageContext, config: Config, shard: Shard) -> None:
        """Make one shard of the work in this process."""
        importlib.import_module(self.body).shard(ctx, config, shard)

    def computes(self, config: Config) -> Compute:
        """What it needs with this config."""
        return self.compute if isinstance(self.compute, Compute) else self.compute(config)
