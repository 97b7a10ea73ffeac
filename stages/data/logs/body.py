"""The body of stage `logs`: collects usable answers, mixes in those of an earlier refresh, and scores some of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from draftsmith.artifacts.atomic import atomic_path, write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.data import LogsSummary, LogWindow
from draftsmith.artifacts.tables.parquet import TableWriter
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.held_out import read_held_out
from draftsmith.stages.data.logs.earlier import changes_since, read_contents, select_rows
from draftsmith.stages.data.logs.filter import (
    AcceptedAnswer,
    EarlierAnswers,
    LogFilter,
    read_earlier_answers,
)
from draftsmith.stages.data.logs.likelihood import ReadAnswer, describe_foreign, foreign_error, read_answer
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.row_files import RejectLog, Throttle, is_remote, no_rows_error, read_rows
from draftsmith.stages.data.row_formats import LOG_SHAPES
from draftsmith.stages.data.time_window import LAST, to_iso
from draftsmith.stages.runtime.stage import StageContext, progress_callback
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import read_target_info

_COLUMNS = ("prompt_id", "prompt_ids", "response_ids", "finish_reason")  # fields of an AcceptedAnswer
_GROUP_TOKENS, _GROUP_ROWS = 1 << 20, 4096  # size of a group of answers that are appended together


def run(ctx: StageContext, config: LogsConfig) -> None:
    """Write `trajectories.parquet`, `set_aside.jsonl` (file, row, id, reason) and `logs.json` (counts, window)."""
    if config.overlaps and "earlier" not in ctx.inputs:
        ctx.log(
            f"cannot tell which rows up to {config.after} the champion was trained on, so all are skipped and "
            "logs.lateness_hours is ignored"
        )
        config = config.model_copy(update={"lateness_hours": 0.0})
    held_out = read_held_out(ctx.inputs.get("prompts"))
    with (
        atomic_path(ctx.out / "set_aside.jsonl") as rejects_path,
        rejects_path.open("w", encoding="utf-8") as lines,
        TrajectoryTable(ctx.out / "trajectories.parquet") as table,
    ):
        rejects = RejectLog("logs.max_bad_share", config.max_bad_share, lines)
        used_before = read_contents(ctx.inputs["earlier"]) if config.overlaps else frozenset()
        log_filter = LogFilter(config, ctx.inputs["target"], held_out, rejects, used_before)
        earlier, changed = _earlier_answers(ctx, config, log_filter)
        max_new = _max_new_answers(config, earlier)
        contents: set[bytes] = set()  # of the answers that are used
        for batch in answer_batches(_read(ctx, config, log_filter, max_new, contents)):
            table.add(
                batch,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                seed=0,  # unknown
                engine="logs",
            )
        rejects.check()
        if not table.rows:
            raise DraftsmithError(_nothing_usable(config, log_filter))
        used = table.rows
        if earlier is not None:
            for batch in earlier.rows(earlier.choose(_replay_count(config, used), ctx.seed, contents)):
                table.add(batch)
            ctx.log(f"{table.rows - used} answers of the earlier refresh mixed in")
    for warning in log_filter.warnings():
        ctx.log(f"warning: {warning}")
    if rejects.reasons:
        ctx.log(f"{used} rows used, {rejects.reasons.total()} rejected: {rejects.describe()}")
    loads = log_filter.in_flight.shares()
    if loads:
        ctx.log(f"requests in flight, by the times of {log_filter.in_flight.timed} rows: gate.loads: {loads}")
    improbable = _test_answers(ctx, config, table.rows)
    replayed, info = table.rows - used, read_target_info(ctx.inputs["target"])
    whole = _reads_all_rows(config, max_new) and not any(is_remote(file) for file in config.files())
    LogsSummary(
        rows_in_files=rejects.rows - rejects.truncated if whole else None,
        rows_read=rejects.rows,
        used=used,
        replayed=replayed,
        replay_left_out=changed,
        set_aside=dict(rejects.reasons.most_common()),
        outside_window=log_filter.outside_window,
        filtered=log_filter.filtered,
        not_drawn=log_filter.accepted - used,
        response_tokens=table.answer_tokens,
        scored=min(config.scored, table.rows),
        improbable=dict(Counter(improbable).most_common()),
        heldout_share=held_out.share,
        window=_window(config, log_filter),
        loads=loads,
        given_by={"target_digest": info.digest, "tokenizer_digest": info.tokenizer_digest},
    ).write(ctx.out)
    ctx.summary(
        answers=table.rows,
        response_tokens=table.answer_tokens,
        rows_set_aside=rejects.reasons.total(),
        improbable=len(improbable),
        replayed=replayed,
        replay_left_out=float(changed is not None),
    )


def _earlier_answers(
    ctx: StageContext, config: LogsConfig, log_filter: LogFilter
) -> tuple[EarlierAnswers | None, str | None]:
    """Return the answers that the champion was trained on, or what has changed since they were given."""
    if not config.replay_share or "earlier" not in ctx.inputs:
        return None, None
    if changed := changes_since(ctx.inputs["earlier"], log_filter.info):
        ctx.log(f"warning: no answers of the earlier refresh are mixed in, since {changed} changed after it")
        return None, changed

    progress = progress_callback(ctx, "earlier answers")
    earlier = read_earlier_answers(ctx.inputs["earlier"], log_filter, config.sampling, progress)
    if earlier.of_other_sampling:
        ctx.log(
            f"{earlier.of_other_sampling} answers of the earlier refresh are skipped: they were sampled at another "
            "temperature, top_p or top_k"
        )
    return earlier, None


def _test_answers(ctx: StageContext, config: LogsConfig, rows: int) -> list[str]:
    """Test answers that are evenly spread over the table; return the reasons against those that fail.

    Raises DraftsmithError if too many fail.
    """
    count = min(config.scored, rows)
    if not count:
        return []
    mask = np.zeros(rows, dtype=bool)
    mask[np.linspace(0, rows - 1, count).astype(int)] = True
    target, read, improbable = Target.load(ctx.inputs["target"]), list[ReadAnswer](), []
    for batch in select_rows(ctx.out / "trajectories.parquet", mask):
        for row in batch.to_pylist():
            answer = read_answer(target, row["prompt_ids"], row["response_ids"], config.sampling)
            read.append(answer)
            if answer.reason:
                improbable.append({"trajectory_id": row["trajectory_id"], "reason": answer.reason})
            ctx.progress(len(read), count, "answers read by the target", improbable=len(improbable))
            ctx.check_interrupted()
    write_text(ctx.out / "improbable.jsonl", "".join(json.dumps(entry) + "\n" for entry in improbable))
    if error := foreign_error(target, config, read):
        raise DraftsmithError(f"logs: {error}")
    if improbable:
        ctx.log(f"warning: {describe_foreign(config, read)}: improbable.jsonl")
    return [entry["reason"] for entry in improbable]


def _reads_all_rows(config: LogsConfig, max_new: int | None) -> bool:
    """Return whether reading goes on after the last answer that is used.

    The next window of `since: last` begins after the newest row read, so no row of this window may stay unread.
    """
    return max_new is None or config.since == LAST or config.after is not None


def _read(
    ctx: StageContext, config: LogsConfig, log_filter: LogFilter, max_new: int | None, contents: set[bytes]
) -> Iterator[AcceptedAnswer]:
    """Yield the answers that are used, and add their contents to `contents`."""
    throttle, all_rows = Throttle(), _reads_all_rows(config, max_new)
    for number, row in enumerate(read_rows(config.files()), start=1):
        answer = log_filter.accept(row)
        if answer is not None and (max_new is None or log_filter.accepted <= max_new):
            contents.add(answer.content)
            yield answer
        if throttle.is_due():
            ctx.progress(number, number, "rows", used=len(contents))
        ctx.check_interrupted()
        if not all_rows and log_filter.accepted == max_new:
            break


def _max_new_answers(config: LogsConfig, earlier: EarlierAnswers | None) -> int | None:
    """Return the limit of new answers: `rows` less the replayed ones; None without a limit."""
    if config.rows is None or earlier is None:
        return config.rows
    return config.rows - min(int(config.replay_share * config.rows + 1e-9), earlier.usable)


def _replay_count(config: LogsConfig, new: int) -> int:
    """Return the number of earlier answers that make up `replay_share` together with this many new ones."""
    count = int(new * config.replay_share / (1 - config.replay_share) + 1e-9)
    return count if config.rows is None else min(count, config.rows - new)


def _nothing_usable(config: LogsConfig, log_filter: LogFilter) -> str:
    rejects, paths = log_filter.rejects, ", ".join(config.paths)
    if not rejects.rows:
        return no_rows_error(config.paths)
    if rejects.outside + log_filter.overlap == rejects.rows:  # of the overlap, all that can be used was used before
        since = f"from {to_iso(config.since_time)} or later" if config.since_time is not None else ""
        after = f"later than {config.after}" if config.after is not None else ""
        window = " and ".join(part for part in (since, after) if part)
        return f"logs: none of {rejects.rows} rows of {paths} is {window}. Use newer files, or an earlier logs.since."
    reasons = ", ".join([text for text in (rejects.describe(), log_filter.describe_unselected()) if text])
    return (
        f"logs: none of {rejects.rows} rows of {paths} can be used ({reasons}). Use rows of the shapes "
        f"{LOG_SHAPES}, with token ids if text does not survive."
    )


def _window(config: LogsConfig, log_filter: LogFilter) -> LogWindow:
    """Return absolute times.

    newest: the time of the newest row read, used or not; the next `since: last` begins after it.
    """
    return LogWindow(
        since=None if config.since_time is None else to_iso(config.since_time),
        after=config.after,
        newest=None if log_filter.newest is None else to_iso(log_filter.newest),
    )


def answer_batches(answers: Iterable[AcceptedAnswer]) -> Iterator[pa.Table]:
    """Yield the answers as tables of some thousand rows."""
    rows: list[AcceptedAnswer] = []
    tokens = 0
    for answer in answers:
        rows.append(answer)
        tokens += len(answer.prompt_ids) + len(answer.response_ids)
        if tokens >= _GROUP_TOKENS or len(rows) >= _GROUP_ROWS:
            yield _table(rows)
            rows, tokens = [], 0
    if rows:
        yield _table(rows)


def _table(rows: list[AcceptedAnswer]) -> pa.Table:
    types = {name: TRAJECTORIES.columns.field(name).type for name in _COLUMNS}
    return pa.table({name: pa.array([getattr(row, name) for row in rows], kind) for name, kind in types.items()})


class TrajectoryTable(TableWriter):
    """Writes `trajectories.parquet` of training answers; answers to one prompt are numbered in their order."""

    def __init__(self, path: Path):
        super().__init__(path, TRAJECTORIES)
        self._samples: Counter[str] = Counter()
        self.answer_tokens = 0

    def add(self, batch: pa.Table, **constants: Any) -> None:
        """Append answers. constants: values of columns that are the same in all rows, in place of those of `batch`."""
        prompts = batch["prompt_id"].to_pylist()
        samples = []
        for prompt in prompts:
            samples.append(self._samples[prompt])
            self._samples[prompt] += 1
        added: dict[str, Sequence[object]] = {
            "trajectory_id": [f"{prompt}/{sample}" for prompt, sample in zip(prompts, samples, strict=True)],
            "sample": samples,
            **{name: [value] * batch.num_rows for name, value in (constants | {"split": "train"}).items()},
        }
        columns = [
            pa.array(added[field.name], field.type) if field.name in added else batch[field.name]
            for field in TRAJECTORIES.columns
        ]
        self.append(pa.table(columns, names=TRAJECTORIES.columns.names))
        self.answer_tokens += pc.sum(pc.list_value_length(batch["response_ids"])).as_py()
