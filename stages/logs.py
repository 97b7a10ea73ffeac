"""Logs: answers that the target gave in production, as trajectories, in place of a rollout.

Replay rebuilds the trace of any drafter on any text of the target, so logged answers serve SFT, mining and OPD as they
are. They must be this target's own: a row is checked as far as its tokens go (`stages/prompting/logged.py`), and a
row that is not used is counted and listed with its reason in `set_aside.jsonl`, never dropped silently.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from draftsmith.stages.contract import Config, Stage, StageContext

if TYPE_CHECKING:
    from draftsmith.stages.prompting.logged import LoggedRow, Reader

_REPORT_EVERY = 256


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class LogsConfig(Config):
    """Which answers of a log are used."""

    paths: Annotated[
        list[str],
        BeforeValidator(_as_list),
        Field(min_length=1, description="JSON Lines files, plain or .gz, relative to the current directory"),
    ]
    temperature: float = Field(
        ge=0,
        description="sampling temperature of the answers; a row that says another one is set aside, one that says none "
        "is taken to have this one. 0 = greedy",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="of the answers; written down, not checked")
    rows: int | None = Field(default=None, ge=1, description="use at most so many answers, the first ones")
    max_tokens: int | None = Field(
        default=None, ge=2, description="prompt and answer; longer rows are set aside. Left out: the target's context"
    )
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field(
        default={}, description="passed to the chat template for rows of text: what the service passed"
    )

    def external_files(self) -> list[Path]:
        """The logs. Raises DraftsmithError if one is not there."""
        from draftsmith.artifacts.errors import DraftsmithError

        files = [Path(path).absolute() for path in self.paths]
        for file in files:
            if not file.is_file():
                raise DraftsmithError(f"logs.paths: {file} is not an existing file: correct the path")
        return files


def preflight(config: LogsConfig, target: Path) -> None:
    """The files are there, and rows of the allowed length fit into the target's context."""
    from draftsmith.artifacts.errors import DraftsmithError
    from draftsmith.stages.targets.info import read_target_info

    config.external_files()
    limit = read_target_info(target).max_positions
    if config.max_tokens is not None and config.max_tokens > limit:
        raise DraftsmithError(f"logs.max_tokens: {config.max_tokens} exceeds the target's {limit} positions: lower it")


def run(ctx: StageContext, config: LogsConfig) -> None:
    """Write `trajectories.parquet`, `set_aside.jsonl` (file, row, id, reason) and `logs.json` (counts).

    Nothing is kept between attempts: reading is fast beside everything that uses it.
    """
    from draftsmith.artifacts.atomic import write_text
    from draftsmith.artifacts.errors import DraftsmithError
    from draftsmith.artifacts.parquet import write_table
    from draftsmith.artifacts.schemas import TRAJECTORIES
    from draftsmith.stages.prompting.logged import SHAPES, Reader, SetAside, read_rows
    from draftsmith.stages.targets.info import model_path, read_target_info
    from draftsmith.stages.targets.resolve import load_tokenizer

    preflight(config, ctx.inputs["target"])
    info = read_target_info(ctx.inputs["target"])
    reader = Reader(
        load_tokenizer(model_path(ctx.inputs["target"])),
        vocab_size=info.vocab_size,
        eos_ids=info.eos_ids,
        max_tokens=config.max_tokens or info.max_positions,
        template_kwargs=config.chat_template_kwargs,
    )
    log = _Collected(config, _prompts_to_avoid(ctx))
    paths = [Path(path) for path in config.paths]
    total = sum(1 for _ in read_rows(paths))
    for read, row in enumerate(read_rows(paths), start=1):
        try:
            log.take(row, reader)
        except SetAside as reason:
            log.set_aside.append({"file": str(row.path), "row": row.number, "id": row.log_id, "reason": str(reason)})
        if read % _REPORT_EVERY == 0 or read == total:
            ctx.progress(read, total, "rows", used=len(log.used))
            ctx.check_interrupted()
        if config.rows is not None and len(log.used) == config.rows:
            break
    reasons = Counter(entry["reason"] for entry in log.set_aside)
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    if not log.used:
        raise DraftsmithError(
            f"logs: none of {len(log.set_aside)} rows of {', '.join(config.paths)} can be used ({said or 'no rows'}): "
            f"give rows of the shapes {SHAPES}, token ids if text does not survive"
        )
    if reasons:
        ctx.log(f"{len(log.used)} rows used, {len(log.set_aside)} set aside: {said}")
    write_table(ctx.out / "trajectories.parquet", TRAJECTORIES, log.used)
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in log.set_aside]
    write_text(ctx.out / "set_aside.jsonl", "".join(lines))
    tokens = sum(len(row["response_ids"]) for row in log.used)
    counts = {
        "rows_in_files": total,
        "rows_read": len(log.used) + len(log.set_aside),
        "used": len(log.used),
        "set_aside": dict(reasons.most_common()),
        "response_tokens": tokens,
    }
    write_text(ctx.out / "logs.json", json.dumps(counts, indent=2, ensure_ascii=False) + "\n")
    ctx.summary(answers=len(log.used), response_tokens=tokens, rows_set_aside=len(log.set_aside))


class _Collected:
    """Rows of the table so far, and what was set aside."""

    def __init__(self, config: LogsConfig, avoided: set[tuple[int, ...]]):
        self.config, self.avoided = config, avoided
        self.used: list[dict[str, Any]] = []
        self.set_aside: list[dict[str, Any]] = []
        self._seen: set[bytes] = set()
        self._samples: Counter[str] = Counter()

    def take(self, row: LoggedRow, reader: Reader) -> None:
        """Raises SetAside for a row that is not used."""
        from draftsmith.stages.prompting.logged import SetAside

        if row.temperature not in (None, self.config.temperature):
            raise SetAside("another temperature")
        answer = reader.read(row)
        if tuple(answer.prompt_ids) in self.avoided:
            raise SetAside("prompt of the validation or held-out split")
        prompt_id = _digest(answer.prompt_ids).hex()[:16]
        both = _digest([*answer.prompt_ids, -1, *answer.response_ids])
        if both in self._seen:
            raise SetAside("duplicate of an earlier row")
        self._seen.add(both)
        sample = self._samples[prompt_id]
        self._samples[prompt_id] += 1
        self.used.append(
            {
                "trajectory_id": f"{prompt_id}/{sample}",
                "prompt_id": prompt_id,
                "split": "train",
                "sample": sample,
                "prompt_ids": answer.prompt_ids,
                "response_ids": answer.response_ids,
                "finish_reason": "stop" if answer.response_ids[-1] in reader.eos_ids else "length",
                "temperature": self.config.temperature,
                "top_p": self.config.top_p,
                "seed": 0,  # not known
                "engine": "logs",
            }
        )


def _digest(ids: list[int]) -> bytes:
    return hashlib.sha256(json.dumps(ids).encode()).digest()


def _prompts_to_avoid(ctx: StageContext) -> set[tuple[int, ...]]:
    """Prompts that drafters are measured on: nothing may be trained on them."""
    from draftsmith.stages.stored import load_prompts

    if "prompts" not in ctx.inputs:
        return set()
    return {tuple(p.token_ids) for p in load_prompts(ctx.inputs["prompts"], ("validation", "heldout"))}


STAGE = Stage(name="logs", config=LogsConfig, inputs=("target", "prompts?"), run=run, preflight=preflight)
