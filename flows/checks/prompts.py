"""Checks that prompts can be read, have enough rows for every rollout, and fit the target's context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.data.held_out import hash_fraction, prompt_identity
from draftsmith.stages.data.prompts.stage import (
    MORE_LOGS,
    SPLITS,
    HuggingFaceSource,
    JsonlSource,
    PromptsConfig,
    PromptSource,
    ReasoningGymSource,
    Split,
)
from draftsmith.stages.data.prompts.streams import load_rows, open_streams, prompt_rows
from draftsmith.stages.data.row_files import UNREADABLE, RejectLog, is_remote, match_files, read_rows
from draftsmith.stages.data.row_formats import RejectedRow, row_messages
from draftsmith.stages.data.stored_prompts import Prompt, positions_needed
from draftsmith.stages.engines.stage import RolloutConfig, prompt_shortage, prompts_to_answer
from draftsmith.stages.evaluation.config import EvaluationConfig, prompts_to_decode

_COUNTED_BYTES = 1 << 28  # of larger files only the first row is read
_MUCH_UNUSED = 0.5  # share of the training prompts
MANY_REJECTED = 0.2  # share of the rows of a log or a source


def check_sources(findings: Findings, nodes: Sequence[Node]) -> None:
    """Check that every source of prompts can be read, and has enough rows if they are cheap to count."""
    for node in nodes:
        if isinstance(node.config, PromptsConfig):
            for index, source in enumerate(node.config.sources):
                name = node.config.section if node.config.of_logs else f"{node.name}.sources.{index}"
                with findings.check(name):
                    _check_source(findings, name, source, node.config)
            on_hub = [s for s in node.config.sources if isinstance(s, HuggingFaceSource) and s.is_on_hub]
            if on_hub:
                names = ", ".join(dict.fromkeys(source.id for source in on_hub))
                findings.skip(node.name, f"whether {names} have enough rows. A run counts them when it fetches them.")


def check_prompt_counts(findings: Findings, nodes: Sequence[Node]) -> None:
    """Check that every rollout has enough prompts, and warn if many training prompts are never answered."""
    by_name = {node.name: node for node in nodes}
    answered: dict[str, list[RolloutConfig]] = {}
    for node in nodes:
        if not isinstance(node.config, RolloutConfig):
            continue
        prompts = by_name[node.inputs["prompts"]].config
        if isinstance(prompts, PromptsConfig):
            answered.setdefault(node.inputs["prompts"], []).append(node.config)
            if problem := prompt_shortage(
                node.config, sum(prompts.prompt_count(s) for s in SPLITS if s in node.config.splits)
            ):
                findings.error(node.name, problem)
    for name, rollouts in answered.items():
        prompts = by_name[name].config
        assert isinstance(prompts, PromptsConfig)
        count = prompts.prompt_count("train")
        ranges = [range(r.skip, r.skip + r.counts({"train": count})["train"]) for r in rollouts]
        used = len(set(chain(*ranges)))  # by at least one rollout
        if 0 < used < _MUCH_UNUSED * count:
            findings.warn(
                name,
                f"train: only {used} of {count} prompts are answered. Raise the rollouts' prompts, or lower "
                f"{name}.train (or the counts of its sources).",
            )


def check_max_lengths(findings: Findings, nodes: Sequence[Node], positions: int) -> None:
    """Warn if the longest allowed prompt and answer exceed the target's context; real prompts may be shorter."""
    limits = [node.config.max_prompt_tokens for node in nodes if isinstance(node.config, PromptsConfig)]
    longest = max(limits, default=0)
    for node in nodes:
        if not longest or not isinstance(node.config, RolloutConfig | EvaluationConfig):
            continue
        if longest + (new := node.config.sampling.max_new_tokens) > positions:
            findings.warn(
                node.name,
                f"{longest} prompt and {new} new tokens exceed the target's {positions} positions. "
                "A run stops after the prompts if one really is that long. Lower one of the two.",
            )


def check_lengths(findings: Findings, nodes: Sequence[Node], prompts: str, artifact: Path, positions: int) -> None:
    """Check that every prompt with its longest answer fits into the target's context.

    prompts: name of the node that made `artifact`. positions: the target's context length.
    """
    for node in nodes:
        config = node.config
        if node.inputs.get("prompts") != prompts or not isinstance(config, RolloutConfig | EvaluationConfig):
            continue
        asked: Sequence[Prompt]
        if isinstance(config, RolloutConfig):
            asked = prompts_to_answer(config, artifact)
        else:
            heldout, validation = prompts_to_decode(config, artifact)
            asked = [*heldout, *validation]
        if asked:
            with findings.check(node.name):
                positions_needed(asked, config.sampling.max_new_tokens, positions)


def _share(config: PromptsConfig, source: PromptSource, splits: Sequence[Split] = SPLITS) -> int:
    """Return how many prompts of these splits come from this source, over all its tasks."""
    if source.counts is not None:
        return sum(getattr(source.counts, split) for split in splits)
    weights = sum(map(_weight, config.sources))
    return round(sum(config.prompt_count(split) for split in splits) * _weight(source) / weights)


def _weight(source: PromptSource) -> int:
    """Return a source's share of the prompts in units of one task."""
    return len(source.tasks) if isinstance(source, ReasoningGymSource) else 1


def _check_source(findings: Findings, name: str, source: PromptSource, config: PromptsConfig) -> None:
    needed = _share(config, source)
    match source:
        case ReasoningGymSource():
            streams = open_streams(source, config)
            for stream in streams:
                stream.next("heldout")  # checks name and options
            findings.ok(name, f"{source.kind} {', '.join(stream.label for stream in streams)}: made as needed")
        case JsonlSource():
            _check_files(findings, name, source, config)
        case HuggingFaceSource() if Path(source.id).is_dir():
            rows = load_rows(source)
            findings.ok(name, _enough_rows(source, source.id, len(rows), needed, filtered=bool(source.filter)))
            try:
                row_messages(rows[0], source.field, f"{source.id}, row 1")
            except (DraftsmithError, RejectedRow) as error:  # other rows may be better
                findings.warn(name, str(error))
        case HuggingFaceSource():
            _check_hub(findings, name, source)


def _check_hub(findings: Findings, name: str, source: HuggingFaceSource) -> None:
    """Check that the hub has the data set, without fetching it."""
    # slow to import, and only needed for the hub's data sets
    from huggingface_hub import dataset_info, errors

    try:
        dataset_info(source.id, revision=source.revision, timeout=10)
    except errors.GatedRepoError:
        findings.error(
            name, f"data set {source.id}: access is restricted. Accept its terms on the hub and set HF_TOKEN."
        )
    except errors.RepositoryNotFoundError:
        findings.error(name, f"data set {source.id}: no such folder here and none on the hub. Correct the id.")
    except errors.RevisionNotFoundError:
        findings.error(name, f"data set {source.id}: the hub has no revision {source.revision}. Correct it.")
    except Exception as error:  # the hub's library also raises errors of its HTTP client
        findings.skip(name, f"data set {source.id}: the hub does not answer ({one_line(error, 80)})", unreachable=True)
    else:
        findings.ok(name, f"data set {source.id} is on the hub")


def _check_files(findings: Findings, name: str, source: JsonlSource, config: PromptsConfig) -> None:
    files = match_files([source.path], config.paths_field, config.pinned_files)
    known = [Path(file).stat().st_size for file in files if not is_remote(file)]
    whole = len(known) == len(files) and sum(known) <= _COUNTED_BYTES
    share = source.heldout_share or config.heldout_share
    rejects = RejectLog(f"{config.section}.max_bad_share", config.max_bad_share)
    seen: set[str] = set()
    rows = held_out = unread = duplicates = 0
    unchanged = not (source.suffix or config.system)
    for _, candidate in prompt_rows(
        source, read_rows(files), rejects, unchanged=unchanged, slices=config.slices, of_logs=config.of_logs
    ):
        text = candidate.text_hash if candidate.messages else ""
        if text in seen:
            duplicates += 1
            continue
        if text:
            seen.add(text)
        rows += 1
        unread += not text  # only token ids, which the stage decodes
        held_out += hash_fraction(prompt_identity(candidate.messages, config.heldout_by)) < share
        if not whole:
            findings.skip(
                name, f"whether {source.path} has enough rows. It can be read, and is too large to count here."
            )
            return
    if rejects.bad:
        findings.warn(name, f"{source.path}: {rejects.bad} of {rejects.rows} rows cannot be read and will be rejected")
    if unusable := rejects.reasons - Counter({UNREADABLE: rejects.bad}):
        reasons = ", ".join(f"{count} {reason}" for reason, count in unusable.most_common())
        report = findings.warn if unusable.total() > MANY_REJECTED * rejects.rows else findings.ok
        report(name, f"{source.path}: {unusable.total()} of {rejects.rows} rows cannot be prompts: {reasons}")
    needed = _share(config, source)
    label = f"{source.path}, without {duplicates} duplicates" if duplicates else source.path
    if config.of_logs and rows < needed:
        raise DraftsmithError(
            f"{label} has {rows} row(s), and {needed} held-out and validation prompts are needed. {MORE_LOGS}."
        )
    findings.ok(name, _enough_rows(source, label, rows, needed, filtered=False))
    if source.suffix or unread:
        return  # held-out rows are decided by the text with its suffix, or by decoded token ids: the stage counts them
    trained, measured = _share(config, source, ("train",)), _share(config, source, ("heldout", "validation"))
    if rows - held_out < trained:
        raise DraftsmithError(
            f"{label}: {rows - held_out} of {rows} rows are training prompts (heldout_share {share:g}), and {trained} "
            f"are needed. Lower {_counts(source, ('train',))}, or add rows or a source."
        )
    if held_out < measured:
        lower = _counts(source, ("heldout", "validation"))
        remedy = f"Lower {lower}, or raise heldout_share (a larger share contains the smaller)."
        if config.of_logs:
            remedy = f"{MORE_LOGS}."
        raise DraftsmithError(
            f"{label}: {held_out} of {rows} rows are held out (heldout_share {share:g}), and {measured} held-out and "
            f"validation prompts are needed. {remedy}"
        )


def _counts(source: PromptSource, splits: Sequence[Split] = SPLITS) -> str:
    """Return the fields that set how many prompts the source has to give."""
    return "its counts" if source.counts is not None else f"prompts.{', prompts.'.join(splits)}"


def _enough_rows(source: PromptSource, label: str, rows: int, needed: int, *, filtered: bool) -> str:
    """Return the line of a source with enough rows. Raises DraftsmithError if it has too few."""
    unfiltered = " before its filter" if filtered else ""
    if rows < needed:
        raise DraftsmithError(
            f"{label}: {rows} rows{unfiltered}, and {needed} prompts are needed. Lower {_counts(source)}, or add rows "
            "or a source."
        )
    return f"{label}: {rows} rows{unfiltered} for {needed} prompts"
