"""Writes the config of a first refresh for `draftsmith init`, from a person's answers or a script's options."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any

import yaml

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_files import Row, match_files, read_rows

_TEMPLATES = Path(__file__).parent / "beginnings"
_ROWS = 9200  # prompts that configs/model.yaml needs; also assumed for a file that does not exist yet
_TRAIN, _VALIDATION, _HELDOUT = 8000, 64, 512
_PER_STEP, _ROLLOUT = 8, 64  # answers of a training step, and of SFT without steps, in configs/model.yaml


QUESTIONS = {  # name of the option -> question, and the default of the answer
    "target": ("Target (hub id, folder or .gguf file)", "Qwen/Qwen3-4B"),
    "prompts": ("Prompts (JSON Lines or Parquet: file, folder or glob)", "prompts.jsonl"),
    "logs": ("Logged answers (JSON Lines or Parquet: file, folder or glob)", "answers.jsonl"),
    "temperature": ("Temperature that they were sampled at (0: greedy)", "0"),
    "drafter": ("Drafter (hub id or folder)", "z-lab/Qwen3-4B-DFlash-b16"),
    "mask_token": ("Mask token of the new drafter (Qwen3: 151669; null: the tokenizer's own)", "null"),
}
_NUMBERS = ("temperature", "mask_token")  # answers that are parsed as YAML; the others are text
BEGINNINGS = {
    "model": ("target", "prompts", "mask_token"),
    "logs": ("target", "logs", "temperature", "drafter"),
    "drafter": ("target", "drafter", "prompts"),
    "node": ("target", "drafter"),
}
_DESCRIPTIONS = {
    "model": "your own target and prompts, and a new drafter",
    "logs": "answers that your target gave in production",
    "drafter": "a drafter of the hub, your prompts",
    "node": "a model line on a node of 8 GPUs",
}


def write_first_config(path: Path, beginning: str | None, given: Mapping[str, str | None]) -> None:
    """Write a config from a template to a new file; on a terminal, ask for the values that are not given.

    beginning: name of the template. given: option -> value, None if it is left out. Raises DraftsmithError without
    writing anything.
    """
    if path.exists():
        raise DraftsmithError(f"{path} exists. Give the name of a new file.")
    if not path.absolute().parent.is_dir():
        raise DraftsmithError(f"{path.parent}: no such folder. Create it, or give another file.")
    interactive = sys.stdin.isatty()
    if beginning is None:
        if not interactive:
            raise DraftsmithError(f"--from is missing. Give one of {', '.join(BEGINNINGS)}.")
        beginning = _ask_beginning()
    names = BEGINNINGS[beginning]
    if unused := [name for name, value in given.items() if value is not None and name not in names]:
        option = f"--{unused[0].replace('_', '-')}"
        raise DraftsmithError(f"{option} is not used with --from {beginning}. Remove it.")
    values: dict[str, object] = {"name": re.sub(r"^[^\w]+|[^\w.-]", "-", path.stem).strip("-") or "draftsmith"}
    for name in names:
        (question, default), value = QUESTIONS[name], given[name]
        if value is None:
            value = (input(f"{question} [{default}]: ").strip() if interactive else "") or default
        values[name] = yaml.safe_load(value) if name in _NUMBERS else value
    if "prompts" in names:
        values |= _counts(str(values["prompts"]))
    template = Template((_TEMPLATES / f"{beginning}.yaml").read_text("utf-8"))
    text = template.substitute({name: _as_yaml(value) for name, value in values.items()})
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def _ask_beginning() -> str:
    for name, description in _DESCRIPTIONS.items():
        print(f"  {name:<8} {description}")
    while (answer := input(f"Begin with ({', '.join(BEGINNINGS)}) [model]: ").strip() or "model") not in BEGINNINGS:
        print(f"{answer!r} is none of them.")
    return answer


def _counts(prompts: str) -> dict[str, int]:
    """Return counts of prompts and steps that fit the files' rows, one in ten of which may be held out."""
    try:
        first = islice(read_rows(match_files([prompts], "--prompts")), _ROWS)
        rows = sum(isinstance(row, Row) for row in first)
    except DraftsmithError:  # it does not exist yet, which the check reports
        rows = _ROWS
    few = rows < _ROWS
    train = rows * 4 // 5 if few else _TRAIN
    return {
        "train": train,
        "validation": max(1, rows // 100) if few else _VALIDATION,
        "heldout": max(1, rows // 20) if few else _HELDOUT,
        "rollout": min(_ROLLOUT, train),
        "sft_steps": max(1, 4 * train // _PER_STEP),
        "opd_steps": max(1, train // _PER_STEP),
    }


def _as_yaml(value: Any) -> str:
    """Return a value as YAML inside of {…}, quoted if it must be."""
    text = yaml.safe_dump({"v": value}, default_flow_style=True, allow_unicode=True, width=sys.maxsize)
    return text.removeprefix("{v: ").removesuffix("}\n")
