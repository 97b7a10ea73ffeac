"""Checks of prompts and logs: they are there and have rows enough, every rollout finds its prompts, and they fit."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.data.held_out import HeldOut, identity, place
from draftsmith.stages.data.load import Prompt, positions_needed
from draftsmith.stages.data.logs.config import LogsConfig
from draftsmith.stages.data.logs.filter import Intake, ShapeSieve
from draftsmith.stages.data.prompt_config import (
    SPLITS,
    Candidate,
    HuggingFaceSource,
    JsonlSource,
    PromptSource,
    ReasoningGymSource,
    Split,
)
from draftsmith.stages.data.prompt_supply import Supply, load_rows, prompt_rows, supplies
from draftsmith.stages.data.prompts import OF_MORE_LOGS, PromptsConfig
from draftsmith.stages.data.rejects import UNREADABLE, Aside
from draftsmith.stages.data.row_files import is_remote, matched, no_rows, read_rows
from draftsmith.stages.data.row_formats import SetAside, row_messages
from draftsmith.stages.engines.stage import RolloutConfig, prompt_shortage, prompts_to_answer
from draftsmith.stages.evaluation.config import EvaluationConfig, prompts_to_decode

_COUNTED_BYTES = 1 << 28  # larger files are only looked into
_LOG_ROWS, _LOG_SECONDS = 20_000, 20.0  # of a log, whichever is reached first
_STILL_WRITTEN_S = 30.0
_MUCH_UNUSED = 0.5  # of the training prompts
_MUCH_SET_ASIDE = 0.2  # of the rows of a log or a source


def check_sources(found: Findings, nodes: Sequence[Node]) -> None:
    """Every source of prompts can be read, and has rows enough where counting is cheap."""
    for node in nodes:
        if isinstance(node.config, PromptsConfig):
            for index, source in enumerate(node.config.sources):
                name = node.config.section if node.config.of_logs else f"{node.name}.sources.{index}"
                with found.part(name):
                    _check_source(found, name, source, node.config)
            sources = [each for each in node.config.sources if isinstance(each, HuggingFaceSource) and each.of_hub]
            if sources:
                names = ", ".join(dict.fromkeys(each.id for each in sources))
                found.skip(node.name, f"whether {names} have rows enough: they are counted when a run fetches them")


def check_supplies(found: Findings, nodes: Sequence[Node]) -> None:
    """Every rollout finds the prompts that it asks for."""
    by_name = {node.name: node for node in nodes}
    answered: dict[str, list[RolloutConfig]] = {}
    for node in nodes:
        if not isinstance(node.config, RolloutConfig):
            continue
        prompts = by_name[node.inputs["prompts"]].config
        if isinstance(prompts, PromptsConfig):
            answered.setdefault(node.inputs["prompts"], []).append(node.config)
            if problem := prompt_shortage(
                node.config, sum(prompts.wanted(s) for s in SPLITS if s in node.config.splits)
            ):
                found.error(node.name, problem)
    for name, rollouts in answered.items():
        prompts = by_name[name].config
        assert isinstance(prompts, PromptsConfig)
        wanted, used = prompts.wanted("train"), _answered(rollouts, prompts.wanted("train"))
        if 0 < used < _MUCH_UNUSED * wanted:
            found.warn(
                name,
                f"train: {used} of {wanted} prompts are answered: raise the rollouts' prompts, or lower {name}.train "
                "(with counts: those of its sources)",
            )


def _answered(rollouts: Sequence[RolloutConfig], available: int) -> int:
    """How many of so many training prompts are answered by at least one of them."""
    parts = [(each.skip, each.counts({"train": available})["train"]) for each in rollouts]
    return len({row for start, count in parts for row in range(start, start + count)})


def check_longest(found: Findings, nodes: Sequence[Node], positions: int) -> None:
    """Longest allowed prompt and answer against the context: no error, the prompts that come may all be shorter."""
    limits = [node.config.max_prompt_tokens for node in nodes if isinstance(node.config, PromptsConfig)]
    longest = max(limits, default=0)
    for node in nodes:
        sampling = getattr(node.config, "sampling", None)
        if sampling is not None and longest and longest + sampling.max_new_tokens > positions:
            found.warn(
                node.name,
                f"{longest} prompt and {sampling.max_new_tokens} new tokens exceed the target's {positions} positions: "
                "a run stops once the prompts are made if one really is that long; lower one of the two",
            )


def check_lengths(found: Findings, nodes: Sequence[Node], prompts: str, made: Path, positions: int) -> None:
    """Every prompt that was made, with its longest answer, fits into the context.

    prompts: the node whose artifact `made` is. positions: of the target.
    """
    for node in nodes:
        config = node.config
        if node.inputs.get("prompts") != prompts or not isinstance(config, RolloutConfig | EvaluationConfig):
            continue
        asked: Sequence[Prompt]
        if isinstance(config, RolloutConfig):
            asked = prompts_to_answer(config, made)
        else:
            heldout, validation = prompts_to_decode(config, made)
            asked = [*heldout, *validation]
        if asked:
            with found.part(node.name):
                positions_needed(asked, config.sampling.max_new_tokens, positions)


def _share(config: PromptsConfig, source: PromptSource, splits: Sequence[Split] = SPLITS) -> int:
    """Prompts that this source gives, over some splits (tasks of one source together)."""
    if source.counts is not None:
        return sum(getattr(source.counts, split) for split in splits)
    parts = sum(_supplies(each) for each in config.sources)
    return round(sum(config.wanted(split) for split in splits) * _supplies(source) / parts)


def _supplies(source: PromptSource) -> int:
    return len(source.tasks) if isinstance(source, ReasoningGymSource) else 1


def _check_source(found: Findings, name: str, source: PromptSource, config: PromptsConfig) -> None:
    wanted = _share(config, source)
    match source:
        case ReasoningGymSource():
            made = [supply.label for supply in _tried(source, config)]
            found.ok(name, f"{source.kind} {', '.join(made)}: made as needed")
        case JsonlSource():
            _check_files(found, name, source, config)
        case HuggingFaceSource() if Path(source.id).is_dir():
            rows = load_rows(source)
            _enough(found, name, source, source.id, len(rows), wanted, filtered=bool(source.filter))
            try:
                row_messages(rows[0], source.field, f"{source.id}, row 1")
            except (DraftsmithError, SetAside) as error:  # others may be better
                found.warn(name, str(error))
        case HuggingFaceSource():
            _check_hub(found, name, source)


def _check_hub(found: Findings, name: str, source: HuggingFaceSource) -> None:
    """Ask the hub whether it has the data set; never fetch it."""
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
        found.skip(name, f"data set {source.id}: the hub cannot be asked ({one_line(error, 80)})", unreachable=True)
    else:
        found.ok(name, f"data set {source.id} is on the hub")


def _tried(source: ReasoningGymSource, config: PromptsConfig) -> list[Supply]:
    """The supplies of a procedural source, each after it has made one prompt: that its name and options are right."""
    tried = supplies(source, config)
    for supply in tried:
        supply.next("heldout")
    return tried


def _check_files(found: Findings, name: str, source: JsonlSource, config: PromptsConfig) -> None:
    files = matched([source.path], config.of_paths, config.pinned_files)
    if not config.of_logs:
        _may_grow(found, name, files)
    known = [Path(file).stat().st_size for file in files if not is_remote(file)]
    whole = len(known) == len(files) and sum(known) <= _COUNTED_BYTES
    share = source.heldout_share or config.heldout_share
    aside = Aside(f"{config.section}.max_bad_share", config.max_bad_share)
    seen: set[str] = set()
    rows = held_out = unread = again = 0
    as_they_are = not (source.suffix or config.system)
    for _, messages, _ in prompt_rows(source, read_rows(files), aside, as_they_are=as_they_are):
        text = Candidate(source.path, messages, "").text_hash if messages else ""
        if text in seen:
            again += 1
            continue
        if text:
            seen.add(text)
        rows += 1
        unread += not text  # token ids alone: the stage decodes them
        held_out += place(identity(messages, config.heldout_by)) < share
        if not whole:
            found.skip(name, f"whether {source.path} has rows enough: it can be read, and is too large to count here")
            return
    if aside.bad:
        found.warn(name, f"{source.path}: {aside.bad} of {aside.rows} rows cannot be read and will be set aside")
    if unusable := aside.reasons - Counter({UNREADABLE: aside.bad}):
        said = ", ".join(f"{count} {reason}" for reason, count in unusable.most_common())
        say = found.warn if unusable.total() > _MUCH_SET_ASIDE * aside.rows else found.ok
        say(name, f"{source.path}: {unusable.total()} of {aside.rows} rows cannot be prompts: {said}")
    wanted = _share(config, source)
    label = f"{source.path}, without {again} duplicates" if again else source.path
    if config.of_logs and rows < wanted:
        raise DraftsmithError(
            f"{rows} row(s) of {label}, {wanted} held-out and validation prompts wanted: {OF_MORE_LOGS}"
        )
    _enough(found, name, source, label, rows, wanted, filtered=False)
    if source.suffix or unread:
        return  # the class is that of the text with its suffix, or of decoded token ids: the stage counts
    trained, measured = _share(config, source, ("train",)), _share(config, source, ("heldout", "validation"))
    if rows - held_out < trained:
        raise DraftsmithError(
            f"{label}: {rows - held_out} of {rows} rows are of the training class (heldout_share {share:g}), "
            f"{trained} training prompts wanted: lower {_counts(source, ('train',))}, or add rows or a source"
        )
    if held_out < measured:
        lower = _counts(source, ("heldout", "validation"))
        remedy = f"lower {lower}, or raise heldout_share (a larger share contains the smaller)"
        raise DraftsmithError(
            f"{label}: {held_out} of {rows} rows are of the held-out class (heldout_share {share:g}), {measured} "
            f"held-out and validation prompts wanted: {OF_MORE_LOGS if config.of_logs else remedy}"
        )


def _may_grow(found: Findings, name: str, files: Sequence[str]) -> None:
    """What is appended to while a stage reads it fails the stage."""
    newest = {file: Path(file).stat().st_mtime for file in files if not is_remote(file)}
    fresh = [file for file, written in newest.items() if time.time() - written < _STILL_WRITTEN_S]
    if fresh:
        more = f" and {len(fresh) - 1} more" if len(fresh) > 1 else ""
        found.warn(
            name,
            f"{fresh[0]}{more}: written to within the last {_STILL_WRITTEN_S:.0f} s. A file that grows while a stage "
            "reads it fails the stage: if it is still written, give whole files alone (a pattern that it does not "
            "match until then)",
        )


def _counts(source: PromptSource, splits: Sequence[Split] = SPLITS) -> str:
    """The fields that say how many prompts are wanted of it."""
    return "its counts" if source.counts is not None else f"prompts.{', prompts.'.join(splits)}"


def _enough(
    found: Findings, name: str, source: PromptSource, label: str, rows: int, wanted: int, *, filtered: bool
) -> None:
    behind = " before its filter" if filtered else ""
    if rows < wanted:
        raise DraftsmithError(
            f"{label}: {rows} rows{behind}, {wanted} prompts wanted of it: lower {_counts(source)}, or add rows or a "
            "source"
        )
    found.ok(name, f"{label}: {rows} rows{behind} for {wanted} prompts")


def check_logs(found: Findings, nodes: Sequence[Node], target: Path | None) -> None:
    """Logs hold answers that can be used: says how many of the first rows are, and why others are not.

    target: an artifact of the target, of which only the tokenizer and other small files are read; None if there is
    none here: rows are then judged by shape, temperature and time.
    """
    for node in nodes:
        if isinstance(node.config, LogsConfig):
            asked = next((other.config for other in nodes if other.name == node.inputs.get("prompts")), None)
            # the prompts themselves may not be made yet
            held_out = HeldOut()
            if isinstance(asked, PromptsConfig):
                held_out = HeldOut(asked.share_elsewhere, by=asked.heldout_by)
            with found.part(node.name):
                _check_log(found, node.name, node.config, target, held_out)


def _check_log(found: Findings, name: str, config: LogsConfig, target: Path | None, held_out: HeldOut) -> None:
    aside = Aside(f"{name}.max_bad_share", config.max_bad_share)
    sieve: Intake | ShapeSieve = ShapeSieve(config, aside)
    if target is not None:
        sieve = Intake(config, target, held_out, aside)
    used, whole, end = 0, True, time.monotonic() + _LOG_SECONDS
    files = config.files()
    _may_grow(found, name, files)
    for row in read_rows(files):
        if aside.rows >= _LOG_ROWS or time.monotonic() > end:
            whole = False
            break
        used += sieve.take(row) is not None
    read = "all" if whole else "the first"
    said = ", ".join([part for part in (aside.said(), sieve.not_meant) if part])
    line = f"{used} of {read} {aside.rows} rows can be used{f'; not used: {said}' if said else ''}"
    if target is None:
        line += " (seen without the target's tokenizer)"
    aside.check()
    for doubt in sieve.doubts():
        found.warn(name, doubt)
    if sieve.outside_window + sieve.overlap == aside.rows and not whole:
        found.skip(name, f"whether there are rows of the window: {line}; others may follow")
        return
    if config.after is not None and sieve.outside_window + sieve.overlap == aside.rows:
        found.warn(name, f"no row is later than {config.after}: without new ones, only a drift check can be made")
        return
    if not aside.rows:
        raise DraftsmithError(no_rows(config.paths))
    if not used and whole:
        raise DraftsmithError(f"{', '.join(config.paths)}: {line}: give other files or correct section {name}")
    meant = aside.rows - sieve.outside_window - sieve.filtered
    if not used or sum(aside.reasons.values()) > _MUCH_SET_ASIDE * meant:
        found.warn(name, f"{line}: see whether these are this target's answers, and the settings their own")
    else:
        found.ok(name, line)
