"""Logs: answers that the target gave in production, as trajectories, in place of a rollout.

Replay rebuilds the trace of any drafter on any text of the target, so logged answers serve SFT, mining and OPD as they
are. They must be this target's own: a row is checked as far as its tokens go (`stages/data/logs/rows.py`), and a
row that is not used is counted and listed with its reason in `set_aside.jsonl`, never dropped silently.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.logs.config import LogsConfig
from draftsmith.stages.data.row_files import Throttle, is_remote, no_rows, read_rows
from draftsmith.stages.data.time_window import LAST, iso
from draftsmith.stages.runtime.stage import SOURCES, Compute, Stage, StageContext

if TYPE_CHECKING:
    from draftsmith.stages.data.logs.filter import Intake, Taken
    from draftsmith.stages.data.logs.rehearsal import Earlier

_REPORT_EVERY = 256


def preflight(config: LogsConfig, target: Path) -> None:
    """Check that the files are there, and that rows of the allowed length fit into the target's context."""
    from draftsmith.stages.target.info import read_target_info

    config.external_files()
    limit = read_target_info(target).max_positions
    if config.max_tokens is not None and config.max_tokens > limit:
        raise DraftsmithError(f"logs.max_tokens: {config.max_tokens} exceeds the target's {limit} positions: lower it")


def run(ctx: StageContext, config: LogsConfig) -> None:
    """Write `trajectories.parquet`, `set_aside.jsonl` (file, row, id, reason) and `logs.json` (counts, window).

    Kept between attempts is what takes the time of reading: the texts as token ids.
    """
    from draftsmith.artifacts.atomic import atomic_path, write_text
    from draftsmith.stages.data.held_out import read_held_out
    from draftsmith.stages.data.logs.answer_table import TrajectoryTable, tables
    from draftsmith.stages.data.logs.filter import Intake
    from draftsmith.stages.data.logs.rehearsal import read_contents
    from draftsmith.stages.data.logs.rows import TokenCache
    from draftsmith.stages.data.rejects import Aside
    from draftsmith.stages.target.info import read_target_info

    preflight(config, ctx.inputs["target"])
    if config.overlaps and "earlier" not in ctx.inputs:
        ctx.log(
            f"rows up to {config.after} are left out: which of them the champion was trained on is unknown here, so "
            "logs.lateness_hours is ignored"
        )
        config = config.model_copy(update={"lateness_hours": 0.0})
    held_out = read_held_out(ctx.inputs.get("prompts"))
    with (
        atomic_path(ctx.out / "set_aside.jsonl") as listed,
        listed.open("w", encoding="utf-8") as lines,
        TokenCache(ctx.work / "tokenised") as cache,
        TrajectoryTable(ctx.out / "trajectories.parquet") as table,
    ):
        aside = Aside("logs.max_bad_share", config.max_bad_share, lines)
        used_before = read_contents(ctx.inputs["earlier"]) if config.overlaps else frozenset()
        intake = Intake(config, ctx.inputs["target"], held_out, aside, cache, used_before)
        earlier, changed = _earlier(ctx, config, intake)
        wanted = _wanted(config, earlier)
        contents: set[bytes] = set()  # of the answers that are used
        stated: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        stated |= {"seed": 0, "engine": "logs"}  # their seed is not known
        for part in tables(_read(ctx, config, intake, wanted, contents)):
            table.add(part, **stated)
        aside.check()
        if not table.rows:
            raise DraftsmithError(_nothing_usable(config, intake))
        used = table.rows
        if earlier is not None:
            for part in earlier.rows(earlier.choose(_replayed(config, used), ctx.seed, contents)):
                table.add(part)
            ctx.log(f"{table.rows - used} answers of the earlier refresh mixed in")
    for doubt in intake.doubts():
        ctx.log(f"warning: {doubt}")
    if cache.hits:
        ctx.log(f"{cache.hits} answers were tokenised by an earlier attempt")
    if aside.reasons:
        ctx.log(f"{used} rows used, {sum(aside.reasons.values())} set aside: {aside.said()}")
    improbable = _judge(ctx, config, table.rows)
    replayed, info = table.rows - used, read_target_info(ctx.inputs["target"])
    whole = _is_read_whole(config, wanted) and not any(is_remote(file) for file in config.files())
    counts = {
        "rows_in_files": aside.rows - aside.cut_off if whole else None,
        "rows_read": aside.rows,
        "used": used,
        "replayed": replayed,
        "replay_left_out": changed,
        "set_aside": dict(aside.reasons.most_common()),
        "outside_window": intake.outside_window,
        "filtered": intake.filtered,
        "not_drawn": intake.taken - used,
        "response_tokens": table.response_tokens,
        "scored": min(config.scored, table.rows),
        "improbable": dict(Counter(improbable).most_common()),
        "heldout_share": held_out.share,
        "window": _window(config, intake),
        "given_by": {"target_digest": info.digest, "tokenizer_digest": info.tokenizer_digest},
    }
    write_text(ctx.out / "logs.json", json.dumps(counts, indent=2, ensure_ascii=True) + "\n")
    ctx.summary(
        answers=table.rows,
        response_tokens=table.response_tokens,
        rows_set_aside=sum(aside.reasons.values()),
        improbable=len(improbable),
        replayed=replayed,
        replay_left_out=float(changed is not None),
    )


def _earlier(ctx: StageContext, config: LogsConfig, intake: Intake) -> tuple[Earlier | None, str | None]:
    """Return the answers that the champion was trained on, or what has changed since they were given."""
    from draftsmith.stages.data.logs.rehearsal import made_otherwise, read_earlier

    if not config.replay_share or "earlier" not in ctx.inputs:
        return None, None
    if changed := made_otherwise(ctx.inputs["earlier"], intake.info):
        ctx.log(f"warning: no answers of the earlier refresh are mixed in: {changed} changed since they were given")
        return None, changed

    def tell(answers: int) -> None:
        ctx.progress(answers, answers, "earlier answers")
        ctx.check_interrupted()

    earlier = read_earlier(ctx.inputs["earlier"], intake, config.sampling, tell)
    if earlier.of_other_sampling:
        ctx.log(
            f"{earlier.of_other_sampling} answers of the earlier refresh are left out: they were drawn at another "
            "temperature, top_p or top_k"
        )
    return earlier, None


def _judge(ctx: StageContext, config: LogsConfig, rows: int) -> list[str]:
    """Return what speaks against some answers of the table, evenly spread over it."""
    import numpy as np

    from draftsmith.artifacts.atomic import write_text
    from draftsmith.stages.data.logs.answer_table import chosen_rows
    from draftsmith.stages.data.logs.likelihood_check import OUTSIDE, judge
    from draftsmith.stages.data.rejects import by_frequency
    from draftsmith.stages.target.causal_lm import Target

    count = min(config.scored, rows)
    if not count:
        return []
    mask = np.zeros(rows, dtype=bool)
    mask[np.linspace(0, rows - 1, count).astype(int)] = True
    target, found, done = Target.load(ctx.inputs["target"]), [], 0
    for part in chosen_rows(ctx.out / "trajectories.parquet", mask):
        for row in part.select(["trajectory_id", "prompt_ids", "response_ids"]).to_pylist():
            reason = judge(target, row["prompt_ids"], row["response_ids"], config.sampling)
            if reason:
                found.append({"trajectory_id": row["trajectory_id"], "reason": reason})
            done += 1
            ctx.progress(done, count, "answers read by the target", improbable=len(found))
            ctx.check_interrupted()
    write_text(ctx.out / "improbable.jsonl", "".join(json.dumps(each) + "\n" for each in found))
    by_reason = Counter(each["reason"] for each in found)
    if found:
        sampling = f"temperature {config.temperature:g}" + (
            f", {config.sampling.truncation}" if config.temperature else ""
        )
        remedy = (
            " Correct logs.top_p and logs.top_k; min_p and penalties cannot be stated, so log answers without them, or "
            "greedy ones."
        )
        ctx.log(
            f"warning: {len(found)} of {count} answers are not what this target gives at {sampling} "
            f"({by_frequency(by_reason)}; improbable.jsonl): sampled otherwise, another model's, or a part was cut out?"
            f"{remedy if by_reason[OUTSIDE] else ''}"
        )
    return list(by_reason.elements())


def _is_read_whole(config: LogsConfig, wanted: int | None) -> bool:
    """Return whether reading goes on after the answers that are used.

    The next window begins after the newest row read: of this one, none may be left unread, in whatever file.
    """
    return wanted is None or config.since == LAST or config.after is not None


def _read(
    ctx: StageContext, config: LogsConfig, intake: Intake, wanted: int | None, contents: set[bytes]
) -> Iterator[Taken]:
    """Yield the answers that are used, and note their contents."""
    throttle, whole = Throttle(), _is_read_whole(config, wanted)
    for read, row in enumerate(read_rows(config.files()), start=1):
        answer = intake.take(row)
        if answer is not None and (wanted is None or intake.taken <= wanted):
            contents.add(answer.content)
            yield answer
        if throttle.is_due() or read % _REPORT_EVERY == 0:  # a row of a megabyte takes seconds
            ctx.progress(read, read, "rows", used=len(contents))
        ctx.check_interrupted()
        if not whole and intake.taken == wanted:
            break


def _wanted(config: LogsConfig, earlier: Earlier | None) -> int | None:
    """Return the most new answers: what `rows` leaves beside those of the earlier refresh."""
    if config.rows is None or earlier is None:
        return config.rows
    return config.rows - min(int(config.replay_share * config.rows + 1e-9), earlier.usable)


def _replayed(config: LogsConfig, new: int) -> int:
    """Return how many earlier answers make up their share beside so many new ones."""
    count = int(new * config.replay_share / (1 - config.replay_share) + 1e-9)
    return count if config.rows is None else min(count, config.rows - new)


def _nothing_usable(config: LogsConfig, intake: Intake) -> str:
    from draftsmith.stages.data.logs.filter import USED_BEFORE
    from draftsmith.stages.data.logs.rows import SHAPES

    rows, where = intake.aside.rows, ", ".join(config.paths)
    if not rows:
        return no_rows(config.paths)
    if intake.outside_window + intake.aside.reasons[USED_BEFORE] == rows:
        since = f"from {iso(config.since_time)} or later" if config.since_time is not None else ""
        after = f"later than {config.after}" if config.after is not None else ""
        beginning = " and ".join(each for each in (since, after) if each)
        return f"logs: none of {rows} rows of {where} is {beginning}: give newer files or an earlier time"
    said = ", ".join([part for part in (intake.aside.said(), intake.not_meant) if part])
    return (
        f"logs: none of {rows} rows of {where} can be used ({said}): give rows of the shapes {SHAPES}, token ids if "
        "text does not survive"
    )


def _window(config: LogsConfig, intake: Intake) -> dict[str, str | None]:
    """Return absolute times. newest: of all rows read, used or not; the next `since: last` begins after it."""
    return {
        "since": None if config.since_time is None else iso(config.since_time),
        "after": config.after,
        "newest": None if intake.newest is None else iso(intake.newest),
    }


STAGE = Stage(
    name="logs",
    config=LogsConfig,
    inputs=("target", "prompts?", "earlier?", f"{SOURCES}?"),
    body=__name__,
    preflight=preflight,
    compute=Compute.HEAVY,
)
