"""Logs: answers that the target gave in production, as trajectories, in place of a rollout.

Replay rebuilds the trace of any drafter on any text of the target, so logged answers serve SFT, mining and OPD as they
are. They must be this target's own: a row is checked as far as its tokens go (`stages/prompting/logged.py`), and a
row that is not used is counted and listed with its reason in `set_aside.jsonl`, never dropped silently.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.contract import SOURCES, Compute, Stage, StageContext
from draftsmith.stages.prompting.files import count_rows, is_remote, no_rows, read_rows
from draftsmith.stages.prompting.logs_config import LogsConfig
from draftsmith.stages.prompting.pace import Pace
from draftsmith.stages.prompting.times import LAST, iso

if TYPE_CHECKING:
    from draftsmith.stages.prompting.answers import WaitingAnswers
    from draftsmith.stages.prompting.earlier import Earlier
    from draftsmith.stages.prompting.intake import Intake

_REPORT_EVERY = 256


def preflight(config: LogsConfig, target: Path) -> None:
    """The files are there, and rows of the allowed length fit into the target's context."""
    from draftsmith.stages.targets.info import read_target_info

    config.external_files()
    limit = read_target_info(target).max_positions
    if config.max_tokens is not None and config.max_tokens > limit:
        raise DraftsmithError(f"logs.max_tokens: {config.max_tokens} exceeds the target's {limit} positions: lower it")


def run(ctx: StageContext, config: LogsConfig) -> None:
    """Write `trajectories.parquet`, `set_aside.jsonl` (file, row, id, reason) and `logs.json` (counts, window).

    Kept between attempts is what takes the time of reading: the texts as token ids.
    """
    import numpy as np

    from draftsmith.artifacts.atomic import atomic_path, write_text
    from draftsmith.stages.prompting.answers import TrajectoryTable, WaitingAnswers, chosen_rows
    from draftsmith.stages.prompting.aside import Aside
    from draftsmith.stages.prompting.earlier import made_otherwise, read_contents, read_earlier
    from draftsmith.stages.prompting.held_out import read_held_out
    from draftsmith.stages.prompting.intake import Intake
    from draftsmith.stages.prompting.tokenised import Tokenised
    from draftsmith.stages.targets.info import read_target_info

    preflight(config, ctx.inputs["target"])
    if config.overlaps and "earlier" not in ctx.inputs:
        ctx.log(
            f"the window begins behind {config.after}, without logs.lateness_hours: which rows before it were used by "
            "the champion's refresh is not known here"
        )
        config = config.model_copy(update={"lateness_hours": 0.0})
    held_out = read_held_out(ctx.inputs.get("prompts"))

    def tell(answers: int) -> None:
        ctx.progress(answers, answers, "earlier answers")
        ctx.check_interrupted()

    with (
        atomic_path(ctx.out / "set_aside.jsonl") as listed,
        listed.open("w", encoding="utf-8") as lines,
        Tokenised(ctx.work / "tokenised") as kept,
    ):
        aside = Aside("logs.max_bad_share", config.max_bad_share, lines)
        used_before = read_contents(ctx.inputs["earlier"]) if config.overlaps else frozenset()
        intake = Intake(config, ctx.inputs["target"], held_out, aside, kept, used_before)
        earlier, changed, info = None, None, read_target_info(ctx.inputs["target"])
        if config.replay_share and "earlier" in ctx.inputs:
            changed = made_otherwise(ctx.inputs["earlier"], info)
            if changed is None:
                earlier = read_earlier(ctx.inputs["earlier"], intake, config.law, tell)
                if earlier.of_other_laws:
                    ctx.log(
                        f"{earlier.of_other_laws} answers of the earlier refresh are left out: they were drawn at "
                        "another temperature, top_p or top_k"
                    )
            else:
                ctx.log(
                    f"warning: no answers of the earlier refresh are mixed in: {changed} changed since they were given"
                )
        wanted = _wanted(config, earlier)
        with WaitingAnswers(ctx.work / "answers.parquet") as waiting:
            contents: list[bytes] = []  # of every answer that may be used
            total = _read(ctx, config, intake, waiting, contents, wanted)
        aside.check()
    for doubt in intake.doubts():
        ctx.log(f"warning: {doubt}")
    if kept.kept:
        ctx.log(f"{kept.kept} answers were tokenised by an earlier attempt")
    if not contents:
        raise DraftsmithError(_nothing_usable(config, intake))
    used = np.arange(len(contents)) < (len(contents) if wanted is None else wanted)
    if aside.reasons:
        ctx.log(f"{used.sum()} rows used, {sum(aside.reasons.values())} set aside: {aside.said()}")
    replayed = 0
    with TrajectoryTable(ctx.out / "trajectories.parquet") as table:
        said = {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
        for part in chosen_rows(waiting.path, used):
            table.append(part, **said, seed=0, engine="logs")  # their seed is not known
            ctx.check_interrupted()
        if earlier is not None:
            newer = set(contents[: int(used.sum())])
            mask = earlier.choose(_replayed(config, int(used.sum())), ctx.seed, newer)
            for part in earlier.rows(mask):
                table.append(part)
            replayed = int(mask.sum())
            ctx.log(f"{replayed} answers of the earlier refresh mixed in")
    improbable = _judge(ctx, config, table.rows)
    counts = {
        "rows_in_files": total,
        "rows_read": aside.rows,
        "used": int(used.sum()),
        "replayed": replayed,
        "replay_left_out": changed,
        "set_aside": dict(aside.reasons.most_common()),
        "outside_window": intake.outside_window,
        "filtered": intake.filtered,
        "not_drawn": len(used) - int(used.sum()),
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


def _judge(ctx: StageContext, config: LogsConfig, rows: int) -> list[str]:
    """Return what speaks against some answers of the table, evenly spread over it."""
    import numpy as np

    from draftsmith.artifacts.atomic import write_text
    from draftsmith.stages.prompting.answers import chosen_rows
    from draftsmith.stages.prompting.probable import OUTSIDE, judge
    from draftsmith.stages.targets.causal_lm import Target

    count = min(config.scored, rows)
    if not count:
        return []
    mask = np.zeros(rows, dtype=bool)
    mask[np.linspace(0, rows - 1, count).astype(int)] = True
    target, found, done = Target.load(ctx.inputs["target"]), [], 0
    for part in chosen_rows(ctx.out / "trajectories.parquet", mask):
        for row in part.select(["trajectory_id", "prompt_ids", "response_ids"]).to_pylist():
            reason = judge(target, row["prompt_ids"], row["response_ids"], config.law)
            if reason:
                found.append({"trajectory_id": row["trajectory_id"], "reason": reason})
            done += 1
            ctx.progress(done, count, "answers read by the target", improbable=len(found))
            ctx.check_interrupted()
    write_text(ctx.out / "improbable.jsonl", "".join(json.dumps(each) + "\n" for each in found))
    if found:
        by_reason = Counter(each["reason"] for each in found)
        reasons = ", ".join(f"{n} {reason}" for reason, n in by_reason.most_common())
        law = f"temperature {config.temperature:g}" + (f", {config.law.truncation}" if config.temperature else "")
        said = (
            f"{len(found)} of {count} answers are not what this target gives at {law} "
            f"({reasons}; improbable.jsonl): sampled otherwise, another model's, or a part was cut out?"
        )
        if by_reason[OUTSIDE]:
            said += (
                " Correct logs.top_p and logs.top_k; min_p and penalties cannot be stated, so log answers without "
                "them, or greedy ones."
            )
        ctx.log(f"warning: {said}")
    return [each["reason"] for each in found]


def _read(
    ctx: StageContext,
    config: LogsConfig,
    intake: Intake,
    waiting: WaitingAnswers,
    contents: list[bytes],
    wanted: int | None,
) -> int | None:
    """All rows, or as many as are needed. Returns how many there are in the files, None where not all are
    read or some are far away."""
    files = config.files()
    # the next window begins behind the newest row read: of this one, none may be left unread, in whatever file
    consecutive = config.since == LAST or config.after is not None
    enough = None if consecutive else wanted
    uncounted = enough is not None or any(is_remote(file) for file in files)
    total = None if uncounted else _count(ctx, files)
    pace = Pace()
    for read, row in enumerate(read_rows(files), start=1):
        answer = intake.take(row)
        if answer is not None:
            waiting.append(answer)
            contents.append(answer.content)
        if pace.step() or read % _REPORT_EVERY == 0 or read == total:  # a row of a megabyte takes seconds
            ctx.progress(read, max(read, total or 0), "rows", used=len(contents))
        ctx.check_interrupted()
        if enough is not None and len(contents) >= enough:
            break
    return total


def _count(ctx: StageContext, files: Sequence[str]) -> int:
    """Rows of the files, for the time that is left: of large ones it takes minutes itself."""
    pace = Pace()

    def counted() -> None:
        if pace.step():
            ctx.progress(pace.rows, pace.rows, "rows counted")
        ctx.check_interrupted()

    return count_rows(files, counted)


def _wanted(config: LogsConfig, earlier: Earlier | None) -> int | None:
    """The most new answers: what `rows` leaves beside those of the earlier refresh."""
    if config.rows is None or earlier is None:
        return config.rows
    return config.rows - min(int(config.replay_share * config.rows + 1e-9), earlier.usable)


def _replayed(config: LogsConfig, new: int) -> int:
    """How many earlier answers make up their share beside so many new ones."""
    count = int(new * config.replay_share / (1 - config.replay_share) + 1e-9)
    return count if config.rows is None else min(count, config.rows - new)


def _nothing_usable(config: LogsConfig, intake: Intake) -> str:
    from draftsmith.stages.prompting.intake import USED_BEFORE
    from draftsmith.stages.prompting.logged import SHAPES

    rows, where = intake.aside.rows, ", ".join(config.paths)
    if not rows:
        return no_rows(config.paths)
    if rows and intake.outside_window + intake.aside.reasons[USED_BEFORE] == rows:
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
    """In absolute time. newest: of all rows read, whether used or not; what the next `since: last` begins behind."""
    return {
        "since": None if config.since_time is None else iso(config.since_time),
        "after": config.after,
        "newest": None if intake.newest is None else iso(intake.newest),
    }


STAGE = Stage(
    name="logs",
    config=LogsConfig,
    inputs=("target", "prompts?", "earlier?", f"{SOURCES}?"),
    run=run,
    preflight=preflight,
    compute=Compute.HEAVY,
)
