"""A small pipeline of real stages in real processes: target -> left, right -> total."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from draftsmith.artifacts.errors import RefusedError
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display, EndedRun
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.planning.plan import Conclusion, Pipeline
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


def conclude(config: ToyConfig) -> Conclusion | None:
    """Return the conclusion of a run that has made all its nodes."""
    from draftsmith.flows.orchestration.flow_run import approved

    message = f'the sum is "{config.verdict}"'
    if config.verdict is None:
        return None
    if config.verdict == "refused":
        return Conclusion("Refused", message, RefusedError(message))
    if config.approve and not approved("toy@1"):
        return Conclusion("Waiting", message, RefusedError(message))
    return Conclusion("Promoted", message, asset=ASSET, metadata={"version": 1, "tau": 2.5})


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


class ToyPipeline(Pipeline):
    """The toy pipeline, of whose stages each is a file."""

    config = ToyConfig

    def __init__(self, flow: str = "tests.flows.toy_flow:toy_refresh") -> None:
        self.flow = flow

    def nodes(self, config: ToyConfig) -> list[Node]:
        return toy_nodes(config)

    def code_digest(self, module: str) -> str:
        return digest_of_file(module)

    def code_modules(self, module: str) -> dict[str, str]:
        return {module: digest_of_file(module)[:16]}

    def concludes(self, config: ToyConfig) -> bool:
        return config.verdict is not None

    def show(self, display: Display, folders: Mapping[str, Path], ended: EndedRun) -> None:
        display.line(f"{len(folders)} nodes; MLflow: {ended.mlflow}")


class EditedToy(ToyPipeline):
    """The toy pipeline after its code was edited."""

    def code_digest(self, module: str) -> str:
        return f"edited {module}"

    def code_modules(self, module: str) -> dict[str, str]:
        return {module: "edited"}


TOY = ToyPipeline()


def write_config(path: Path, **sections: Any) -> Path:
    import yaml

    sections = {
        "name": "toy",
        "stages": {"min_free_gb": 0.01, "retry_delay_seconds": 0},
        **sections,
    }
    path.write_text(yaml.safe_dump(sections))
    return path
