"""Checks that logs have usable answers, and that these are the target's."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.prompts import MANY_REJECTED
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.data.held_out import HeldOut
from draftsmith.stages.data.logs.filter import AcceptedAnswer, LogFilter, SchemaFilter
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.data.row_files import RejectLog, no_rows_error, read_rows

_LOG_ROWS, _LOG_SECONDS = 20_000, 20.0  # limits for one log

ReadSample = Callable[[str, LogsConfig, Sequence[AcceptedAnswer]], None]  # arguments: node, config, usable answers


def check_logs(findings: Findings, nodes: Sequence[Node], target: Path | None, test: ReadSample | None = None) -> None:
    """Check that logs have usable answers: count them in the first rows, with the reasons why others are not used.

    target: the target's artifact, of which only small files such as the tokenizer are read; None: only the rows'
    fields, temperature and time are checked. test: called with some of the usable answers.
    """
    for node in nodes:
        if isinstance(node.config, LogsConfig):
            prompts = next((other.config for other in nodes if other.name == node.inputs.get("prompts")), None)
            held_out = HeldOut()  # the prompts themselves may not be made yet
            if isinstance(prompts, PromptsConfig):
                held_out = HeldOut(prompts.max_heldout_share, by=prompts.heldout_by)
            with findings.check(node.name):
                answers = _check_log(findings, node.name, node.config, target, held_out)
                if answers and test is not None:
                    test(node.name, node.config, answers)


def check_answers(
    findings: Findings, weights: Path | None, name: str, config: LogsConfig, answers: Sequence[AcceptedAnswer]
) -> None:
    """Check by the target's log-probs that answers are its own, as stage `logs` will.

    weights: an artifact of the target with its weights; None if they are not here. Raises DraftsmithError.
    """
    if weights is None:
        findings.skip(
            name, "whether the answers are this target's: its weights are not here, or too large. A run tests it first."
        )
        return
    from draftsmith.stages.data.logs.likelihood import describe_foreign, foreign_error, read_answer  # import torch
    from draftsmith.stages.targets.causal_lm import Target

    target, read, end = Target.load(weights), [], time.monotonic() + _LOG_SECONDS
    for answer in answers:
        prompt, response = answer.prompt_ids.tolist(), answer.response_ids.tolist()
        read.append(read_answer(target, prompt, response, config.sampling))
        if time.monotonic() > end:
            break
    if error := foreign_error(target, config, read):
        raise DraftsmithError(error)
    if foreign := describe_foreign(config, read):
        findings.warn(name, foreign)
    else:
        findings.ok(name, f"{len(read)} answers that were tested are this target's")


def _check_log(
    findings: Findings, name: str, config: LogsConfig, target: Path | None, held_out: HeldOut
) -> list[AcceptedAnswer]:
    """Return `scored` random usable answers; none without a target."""
    rejects = RejectLog(f"{name}.max_bad_share", config.max_bad_share)
    row_filter: LogFilter | SchemaFilter = SchemaFilter(config, rejects)
    if target is not None:
        row_filter = LogFilter(config, target, held_out, rejects)
    used, whole, end = 0, True, time.monotonic() + _LOG_SECONDS
    sample, chance = list[AcceptedAnswer](), random.Random(0)
    for row in read_rows(config.files()):
        if rejects.rows >= _LOG_ROWS or time.monotonic() > end:
            whole = False
            break
        if (accepted := row_filter.accept(row)) is None:
            continue
        used += 1
        if isinstance(accepted, AcceptedAnswer):  # reservoir sampling: all are equally likely to stay
            if len(sample) < config.scored:
                sample.append(accepted)
            elif (place := chance.randrange(used)) < config.scored:
                sample[place] = accepted
    read = "all" if whole else "the first"
    unused = ", ".join([text for text in (rejects.describe(), row_filter.describe_unselected()) if text])
    line = f"{used} of {read} {rejects.rows} rows can be used{f'; not used: {unused}' if unused else ''}"
    if target is None:
        line += " (checked without the target's tokenizer)"
    rejects.check()
    for warning in row_filter.warnings():
        findings.warn(name, warning)
    if loads := row_filter.in_flight.shares():
        findings.ok(name, f"requests in flight, by the times of {row_filter.in_flight.timed} rows: gate.loads: {loads}")
    if row_filter.outside_window + row_filter.overlap == rejects.rows and not whole:
        findings.skip(name, f"whether there are rows of the window. {line}; others may follow")
        return []
    if config.after is not None and row_filter.outside_window + row_filter.overlap == rejects.rows:
        findings.warn(name, f"no row is later than {config.after}. Without new rows, only a drift check is possible.")
        return []
    if not rejects.rows:
        raise DraftsmithError(no_rows_error(config.paths))
    if not used and whole:
        raise DraftsmithError(f"{', '.join(config.paths)}: {line}. Give other files or correct section {name}.")
    in_scope = rejects.rows - row_filter.outside_window - row_filter.filtered
    if not used or sum(rejects.reasons.values()) > MANY_REJECTED * in_scope:
        findings.warn(name, f"{line}. Check that these are this target's answers, and that the sampling is theirs.")
    else:
        findings.ok(name, line)
    return sample
