"""Checks of target and drafter from their small files: what they are, and whether they belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.preflight import (
    drafters_of,
    drafts_on_sglang,
    no_trees,
    oversized,
    trains_anew,
    unservable_there,
)
from draftsmith.flows.pipeline.graph import Node
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.estimate import ModelSize, target_size
from draftsmith.stages.training.config import SftConfig

if TYPE_CHECKING:
    from draftsmith.stages.drafters.checkpoint import DrafterPlan
    from draftsmith.stages.targets.info import TargetInfo


@dataclass(frozen=True)
class Models:
    """What the config and the small files say."""

    artifact: Path  # a target artifact without weights or digest
    info: TargetInfo
    target: ModelSize
    plan: DrafterPlan | None  # of several drafters the largest; None: no drafter's config could be had

    @property
    def drafter(self) -> ModelSize | None:
        return ModelSize.of(self.plan.config, self.plan.parameters) if self.plan is not None else None


def check_models(found: Findings, nodes: Sequence[Node], scratch: Path) -> Models | None:
    """None if there is no target, or nothing is known of it: what follows from its config cannot be checked then."""
    from draftsmith.stages.targets.info import model_path
    from draftsmith.stages.targets.metadata import UnreachableError, metadata_artifact

    target = next((node.config for node in nodes if isinstance(node.config, TargetConfig)), None)
    if target is None:
        return None
    info = None
    with found.part("target"):
        try:
            info = metadata_artifact(target, scratch)
        except UnreachableError as error:
            found.warn("target", f"{error}; not checked: tokenizer, chat template, drafter, context, memory, disk")
    if info is None:
        return None
    size = target_size(model_path(scratch))
    found.ok(
        "target",
        f"{info.source}: {info.architecture}, {size.parameters / 1e6:,.0f}M parameters, {info.num_layers} layers, "
        f"hidden {info.hidden_size}, vocabulary {info.vocab_size}, {info.max_positions} positions, {info.dtype}",
    )
    if info.kind == "hub" and target.revision is None:
        found.warn("target.revision", f"not set: now {info.revision}, reused until `--force target` takes a newer one")
    prompts = [node.config for node in nodes if isinstance(node.config, PromptsConfig)]
    for config in prompts:
        with found.part("chat template"):
            _check_template(found, config, model_path(scratch))
    plans: dict[str, DrafterPlan] = {}  # by the node that trains it anew
    served = [node.name for node in nodes if drafts_on_sglang(node)]
    for node in nodes:
        if isinstance(node.config, SftConfig) and trains_anew(node):
            with found.part(f"{node.name}: drafter"):
                if plan := _check_drafter(found, node.name, node.config, scratch, served):
                    plans[node.name] = plan
    models = Models(scratch, info, size, max(plans.values(), key=lambda plan: plan.parameters, default=None))
    _check_drafting(found, nodes, plans)
    _check_lengths(found, nodes, prompts, info.max_positions)
    return models


def _check_template(found: Findings, config: PromptsConfig, folder: Path) -> None:
    """The template takes a system prompt and the kwargs; a kwarg that changes nothing is told."""
    from draftsmith.stages.prompting.sources import Candidate
    from draftsmith.stages.prompting.template import token_ids
    from draftsmith.stages.targets.resolve import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        found.warn("chat template", "the target has none: prompts are plain text, chat_template_kwargs are ignored")
        return
    messages = [{"role": "user", "content": "Hello"}]
    if system := config.system or next((s.system for s in config.sources if s.system), None):
        messages = [{"role": "system", "content": system}, *messages]
    candidate = Candidate("check", messages, "chat template")
    ids = token_ids(tokenizer, candidate, config.chat_template_kwargs)
    for name in config.chat_template_kwargs:
        if name not in str(tokenizer.chat_template):
            found.warn(
                "chat template", f"it does not read {name}: correct prompts.chat_template_kwargs or leave it out"
            )
    given = ", ".join(f"{name}={value}" for name, value in config.chat_template_kwargs.items())
    found.ok("chat template", f"works{f' with {given}' if given else ''}: {len(ids)} tokens around one word")


def _check_drafter(
    found: Findings, node: str, config: SftConfig, artifact: Path, served: Sequence[str]
) -> DrafterPlan | None:
    """Layer ids, mask token, block size and shape: of the checkpoint to start from, or of the new drafter.

    served: nodes in which SGLang drafts with it.
    """
    from transformers import AutoConfig

    from draftsmith.stages.drafters.checkpoint import plan_of_checkpoint, plan_of_new
    from draftsmith.stages.drafters.layout import unservable_layers
    from draftsmith.stages.targets.info import model_path
    from draftsmith.stages.targets.metadata import UnreachableError
    from draftsmith.stages.targets.resolve import load_tokenizer

    name, folder = f"{node}: drafter", model_path(artifact)
    target_config = AutoConfig.from_pretrained(folder, local_files_only=True)

    def tokenizer() -> Any:
        return load_tokenizer(folder)

    if config.init_from:
        try:
            source = _drafter_metadata(config.init_from, config.init_revision)
        except UnreachableError as error:
            found.warn(name, f"{error}; not checked: its layers, mask token, memory, disk")
            return None
        plan, where = plan_of_checkpoint(source, target_config, config.init_from, tokenizer), config.init_from
        if config.drafter != SftConfig.model_fields["drafter"].default:
            found.warn(name, f"section drafter is not used: {where} has its own shape; remove the section")
        if source == Path(config.init_from).expanduser() and not (source / "model.safetensors").is_file():
            found.error(name, f"{source} has no model.safetensors: give the folder of a whole checkpoint")
    else:
        plan, where = plan_of_new(config.drafter, target_config, tokenizer), "new"
    if reason := unservable_layers(plan.target_layer_ids, target_config.num_hidden_layers):
        if served:
            found.error(name, unservable_there(reason, served))
        else:
            found.warn(name, f"{reason}: this drafter will work in the embedded engine only")
    found.ok(name, f"{where}: {plan.description}, {plan.parameters / 1e6:,.1f}M parameters")
    return plan


def _drafter_metadata(source: str, revision: str | None) -> Path:
    """The folder, or the small files of a hub checkpoint."""
    from draftsmith.stages.targets.metadata import fetch_metadata

    folder = Path(source).expanduser()
    return folder if folder.is_dir() else fetch_metadata(source, revision, "sft.init_from")


def _check_drafting(found: Findings, nodes: Sequence[Node], plans: Mapping[str, DrafterPlan]) -> None:
    """What the config asks of drafters, against what those that a node reads can do."""
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        for plan in (plans[origin.name] for origin in drafters_of(node, by_name) if origin.name in plans):
            for problem in filter(None, (oversized(node, plan.block_size), no_trees(node, plan.kind))):
                found.error(node.name, problem)
            if over := [size for size in getattr(node.config, "block_sizes", None) or () if size > plan.block_size]:
                found.warn(
                    node.name,
                    f"block_sizes {over} are larger than the trained {plan.block_size}, which is taken instead",
                )


def _check_lengths(found: Findings, nodes: Sequence[Node], prompts: Sequence[PromptsConfig], positions: int) -> None:
    """Longest allowed prompt and answer against the context: no error, the prompts that come may all be shorter."""
    longest = max((config.max_prompt_tokens for config in prompts), default=0)
    for node in nodes:
        sampling = getattr(node.config, "sampling", None)
        if sampling is not None and longest and longest + sampling.max_new_tokens > positions:
            found.warn(
                node.name,
                f"{longest} prompt and {sampling.max_new_tokens} new tokens exceed the target's {positions} positions: "
                "a run stops once the prompts are made if one really is that long; lower one of the two",
            )
