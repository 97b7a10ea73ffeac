"""Checks before any long work: a home that can be written, enough disk, configs that fit the target."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import DraftsmithError, from_os_error
from flows.graph import Node
from flows.options import RunOptions

if TYPE_CHECKING:
    from stages.engines.config import SGLangEngineConfig

_FETCHES_WEIGHTS = ("stages.sft",)  # its preflight has the drafter of init_from fetched whole


def check_home(home: Path, options: RunOptions) -> None:
    """The home exists, can be written, and its disk has room."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home) as probe:
            probe.write(b"x")
    except OSError as error:
        raise from_os_error(error, f"preparing {home}:") from error
    disk = os.statvfs(home)
    free_gb = disk.f_bavail * disk.f_frsize / 1e9
    wanted_gb = options.stages.min_free_gb
    if free_gb < wanted_gb:
        raise DraftsmithError(
            f"{home}: {free_gb:.1f} GB free, {wanted_gb:g} GB wanted (stages.min_free_gb): free some space or point "
            "DRAFTSMITH_HOME at another disk"
        )


def check_supplies(nodes: Sequence[Node]) -> None:
    """Every rollout finds the prompts that it asks for. Raises DraftsmithError with the node's name."""
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        check_supply(node, by_name)


def check_supply(node: Node, by_name: Mapping[str, Node]) -> None:
    """As `check_supplies`, for one node of any stage."""
    from stages.prompt_sources import SPLITS
    from stages.prompts import PromptsConfig
    from stages.rollout import RolloutConfig

    config = node.config
    prompts = by_name[node.inputs["prompts"]].config if isinstance(config, RolloutConfig) else None
    if not isinstance(config, RolloutConfig) or not isinstance(prompts, PromptsConfig):
        return
    available = sum(prompts.wanted(split) for split in SPLITS if split in config.splits)
    left = available - config.skip
    if left <= 0:
        raise DraftsmithError(
            f"{node.name}: splits {list(config.splits)} have {available} prompts and {config.skip} are skipped: "
            "raise the counts in section prompts or lower skip"
        )
    if config.prompts is not None and left < config.prompts:
        raise DraftsmithError(
            f"{node.name}: {config.prompts} prompts wanted behind {config.skip} skipped, {left} left: raise the counts "
            "in section prompts, or lower prompts or skip"
        )


def check_target(nodes: Sequence[Node], target: Path) -> None:
    """Every stage's own checks of its config against the resolved target; no weights are loaded."""
    for node in nodes:
        check_node(node, target)
    if blocks := [_trained_block(node) for node in nodes if trains_anew(node)]:
        for node in nodes:
            if problem := oversized(node, max(blocks)):
                raise DraftsmithError(f"{node.name}: {problem}")
    served = [node.name for node in nodes if drafts_on_sglang(node)]
    for node in nodes if served else ():
        if trains_anew(node):
            _check_servable(node, target, served)


def trains_anew(node: Node) -> bool:
    """Whether a drafter comes into being there, rather than being trained on."""
    return node.module == "stages.sft" and "drafter" not in node.inputs


def _trained_block(node: Node) -> int:
    from stages.sft import SftConfig, trained_block

    assert isinstance(node.config, SftConfig)
    return trained_block(node.config)


def oversized(node: Node, trained: int) -> str | None:
    """Why a node cannot draft as its config says, with drafters of at most `trained` tokens a block; None if it can."""
    size = getattr(getattr(node.config, "drafting", None), "block_size", None) or 0
    return f"drafting.block_size {size} is larger than the trained {trained}: lower it" if size > trained else None


def drafts_on_sglang(node: Node) -> bool:
    """Whether SGLang is to draft with a trained drafter there."""
    from stages.engines.config import SGLangEngineConfig
    from stages.evaluation import DRAFTERS

    with_drafter = any(name in DRAFTERS or name.startswith("drafter") for name in node.inputs)
    return with_drafter and isinstance(getattr(node.config, "engine", None), SGLangEngineConfig)


def _check_servable(node: Node, target: Path, served: Sequence[str]) -> None:
    """What SGLang would not hand to the drafter is an error before it is trained, not when it is served."""
    from stages.sft import SftConfig, unservable

    assert isinstance(node.config, SftConfig)
    if reason := unservable(node.config, target):
        raise DraftsmithError(f"{node.name}: {unservable_there(reason, served)}")


def unservable_there(reason: str, served: Sequence[str]) -> str:
    """The error of layers that SGLang does not hand over. served: nodes in which it is to draft."""
    return f"{reason}, and SGLang is to draft with it in {', '.join(served)}: change drafter.target_layer_ids"


def check_node(node: Node, target: Path, *, metadata_only: bool = False) -> bool:
    """One stage's own checks; False if it has none, or if they would fetch weights and only metadata is wanted.

    Raises the stage's DraftsmithError with the node's name.
    """
    check = node.stage.preflight
    if node.module == "stages.sft" and not trains_anew(node):
        return False  # it goes on with a drafter of this run, not with what its section says of a new one
    if check is None or (metadata_only and node.module in _FETCHES_WEIGHTS):
        return False
    try:
        check(node.config, target)
    except DraftsmithError as error:
        raise type(error)(f"{node.name}: {error}") from error
    return True


def check_engines(nodes: Sequence[Node]) -> list[str]:
    """Every node's SGLang environment, before anything long runs: warnings, each with the nodes that it is about.

    Raises DraftsmithError for an interpreter that cannot launch SGLang.
    """
    from stages.engines.sglang.preflight import check_engine

    warnings: dict[str, list[str]] = {}
    for config, names in sglang_engines(nodes):
        where = ", ".join(names)
        try:
            for warning in check_engine(config):
                warnings.setdefault(warning, []).append(where)
        except DraftsmithError as error:
            raise type(error)(f"{where}: {error}") from error
    return [f"{', '.join(names)}: {warning}" for warning, names in warnings.items()]


def sglang_engines(nodes: Sequence[Node]) -> list[tuple[SGLangEngineConfig, list[str]]]:
    """The different SGLang sections of a run (by interpreter and servers), each with the nodes that use it."""
    from stages.engines.config import SGLangEngineConfig

    found: dict[tuple[object, ...], tuple[SGLangEngineConfig, list[str]]] = {}
    for node in nodes:
        engine = getattr(node.config, "engine", None)
        if isinstance(engine, SGLangEngineConfig):
            found.setdefault((engine.python, engine.urls, engine.trace), (engine, []))[1].append(node.name)
    return list(found.values())
