"""Drafter checkpoints: the files that engines load, and `drafter.json`, which records the drafter's origin."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import TypeAdapter
from transformers import AutoConfig

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.checksums import Checksums
from draftsmith.stages.drafters import checkpoint_format
from draftsmith.stages.drafters.base import Drafter, DrafterInfo
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.mtp.config import MtpConfig
from draftsmith.stages.drafters.mtp.families import find_head
from draftsmith.stages.drafters.registry import KINDS, DrafterConfig
from draftsmith.stages.drafters.spec import Architecture, RawConfig
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.hub import check_snapshot, hub_commit, hub_snapshot
from draftsmith.stages.targets.info import TargetInfo

_INFO = TypeAdapter(DrafterInfo)
INFO_FILE, TOKENS_FILE = "drafter.json", "frequent_tokens.npy"

ARCHITECTURES: dict[str, Architecture] = {
    kind: cast("Architecture", import_module(traits.checkpoint)) for kind, traits in KINDS.items()
}
# Kinds that can start from the weights of another kind: their modules have `upgrade_config`.
UPGRADES: dict[tuple[str, str], Any] = {
    (module.UPGRADES, kind): module for kind, module in ARCHITECTURES.items() if hasattr(module, "UPGRADES")
}


def read_config(folder: Path) -> tuple[str, Any]:
    """Return a checkpoint's kind and config. Settings that engines would guess are made explicit or refused."""
    path, raw = folder / checkpoint_format.CONFIG_FILE, checkpoint_format.read_raw_config(folder)
    kind = _kind_of(path, raw)
    with checkpoint_format.config_errors(str(path)):
        return kind, ARCHITECTURES[kind].parse(path, raw)


def _kind_of(path: Path, raw: RawConfig) -> str:
    names = raw.get("architectures") or []
    for kind, architecture in ARCHITECTURES.items():
        if {architecture.ARCHITECTURE, *getattr(architecture, "OTHER_NAMES", ())} & set(names):
            return kind
    if "dflash_config" in raw:  # z-lab's first checkpoints name the class of their own code
        return "dflash"
    known = " or ".join(architecture.ARCHITECTURE for architecture in ARCHITECTURES.values())
    raise DraftsmithError(f"drafter {path}: architectures is {names}. Supported architectures: {known}.")


def _check_fits(kind: str, config: Any, target_config: Any, where: str) -> None:
    """Refuse a drafter for a target of another shape. Reads only configs."""
    with checkpoint_format.config_errors(where):
        ARCHITECTURES[kind].check_fits(config, target_config, where)


@dataclass(frozen=True)
class DrafterPlan:
    """The properties of a drafter that are known without its weights."""

    kind: str  # a key of ARCHITECTURES
    config: Any  # a transformers config
    block_size: int
    target_layer_ids: list[int]
    description: str
    parameters: int
    map_sizes: tuple[int, int]  # same as `Drafter.map_sizes`
    operations: Callable[..., float]  # same as `Drafter.operations`


def with_mask_token(shape: DrafterConfig, target: TargetInfo) -> DrafterConfig:
    """Return the shape with a mask token. By default it is a token that no text of the target contains.

    If the vocabulary has no such token, it is the one that ends answers: nothing is drafted after it.
    """
    if getattr(shape, "mask_token", 0) is not None:
        return shape
    return shape.model_copy(update={"mask_token": [*target.mask_candidates, *target.eos_ids][0]})


def plan_of_new(shape: DrafterConfig, target_config: Any, tokenizer: Callable[[], Any]) -> DrafterPlan:
    """Plan a drafter that is still to be trained. Raises DraftsmithError if its shape does not fit the target.

    shape: has its mask token (`with_mask_token`).
    """
    config = ARCHITECTURES[shape.kind].new_config(shape, target_config, tokenizer)
    return _plan(shape.kind, config, target_config, "sft.drafter", tokenizer)


def plan_of_checkpoint(
    folder: Path, target_config: Any, where: str, tokenizer: Callable[[], Any], shape: DrafterConfig | None = None
) -> DrafterPlan:
    """Plan from the config.json of a checkpoint. Raises DraftsmithError if it does not fit the target.

    shape: the shape to continue training with; matters if it is of another kind (`upgrade_drafter`).
    """
    kind, config = read_config(folder)
    if shape is not None and (upgrade := UPGRADES.get((kind, shape.kind))):
        _check_fits(kind, config, target_config, where)
        return _plan(shape.kind, upgrade.upgrade_config(config), target_config, where, tokenizer)
    return _plan(kind, config, target_config, where, tokenizer)


def upgrade_drafter(drafter: Drafter, shape: DrafterConfig, target: Target, seed: int) -> Drafter:
    """Convert the drafter to the kind of `shape`, with the same proposals, if it can become that kind.

    Otherwise return the drafter itself: a checkpoint's shape overrides the shape of a new drafter in a config.
    """
    upgrade: Any = UPGRADES.get((drafter.kind, shape.kind))
    if upgrade is None:
        return drafter
    config = upgrade.upgrade_config(drafter.config)
    _check_fits(shape.kind, config, target.config, "sft.drafter")
    upgraded = upgrade.create(config, target)
    upgraded.load_state_dict(drafter.state_dict(), strict=False)
    upgraded.initialise_additions(torch.Generator().manual_seed(seed), target.logit_map.scale)
    checkpoint_format.cast(upgraded, next(drafter.parameters()).dtype, upgraded.float32_weights)
    upgraded.frequent_tokens, upgraded.info = drafter.frequent_tokens, drafter.info
    return _with_target_scales(target, upgraded.to(target.device))


def kind_after(kind: str, shape: DrafterConfig) -> str:
    """Return the kind of a drafter of this kind after `upgrade_drafter`."""
    return shape.kind if (kind, shape.kind) in UPGRADES else kind


def skeleton_of(folder: Path) -> Drafter:
    """Create the drafter of a checkpoint without its weights, from its config.json."""
    return _skeleton(*read_config(folder), str(folder / checkpoint_format.CONFIG_FILE))


def _skeleton(kind: str, config: Any, where: str) -> Drafter:
    try:
        with torch.device("meta"):
            skeleton: Drafter = ARCHITECTURES[kind].MODEL(config, torch.empty(0))
    except Exception as error:  # torch and transformers raise all kinds of errors for impossible sizes or angles
        raise DraftsmithError(
            f"drafter {where}: no model can be created from it ({type(error).__name__}: {one_line(error, 200)}). "
            "Correct its fields."
        ) from error
    return skeleton


def check_complete(folder: Path) -> None:
    """Check that a checkpoint has all weights, with the shapes of its config.json. Reads headers only."""
    skeleton = skeleton_of(folder)
    architecture: Any = ARCHITECTURES[skeleton.kind]
    if KINDS[skeleton.kind].native:
        architecture.check_head(folder, skeleton.config)
        return
    expected = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    checkpoint_format.check_weights(folder, expected, architecture.own_name)


def has_native_head(folder: Path, config: Any, steps: int) -> bool:
    """Check a target's head by a plan's config, and return whether there is one. Reads headers only.

    Raises DraftsmithError for an incomplete head, and for a missing one if no steps train it.
    """
    architecture: Any = next(ARCHITECTURES[kind] for kind, traits in KINDS.items() if traits.native)
    if steps and architecture.find_head(folder, config) is None:
        return False
    architecture.check_head(folder, config)
    return True


def block_size_of(folder: Path) -> int:
    """Return the block size that a checkpoint was trained with, from its config.json."""
    return int(read_config(folder)[1].block_size)


def _plan(kind: str, config: Any, target_config: Any, where: str, tokenizer: Callable[[], Any]) -> DrafterPlan:
    _check_fits(kind, config, target_config, where)
    architecture, skeleton = ARCHITECTURES[kind], _skeleton(kind, config, where)
    return DrafterPlan(
        kind,
        config,
        config.block_size,
        architecture.target_layer_ids(config),
        architecture.description(config, tokenizer),
        sum(p.numel() for p in skeleton.parameters()),
        skeleton.map_sizes,
        skeleton.operations,
    )


def create_drafter(shape: DrafterConfig, target: Target, seed: int, frequent: torch.Tensor | None = None) -> Drafter:
    """Create a drafter with seeded random weights, float32.

    frequent: [V] token ids, most frequent first; required for a reduced draft vocabulary.
    """
    architecture, shape = ARCHITECTURES[shape.kind], with_mask_token(shape, target.info)
    config = architecture.new_config(shape, target.config, lambda: target.tokenizer)
    _check_fits(shape.kind, config, target.config, "sft.drafter")
    drafter = architecture.create(config, target, frequent)
    drafter.initialise(torch.Generator().manual_seed(seed), target.head_weight)
    return _with_target_scales(target, drafter.to(target.device))


def _with_target_scales(target: Target, drafter: Drafter) -> Drafter:
    """Set the logit map and the embedding scale, which a drafter shares with its target."""
    drafter.logit_map, drafter.embedding_scale = target.logit_map, target.embedding_scale
    return drafter


def save_drafter(drafter: Drafter, folder: Path, dtype: torch.dtype) -> None:
    """Write the checkpoint in the layout that engines load, in the dtype that they serve."""
    folder.mkdir(parents=True, exist_ok=True)
    ARCHITECTURES[drafter.kind].save(drafter, folder, dtype)
    if drafter.frequent_tokens is not None:
        np.save(folder / TOKENS_FILE, drafter.frequent_tokens.cpu().numpy().astype(np.int32))
    write_info(folder, drafter.info)


def write_info(folder: Path, info: DrafterInfo) -> None:
    """Write drafter.json next to the weights."""
    record = {"digest": drafter_digest(folder), **asdict(info)}
    (folder / INFO_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def load_drafter(
    source: Path | str, target: Target, dtype: torch.dtype | None = None, *, any_target: bool = False
) -> Drafter:
    """Load a checkpoint (ours, or one in a public layout) for this target, in `dtype` (default: the target's).

    source: a folder, or a hub id as text. Raises DraftsmithError if it was trained for another target, unless
    `any_target`.
    """
    folder = source if isinstance(source, Path) else drafter_source(source)
    if not any_target:
        check_drafter(folder, target.info)
    kind, config = read_config(folder)
    _check_fits(kind, config, target.config, str(folder))
    drafter: Drafter = ARCHITECTURES[kind].MODEL(config, target.embedding)
    ARCHITECTURES[kind].load_weights(drafter, folder, target, dtype or target.dtype)
    drafter = _with_target_scales(target, drafter.to(target.device))
    drafter.info, drafter.folder = read_info(folder), folder
    if (tokens := folder / TOKENS_FILE).exists():
        try:
            drafter.frequent_tokens = torch.from_numpy(np.load(tokens).astype(np.int64)).to(target.device)
        except (OSError, ValueError, EOFError) as error:
            raise DraftsmithError(f"drafter {tokens}: cannot be read ({error}). It is cut short or damaged.") from error
    return drafter.eval()


def load_native_head(target: Target, folder: Path, engine: str) -> Drafter | None:
    """Read the target's own head, and write it to `folder` as engines load it. None: its checkpoint has none.

    engine: the one that serves the head, sglang or vllm. Raises DraftsmithError if the head cannot be read here.
    """
    if target.folder is None or find_head(target.folder, target.config) is None:
        return None
    shape = MtpConfig.model_validate({"kind": "mtp", "engine": engine})
    save_drafter(create_drafter(shape, target, 0), folder, target.dtype)
    return load_drafter(folder, target)


def read_info(folder: Path) -> DrafterInfo:
    """Read drafter.json; a checkpoint from elsewhere has an empty record. Raises DraftsmithError if it is damaged."""
    if not (path := folder / INFO_FILE).exists():
        return DrafterInfo()
    try:
        return _INFO.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DraftsmithError(
            f"drafter {path}: cannot be read ({one_line(error, 200)}). Remove it to use the checkpoint without its "
            "record."
        ) from error


def check_drafter(folder: Path, target: TargetInfo) -> None:
    """Refuse a drafter trained for another revision of the target. Reads JSON only."""
    info = read_info(folder)
    if not info.target_digest or info.target_digest == target.digest:
        return
    facts = [("source", target.source, info.target_source)]
    if target.source == info.target_source:
        facts = [
            ("dtype", target.dtype if target.kind in ("gguf", "package") else "", info.target_dtype),  # of its weights
            ("revision", target.revision or "", info.target_revision),
            ("tokenizer and chat template", target.tokenizer_digest[:12], info.tokenizer_digest[:12]),
        ]
    changed = [fact for fact in facts if all(fact) and fact[1] != fact[2]]
    cause = "".join(f", with {what} {now} instead of {then}" for what, now, then in changed)
    remedy = f"Load the target with {' and '.join(f'{what} {then}' for what, _, then in changed)}"
    raise DraftsmithError(
        f"drafter {folder / INFO_FILE}: trained for the target {info.target_digest[:12]}, this target is "
        f"{target.digest[:12]}{cause}. {remedy if changed else 'Choose a drafter of this target'}, or set sft.adopt: "
        "true to start from this one."
    )


def check_layers(folder: Path, num_target_layers: int) -> None:
    """Refuse a checkpoint whose layers SGLang would pass differently from its training. Reads JSON only."""
    kind, config = read_config(folder)
    ids = [] if KINDS[kind].native else ARCHITECTURES[kind].target_layer_ids(config)
    if ids and (reason := checkpoint_format.unservable_layers(ids, num_target_layers)):
        raise DraftsmithError(
            f"drafter {folder / checkpoint_format.CONFIG_FILE}: {reason}. Train one that can be served."
        )


def lineage_from(folder: Path) -> tuple[str, ...]:
    """Return the parents of a drafter that was trained from this checkpoint, oldest first."""
    return (*read_info(folder).parents, drafter_digest(folder))


def drafter_source(source: str, revision: str | None = None) -> Path:
    """Return a local folder, or download a hub id once. Raises DraftsmithError if neither works."""
    if (folder := Path(source).expanduser()).is_dir():
        if revision is not None:
            raise DraftsmithError(
                f"sft.init_revision: {source} is a folder, and only drafters of the hub have revisions. Remove it."
            )
        return folder
    commit = hub_commit(source, revision) or revision
    folder = hub_snapshot("sft.init_from", source, commit, ["*.json", "*.safetensors", "*.npy"])
    check_snapshot(folder, Checksums(home()).sha256)
    return folder


def check_shape(folder: Path, target_model: Path) -> None:
    """Refuse a drafter whose config does not fit the target's. Reads only configs."""
    _check_fits(*read_config(folder), read_target_config(target_model), str(folder))


def read_target_config(target_model: Path) -> Any:
    """Read the text part of a target's config, which drafters are planned with."""
    return AutoConfig.from_pretrained(target_model, local_files_only=True).get_text_config()
