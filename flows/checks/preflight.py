"""Checks before any long work: a home that can be written, enough disk, configs that fit the target."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import DraftsmithError, from_os_error
from draftsmith.flows.pipeline.graph import Node
from draftsmith.flows.pipeline.options import RunOptions

if TYPE_CHECKING:
    from draftsmith.stages.engines.config import SGLangEngineConfig

_FETCHES_WEIGHTS = ("draftsmith.stages.sft",)  # its preflight has the drafter of init_from fetched whole


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
    from draftsmith.stages.prompting.sources import SPLITS
    from draftsmith.stages.prompts import PromptsConfig
    from draftsmith.stages.rollout import RolloutConfig

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
    by_name = {node.name: node for node in nodes}
    trained = {node.name: _trained(node) for node in nodes if trains_anew(node)}
    for node in nodes:
        for origin in drafters_of(node, by_name):
            kind, block_size = trained[origin.name]
            if problem := oversized(node, block_size) or no_trees(node, kind):
                raise DraftsmithError(f"{node.name}: {problem}")
    served = [node.name for node in nodes if drafts_on_sglang(node)]
    for node in nodes if served else ():
        if trains_anew(node):
            _check_servable(node, target, served)


def check_lengths(nodes: Sequence[Node], prompts: str, made: Path, target: Path) -> None:
    """Every prompt with its longest answer fits into the target's context. made: the artifact of node `prompts`."""
    from draftsmith.stages.measure.config import EvaluationConfig, prompts_to_decode
    from draftsmith.stages.rollout import RolloutConfig, prompts_to_answer
    from draftsmith.stages.stored import positions_needed
    from draftsmith.stages.targets.info import read_target_info

    limit = read_target_info(target).max_positions
    for node in nodes:
        config = node.config
        if node.inputs.get("prompts") != prompts or not isinstance(config, RolloutConfig | EvaluationConfig):
            continue
        if isinstance(config, RolloutConfig):
            asked = prompts_to_answer(config, made)
        else:
            heldout, validation = prompts_to_decode(config, made)
            asked = [*heldout, *validation]
        if asked:
            try:
                positions_needed(asked, config.sampling.max_new_tokens, limit)
            except DraftsmithError as error:
                raise DraftsmithError(f"{node.name}: {error}") from error


def trains_anew(node: Node) -> bool:
    """Whether a drafter comes into being there, rather than being trained on."""
    return node.module == "draftsmith.stages.sft" and "drafter" not in node.inputs


def drafters_of(node: Node, by_name: Mapping[str, Node]) -> list[Node]:
    """Where the drafters that a node reads came into being, as far as those nodes are known."""
    found: list[Node] = []
    for source in (by_name.get(source) for name, source in node.inputs.items() if _is_drafter(name)):
        if source is not None:
            found += [source] if trains_anew(source) else drafters_of(source, by_name)
    return list({origin.name: origin for origin in found}.values())


def _is_drafter(name: str) -> bool:
    """Of a stage's input."""
    from draftsmith.stages.measure.config import DRAFTERS

    return name in DRAFTERS or name.startswith("drafter")


def _trained(node: Node) -> tuple[str, int]:
    """Kind and block size of what is trained anew there."""
    from draftsmith.stages.sft import trained_shape
    from draftsmith.stages.training.config import SftConfig

    assert isinstance(node.config, SftConfig)
    return trained_shape(node.config)


def oversized(node: Node, trained: int) -> str | None:
    """Why a node cannot draft as its config says, with a drafter of `trained` tokens a block; None if it can."""
    size = getattr(getattr(node.config, "drafting", None), "block_size", None) or 0
    return f"drafting.block_size {size} is larger than the trained {trained}: lower it" if size > trained else None


def no_trees(node: Node, kind: str) -> str | None:
    """Why SGLang cannot draft trees there with a drafter of this kind; None if it can or is not to."""
    engine = _sglang_engine(node)
    drawn = engine is not None and engine.launch is not None and engine.launch.tree is not None
    return f"engine.launch.tree: {kind} drafts blocks, no trees: leave it out" if drawn and kind != "eagle3" else None


def drafts_on_sglang(node: Node) -> bool:
    """Whether SGLang is to draft with a trained drafter there."""
    return _sglang_engine(node) is not None and any(_is_drafter(name) for name in node.inputs)


def _sglang_engine(node: Node) -> SGLangEngineConfig | None:
    from draftsmith.stages.engines.config import SGLangEngineConfig

    engine = getattr(node.config, "engine", None)
    return engine if isinstance(engine, SGLangEngineConfig) else None


def _check_servable(node: Node, target: Path, served: Sequence[str]) -> None:
    """What SGLang would not hand to the drafter is an error before it is trained, not when it is served."""
    from draftsmith.stages.sft import unservable
    from draftsmith.stages.training.config import SftConfig

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
    if node.module == "draftsmith.stages.sft" and not trains_anew(node):
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

    Raises DraftsmithError for an interpreter that cannot launch SGLang, and for sampling that it cannot do there.
    """
    from draftsmith.stages.engines.sglang.environment import check_engine

    for node in nodes:
        if problem := cannot_sample(node):
            raise DraftsmithError(f"{node.name}: {problem}")

    warnings: dict[str, list[str]] = {}
    for config, names in sglang_engines(nodes):
        where = ", ".join(names)
        try:
            for warning in check_engine(config):
                warnings.setdefault(warning, []).append(where)
        except DraftsmithError as error:
            raise type(error)(f"{where}: {error}") from error
    return [f"{', '.join(names)}: {warning}" for warning, names in warnings.items()]


def cannot_sample(node: Node) -> str | None:
    """Why a launched server would change sampled answers there; None if it would not. Of running servers the handshake
    finds it."""
    from draftsmith.stages.engines.config import GREEDY_ONLY
    from draftsmith.stages.measure.config import EvaluationConfig
    from draftsmith.stages.rollout import RolloutConfig

    engine, config = _sglang_engine(node), node.config
    if not drafts_on_sglang(node) or engine is None or engine.launch is None or not engine.launch.on_cpu:
        return None
    if isinstance(config, EvaluationConfig) and config.temperatures is not None:
        return f"temperatures: {GREEDY_ONLY}" if any(config.temperatures) else None
    sampled = isinstance(config, RolloutConfig | EvaluationConfig) and config.sampling.temperature > 0
    return f"sampling.temperature: {GREEDY_ONLY}" if sampled else None


def sglang_engines(nodes: Sequence[Node]) -> list[tuple[SGLangEngineConfig, list[str]]]:
    """The different SGLang sections of a run (by interpreter and servers), each with the nodes that use it."""
    found: dict[tuple[object, ...], tuple[SGLangEngineConfig, list[str]]] = {}
    for node in nodes:
        if (engine := _sglang_engine(node)) is not None:
            found.setdefault((engine.python, engine.urls, engine.trace), (engine, []))[1].append(node.name)
    return list(found.values())
