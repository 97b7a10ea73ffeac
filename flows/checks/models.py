"""Checks target and drafters by their small files: what they are, and that they fit each other."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.host import memory_bytes, visible_gpus
from draftsmith.flows.checks.drafters import creates_drafter, drafter_origins, drafts_on_sglang, sglang_engine
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.execution.display import format_bytes
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.data.chat_template import token_ids
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.drafters.champion import ChampionConfig
from draftsmith.stages.drafters.registry import KINDS, DrafterConfig
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.targets.config import TargetConfig, check_weights, gguf_file, model_folder, source_kind
from draftsmith.stages.targets.estimate import DTYPE_BYTES, target_size
from draftsmith.stages.targets.hub import hub_snapshot
from draftsmith.stages.targets.info import TargetInfo, load_tokenizer, model_path, read_target_info, write_target_info
from draftsmith.stages.training.config import SftConfig

if TYPE_CHECKING:
    from draftsmith.stages.drafters.checkpoint import DrafterPlan

_WEIGHTS_SHARE = 0.7  # of the computing device's memory, for weights that a check loads
DrafterPlans = Mapping[str, "DrafterPlan"]  # node -> the drafter that a run starts with there


class HubUnreachableError(DraftsmithError):
    """The hub cannot be reached and its cache has no copy: the source could not be checked."""


def fetch_target_metadata(findings: Findings, nodes: Sequence[Node], artifact: Path) -> bool:
    """Write a target artifact without weights. Return False if the config has no target or it cannot be reached."""
    target = next((node.config for node in nodes if isinstance(node.config, TargetConfig)), None)
    if target is None:
        return False
    with findings.check("target"):
        try:
            metadata_artifact(target, artifact)
        except HubUnreachableError as error:
            skipped = "tokenizer, chat template, drafter, context, memory, disk"
            findings.skip("target", f"{error} Not checked: {skipped}.", unreachable=True)
            return False
        return True
    return False


def fetch_weights(nodes: Sequence[Node], metadata: Path, stored: Path | None) -> Path | None:
    """Return an artifact of the target with its weights; None if they are only on the hub, or too large for the memory.

    metadata: artifact of `fetch_target_metadata`, in which a new one is written. stored: the one in the store, if any.
    """
    # imports torch, and planning imports this module
    from draftsmith.stages.targets.body import resolve_target

    info, folder = read_target_info(metadata), model_path(metadata)
    size = target_size(folder).parameters * DTYPE_BYTES[info.dtype]
    if size > _WEIGHTS_SHARE * min([gpu.memory for gpu in visible_gpus()], default=memory_bytes()):
        return None
    if stored is not None:
        return stored
    if info.kind == "hub":
        try:
            check_weights(folder)
        except DraftsmithError:
            return None
    config = next(node.config for node in nodes if isinstance(node.config, TargetConfig))
    resolve_target(config, metadata / "whole", lambda _line: None)
    return metadata / "whole"


def metadata_artifact(config: TargetConfig, out: Path) -> TargetInfo:
    """Write a `target.json` without the digest to `out`: enough for the preflight of every stage.

    A folder's weights are checked for completeness (headers only); the hub's are not fetched. Config and tokenizer of a
    GGUF file are written to `out/model`.
    """
    # imports torch, and planning imports this module
    from draftsmith.stages.targets.body import extract_metadata
    from draftsmith.stages.targets.describe import describe_metadata

    kind, revision = source_kind(config.source), None
    if kind == "hub":
        folder = fetch_metadata(config.source, config.revision, "target.source")
        location, revision = os.fspath(folder), folder.name
    elif kind == "folder":
        folder = model_folder(config.source)
        location = os.fspath(folder)
        check_weights(folder)
    else:
        folder, location = out / "model", "model"
        extract_metadata(gguf_file(config.source), folder)
    info = describe_metadata(folder, config, kind=kind, location=location, revision=revision)
    write_target_info(info, out)
    return info


def fetch_metadata(source: str, revision: str | None, field: str) -> Path:
    """Return the folder with the small files of a hub repository, never its weights, in the hub's own cache.

    field: config field that errors name. Raises HubUnreachableError without network and cache, DraftsmithError if the
    hub does not have the repository.
    """
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"]
    return hub_snapshot(field, source, revision, patterns, unreached=HubUnreachableError)


def check_target(findings: Findings, nodes: Sequence[Node], artifact: Path) -> None:
    """Report what the target is, and check that its chat template takes the prompts. artifact: the target's folder."""
    info, size = read_target_info(artifact), target_size(model_path(artifact))
    findings.ok(
        "target",
        f"{info.source}: {info.architecture}, {size.parameters / 1e6:,.0f}M parameters, {info.num_layers} layers, "
        f"hidden {info.hidden_size}, vocabulary {info.vocab_size}, {info.max_positions} positions, {info.dtype}",
    )
    if info.quantisation == "mxfp4" and importlib.util.find_spec("kernels") is None:
        findings.warn(
            "target",
            f"its MXFP4 weights become {format_bytes(size.parameters * DTYPE_BYTES[info.dtype])} of {info.dtype} in "
            "each process, since the package kernels is missing. On a GPU install it: `pip install kernels`.",
        )
    with findings.check("native head"):
        _check_native_head(findings, model_path(artifact))
    config = next((node.config for node in nodes if isinstance(node.config, TargetConfig)), None)
    if config is not None and info.kind == "hub" and config.revision is None:
        findings.warn(
            "target.revision",
            f"not set. Using commit {info.revision} until `--force target` takes a newer one.",
        )
    for node in nodes:
        if isinstance(node.config, PromptsConfig):
            with findings.check("chat template"):
                _check_template(findings, node.config, model_path(artifact))


def _check_native_head(findings: Findings, folder: Path) -> None:
    """Say whether a target has a head of its own, which a new drafter must beat."""
    from draftsmith.stages.drafters.checkpoint import read_target_config  # imports torch, and planning must not
    from draftsmith.stages.drafters.mtp.families import find_head

    try:
        head = find_head(folder, read_target_config(folder))
    except DraftsmithError as error:
        findings.warn("native head", f"this target has an MTP head, which no evaluation measures: {error}")
        return
    if head is not None:
        findings.ok("native head", "this target has an MTP head; a new drafter must beat it (arm native)")


def _check_template(findings: Findings, config: PromptsConfig, folder: Path) -> None:
    """Check that the template takes a system prompt and the kwargs; warn of a kwarg that it does not read."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template:
        findings.warn(
            "chat template", "the target has none. Prompts are plain text, and chat_template_kwargs are ignored."
        )
        return
    messages = [{"role": "user", "content": "Hello"}]
    if system := config.system:
        messages = [{"role": "system", "content": system}, *messages]
    try:
        ids = token_ids(tokenizer, messages, "chat template", config.chat_template_kwargs)
    except DraftsmithError as error:
        refused, remedy = "a question", "Correct it."
        if system:
            refused, remedy = "a question after a system prompt", f"Remove {config.section}.system."
        raise DraftsmithError(f"the target's rejects {refused} ({error.__cause__}). {remedy}") from error
    for name in config.chat_template_kwargs:
        if name not in str(tokenizer.chat_template):
            findings.warn(
                "chat template",
                f"it does not read {name}. Correct {config.section}.chat_template_kwargs or remove it.",
            )
    kwargs = ", ".join(f"{name}={value}" for name, value in config.chat_template_kwargs.items())
    findings.ok("chat template", f"works{f' with {kwargs}' if kwargs else ''}: {len(ids)} tokens around one word")


def check_stage_settings(findings: Findings, nodes: Sequence[Node], artifact: Path) -> None:
    """Run every stage's own check of its settings against the target."""
    for node in nodes:
        if (check := node.stage.preflight) is not None:
            with findings.check(node.name):
                check(node.config, artifact)
                findings.ok(node.name, "its settings fit the target")


def check_initial_drafters(findings: Findings, nodes: Sequence[Node]) -> None:
    """Check that every drafter that a run starts from is a folder here or on the hub."""
    for node in nodes:
        if isinstance(node.config, SftConfig) and creates_drafter(node) and node.config.init_from:
            check = f"{node.name}: drafter"
            with findings.check(check):
                try:
                    _drafter_metadata(node.config.init_from, node.config.init_revision)
                except HubUnreachableError as error:
                    findings.skip(check, str(error), unreachable=True)


def check_drafters(findings: Findings, nodes: Sequence[Node], artifact: Path, *, whole: bool) -> DrafterPlans:
    """Check every drafter that a run starts with, and the settings of the nodes that draft with it.

    artifact: the target's folder. whole: it has its weights, and a drafter's may be fetched; otherwise only small files
    are read. Returns the drafters as they are trained.
    """
    plans: dict[str, DrafterPlan] = {}
    serving: dict[str, DrafterPlan] = {}  # champions as they serve: training may change their kind
    served = [node.name for node in nodes if drafts_on_sglang(node)]
    for node in nodes:
        if isinstance(node.config, SftConfig) and creates_drafter(node):
            with findings.check(f"{node.name}: drafter"):
                if plan := _check_drafter(findings, node.name, node.config, artifact, served, whole=whole):
                    plans[node.name] = plan
        elif isinstance(node.config, ChampionConfig):
            with findings.check(node.name):
                readers = [reader.config for reader in nodes if reader.inputs.get("drafter") == node.name]
                sft = next((config for config in readers if isinstance(config, SftConfig)), None)
                serving[node.name], plans[node.name] = _check_champion(findings, node.name, node.config, artifact, sft)
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        # nodes other than SFT read a champion as it serves
        served_here = {source: serving[source] for source in node.inputs.values() if source in serving}
        known = plans if isinstance(node.config, SftConfig) else plans | served_here
        for plan in (known[origin.name] for origin in drafter_origins(node, by_name) if origin.name in known):
            _check_drafting(findings, node, plan, read_target_info(artifact).dtype)
    return plans


def _check_drafter(
    findings: Findings, node: str, config: SftConfig, artifact: Path, served: Sequence[str], *, whole: bool
) -> DrafterPlan | None:
    """Check layer ids, mask token, block size and shape of a checkpoint to start from, or of a new drafter.

    served: nodes in which SGLang drafts with it. None if the checkpoint cannot be reached.
    """
    from draftsmith.stages.drafters import checkpoint, checkpoint_format  # import torch, and planning must not

    name, folder, info = f"{node}: drafter", model_path(artifact), read_target_info(artifact)
    target_config = checkpoint.read_target_config(folder)

    def tokenizer() -> Any:
        return load_tokenizer(folder)

    if config.init_from:
        try:
            fetch = checkpoint.drafter_source if whole else _drafter_metadata
            source = fetch(config.init_from, config.init_revision)
        except HubUnreachableError as error:
            findings.skip(name, f"{error} Not checked: layers, mask token, memory, disk.", unreachable=True)
            return None
        where = config.init_from
        plan = checkpoint.plan_of_checkpoint(source, target_config, where, tokenizer, config.drafter)
        # else it becomes the kind of section drafter
        keeps_kind = plan.kind == (kind := checkpoint.read_config(source)[0])
        config.check_lora(kind, plan.kind)
        if keeps_kind and config.drafter != SftConfig.model_fields["drafter"].default:
            findings.warn(name, f"section drafter is not used: {where} has its own shape. Remove the section.")
        if whole and not config.adopt:
            checkpoint.check_drafter(source, info)
        if whole or source == Path(config.init_from).expanduser():  # only small files of a hub checkpoint are here
            checkpoint.check_complete(source)
    elif config.steps == 0 and not KINDS[config.drafter.kind].native:
        raise DraftsmithError("sft.steps: 0 steps train nothing. Name the drafter to use unchanged in sft.init_from.")
    else:
        config.check_lora(None, config.drafter.kind)
        shape = checkpoint.with_mask_token(config.drafter, info)
        plan, where = checkpoint.plan_of_new(shape, target_config, tokenizer), "new"
    if KINDS[plan.kind].native:
        if not config.init_from:
            where = "the target's own"
            if (whole or info.kind == "folder") and not checkpoint.has_native_head(folder, plan.config, config.steps):
                where = "from the target's last layer, because the target has no head"
        findings.ok(name, f"{where}: {plan.description}, {plan.parameters / 1e6:,.1f}M parameters")
        return plan
    if reason := checkpoint_format.unservable_layers(plan.target_layer_ids, target_config.num_hidden_layers):
        if served:
            remedy = f"Change {node}.drafter.target_layer_ids."
            if config.init_from:  # it was trained on its layers
                remedy = "Use another drafter, or the embedded engine there."
            findings.error(name, f"{reason}, and SGLang drafts with it in {', '.join(served)}. {remedy}")
        else:
            findings.warn(name, f"{reason}. This drafter works in the embedded engine only.")
    findings.ok(name, f"{where}: {plan.description}, {plan.parameters / 1e6:,.1f}M parameters")
    return plan


def _check_champion(
    findings: Findings, node: str, config: ChampionConfig, artifact: Path, sft: SftConfig | None
) -> tuple[DrafterPlan, DrafterPlan]:
    """Check that the champion's checkpoint is there and fits the target. Return its plans for serving and training.

    sft: the training that continues it, if any.
    """
    # imports torch, and planning must not
    from draftsmith.stages.drafters.checkpoint import kind_after, plan_of_checkpoint, read_target_config

    where, folder = f"{config.line} version {config.version}", model_path(artifact)
    target_config = read_target_config(folder)
    checkpoint, shape = config.checkpoint(), sft.drafter if sft is not None else None

    def planned(shape: DrafterConfig | None) -> DrafterPlan:
        return plan_of_checkpoint(checkpoint, target_config, where, lambda: load_tokenizer(folder), shape)

    serves = planned(None)
    findings.ok(node, f"{where}: {serves.description}, {serves.parameters / 1e6:,.1f}M parameters")
    trained = serves if shape is None or kind_after(serves.kind, shape) == serves.kind else planned(shape)
    if sft is not None:
        sft.check_lora(serves.kind, trained.kind)
    if trained is not serves:
        findings.ok(node, f"it is trained as: {trained.description}, {trained.parameters / 1e6:,.1f}M parameters")
    if shape is not None and (ignored := _ignored_fields(shape, trained)):
        findings.warn(
            node,
            f"sft.drafter: {', '.join(ignored)}: not used, because the line continues from its champion and keeps its "
            "shape. Remove it, or start again from the section with --restart.",
        )
    return serves, trained


def _ignored_fields(shape: DrafterConfig, plan: DrafterPlan) -> list[str]:
    """Return the fields of section drafter that the champion's shape overrides."""
    if shape == SftConfig.model_fields["drafter"].default:
        return []
    fields, fields_set = type(shape).model_fields, shape.model_fields_set
    whole = fields_set == fields.keys()  # a deployment sends every field: those of its file are unknown
    sizes = {"num_layers": plan.config.num_hidden_layers, "block_size": plan.block_size}
    asked = {"kind": shape.kind} | {
        name: getattr(shape, name)
        for name in sizes
        if name in fields and (getattr(shape, name) != fields[name].default if whole else name in fields_set)
    }
    champion = {"kind": plan.kind, **sizes}
    return [
        f"{name} {value} (the champion: {champion[name]})" for name, value in asked.items() if value != champion[name]
    ]


def _drafter_metadata(source: str, revision: str | None) -> Path:
    """Return the folder of a drafter, or of a hub checkpoint's small files."""
    folder = Path(source).expanduser()
    return folder if folder.is_dir() else fetch_metadata(source, revision, "sft.init_from")


def _check_drafting(findings: Findings, node: Node, plan: DrafterPlan, dtype: str) -> None:
    """Check a node's drafting settings against its drafter. dtype: the served target's."""
    engine = sglang_engine(node)
    launch = engine.launch if engine is not None else None
    if launch is not None and not launch.on_cpu and not KINDS[plan.kind].served_in_any_dtype and dtype != "bfloat16":
        findings.error(
            node.name,
            f"target.dtype: {dtype}, but SGLang drafts with {plan.kind} only in bfloat16. Set it to bfloat16, or use "
            "the embedded engine there.",
        )
    with findings.check(node.name):
        getattr(node.config, "drafting", DraftingConfig()).block_of(plan.block_size)
    sizes = getattr(node.config, "block_sizes", None)
    if sizes and max(sizes) < plan.block_size:
        findings.warn(node.name, f"block_sizes: {list(sizes)} lack {plan.block_size}, the trained block size.")
    if over := [size for size in sizes or () if size > plan.block_size]:
        findings.warn(
            node.name, f"block_sizes: {over} are larger than the trained {plan.block_size}, which is used instead."
        )
