"""Options of how a run executes its stages, never of what they compute. They are not part of a cache key."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.locks import Holder, LockWait
from draftsmith.artifacts.redaction import find_secrets
from draftsmith.flows.config.errors import field_paths
from draftsmith.stages.runtime.stage import Config

DAY_MINUTES = 24 * 60  # the time limit of an attempt without an entry in `stages.time_limits`
RETRY_JITTER = 0.5  # at most this share of a delay is added, so that runs that failed together do not retry together


class StageOptions(Config):
    """Options of the stage processes."""

    time_limits: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Time limit of an attempt in minutes, by node, e.g. `{sft: 30}`. Other nodes have a day."""
    retries: int = Field(default=5, ge=0, le=20)
    """Further attempts after the hub, an engine, or a server of MLflow or Prefect was lost. No other error is
    retried."""
    retry_delay_seconds: float = Field(default=10, ge=0)
    """Delay before the first retry. It doubles with every retry, with jitter; five retries take about five minutes."""
    lock_wait_minutes: float = Field(default=24 * 60, gt=0)
    """How long to wait for another run that makes the same artifact or uses the same device."""
    group_may_read: bool = False
    """Let the group of the home read its files (0750, files 0640). Otherwise only the owner may (0700, 0600)."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the numerical libraries; by default their own choice."""
    shards: int = Field(default=1, ge=1, le=1024)
    """Number of shards of a stage that allows them. Each is made by its own process, on one GPU if there are any. The
    result is the same. On CPUs, set `threads` to the cores of one shard."""
    runner: Literal["local", "ray"] = "local"
    """Where shards are made: on this machine, or by Prefect's task runner on the Ray cluster that `RAY_ADDRESS` in the
    environment names; without it a cluster is started on this machine."""
    min_free_gb: float = Field(default=2, ge=0)
    """Free disk space (10^9 bytes) that a run needs to start."""

    @property
    def retry_delays(self) -> list[float]:
        """Return the seconds before each retry, without jitter."""
        return [self.retry_delay_seconds * 2**retry for retry in range(self.retries)]

    def lock_wait(
        self, check: Callable[[], None], on_wait: Callable[[Holder | None], None] = lambda _holder: None
    ) -> LockWait:
        """Return how to wait for the lock of an artifact."""
        return LockWait(60 * self.lock_wait_minutes, "stages.lock_wait_minutes", on_wait, check)

    def time_limit_s(self, node: str) -> float:
        """Return the seconds that one attempt at a node may take."""
        return 60 * self.time_limits.get(node, DAY_MINUTES)

    def require_nodes(self, nodes: Collection[str]) -> None:
        """Raise ValueError, for validators of configs, if a time limit names none of these nodes."""
        for name in self.time_limits:
            if name not in nodes:
                raise ValueError(f"stages.time_limits.{name}: no such node. Use one of: {', '.join(sorted(nodes))}.")


class RunOptions(Config):
    """The fields that every run's config has, whatever its stages."""

    name: str = Field(min_length=1)
    """Name of the run in Prefect and MLflow."""
    seed: int = Field(default=0, ge=0)
    """Seed of every stage; part of the cache keys."""
    stages: StageOptions = StageOptions()

    @property
    def experiment(self) -> str | None:
        """Return the experiment in MLflow; None: the default one."""
        return None

    @property
    def skipped(self) -> tuple[str, ...]:
        """Return the nodes that a run of its kind has by default, and this config skips to save their time."""
        return ()

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, data: Any) -> Any:
        """Reject secrets: a config is written to manifests, MLflow, Prefect's database and the report."""
        for field, why in find_secrets(data):
            number = f"{field.rpartition('.')[2]}s"
            if number.endswith("_tokens") and any(path.rpartition(".")[2] == number for path in field_paths(cls)):
                continue  # a misspelt field, which validation reports better
            raise ValueError(
                f"{field}: {why}, and MLflow and the report show the config. Remove it, and set it in the environment "
                "of the command (for a deployment: in a variable of the work pool, from a Prefect Secret block)."
            )
        return data


def check_runner(options: StageOptions) -> None:
    """Raise DraftsmithError if the packages of the config's runner are not installed."""
    for package in ("ray", "prefect_ray") if options.runner == "ray" else ():
        if importlib.util.find_spec(package) is None:
            raise DraftsmithError(
                f"stages.runner: the package {package.replace('_', '-')} is not installed. Run pip install "
                "'draftsmith[ray]', or remove the field."
            )
