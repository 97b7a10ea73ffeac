"""Checks of the prompt sources: files are there, and have rows enough where counting is cheap."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.preflight import check_supply
from draftsmith.flows.pipeline.graph import Node
from draftsmith.stages.prompting.rows import read_jsonl, row_messages
from draftsmith.stages.prompting.sources import (
    SPLITS,
    HuggingFaceSource,
    JsonlSource,
    ProceduralSource,
    PromptSource,
    ReasoningGymSource,
    Supply,
    load_rows,
    supplies,
)
from draftsmith.stages.prompts import PromptsConfig

_COUNTED_BYTES = 1 << 28  # larger files are only looked into


def check_prompts(found: Findings, nodes: Sequence[Node]) -> None:
    """Every source of every node of the stage `prompts`, and whether rollouts find prompts that no other took."""
    for node in nodes:
        if isinstance(node.config, PromptsConfig):
            for index, source in enumerate(node.config.sources):
                name = f"{node.name}.sources.{index}"
                with found.part(name):
                    _check_source(found, name, source, _share(node.config, source))
        else:
            with found.part(node.name):
                check_supply(node, {each.name: each for each in nodes})


def _share(config: PromptsConfig, source: PromptSource) -> int:
    """Prompts that this source gives, over all splits (tasks of one source together)."""
    if source.counts is not None:
        return sum(getattr(source.counts, split) for split in SPLITS)
    parts = sum(_supplies(each) for each in config.sources)
    return round(sum(config.wanted(split) for split in SPLITS) * _supplies(source) / parts)


def _supplies(source: PromptSource) -> int:
    match source:
        case ReasoningGymSource():
            return len(source.tasks)
        case ProceduralSource():
            return len(source.families)
    return 1


def _check_source(found: Findings, name: str, source: PromptSource, wanted: int) -> None:
    match source:
        case ReasoningGymSource() | ProceduralSource():
            made = [supply.label for supply in _tried(source)]
            found.ok(name, f"{source.kind} {', '.join(made)}: made as needed")
        case JsonlSource():
            _check_jsonl(found, name, source, wanted)
        case HuggingFaceSource() if Path(source.id).is_dir():
            _enough(found, name, source.id, len(load_rows(source)), wanted, filtered=bool(source.filter))
        case HuggingFaceSource():
            _check_hub(found, name, source, wanted)


def _check_hub(found: Findings, name: str, source: HuggingFaceSource, wanted: int) -> None:
    """Asks the hub whether it has the data set; never fetches it."""
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        dataset_info(source.id, revision=source.revision, timeout=10)
    except GatedRepoError:
        found.error(name, f"data set {source.id}: access is restricted: accept its terms on the hub and set HF_TOKEN")
    except RepositoryNotFoundError:
        found.error(name, f"data set {source.id}: no such folder here and none on the hub: correct the id")
    except RevisionNotFoundError:
        found.error(name, f"data set {source.id}: the hub has no revision {source.revision}: correct it")
    except Exception as error:  # the hub's library raises its HTTP client's own errors too
        reason = " ".join(str(error).split())[:80] or type(error).__name__
        found.warn(name, f"data set {source.id}: the hub cannot be asked ({reason}); {wanted} prompts are not certain")
    else:
        found.ok(name, f"data set {source.id} is on the hub; whether it has {wanted} rows is not checked")


def _tried(source: ReasoningGymSource | ProceduralSource) -> list[Supply]:
    """The supplies of a procedural source, each after it has made one prompt: that its name and options are right."""
    tried = supplies(source, None, 0, limit=1)
    for supply in tried:
        supply.next("heldout")
    return tried


def _check_jsonl(found: Findings, name: str, source: JsonlSource, wanted: int) -> None:
    path = Path(source.path)
    rows = 0
    whole = not path.is_file() or path.stat().st_size <= _COUNTED_BYTES
    for number, row in read_jsonl(path):
        where = f"{path}, row {number}"
        if source.keeps(row, where):
            row_messages(row, source.field, where)
            rows += 1
        if not whole and rows:
            found.ok(name, f"{path} can be read; too large to count here")
            return
    _enough(found, name, str(path), rows, wanted, filtered=False)


def _enough(found: Findings, name: str, label: str, rows: int, wanted: int, *, filtered: bool) -> None:
    behind = " before its filter" if filtered else ""
    if rows < wanted:
        raise DraftsmithError(
            f"{label}: {rows} rows{behind}, {wanted} prompts wanted: lower the counts or add a source"
        )
    found.ok(name, f"{label}: {rows} rows{behind} for {wanted} prompts")
