"""A small pipeline of real stages in real processes: target -> left, right -> total."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.graph import Node, Pipeline
from draftsmith.flows.pipeline.options import RunOptions
from tests.flows.pipeline.toy_stages.collect import CollectConfig
from tests.flows.pipeline.toy_stages.combine import CombineConfig

COLLECT, COMBINE = "tests.flows.pipeline.toy_stages.collect", "tests.flows.pipeline.toy_stages.combine"


class ToyConfig(RunOptions):
    target: CollectConfig = CollectConfig()
    left: CombineConfig = CombineConfig()
    right: CombineConfig = CombineConfig(factor=2)
    total: CombineConfig = CombineConfig()


def toy_nodes(config: ToyConfig) -> list[Node]:
    return [
        Node("total", COMBINE, config.total, {"first": "left", "second": "right"}),
        Node("left", COMBINE, config.left, {"first": "target"}),
        Node("right", COMBINE, config.right, {"first": "target"}),
        Node("target", COLLECT, config.target),
    ]


def digest_of_file(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def show_results(display: Display, made: Mapping[str, Path], mlflow: str) -> None:
    display.line(f"{len(made)} nodes; MLflow: {mlflow}")


TOY = Pipeline(
    ToyConfig,
    toy_nodes,
    "tests.flows.pipeline.toy_flow:toy_refresh",
    digest_of_file,
    results="tests.flows.pipeline.toy:show_results",
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
