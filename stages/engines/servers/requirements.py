"""Requirements that every server of an engine must meet: target, drafter, and context for the longest request.

The way an engine drafts with a checkpoint is read from its config.json, without torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.mtp.config import MtpConfig
from draftsmith.stages.drafters.mtp.families import ARCHITECTURES, ENGINE_FIELD
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import ServerEngineConfig, SGLangEngineConfig
from draftsmith.stages.targets.info import TargetInfo, load_tokenizer, model_path, read_target_info

PROBE_TEXT = "What is 12 + 30?\n\tNaïve café, 3.14 °C; 你好, привет."  # tokenizers split it differently
SCORED_TEXT = (  # its log-probs are compared where a server's weights have no known revision
    "Question: a train leaves at 9:40 and arrives at 13:05. How long does it travel? Answer: from 9:40 to 13:05 there "
    "are 3 hours and 25 minutes.\n\ndef median(values: list[float]) -> float:\n    ordered = sorted(values)\n"
    "    middle = len(ordered) // 2\n    return ordered[middle]\n\nLa pluie est tombée toute la nuit, et au matin le "
    "jardin sentait la terre. In 1969 two people walked on the Moon for the first time."
)


@dataclass(frozen=True)
class ServerRequirements:
    """The target, drafter and limits that a server must serve."""

    target: TargetInfo
    target_folder: Path  # the target's artifact
    model_folder: Path
    probe_ids: list[int]  # PROBE_TEXT in the target's tokenizer, without special tokens
    scored_ids: list[int]  # SCORED_TEXT, likewise
    longest: int  # positions of the longest request
    concurrency: int  # requests in flight per replica of the model
    measure_first_token: bool = False
    drafter_folder: Path | None = None
    drafter_digest: str | None = None
    algorithm: str | None = None  # DFLASH, DSPARK, EAGLE3 or NEXTN
    block_size: int | None = None

    @property
    def reported_digests(self) -> tuple[str, ...]:
        """Return what SGLang's plug-in may report as the drafter; "" is a head in the target's own checkpoint."""
        if self.drafter_digest is None:
            return ()
        return (self.drafter_digest, "") if self.algorithm == "NEXTN" else (self.drafter_digest,)


def server_requirements(
    config: ServerEngineConfig,
    target_folder: Path,
    drafter_folder: Path | None,
    drafting: DraftingConfig,
    longest: int,
    *,
    measure_first_token: bool = False,
) -> ServerRequirements:
    """Return the requirements on servers that decode a target, with a drafter if one is given.

    target_folder: the target's artifact. longest: positions of the longest request, prompt and answer.
    Raises DraftsmithError if the drafter was made for another target, or cannot draft as the config says.
    """
    target, model_folder = read_target_info(target_folder), model_path(target_folder)
    tokenizer = load_tokenizer(model_folder)
    probe_ids, scored_ids = (tokenizer.encode(text, add_special_tokens=False) for text in (PROBE_TEXT, SCORED_TEXT))
    plain = ServerRequirements(
        target,
        target_folder,
        model_folder,
        probe_ids,
        scored_ids,
        longest,
        config.concurrency,
        measure_first_token=measure_first_token,
    )
    if drafter_folder is None:
        return plain
    from draftsmith.stages.drafters.checkpoint import check_drafter, check_layers  # imports torch

    check_drafter(drafter_folder, target)
    check_layers(drafter_folder, target.num_layers)
    if isinstance(config, SGLangEngineConfig):
        _check_slots(drafter_folder)
    algorithm = speculative_algorithm(drafter_folder)
    reads = _drafter_config(drafter_folder).get(ENGINE_FIELD, "sglang")
    if algorithm == "NEXTN" and reads != config.kind:
        raise DraftsmithError(
            f"drafter {drafter_folder / 'config.json'}: {ENGINE_FIELD} is {reads}, and {config.kind} may feed this "
            "head differently. Set sft.drafter.engine to the engine that serves."
        )
    return replace(
        plain,
        drafter_folder=drafter_folder,
        drafter_digest=drafter_digest(drafter_folder),
        algorithm=algorithm,
        block_size=served_block_size(drafter_folder, drafting, algorithm),
    )


def _check_slots(drafter_folder: Path) -> None:
    """Raise DraftsmithError for a DSpark of the speculators library that SGLang reads one slot off.

    There the anchor has a query that proposes nothing, which SGLang counts as the first proposal
    (sgl-project/sglang#30982). Converted to SGLang's layout, the same drafter is read right.
    """
    raw = _drafter_config(drafter_folder)
    if raw.get("speculators_model_type") == "dspark" and raw.get("sample_from_anchor") is False:
        raise DraftsmithError(
            f"drafter {drafter_folder}: is in the layout of speculators with sample_from_anchor: false, which SGLang "
            "reads one slot off, so tau is about 1. Run a config with it as sft.init_from and sft.steps: 0, and serve "
            "the `draftsmith export` of the result."
        )


def speculative_algorithm(drafter_folder: Path) -> str:
    """Return DFLASH, DSPARK, EAGLE3 or NEXTN, by the architecture in the drafter's config.json."""
    architectures = _architectures(drafter_folder)
    if any(name.lower() in architectures.split() for name in ARCHITECTURES):
        return "NEXTN"
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
    if algorithm == "NEXTN":
        return drafting.block_of(int(raw.get("block_size") or MtpConfig(kind="mtp").block_size))
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
        raise DraftsmithError(f"drafter {path}: cannot be read ({error}). Name a drafter's folder.") from error
    if not isinstance(raw, dict):
        raise DraftsmithError(f"drafter {path}: is not a JSON object. Name a drafter's folder.")
    return raw
