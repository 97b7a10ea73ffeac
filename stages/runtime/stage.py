"""The contract between a stage and its runner: the stage's declaration, and what its body may use."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Protocol, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from draftsmith.artifacts.errors import DraftsmithError

INCONCLUSIVE = "inconclusive"  # in a stage's summary: the measurement decides nothing, so the next run adds to it
NOT_FETCHED = "not fetched"  # version of a hub repository whose commit could not be looked up yet
CHECKPOINTS_KEPT = 2  # checkpoints that a training keeps; `runtime/checkpoint.py` writes them
RENDEZVOUS = "DRAFTSMITH_RENDEZVOUS"  # environment variable: HOST:PORT of the node that runs the flow


JsonObject: TypeAlias = dict[str, Any]


class NotInKey:
    """Marks a field (`Annotated[int, NotInKey()]`) that says where or how fast a stage runs, not what it computes.

    Such a field is not part of the cache key: another address or time limit must not remake an artifact.
    """


class FilledIn:
    """Marks a field that a run fills in; a config file may not set it."""


@dataclass(frozen=True)
class InputListing:
    """The files of rows that a stage reads in one run, and when its time windows begin."""

    paths: Sequence[str]  # as the config gives them
    files: Sequence[str]  # absolute paths and addresses, sorted
    since: Mapping[str, str]  # window as it was written, such as 7d -> ISO time

    def serves(self, now: InputListing) -> bool:
        """Return whether a later run may read this listing: its config is the same, and all its files still exist."""
        same = (list(self.paths), self.since.keys()) == (list(now.paths), now.since.keys())
        return same and set(self.files) <= set(now.files)


class Config(BaseModel):
    """Base of every config section: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)
    _listing: InputListing | None = PrivateAttr(default=None)

    def model_post_init(self, _context: Any, /) -> None:
        """Mark `kind` as set: a section dumped without it would fit several schemas of a deployment's form."""
        self.model_fields_set.update({"kind"} & type(self).model_fields.keys())

    def with_pinned_files(self, listing: InputListing) -> Self:
        """Return a copy of this config that reads only the listed files, even if more have arrived since."""
        pinned = self.model_copy()
        pinned._listing = listing
        return pinned

    def list_files(self) -> InputListing | None:
        """Return the files of rows that exist now; None if the config means the same files in every run.

        Raises DraftsmithError for a pattern that matches nothing, RetryableError for a bucket that does not answer.
        """
        return None

    @property
    def listing(self) -> InputListing | None:
        """Return the pinned listing; None if the stage reads whatever files exist."""
        return self._listing

    @property
    def pinned_files(self) -> frozenset[str] | None:
        """Return the files of the pinned listing; None without one."""
        return None if self._listing is None else frozenset(self._listing.files)

    @classmethod
    def filled_in(cls) -> list[str]:
        """Return the names of the fields that a run fills in."""
        return [n for n, field in cls.model_fields.items() if any(isinstance(m, FilledIn) for m in field.metadata)]

    def key_material(self) -> JsonObject:
        """Return the fields that determine the result, as JSON values, for the cache key."""
        return _without_unkeyed(self, self.model_dump(mode="json"))

    def external_files(self) -> list[Path]:
        """Return the local files outside the store that the stage reads; their checksums are part of the cache key."""
        return []

    def external_versions(self) -> dict[str, str]:
        """Return address -> version of the remote inputs; it changes with the content and is part of the cache key."""
        return {}

    def programs(self) -> dict[str, str]:
        """Return the known versions of programs in other environments that determine the result."""
        return {}


def _without_unkeyed(config: BaseModel, dumped: JsonObject) -> JsonObject:
    """Return `dumped` without the `NotInKey` fields of `config` and of the configs directly inside it."""
    kept = {}
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if any(isinstance(mark, NotInKey) for mark in info.metadata):
            continue
        kept[name] = _without_unkeyed(value, dumped[name]) if isinstance(value, BaseModel) else dumped[name]
    return kept


class ParallelConfig(Config):
    """The processes that train one drafter together.

    They share out the answers of every step. Each process has one device, the target and the drafter.
    """

    processes: Annotated[int, Field(ge=1, description="processes on each node; with GPUs, one for each GPU")] = 1
    nodes: Annotated[
        int, Field(ge=1, description="machines; the others run `torchrun`, see configs/scale/README.md")
    ] = 1
    target_parallel: Annotated[
        int,
        Field(
            ge=1,
            description="processes of a node that share one copy of the target, each with a slice of every layer; for "
            "a target that leaves too little memory on a GPU for training",
        ),
    ] = 1
    shard_optimiser: Annotated[
        bool, Field(description="split AdamW's two moments, 8 bytes per parameter, over the processes")
    ] = False

    @model_validator(mode="after")
    def _check_target_groups(self) -> ParallelConfig:
        if self.processes % self.target_parallel:
            raise ValueError(
                f"target_parallel: {self.processes} processes cannot be divided into groups of {self.target_parallel}. "
                "Set a number that divides processes."
            )
        return self

    @property
    def world(self) -> int:
        """Return the number of processes on all nodes."""
        return self.processes * self.nodes

    def endpoint(self) -> tuple[str, int]:
        """Return the host and port where the nodes meet. Raises DraftsmithError if the environment has no valid one."""
        address = os.environ.get(RENDEZVOUS) or ""
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            problem = f"is {address!r}" if address else "is not set"
            raise DraftsmithError(
                f"parallel.nodes: {RENDEZVOUS} {problem}. Set it to HOST:PORT of the node that runs the flow."
            )
        return host, int(port)


@dataclass(frozen=True)
class Shard:
    """One of several shards of a stage's work, made concurrently. Every process divides the work in the same way."""

    index: int = 0
    of: int = 1

    def contains(self, number: int) -> bool:
        """Return whether the unit of work with this number, counted from 0, belongs to the shard."""
        return number % self.of == self.index


WHOLE = Shard()


class StageRequest(BaseModel):
    """The work of one process `python -m draftsmith.stages`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    module: str  # the module that declares the stage
    config: JsonObject
    inputs: dict[str, Path]  # name -> folder of a complete artifact
    out: Path
    work: Path
    seed: int
    threads: int | None = None
    listing: InputListing | None = None  # the files to read; None: whatever files exist
    shard: Shard | None = None  # the shard to make; None: the whole artifact
    shards: list[Path] = []  # folders of all shards that the artifact is put together from
    earlier: Path | None = None  # the inconclusive artifact that this one replaces


class StageContext(Protocol):
    """The services of a running stage. `runtime/process.py` implements them for a run; tests use plain objects."""

    out: Path  # its content becomes the artifact; kept between attempts until the artifact is complete
    work: Path  # files and checkpoints of an unfinished attempt; deleted when the artifact is complete
    inputs: Mapping[str, Path]  # input name -> folder of a complete artifact
    seed: int
    shards: Sequence[Path]  # artifacts of all shards of this stage's work; empty if it was not divided
    earlier: Path | None  # the inconclusive artifact of the same key that this one replaces; it may be added to

    def log(self, message: str) -> None:
        """Write one line to the log of the run."""

    def progress(self, done: int, total: int, unit: str, **metrics: float) -> None:
        """Report the work done so far; the runner adds rate and time left. metrics: shown with it, e.g. loss=2.1."""

    def metrics(self, step: int, **values: float) -> None:
        """Record values over steps, in `metrics.jsonl` and, by the flow, in MLflow."""

    def rewind_metrics(self, step: int) -> None:
        """Drop the metrics of `step` and later: a resumed stage writes them again."""

    def summary(self, **values: float) -> None:
        """Record the final metrics of the stage, for its manifest, the plan and MLflow."""

    @property
    def interrupted(self) -> bool:
        """Return whether the stage was asked to stop. It should then save and call `check_interrupted`."""

    def check_interrupted(self) -> None:
        """Raise `StageInterrupted` if the stage was asked to stop. Call it where everything is saved."""


def progress_callback(ctx: StageContext, unit: str) -> Callable[[int, int], None]:
    """Return a callback (done, total) for code that does not know stages: it reports progress and stops when asked."""

    def progress(done: int, total: int) -> None:
        ctx.progress(done, total, unit)
        ctx.check_interrupted()

    return progress


class Compute(StrEnum):
    """The kind of a stage's work, by its use of the machine's devices."""

    LIGHT = "light"  # tables and files
    HEAVY = "heavy"  # loads a model
    TIMED = "timed"  # measures speed: nothing else may compute on the device


@dataclass(frozen=True)
class Stage:
    """A stage as its module declares it: `STAGE = Stage(...)`."""

    name: str
    config: type[Config]
    inputs: tuple[str, ...]  # names of the artifacts that it reads; "name?": optional, "name*": all with this prefix
    body: str  # module with `run(ctx, config)`, which does the work; only the stage's own process imports it
    # Cheap checks of the config against the resolved target (folder with target.json); no weights are loaded.
    preflight: Callable[[Any, Path], None] | None = None
    compute: Compute | Callable[[Any], Compute] = Compute.LIGHT  # or a function of the config that returns it
    # Returns the processes that run the stage together, as ranks; None: always one.
    parallel: Callable[[Any], ParallelConfig] | None = None
    # Files that are not part of the content id, such as timings.
    volatile: tuple[str, ...] = field(default=("metrics.jsonl",))
    # Inputs whose volatile files it also reads. If these were measured again and the content stayed the same, the stage
    # runs again under its key.
    reads_volatile: tuple[str, ...] = ()
    # Whether the body has `shard(ctx, config, shard)`, which makes one shard of the work as an artifact, in another
    # process or on another host. `run` then has all shards in `StageContext.shards`, and its result is the same bit for
    # bit as without them, however many there are.
    sharded: bool = False
    join_compute: Compute | None = None  # `compute` of a `run` that has shards; None: the same as without them

    def run(self, ctx: StageContext, config: Config) -> None:
        """Do the work in this process."""
        importlib.import_module(self.body).run(ctx, config)

    def shard(self, ctx: StageContext, config: Config, shard: Shard) -> None:
        """Make one shard of the work in this process."""
        importlib.import_module(self.body).shard(ctx, config, shard)

    def compute_for(self, config: Config) -> Compute:
        """Return the kind of the stage's work with this config."""
        return self.compute if isinstance(self.compute, Compute) else self.compute(config)
