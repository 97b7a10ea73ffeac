"""What servers must be, for the stage that asks them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.config import NO_REDUCED_HEAD, SGLangEngineConfig, TreeConfig
from draftsmith.stages.engines.sglang import probe
from draftsmith.stages.engines.sglang.server import algorithm_of, block_size_of
from draftsmith.stages.targets.info import TargetInfo, model_path, read_target_info
from draftsmith.stages.targets.resolve import load_tokenizer

PROBE_TEXT = "What is 12 + 30?\n\tNaïve café, 3.14 °C; 你好, привет."  # cut differently by different tokenizers


@dataclass(frozen=True)
class Expected:
    """What the servers are for."""

    target: TargetInfo
    target_folder: Path  # its artifact
    model_folder: Path
    probe_ids: list[int]  # PROBE_TEXT in the target's tokenizer, no special tokens
    scored_ids: list[int]  # the text of `probe.py`, likewise
    longest: int  # positions of the longest request
    drafter_folder: Path | None = None
    drafter_digest: str | None = None
    algorithm: str | None = None
    block_size: int | None = None
    tree: TreeConfig | None = None
    trace: bool = False  # whether records are wanted
    stream: bool = False

    @classmethod
    def of(
        cls,
        config: SGLangEngineConfig,
        *,
        target_folder: Path,
        drafter_folder: Path | None,
        drafting: DraftingConfig,
        longest: int,
        stream: bool,
    ) -> Expected:
        """Raises DraftsmithError if the drafter is made for another target, or cannot draft as the config says."""
        target, model_folder = read_target_info(target_folder), model_path(target_folder)
        tokenizer = load_tokenizer(model_folder)
        probe_ids, scored_ids = (tokenizer.encode(text, add_special_tokens=False) for text in (PROBE_TEXT, probe.TEXT))
        expected = cls(target, target_folder, model_folder, probe_ids, scored_ids, longest, stream=stream)
        if drafter_folder is None:
            return expected
        from draftsmith.stages.drafters.checkpoint import check_drafter, check_layers
        from draftsmith.stages.drafters.digest import drafter_digest

        if drafting.head_tokens is not None:
            raise DraftsmithError(f"drafting.head_tokens: {NO_REDUCED_HEAD}")
        check_drafter(drafter_folder, target.digest)
        check_layers(drafter_folder, target.num_layers)
        algorithm = algorithm_of(drafter_folder, config.launch)
        return replace(
            expected,
            drafter_folder=drafter_folder,
            drafter_digest=drafter_digest(drafter_folder),
            algorithm=algorithm,
            block_size=block_size_of(drafter_folder, drafting, algorithm),
            tree=(tree := config.launch.tree if config.launch else None),
            trace=config.trace and tree is None,
        )
