"""`draftsmith init`: writes the config of a first refresh from what a person answers or a script passes."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import yaml

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_files import Row, match_files, read_rows

_TEMPLATES = Path(__file__).parent / "beginnings"
_ROWS = 9200  # of prompts: what configs/model.yaml is made for, and assumed of a file that is not there yet
_TRAIN, _VALIDATION, _HELDOUT = 8000, 64, 512
_PER_STEP = 8  # answers in a training step of configs/model.yaml


@dataclass(frozen=True)
class Question:
    """A value that a config needs; its name is the option's."""

    text: str
    default: str
    number: bool = False  # a number is written as one, other values as text


QUESTIONS = {
    "target": Question("Target (hub id, folder or .gguf file)", "Qwen/Qwen3-4B"),
    "prompts": Question("Prompts (JSON Lines or Parquet: file, folder or glob)", "prompts.jsonl"),
    "logs": Question("Logged answers (JSON Lines or Parquet: file, folder or glob)", "answers.jsonl"),
    "temperature": Question("Temperature that they were sampled at (0: greedy)", "0", number=True),
    "drafter": Question("Drafter (hub id or folder)", "z-lab/Qwen3-4B-DFlash-b16"),
    "mask_token": Question("Mask token of the new drafter (Qwen3: 151669; null: the tokenizer's own)", "null", True),
}
BEGINNINGS = {
    "model": ("target", "prompts", "mask_token"),
    "logs": ("target", "logs", "temperature", "drafter"),
    "drafter": ("target", "drafter", "prompts"),
    "node": ("target", "drafter"),
}
_WHAT = {
    "model": "your own target and prompts, and a new drafter",
    "logs": "answers that your target gave in production",
    "drafter": "a drafter of the hub, your prompts",
    "node": "a line of drafters on a node of 8 GPUs",
}


def write_first_config(path: Path, beginning: str | None, given: Mapping[str, str | None]) -> None:
    """Write the config of a beginning to a new file; ask for what is not given if there is a terminal.

    given: answers by question, None where an option is left out. Raises DraftsmithError, and writes nothing then.
    """
    if path.exists():
        raise DraftsmithError(f"{path} exists. Give the name of a new file.")
    if not path.absolute().parent.is_dir():
        raise DraftsmithError(f"{path.parent}: no such folder. Make it, or give another file.")
    asking = sys.stdin.isatty()
    if beginning is None:
        if not asking:
            raise DraftsmithError(f"--from is missing. Give one of {', '.join(BEGINNINGS)}.")
        beginning = _asked_beginning()
    asked = BEGINNINGS[beginning]
    if unused := [name for name, value in given.items() if value is not None and name not in asked]:
        option = f"--{unused[0].replace('_', '-')}"
        raise DraftsmithError(f"{option} says nothing with --from {beginning}. Leave it out.")
    values: dict[str, Any] = {"name": re.sub(r"^[^\w]+|[^\w.-]", "-", path.stem).strip("-") or "draftsmith"}
    for name in asked:
        value = given[name]
        if value is None:
            value = _asked(QUESTIONS[name]) if asking else QUESTIONS[name].default
        values[name] = yaml.safe_load(value) if QUESTIONS[name].number else value
    if "prompts" in asked:
        values |= _sizes(values["prompts"])
    template = Template((_TEMPLATES / f"{beginning}.yaml").read_text("utf-8"))
    text = template.substitute({name: _as_yaml(value) for name, value in values.items()})
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def _asked_beginning() -> str:
    for name, what in _WHAT.items():
        print(f"  {name:<8} {what}")
    while (answer := input(f"Begin with ({', '.join(BEGINNINGS)}) [model]: ").strip() or "model") not in BEGINNINGS:
        print(f"{answer!r} is none of them.")
    return answer


def _asked(question: Question) -> str:
    return input(f"{question.text} [{question.default}]: ").strip() or question.default


def _sizes(prompts: str) -> dict[str, int]:
    """Return numbers of prompts and steps that fit the rows of the files, one in ten of which may be measured on."""
    try:
        found = islice(read_rows(match_files([prompts], "--prompts")), _ROWS)  # more change nothing
        rows = sum(isinstance(row, Row) for row in found)
    except DraftsmithError:  # not there yet; the check says so
        rows = _ROWS
    few = rows < _ROWS
    train = rows * 4 // 5 if few else _TRAIN
    return {
        "train": train,
        "validation": max(1, rows // 100) if few else _VALIDATION,
        "heldout": max(1, rows // 20) if few else _HELDOUT,
        "sft_steps": max(1, 4 * train // _PER_STEP),
        "opd_steps": max(1, train // _PER_STEP),
    }


def _as_yaml(value: Any) -> str:
    """Return a value as it stands inside of {…}, in quotes where it needs them."""
    text = yaml.safe_dump({"v": value}, default_flow_style=True, allow_unicode=True, width=sys.maxsize)
    return text.removeprefix("{v: ").removesuffix("}\n")
