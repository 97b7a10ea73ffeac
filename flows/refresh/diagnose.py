"""Finds out why a running server accepts less than replay: config and graph of `draftsmith diagnose`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.redaction import describe_secret
from draftsmith.artifacts.results.diagnosis import DiagnosisResult
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
from draftsmith.stages.evaluation.diagnosis import DiagnosisConfig
from draftsmith.stages.target.config import TargetConfig

NODE = "diagnosis"


class DiagnoseConfig(RunOptions):
    """A server, and the sections of a refresh from which it is asked prompts."""

    target: TargetConfig
    prompts: PromptsConfig
    diagnosis: DiagnosisConfig


def diagnose_nodes(config: DiagnoseConfig) -> list[Node]:
    """Return the nodes of target, prompts and the server's diagnosis."""
    asked = {"target": "target", "prompts": "prompts"}
    return [
        *first_nodes(config.target, config.prompts),
        Node(NODE, STAGES["diagnosis"], config.diagnosis, asked),
    ]


def show_diagnosis(display: Display, folders: Mapping[str, Path], _ui: str) -> None:
    """Print the diagnosis: a table of the changes of replay that were tried, and a sentence."""
    result = DiagnosisResult.read(folders[NODE])
    if result.as_it_is is not None and result.tried:
        head = ["replay with", "change", "steps that differ", "tau"]
        rows = [
            [each.cause, each.change, f"{each.mismatch:.1%}", f"{each.tau:.3f}"]
            for each in [result.as_it_is, *result.tried]
        ]
        display.table(head, rows, text_columns=2)
    display.line(result.sentence)


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
    """Return the config that diagnoses a server. drafter: a folder, or `LINE@alias` of the registry."""
    if (why := describe_secret(url)) is not None:
        raise DraftsmithError(f"--url: it contains {why}. Name the variable that has the key with --api-key-env.")
    _, source = resolve_drafter(drafter)
    if not Path(source).is_dir():
        raise DraftsmithError(f"{drafter}: not a folder. Give the checkpoint that the server loads, or NAME@champion.")
    try:
        SGLangEngineConfig(kind="sglang", urls=(url,), api_key_env=api_key_env).api_key()
    except ValidationError as error:
        first = error.errors()[0]
        option = "--api-key-env" if "api_key_env" in first["loc"] else "--url"
        raise DraftsmithError(f"{option}: {first['msg'].removeprefix('Value error, ')}") from None
    diagnosis = DiagnosisConfig(
        url=url.rstrip("/"),
        drafter=source,
        sampling=refresh.heldout.sampling,
        api_key_env=api_key_env,
        **({} if prompts is None else {"prompts": prompts}),
    )
    sections = {name: getattr(refresh, name) for name in ("target", "prompts", "stages", "seed")}
    return DiagnoseConfig(name=f"{refresh.name}-diagnose", diagnosis=diagnosis, **sections)
