"""A small pipeline of real stages in real processes: target -> left, right -> total."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from draftsmith.artifacts.errors import RefusedError
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display, EndedRun
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.planning.plan import Conclusion, EarlyEnd, Pipeline
from tests.flows.toy_stages.collect import CollectConfig
from tests.flows.toy_stages.combine import CombineConfig
from tests.flows.toy_stages.squares import SquaresConfig

ASSET = "draftsmith://line/toy/champion"
COLLECT, COMBINE, SQUARES = (f"tests.flows.toy_stages.{name}" for name in ("collect", "combine", "squares"))


class ToyConfig(RunOptions):
    target: CollectConfig = CollectConfig()
    left: CombineConfig = CombineConfig()
    right: CombineConfig = CombineConfig(factor=2)
    total: CombineConfig = CombineConfig()
    squares: SquaresConfig | None = None
    """Another node, which can be built in shards."""
    verdict: Literal["promoted", "refused"] | None = None
    """The conclusion of the run, if it has one."""
    approve: bool = False
    """Ask a person before the promotion."""


@dataclass(frozen=True)
class ToyPolicy:
    verdict: str
    approve: bool = False
    sticky_force: Collection[str] = ()

    def should_stop(self, _node: Node, _folders: Mapping[str, Path]) -> Conclusion | None:
        return None

    def early_end(self, _folders: Mapping[str, Path]) -> EarlyEnd | None:
        return None

    def conclude(self, _folders: Mapping[str, Path], _run_id: str | None) -> Conclusion:
        from draftsmith.flows.orchestration.flow_run import approved

        message = f'the sum is "{self.verdict}"'
        if self.verdict == "refused":
            return Conclusion("Refused", message, RefusedError(message))
        if self.approve and not approved("toy@1"):
            return Conclusion("Waiting", message, RefusedError(message))
        return Conclusion("Promoted", message, asset=ASSET, metadata={"version": 1, "tau": 2.5})


def toy_policy(config: ToyConfig, _force: Collection[str]) -> ToyPolicy | None:
    return ToyPolicy(config.verdict, config.approve) if config.verdict is not None else None


def toy_nodes(config: ToyConfig) -> list[Node]:
    more = [Node("squares", SQUARES, config.squares, {"first": "target"})] if config.squares is not None else []
    return [
        *more,
        Node("total", COMBINE, config.total, {"first": "left", "second": "right"}),
        Node("left", COMBINE, config.left, {"first": "target"}),
        Node("right", COMBINE, config.right, {"first": "target"}),
        Node("target", COLLECT, config.target),
    ]


def digest_of_file(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def show_results(display: Display, folders: Mapping[str, Path], ended: EndedRun) -> None:
    display.line(f"{len(folders)} nodes; MLflow: {ended.mlflow}")


TOY = Pipeline(
    ToyConfig,
    toy_nodes,
    "tests.flows.toy_flow:toy_refresh",
    digest_of_file,
    policy=toy_policy,
    results=show_results,
    code_modules=lambda module: {module: digest_of_file(module)[:16]},
)


def write_config(path: Path, **sections: Any) -> Path:
    import yaml

    sections = {
        "name": "toy",
        "stages": {"min_free_gb": 0.01, "grace_seconds": 10, "retry_delay_seconds": 0},
        **sections,
    }
    path.write_text(yaml.safe_dump(sections))
    return path
