"""Why a running server's acceptance is not that of replay: the graph and the config of `draftsmith diagnose`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.redaction import describe_secret
from draftsmith.flows.checks.check import RunChecks
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display
from draftsmith.flows.planning.graph import Node, Pipeline
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.evaluate import resolve_drafter
from draftsmith.flows.refresh.graph import first_nodes
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.prompts import PromptsConfig
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.evaluation.diagnosis import RESULT, DiagnosisConfig
from draftsmith.stages.target.config import TargetConfig

NODE = "diagnosis"


class DiagnoseConfig(RunOptions):
    """A server, and the sections of a refresh that say what it is asked."""

    target: TargetConfig
    prompts: PromptsConfig
    diagnosis: DiagnosisConfig


def diagnose_nodes(config: DiagnoseConfig) -> list[Node]:
    """Target, prompts, and what the server does with them."""
    asked = {"target": "target", "prompts": "prompts"}
    return [
        *first_nodes(config.target, config.prompts),
        Node(NODE, STAGES["diagnosis"], config.diagnosis, asked),
    ]


def show_diagnosis(display: Display, folders: Mapping[str, Path], _ui: str) -> None:
    found = json.loads((folders[NODE] / RESULT).read_text("utf-8"))
    tried = found.get("tried", [])
    if tried:
        head = ["replay with", "change", "steps that differ", "tau"]
        rows = [
            [each["cause"], each["change"], f"{each['mismatch']:.1%}", f"{each['tau']:.3f}"]
            for each in [found["as_it_is"], *tried]
        ]
        display.table(head, rows, text_columns=2)
    display.line(found["sentence"])


DIAGNOSE = Pipeline(
    config=DiagnoseConfig,
    nodes=diagnose_nodes,
    flow="draftsmith.flows.refresh.flow:diagnose",
    checks=RunChecks,
    results="draftsmith.flows.refresh.diagnose:show_diagnosis",
)


def diagnose_config(
    refresh: RefreshConfig, url: str, drafter: str, prompts: int | None, api_key_env: str | None = None
) -> DiagnoseConfig:
    """Of the drafter that a command names: a folder, or `LINE@alias` of the registry."""
    if (why := describe_secret(url)) is not None:
        raise DraftsmithError(f"--url: it holds {why}: name the variable that has the key with --api-key-env")
    _, source = resolve_drafter(drafter)
    if not Path(source).is_dir():
        raise DraftsmithError(f"{drafter}: give the folder of the checkpoint that the server loads, or NAME@champion")
    try:
        SGLangEngineConfig(kind="sglang", urls=(url,), api_key_env=api_key_env).api_key()
    except ValidationError as error:
        first = error.errors()[0]
        option = "--api-key-env" if "api_key_env" in first["loc"] else "--url"
        raise DraftsmithError(f"{option}: {first['msg'].removeprefix('Value error, ')}") from None
    asked: dict[str, Any] = {"api_key_env": api_key_env} | ({} if prompts is None else {"prompts": prompts})
    diagnosis = DiagnosisConfig(url=url.rstrip("/"), drafter=source, sampling=refresh.heldout.sampling, **asked)
    parts = {part: getattr(refresh, part) for part in ("target", "prompts", "stages", "seed")}
    return DiagnoseConfig(name=f"{refresh.name}-diagnose", diagnosis=diagnosis, **parts)
