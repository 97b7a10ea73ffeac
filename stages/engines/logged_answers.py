"""Answers that the target gave before, in place of a rollout: from a service's log, or published as tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.held_out import token_digest
from draftsmith.stages.data.logs.rows import LoggedRow, logged_ids
from draftsmith.stages.data.row_files import BadRow, read_rows
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.partial_answers import PartialAnswers


def store_logged_answers(
    files: Iterable[Path],
    requests: Iterable[Request],
    splits: Mapping[str, str],
    vocab_size: int,
    answers: PartialAnswers,
) -> None:
    """Store the logged answer to every request, the first one of a prompt that was asked several times.

    files: rows of `prompt_token_ids` and `completion_token_ids`. splits: prompt id -> split. vocab_size: the target's.
    Raises DraftsmithError if a row cannot be read, or if an answer is another model's, was sampled otherwise than its
    request, or is missing.
    """
    missing = {token_digest(request.prompt_ids): request for request in requests}
    completions = []
    for row in read_rows([str(file) for file in files]):
        if isinstance(row, BadRow):
            raise DraftsmithError(f"{row.where}: {row.reason}. Correct the row, or remove it.")
        logged = LoggedRow(row.file, row.number, row.fields)
        ids = logged_ids(logged)
        request = None if ids is None else missing.pop(token_digest(ids[0]), None)
        if ids is None or request is None:
            continue
        if difference := logged.sampling_difference(request.sampling):
            raise DraftsmithError(
                f"{row.where}: the answer was not sampled as configured ({difference}). Set sampling to what the "
                "answers were sampled with."
            )
        if max(ids[1], default=0) >= vocab_size:
            raise DraftsmithError(f"{row.where}: token id outside the target's vocabulary. Give this target's answers.")
        reason = "stop" if row.fields.get("finish_reason") == "stop" else "length"
        completions.append(Completion(request, ids[1], finish_reason=reason))
    if missing:
        first = next(iter(missing.values())).request_id
        raise DraftsmithError(
            f"answers: none to {len(missing)} prompts, such as {first}. Add their rows, or ask for fewer prompts."
        )
    answers.append(completions, splits, "logs")
