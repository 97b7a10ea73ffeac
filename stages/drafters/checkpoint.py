"""Drafter checkpoints: the engine's files of the architecture, beside them `drafter.json` with where it comes from."""

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

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.stages.drafters import checkpoint_format
from draftsmith.stages.drafters.base import Drafter, DrafterInfo
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.registry import CHECKPOINTS, DrafterConfig
from draftsmith.stages.drafters.spec import Architecture
from draftsmith.stages.target.causal_lm import Target

_INFO = TypeAdapter(DrafterInfo)
INFO_FILE, TOKENS_FILE = "drafter.json", "frequent_tokens.npy"


ARCHITECTURES: dict[str, Architecture] = {
    kind: cast("Architecture", import_module(module)) for kind, module in CHECKPOINTS.items()
}
# Kinds that take over the weights of another one: their modules have `upgraded` and `upgraded_config`.
UPGRADES: dict[tuple[str, str], Any] = {
    (module.UPGRADES, kind): module for kind, module in ARCHITECTURES.items() if hasattr(module, "UPGRADES")
}


def architecture_of(folder: Path) -> Architecture:
    """By the name in a checkpoint's config.json. Raises DraftsmithError if it is none that is known."""
    raw = checkpoint_format.read_raw_config(folder)
    names = raw.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    for architecture in ARCHITECTURES.values():
        if {architecture.ARCHITECTURE, *getattr(architecture, "OTHER_NAMES", ())} & set(map(str, names)):
            return architecture
    if "dflash_config" in raw:  # z-lab's first checkpoints name the class of their own code
        return ARCHITECTURES["dflash"]
    known = " or ".join(architecture.ARCHITECTURE for architecture in ARCHITECTURES.values())
    raise DraftsmithError(
        f"drafter {folder / checkpoint_format.CONFIG_FILE}: architectures is {names}. Supported architectures: {known}."
    )


def kind_of(architecture: Architecture) -> str:
    """Its name in ARCHITECTURES and in configs."""
    return next(kind for kind, known in ARCHITECTURES.items() if known is architecture)


@dataclass(frozen=True)
class DrafterPlan:
    """What is known of a drafter without its weights."""

    kind: str  # of ARCHITECTURES
    config: Any  # of transformers
    block_size: int
    target_layer_ids: list[int]
    description: str
    parameters: int


def plan_of_new(shape: DrafterConfig, target_config: Any, tokenizer: Callable[[], Any]) -> DrafterPlan:
    """A drafter that is still to be trained. Raises DraftsmithError if its shape does not fit the target."""
    architecture = ARCHITECTURES[shape.kind]
    config = architecture.new_config(shape, target_config, tokenizer)
    architecture.check_fits(config, target_config, "sft.drafter")
    return _plan(architecture, config, tokenizer, "sft.drafter")


def plan_of_checkpoint(
    folder: Path, target_config: Any, where: str, tokenizer: Callable[[], Any], shape: DrafterConfig | None = None
) -> DrafterPlan:
    """A checkpoint, from its config.json. Raises DraftsmithError if it does not fit the target.

    shape: what it is trained on as, where that is another kind (`upgraded`).
    """
    architecture = architecture_of(folder)
    config = architecture.read_config(folder)
    architecture.check_fits(config, target_config, where)
    if shape is not None and (upgrade := UPGRADES.get((kind_of(architecture), shape.kind))):
        config = upgrade.upgraded_config(config, shape)
        upgrade.check_fits(config, target_config, where)
        return _plan(upgrade, config, tokenizer, where)
    return _plan(architecture, config, tokenizer, where)


def upgraded(drafter: Drafter, shape: DrafterConfig, target: Target, seed: int) -> Drafter:
    """The drafter as one of another kind that proposes the same, if the shape names a kind that it can become.

    Else the drafter itself: a checkpoint's own shape goes before what a config says of a new one.
    """
    upgrade = UPGRADES.get((drafter.kind, shape.kind))
    if upgrade is None:
        return drafter
    return _behind(target, upgrade.upgraded(drafter, shape, target, seed))


def kind_after(kind: str, shape: DrafterConfig) -> str:
    """Of a drafter of this kind, once it is `upgraded`."""
    return shape.kind if (kind, shape.kind) in UPGRADES else kind


def skeleton_of(folder: Path) -> Drafter:
    """The drafter of a checkpoint without its weights, from its config.json."""
    architecture = architecture_of(folder)
    return _skeleton(architecture, architecture.read_config(folder), str(folder / checkpoint_format.CONFIG_FILE))


def _skeleton(architecture: Architecture, config: Any, where: str) -> Drafter:
    try:
        with torch.device("meta"):
            found: Drafter = architecture.skeleton(config)
    except Exception as error:  # torch and transformers raise of every kind where a size or an angle makes no sense
        raise DraftsmithError(
            f"drafter {where}: no model can be made of it ({type(error).__name__}: {one_line(error, 200)}); "
            "correct its fields"
        ) from error
    return found


def check_whole(folder: Path) -> None:
    """A checkpoint's weights are all there, with the shapes that its config.json says; reads headers only."""
    expected = {name: tuple(each.shape) for name, each in skeleton_of(folder).named_parameters()}
    checkpoint_format.check_weights(folder, expected, architecture_of(folder).own_name)


def block_size_of(folder: Path) -> int:
    """That a checkpoint was trained with, from its config.json."""
    size: int = architecture_of(folder).read_config(folder).block_size
    return size


def _plan(architecture: Architecture, config: Any, tokenizer: Callable[[], Any], where: str) -> DrafterPlan:
    skeleton = _skeleton(architecture, config, where)
    return DrafterPlan(
        kind_of(architecture),
        config,
        config.block_size,
        architecture.target_layer_ids(config),
        architecture.description(config, tokenizer),
        sum(p.numel() for p in skeleton.parameters()),
    )


def create_drafter(shape: DrafterConfig, target: Target, seed: int, frequent: torch.Tensor | None = None) -> Drafter:
    """A new drafter with seeded random weights, float32.

    frequent: [V] token ids, most frequent first; needed where the shape asks for a reduced draft vocabulary.
    """
    architecture = ARCHITECTURES[shape.kind]
    config = architecture.new_config(shape, target.config, lambda: target.tokenizer)
    architecture.check_fits(config, target.config, "sft.drafter")
    return _behind(target, architecture.create(config, target, seed, frequent))


def _behind(target: Target, drafter: Drafter) -> Drafter:
    """What a drafter takes over from its target beside embedding and head."""
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
    """Write drafter.json beside the weights."""
    record = {"digest": drafter_digest(folder), **asdict(info)}
    (folder / INFO_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def load_drafter(
    source: Path | str, target: Target, dtype: torch.dtype | None = None, *, of_any_target: bool = False
) -> Drafter:
    """Load a checkpoint (ours, or any in the public layouts) for this target, in `dtype` (default: the target's).

    source: a folder, or a hub id as text. Raises DraftsmithError if it was made for another target, unless
    `of_any_target`.
    """
    folder = source if isinstance(source, Path) else drafter_source(source)
    if not of_any_target:
        check_drafter(folder, target.info.digest)
    drafter = _behind(target, architecture_of(folder).load(folder, target, dtype or target.dtype))
    drafter.info = read_info(folder)
    if (tokens := folder / TOKENS_FILE).exists():
        try:
            drafter.frequent_tokens = torch.from_numpy(np.load(tokens).astype(np.int64)).to(target.device)
        except (OSError, ValueError, EOFError) as error:
            raise DraftsmithError(f"drafter {tokens}: cannot be read ({error}); it is cut short or damaged") from error
    return drafter.eval()


def read_info(folder: Path) -> DrafterInfo:
    """drafter.json, or an empty record for a checkpoint made elsewhere. Raises DraftsmithError if it is damaged."""
    if not (path := folder / INFO_FILE).exists():
        return DrafterInfo()
    try:
        raw = json.loads(path.read_text())
        raw.pop("digest", None)
        return _INFO.validate_python(asdict(DrafterInfo(**{**raw, "parents": tuple(raw.get("parents", ()))})))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DraftsmithError(
            f"drafter {path}: cannot be read ({one_line(error, 200)}); remove it to use the checkpoint without its "
            "record"
        ) from error


def check_drafter(folder: Path, target_digest: str) -> None:
    """Refuse a drafter trained for another revision of the target. Reads JSON only."""
    made_for = read_info(folder).target_digest
    if made_for and made_for != target_digest:
        raise DraftsmithError(
            f"drafter {folder / INFO_FILE}: made for the target {made_for[:12]}, this target is {target_digest[:12]}; "
            "give a drafter of this target, or set sft.adopt: true to begin from it although the target has changed"
        )


def check_layers(folder: Path, num_target_layers: int) -> None:
    """Refuse a checkpoint whose layers SGLang would hand over otherwise than it was trained. Reads JSON only."""
    config = architecture_of(folder).read_config(folder)
    ids = architecture_of(folder).target_layer_ids(config)
    if ids and (reason := checkpoint_format.unservable_layers(ids, num_target_layers)):
        raise DraftsmithError(
            f"drafter {folder / checkpoint_format.CONFIG_FILE}: {reason}: train one that can be served"
        )


def descends_from(folder: Path) -> tuple[str, ...]:
    """The parents of a drafter that was trained on from this checkpoint, oldest first."""
    return (*read_info(folder).parents, drafter_digest(folder))


def drafter_source(source: str, revision: str | None = None) -> Path:
    """A local folder, or a hub id downloaded once. Raises DraftsmithError if neither can be had."""
    if (folder := Path(source).expanduser()).is_dir():
        if revision is not None:
            raise DraftsmithError(f"sft.init_revision: {source} is a folder, only drafters of the hub have revisions")
        return folder
    from draftsmith.artifacts.home import home
    from draftsmith.artifacts.store.checksums import Checksums
    from draftsmith.stages.target.hub import check_snapshot, hub_commit, hub_snapshot

    commit = hub_commit(source, revision) or revision
    folder = hub_snapshot("sft.init_from", source, commit, ["*.json", "*.safetensors", "*.npy"])
    check_snapshot(folder, Checksums(home()).sha256)
    return folder


def check_shape(folder: Path, target_model: Path) -> None:
    """Refuse a drafter whose config does not fit the target's. Configs only."""
    architecture = architecture_of(folder)
    architecture.check_fits(architecture.read_config(folder), read_target_config(target_model), str(folder))


def check_new(shape: DrafterConfig, target_model: Path) -> None:
    """Refuse a shape that does not fit the target: layer ids, mask token. Config and tokenizer only."""
    from transformers import AutoTokenizer

    plan_of_new(
        shape,
        read_target_config(target_model),
        lambda: AutoTokenizer.from_pretrained(target_model, local_files_only=True),
    )


def read_target_config(target_model: Path) -> Any:
    """Of a target's folder, its text part, as drafters are planned with it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(target_model, local_files_only=True).get_text_config()
