"""How engines draft with a checkpoint, by its config.json. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.spec import DraftingConfig


def speculative_algorithm(drafter_folder: Path) -> str:
    """Return DFLASH, DSPARK or EAGLE3, by the architecture in the drafter's config.json."""
    architectures = _architectures(drafter_folder)
    return next((name for name in ("EAGLE3", "DSPARK") if name.lower() in architectures), "DFLASH")


def samples_proposals(drafter_folder: Path) -> bool:
    """Return whether a drafter samples its proposals for sampled requests, as DFlash2 and DSpark do."""
    architectures = _architectures(drafter_folder)
    return "dflash2" in architectures or "dspark" in architectures


def _architectures(drafter_folder: Path) -> str:
    return " ".join(map(str, _drafter_config(drafter_folder).get("architectures") or [])).lower()


def served_block_size(drafter_folder: Path, drafting: DraftingConfig, algorithm: str) -> int:
    """Return the tokens of a verify step. Raises DraftsmithError if it is unknown, or larger than the trained one."""
    raw = _drafter_config(drafter_folder)
    if methods := (raw.get("speculators_config") or {}).get("proposal_methods"):  # the layout that vLLM loads
        return drafting.block_of(int(methods[0]["speculative_tokens"]) + 1)
    trained = raw.get("block_size") or (raw.get("dflash_config") or {}).get("block_size")
    if algorithm == "EAGLE3":
        if (block_size := drafting.block_size or trained) is None:
            raise DraftsmithError(
                "drafting.block_size: this EAGLE-3 checkpoint does not state how far it drafts. "
                "Set it (4 = the anchor and three proposals)."
            )
        return int(block_size)
    if trained is None:
        raise DraftsmithError(f"drafter {drafter_folder / 'config.json'}: field block_size is missing. Add it.")
    trained += algorithm == "DSPARK"  # its checkpoints count proposals without the anchor
    return drafting.block_of(int(trained))


def _drafter_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}). Give a drafter's folder.") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"drafter {path}: is not a JSON object. Give a drafter's folder.")
    return raw
