"""Options of a run that change how stages are run, never what they compute: no part of any artifact's key."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.locks import Holder, LockWait
from draftsmith.artifacts.redaction import find_secrets
from draftsmith.flows.config.errors import field_paths
from draftsmith.stages.runtime.stage import Config

DAY_MINUTES = 24 * 60  # of an attempt at a stage that has no limit of its own
RETRY_JITTER = 0.5  # of a delay, at most, beside it: what was lost together does not return together


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"\w[\w@.+-]*", name):
        raise ValueError(f"{name!r}: names are letters, digits and _ @ . + -: files are called after them")
    return name


PlainName = Annotated[str, AfterValidator(_plain_name)]
"""A name that cannot lead out of a folder: of arms and drafters, which files are called after."""


@dataclass(frozen=True)
class TimeLimit:
    """Wall-clock limit of an attempt, and the field of the config that says it."""

    seconds: float
    field: str


class StageOptions(Config):
    """How stage processes are run."""

    time_limits: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Minutes of one attempt at a node, by its name, e.g. `{sft: 30}`; for the others it is a day."""
    grace_seconds: float = Field(default=60, ge=0)
    """Time to save after a stage is asked to stop, before it is killed."""
    retries: int = Field(default=5, ge=0, le=20)
    """Further attempts after the loss of something outside (the hub, an engine, a server of MLflow or Prefect); never
    after any other error."""
    retry_delay_seconds: float = Field(default=10, ge=0)
    """Before the first retry; doubles with every further one, with jitter: five retries are about five minutes."""
    lock_wait_minutes: float = Field(default=24 * 60, gt=0)
    """How long to wait for another run that makes the same artifact, or uses the same accelerator."""
    group_may_read: bool = False
    """Let the group of the home read what is made (0750, files 0640); else it is for its owner alone (0700, 0600)."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the numerical libraries; None leaves it to them."""
    shards: int = Field(default=1, ge=1, le=1024)
    """Parts in which a stage that can be cut is made, each an artifact of its own in a process of its own, on one GPU
    if there are any. The result is the same. On CPUs, set `threads` to the cores a shard is to use."""
    runner: Literal["local", "ray"] = "local"
    """Where shards are made: beside each other on this machine, or by Prefect's task runner for a Ray cluster."""
    runner_address: str | None = None
    """Of the cluster, such as `ray://head:10001`; left out: one on this machine, for the shards alone."""
    min_free_gb: float = Field(default=2, ge=0)
    """Free disk space (10^9 bytes) that must be there before a run starts."""
    price_per_hour: float | None = Field(default=None, ge=0)
    """Of a GPU, or of the machine where it has none: `draftsmith check` says what a run costs."""

    @property
    def retry_delays(self) -> list[float]:
        """Seconds before each retry, without jitter."""
        return [self.retry_delay_seconds * 2**retry for retry in range(self.retries)]

    def lock_wait(
        self, check: Callable[[], None], on_wait: Callable[[Holder | None], None] = lambda _holder: None
    ) -> LockWait:
        """Return how to wait for the lock of an artifact."""
        return LockWait(60 * self.lock_wait_minutes, "stages.lock_wait_minutes", on_wait, check)

    def time_limit(self, node: str) -> TimeLimit:
        """Of one attempt at a node."""
        return TimeLimit(60 * self.time_limits.get(node, DAY_MINUTES), f"stages.time_limits.{node}")

    def require_nodes(self, nodes: Collection[str]) -> None:
        """Raises ValueError (for validators of configs) for a limit of none of these nodes."""
        for name in self.time_limits:
            if name not in nodes:
                raise ValueError(f"stages.time_limits.{name}: no such node, use one of: {', '.join(sorted(nodes))}")


class RunOptions(Config):
    """What every run config has, whatever its stages."""

    name: str = Field(min_length=1)
    """Name of the run in Prefect and MLflow."""
    seed: int = Field(default=0, ge=0)
    """Of every stage; part of the keys."""
    stages: StageOptions = StageOptions()

    @property
    def experiment(self) -> str | None:
        """MLflow's experiment; None: the common one."""
        return None

    @property
    def called(self) -> dict[str, str]:
        """Programs that are started when all is made, by the field that names each."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, data: Any) -> Any:
        """A config is written to manifests, to MLflow, to Prefect's database and to the report."""
        numbers = {path.rpartition(".")[2] for path in field_paths(cls) if path.endswith("_tokens")}
        for field, why in find_secrets(data):
            if f"{field.rpartition('.')[2]}s" in numbers:  # misspelt, which the schema says
                continue
            raise ValueError(
                f"{field}: {why}, and a config is shown in MLflow and in the report: take it out, and give it in the "
                "environment of the command (in a deployment: a variable of the work pool, from a Prefect Secret block)"
            )
        return data


def check_runner(options: StageOptions) -> None:
    """Raises DraftsmithError if the packages of the config's runner are not installed."""
    for package in ("ray", "prefect_ray") if options.runner == "ray" else ():
        if importlib.util.find_spec(package) is None:
            raise DraftsmithError(
                f"stages.runner: the package {package.replace('_', '-')} is not installed: pip install "
                "'draftsmith[ray]', or leave the field out"
            )
