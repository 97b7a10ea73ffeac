"""Checks of target and drafters from their small files: what they are, and whether they belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.checks.drafters import drafters_of, drafts_on_sglang, trains_anew
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.data.chat_template import token_ids
from draftsmith.stages.data.prompt_config import Candidate
from draftsmith.stages.data.prompts import PromptsConfig
from draftsmith.stages.drafters.champion import ChampionConfig, checkpoint_of
from draftsmith.stages.drafters.registry import DrafterConfig
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.target.estimate import target_size
from draftsmith.stages.training.config import SftConfig

if TYPE_CHECKING:
    from draftsmith.stages.drafters.checkpoint import DrafterPlan

Plans = Mapping[str, "DrafterPlan"]  # of the drafters that a run begins with, by node


def resolve_metadata(found: Findings, nodes: Sequence[Node], artifact: Path) -> bool:
    """Write what is known of the target without its weights as a target artifact. False if nothing is."""
    from draftsmith.stages.target.metadata import UnreachableError, metadata_artifact

    target = next((node.config for node in nodes if isinstance(node.config, TargetConfig)), None)
    if target is None:
        return False
    with found.part("target"):
        try:
            metadata_artifact(target, artifact)
        except UnreachableError as error:
            left_out = "tokenizer, chat template, drafter, context, memory, disk"
            found.skip("target", f"{error}; not checked: {left_out}", unreachable=True)
            return False
        return True
    return False


def check_target(found: Findings, nodes: Sequence[Node], artifact: Path) -> None:
    """What the target is, and that its chat template takes what the prompts give it. artifact: of the target."""
    from draftsmith.stages.target.info import model_path, read_target_info

    info, size = read_target_info(artifact), target_size(model_path(artifact))
    found.ok(
        "target",
        f"{info.source}: {info.architecture}, {size.parameters / 1e6:,.0f}M parameters, {info.num_layers} layers, "
        f"hidden {info.hidden_size}, vocabulary {info.vocab_size}, {info.max_positions} positions, {info.dtype}",
    )
    config = next((node.config for node in nodes if isinstance(node.config, TargetConfig)), None)
    if config is not None and info.kind == "hub" and config.revision is None:
        found.warn("target.revision", f"not set: now {info.revision}, reused until `--force target` takes a newer one")
    for node in nodes:
        if isinstance(node.config, PromptsConfig):
            with found.part("chat template"):
                _check_template(found, node.config, model_path(artifact))


def _check_template(found: Findings, config: PromptsConfig, folder: Path) -> None:
    """The template takes a system prompt and the kwargs; a kwarg that changes nothing is told."""
    from draftsmith.stages.target.resolve import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        found.warn("chat template", "the target has none: prompts are plain text, chat_template_kwargs are ignored")
        return
    messages = [{"role": "user", "content": "Hello"}]
    if system := config.system:
        messages = [{"role": "system", "content": system}, *messages]
    candidate = Candidate("check", messages, "chat template")
    try:
        ids = token_ids(tokenizer, candidate, config.chat_template_kwargs)
    except DraftsmithError as error:
        system_too = f" behind a system prompt: leave out {config.section}.system" if system else ": correct it"
        raise DraftsmithError(f"the target's refuses a question ({error.__cause__}){system_too}") from error
    for name in config.chat_template_kwargs:
        if name not in str(tokenizer.chat_template):
            found.warn(
                "chat template",
                f"it does not read {name}: correct {config.section}.chat_template_kwargs or leave it out",
            )
    given = ", ".join(f"{name}={value}" for name, value in config.chat_template_kwargs.items())
    found.ok("chat template", f"works{f' with {given}' if given else ''}: {len(ids)} tokens around one word")


def check_nodes(found: Findings, nodes: Sequence[Node], artifact: Path, *, whole: bool) -> None:
    """Every stage's own checks of its config against the target.

    whole: the target has its weights, and those of a drafter to start from may be fetched; else from small files only.
    """
    for node in nodes:
        if isinstance(node.config, SftConfig) and not (trains_anew(node) and whole):
            continue  # it goes on with a drafter of this run, not with what its section says of a new one
        if (check := node.stage.preflight) is not None:
            with found.part(node.name):
                check(node.config, artifact)
                found.ok(node.name, "its settings fit the target")


def check_first_drafters(found: Findings, nodes: Sequence[Node]) -> None:
    """Look for every drafter that a run starts from, on the hub where it is no folder here."""
    from draftsmith.stages.target.metadata import UnreachableError

    for node in nodes:
        if isinstance(node.config, SftConfig) and trains_anew(node) and node.config.init_from:
            check = f"{node.name}: drafter"
            with found.part(check):
                try:
                    _drafter_metadata(node.config.init_from, node.config.init_revision)
                except UnreachableError as error:
                    found.skip(check, str(error), unreachable=True)


def check_drafters(found: Findings, nodes: Sequence[Node], artifact: Path, *, whole: bool) -> Plans:
    """Every drafter that a run begins with, and what is asked of it where it drafts. artifact, whole: as above."""
    plans: dict[str, DrafterPlan] = {}
    serving: dict[str, DrafterPlan] = {}  # champions, before they become anything else
    served = [node.name for node in nodes if drafts_on_sglang(node)]
    for node in nodes:
        if isinstance(node.config, SftConfig) and trains_anew(node):
            with found.part(f"{node.name}: drafter"):
                if plan := _check_drafter(found, node.name, node.config, artifact, served, whole=whole):
                    plans[node.name] = plan
        elif isinstance(node.config, ChampionConfig):
            with found.part(node.name):
                goes_on = [each for each in nodes if each.inputs.get("drafter") == node.name]
                sft = next((each.config for each in goes_on if isinstance(each.config, SftConfig)), None)
                serving[node.name], plans[node.name] = _check_champion(found, node.name, node.config, artifact, sft)
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        # who reads a champion itself has it as it serves, not as what it is trained on as
        known = plans if isinstance(node.config, SftConfig) else {**plans, **_read_by(node, serving)}
        for plan in (known[origin.name] for origin in drafters_of(node, by_name) if origin.name in known):
            _check_drafting(found, node, plan)
    return plans


def _read_by(node: Node, plans: Plans) -> Plans:
    return {source: plans[source] for source in node.inputs.values() if source in plans}


def _check_drafter(
    found: Findings, node: str, config: SftConfig, artifact: Path, served: Sequence[str], *, whole: bool
) -> DrafterPlan | None:
    """Layer ids, mask token, block size and shape: of the checkpoint to start from, or of the new drafter.

    served: nodes in which SGLang drafts with it.
    """
    from draftsmith.stages.drafters.checkpoint import (
        architecture_of,
        check_whole,
        drafter_source,
        kind_of,
        plan_of_checkpoint,
        plan_of_new,
        read_target_config,
    )
    from draftsmith.stages.drafters.checkpoint_format import NoMaskTokenError, unservable_layers
    from draftsmith.stages.target.info import model_path, read_target_info
    from draftsmith.stages.target.metadata import UnreachableError
    from draftsmith.stages.target.resolve import load_tokenizer

    name, folder, info = f"{node}: drafter", model_path(artifact), read_target_info(artifact)
    target_config = read_target_config(folder)

    def tokenizer() -> Any:
        return load_tokenizer(folder)

    if config.init_from:
        try:
            fetch = drafter_source if whole else _drafter_metadata
            source = fetch(config.init_from, config.init_revision)
        except UnreachableError as error:
            found.skip(name, f"{error}; not checked: its layers, mask token, memory, disk", unreachable=True)
            return None
        where = config.init_from
        plan = plan_of_checkpoint(source, target_config, where, tokenizer, config.drafter)
        kept = plan.kind == kind_of(architecture_of(source))  # else it becomes what the section says
        if kept and config.drafter != SftConfig.model_fields["drafter"].default:
            found.warn(name, f"section drafter is not used: {where} has its own shape; remove the section")
        if source == Path(config.init_from).expanduser():  # of the hub's only small files are here
            check_whole(source)
    else:
        try:
            plan, where = plan_of_new(config.drafter, target_config, tokenizer), "new"
        except NoMaskTokenError as error:
            raise DraftsmithError(f"{error}: {', '.join(map(str, info.mask_candidates[:4]))}, …") from error
    if reason := unservable_layers(plan.target_layer_ids, target_config.num_hidden_layers):
        if served:
            what = f"change {node}.drafter.target_layer_ids"
            if config.init_from:  # its layers are what it was trained on
                what = "take another drafter, or the embedded engine there"
            found.error(name, f"{reason}, and SGLang is to draft with it in {', '.join(served)}: {what}")
        else:
            found.warn(name, f"{reason}: this drafter will work in the embedded engine only")
    found.ok(name, f"{where}: {plan.description}, {plan.parameters / 1e6:,.1f}M parameters")
    return plan


def _check_champion(
    found: Findings, node: str, config: ChampionConfig, artifact: Path, sft: SftConfig | None
) -> tuple[DrafterPlan, DrafterPlan]:
    """That its checkpoint is there and fits the target. As it serves, and as it is trained on.

    sft: of what goes on with it, if anything does.
    """
    from draftsmith.stages.drafters.checkpoint import kind_after, plan_of_checkpoint, read_target_config
    from draftsmith.stages.target.info import model_path
    from draftsmith.stages.target.resolve import load_tokenizer

    where, folder = f"{config.line} version {config.version}", model_path(artifact)
    target_config = read_target_config(folder)
    checkpoint, shape = checkpoint_of(config), sft.drafter if sft is not None else None

    def planned(shape: DrafterConfig | None) -> DrafterPlan:
        return plan_of_checkpoint(checkpoint, target_config, where, lambda: load_tokenizer(folder), shape)

    serves = planned(None)
    found.ok(node, f"{where}: {serves.description}, {serves.parameters / 1e6:,.1f}M parameters")
    trained = serves if shape is None or kind_after(serves.kind, shape) == serves.kind else planned(shape)
    if trained is not serves:
        found.ok(node, f"it goes on as: {trained.description}, {trained.parameters / 1e6:,.1f}M parameters")
    if shape is not None and (ignored := _not_as_said(shape, trained)):
        found.warn(
            node,
            f"sft.drafter: {', '.join(ignored)}: not used, as the line goes on from its champion and keeps its "
            "shape; take it out, or begin again as the section says: --set registry.restart=true",
        )
    return serves, trained


def _not_as_said(shape: DrafterConfig, plan: DrafterPlan) -> list[str]:
    """What a section says of a drafter that this one is not."""
    if shape == SftConfig.model_fields["drafter"].default:
        return []
    fields, given = type(shape).model_fields, shape.model_fields_set
    whole = given == fields.keys()  # one that was sent: nobody knows what its file says
    sizes = {"num_layers": plan.config.num_hidden_layers, "block_size": plan.block_size}
    said = {"kind": shape.kind} | {
        name: getattr(shape, name)
        for name in sizes
        if name in fields and (getattr(shape, name) != fields[name].default if whole else name in given)
    }
    is_now = {"kind": plan.kind, **sizes}
    return [f"{name} {value} (the champion: {is_now[name]})" for name, value in said.items() if value != is_now[name]]


def _drafter_metadata(source: str, revision: str | None) -> Path:
    """The folder, or the small files of a hub checkpoint."""
    from draftsmith.stages.target.metadata import fetch_metadata

    folder = Path(source).expanduser()
    return folder if folder.is_dir() else fetch_metadata(source, revision, "sft.init_from")


def _check_drafting(found: Findings, node: Node, plan: DrafterPlan) -> None:
    """What a node asks of its drafter, against what that can do."""
    with found.part(node.name):
        getattr(node.config, "drafting", DraftingConfig()).block_of(plan.block_size)
    sizes = getattr(node.config, "block_sizes", None)
    if sizes and max(sizes) < plan.block_size:
        found.warn(node.name, f"block_sizes: {list(sizes)} leave out {plan.block_size}, as it is trained")
    if over := [size for size in sizes or () if size > plan.block_size]:
        found.warn(
            node.name, f"block_sizes {over} are larger than the trained {plan.block_size}, which is taken instead"
        )
