"""Runs that measure and train nothing: config and graph of `draftsmith evaluate` and `draftsmith diagnose`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.identifiers import PlainName, server_url
from draftsmith.artifacts.results.evaluation import NATIVE, PLAIN, DiagnosisResult
from draftsmith.flows.checks.check import check_after, check_before
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display, EndedRun
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.planning.plan import Pipeline
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import first_nodes
from draftsmith.flows.refresh.registry_commands import verify_checkpoint
from draftsmith.flows.refresh.screen import compared, show_results
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import DRAFTERS, PREFIX, EvaluationConfig
from draftsmith.stages.evaluation.diagnosis.stage import DiagnosisConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.training.config import SftConfig


class EvaluateConfig(RunOptions):
    """Drafters by name, and the sections of a refresh that measure them."""

    target: TargetConfig
    prompts: PromptsConfig
    heldout: RolloutConfig
    evaluation: EvaluationConfig
    drafters: dict[PlainName, str] = Field(min_length=1)
    """Folder or hub id of each drafter, by name."""


def evaluate_nodes(config: EvaluateConfig) -> list[Node]:
    """Return the nodes: target, held-out answers, each drafter as it is, one evaluation against the first drafter."""
    target = {"target": "target"}
    asked = {**target, "prompts": "prompts"}
    nodes = [
        *first_nodes(config.target, config.prompts),
        Node("heldout", STAGES["rollout"], config.heldout, asked),
    ]
    measured = {**asked, "trajectories": "heldout"}
    for name, source in config.drafters.items():
        untrained = SftConfig(steps=0, init_from=source, adopt=True)
        nodes.append(Node(name, STAGES["sft"], untrained, {**target, "trajectories": "heldout"}))
        measured[f"{PREFIX}{name}"] = name
    return [*nodes, Node("evaluation", STAGES["evaluation"], config.evaluation, measured)]


class EvaluatePipeline(Pipeline):
    """The comparison of drafters."""

    config = EvaluateConfig
    flow = "draftsmith.flows.refresh.flow:evaluate"
    headline = "evaluation"

    nodes = staticmethod(evaluate_nodes)
    compared = staticmethod(compared)
    show = staticmethod(show_results)
    check = staticmethod(check_before)
    check_after = staticmethod(check_after)


EVALUATE = EvaluatePipeline()


_RESERVED = {"target", "prompts", "heldout", "evaluation", PLAIN, NATIVE, *DRAFTERS}  # names of nodes and arms


def evaluate_config(refresh: RefreshConfig, drafters: list[str]) -> EvaluateConfig:
    """Return the config that compares drafters: folders, hub ids, or `LINE@alias` of the registry."""
    sources: dict[str, str] = {}
    for text in drafters:
        name, source = resolve_drafter(text)
        while name in _RESERVED or name in sources:
            name = f"{name}-{len(sources) + 1}"
        sources[name] = source
    sections = {
        name: getattr(refresh, name) for name in ("target", "prompts", "heldout", "evaluation", "stages", "seed")
    }
    return EvaluateConfig(name=f"{refresh.name}-evaluate", drafters=sources, **sections)


def resolve_drafter(text: str) -> tuple[str, str]:
    """Return (name of the arm, folder or hub id) of a drafter that a command names."""
    if Path(text).expanduser().is_dir():
        folder = Path(text).expanduser().resolve()
        inner = folder / "drafter"
        folder = inner if (inner / "config.json").is_file() else folder
        return _arm_name((folder.parent if folder.name == "drafter" else folder).name), str(folder)
    if "@" in text:
        return _arm_name(text), str(verify_checkpoint(registry().resolve(text)))
    path = Path(text)
    # `owner/name` is a hub id unless a folder `owner` exists here; the checks look for it on the hub
    if text.startswith((".", "/", "~")) or len(path.parts) != 2 or path.parent.is_dir():
        raise DraftsmithError(f"{text}: no such folder. Give a drafter's folder, a hub id or NAME@champion.")
    return _arm_name(text.replace("/", "-")), text


def _arm_name(name: str) -> str:
    return re.sub(r"^\W|[^\w@.+-]", "_", name)


DIAGNOSIS = "diagnosis"  # node


class DiagnoseConfig(RunOptions):
    """A server, and the sections of a refresh that give the prompts to send."""

    target: TargetConfig
    prompts: PromptsConfig
    diagnosis: DiagnosisConfig


def diagnose_nodes(config: DiagnoseConfig) -> list[Node]:
    """Return the nodes of target, prompts and the server's diagnosis."""
    asked = {"target": "target", "prompts": "prompts"}
    return [
        *first_nodes(config.target, config.prompts),
        Node(DIAGNOSIS, STAGES["diagnosis"], config.diagnosis, asked),
    ]


def show_diagnosis(display: Display, folders: Mapping[str, Path], ended: EndedRun) -> None:  # noqa: ARG001
    """Print the diagnosis: a table of the changes of replay that were tried, and a sentence."""
    result = DiagnosisResult.read(folders[DIAGNOSIS])
    if result.as_it_is is not None and result.tried:
        head = ["replay with", "change", "steps that differ", "tau"]
        rows = [
            [change.cause, change.change, f"{change.mismatch:.1%}", f"{change.tau:.3f}"]
            for change in [result.as_it_is, *result.tried]
        ]
        display.table(head, rows, text_columns=2)
    display.line(result.sentence)


class DiagnosePipeline(Pipeline):
    """The diagnosis of a server."""

    config = DiagnoseConfig
    flow = "draftsmith.flows.refresh.flow:diagnose"

    nodes = staticmethod(diagnose_nodes)
    show = staticmethod(show_diagnosis)
    check = staticmethod(check_before)
    check_after = staticmethod(check_after)


DIAGNOSE = DiagnosePipeline()


def diagnose_config(
    refresh: RefreshConfig, url: str, drafter: str, prompts: int | None, api_key_env: str | None = None
) -> DiagnoseConfig:
    """Return the config that diagnoses a server. drafter: a folder, or `LINE@alias` of the registry."""
    server_url(url, where="--url")
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
