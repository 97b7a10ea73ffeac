"""From an engine's config to a running engine: loaded into this process, or servers that answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from draftsmith.stages.drafters.config import NO_FREQUENT_TOKENS, DraftingConfig
from draftsmith.stages.engines.base import Engine
from draftsmith.stages.engines.config import EmbeddedEngineConfig, SGLangEngineConfig


@contextmanager
def open_engine(
    config: EmbeddedEngineConfig | SGLangEngineConfig,
    *,
    target_folder: Path,
    drafter_folder: Path | None,
    drafting: DraftingConfig,
    longest: int,
    work: Path,
    log: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> Iterator[Engine]:
    """An engine for one target artifact and, if given, one drafter checkpoint; closed (servers stopped) on exit.

    longest: positions of the longest request, prompt and response. work: where the logs of launched servers go.
    check: called while servers are waited for; what it raises (the stage was asked to stop) ends the wait.
    Raises DraftsmithError if the engine cannot serve this target or drafter, RetryableError if it is not there.
    """
    if isinstance(config, SGLangEngineConfig):
        from draftsmith.stages.engines.sglang.engine import open_sglang

        with open_sglang(
            config,
            target_folder=target_folder,
            drafter_folder=drafter_folder,
            drafting=drafting,
            longest=longest,
            work=work,
            log=log,
            check=check,
        ) as engine:
            yield engine
        return

    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.engines.embedded import EmbeddedEngine
    from draftsmith.stages.targets.causal_lm import Target

    target = Target.load(target_folder)
    drafter = load_drafter(drafter_folder, target) if drafter_folder else None
    if drafter and drafting.head_tokens and drafter.frequent_tokens is None:
        log(f"drafter: {NO_FREQUENT_TOKENS}")
    block = (drafting.block_size or drafter.block_size) if drafter else 1
    yield EmbeddedEngine(target, drafter, slots=config.slots, capacity=longest + block, drafting=drafting)
