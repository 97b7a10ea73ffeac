"""Writes the config of a first refresh for `draftsmith init`, from a person's answers or a script's options."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.host import visible_gpus
from draftsmith.flows.checks.models import fetch_metadata, metadata_artifact
from draftsmith.stages.data.held_out import HELDOUT_SHARE, hash_fraction, prompt_identity
from draftsmith.stages.data.prompts.stage import JsonlSource
from draftsmith.stages.data.prompts.streams import prompt_rows
from draftsmith.stages.data.row_files import RejectLog, match_files, read_rows
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.info import TargetInfo, model_path
from draftsmith.stages.training.config import OpdConfig

_PUBLISHED = ("z-lab/{}-DFlash-b16", "z-lab/{}-DFlash")  # drafters for a model on the hub, by its name
_GPUS = 8  # per node
_FEWEST, _LARGER_SHARE = 18, 0.3  # with fewer held-out prompts a larger share is held out
_WIDTH = 120  # longest line of the file

QUESTIONS = {  # option -> question and default answer
    "target": ("Target (hub id, folder or .gguf file)", "Qwen/Qwen3-4B"),
    "prompts": ("Prompts (JSON Lines or Parquet: file, folder or glob)", "prompts.jsonl"),
    "logs": ("Logged answers (JSON Lines or Parquet: file, folder or glob)", "answers.jsonl"),
    "temperature": ("Sampling temperature of these answers (0: greedy)", "0"),
}
BEGINNINGS = {"prompts": ("target", "prompts"), "logs": ("target", "logs", "temperature")}
TRAININGS = {"opd": "SFT, then OPD at the drafter's own errors", "sft": "SFT alone: fewer stages, in less time"}


@dataclass(frozen=True)
class Size:
    """The size of a refresh on a kind of machine."""

    about: str
    answers: int  # most answers that are trained on
    measured: int  # most validation and held-out prompts
    prompt_tokens: int
    new_tokens: int
    layers: int  # target layers per layer of a new drafter, which has at most five
    block_size: int
    training: dict[str, Any]  # fields of sft and opd
    sft: dict[str, Any] = field(default_factory=dict)  # fields of sft only
    engine: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    other: dict[str, dict[str, Any]] = field(default_factory=dict)  # section -> fields


_SERVERS = {"kind": "sglang", "concurrency": 32, "launch": {"servers": _GPUS, "memory_fraction": 0.8}}
_READS = {"tokens_per_target_forward": 16384}
_BLOCKS = {"block_sizes": [8, 12, 16], "validation_prompts": 16}
SIZES = {
    "laptop": Size(
        "a laptop's CPU: to try it with a small target",
        answers=400,
        measured=72,
        prompt_tokens=512,
        new_tokens=64,
        layers=12,
        block_size=8,
        training={"sequences_per_step": 4, "anchors_per_sequence": 16, "head_tokens": 4096},
        sft={"gamma": 2.0},
        engine={"slots": 16},
        evaluation={"rounds": 1, "speed_prompts": 18},
    ),
    "gpu": Size(
        "one GPU",
        answers=8000,
        measured=576,
        prompt_tokens=2048,
        new_tokens=1024,
        layers=6,
        block_size=16,
        training={"sequences_per_step": 8, "anchors_per_sequence": 64},
        engine={"slots": 32},
        evaluation=_BLOCKS,
    ),
    "node": Size(
        "a node of 8 GPUs, with SGLang servers",
        answers=16000,
        measured=576,
        prompt_tokens=2048,
        new_tokens=1024,
        layers=6,
        block_size=16,
        training={"sequences_per_step": 24, "anchors_per_sequence": 512, "parallel": {"processes": _GPUS}, **_READS},
        engine=_SERVERS,
        evaluation={
            "engine": _SERVERS,
            "concurrency": [1, 16],
            "rounds": 5,
            "speed_prompts": 64,
            "exactness_prompts": 0,
            **_BLOCKS,
            **_READS,
        },
        other={"mining": _READS, "stages": {"shards": _GPUS}},
    ),
}
_PASSES = 4  # passes of a new drafter's SFT over the answers


def write_first_config(
    path: Path, beginning: str | None, size: str | None, training: str | None, given: Mapping[str, str | None]
) -> Size:
    """Write a new config for a target; on a terminal, ask for what is not given. Return its size.

    beginning, size, training: keys of `BEGINNINGS`, `SIZES` and `TRAININGS`. given: option -> value, or None. Raises
    DraftsmithError without writing anything.
    """
    if path.exists():
        raise DraftsmithError(f"{path} exists. Give the name of a new file.")
    if not path.absolute().parent.is_dir():
        raise DraftsmithError(f"{path.parent}: no such folder. Create it, or choose another file.")
    interactive = sys.stdin.isatty()
    if beginning is None:
        if not interactive:
            raise DraftsmithError(f"--from is missing. Give one of {', '.join(BEGINNINGS)}.")
        abouts = {"prompts": "your own prompts", "logs": "answers that your target gave in production"}
        beginning = _choose("Begin with", abouts, "prompts")
    names = BEGINNINGS[beginning]
    if unused := [name for name, value in given.items() if value is not None and name not in names]:
        raise DraftsmithError(f"--{unused[0]} is not used with --from {beginning}. Remove it.")
    if size is None:
        gpus = len(visible_gpus())
        size = "laptop" if not gpus else "gpu" if gpus < _GPUS else "node"
        if interactive:
            size = _choose("Size", {name: choice.about for name, choice in SIZES.items()}, size)
    if training is None:
        training = _choose("Training", TRAININGS, "opd") if interactive else "opd"
    values = {}
    for name in names:
        (question, default), value = QUESTIONS[name], given[name]
        if value is None:
            value = (input(f"{question} [{default}]: ").strip() if interactive else "") or default
        values[name] = value
    name = re.sub(r"^[^\w]+|[^\w.-]", "-", path.stem).strip("-") or "draftsmith"
    sections = _sections(name, values, SIZES[size], alone=training == "sft")
    text = _as_text(sections, f"For {SIZES[size].about}. Written by `draftsmith init`.")
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    return SIZES[size]


def _choose(question: str, choices: Mapping[str, str], default: str) -> str:
    for name, description in choices.items():
        print(f"  {name:<8} {description}")
    while (answer := input(f"{question} ({', '.join(choices)}) [{default}]: ").strip() or default) not in choices:
        print(f"{answer!r} is none of them.")
    return answer


def _sections(name: str, values: Mapping[str, str], size: Size, *, alone: bool) -> dict[str, Any]:
    """Return the config's sections. values: the answers to the questions. alone: SFT, without OPD."""
    with tempfile.TemporaryDirectory(prefix="draftsmith-init-") as scratch:
        info = metadata_artifact(TargetConfig(source=values["target"]), Path(scratch))
        published = _published(info, model_path(Path(scratch)))
    new_tokens = min(size.new_tokens, info.max_positions // 2)
    path = values["prompts"] if "prompts" in values else values["logs"]
    answers, measured, share = _counts(path, size)
    counts = {
        **({"heldout_share": share} if share != HELDOUT_SHARE else {}),
        "validation": (validation := max(1, measured // 4)),  # on which the challenger is chosen
        "heldout": measured - validation,
        "max_prompt_tokens": min(size.prompt_tokens, info.max_positions - new_tokens),
    }
    engine, sampling = {"engine": size.engine}, {"max_new_tokens": new_tokens}
    training = dict(size.training)
    if "head_tokens" in training:
        training["head_tokens"] = min(training["head_tokens"], info.vocab_size // 2)
    steps = max(1, answers // training["sequences_per_step"])
    sft: dict[str, Any] = {"init_from": published, "steps": 0}
    if alone:  # goes on from a drafter as OPD does
        sft |= {"steps": steps, "learning_rate": OpdConfig().learning_rate, **training}
    if published is None:
        sft = {"drafter": _shape(info, size), "steps": _PASSES * steps, **size.sft, **training}
    sections: dict[str, Any]
    if "prompts" in values:
        rollout = {"sampling": sampling, **engine}
        sections = {
            "prompts": {"sources": [{"kind": "jsonl", "path": path}], "train": answers, **counts, "too_long": "skip"},
            # without SFT's steps only for the list of frequent tokens
            "rollout": {"prompts": answers if sft["steps"] else min(64, answers), **rollout},
            **({} if alone else {"assisted": {"prompts": answers, **rollout}}),
        }
    else:
        logs = {
            "paths": path,
            "temperature": yaml.safe_load(values["temperature"]),
            "since": None,
            "rows": size.answers,
        }
        sections = {"logs": logs, "prompts": counts}
    return {
        "name": name,
        "registry": {"name": name},
        "target": {"source": values["target"], "dtype": "bfloat16"},
        **sections,
        "sft": sft,
        "opd": None if alone else {"steps": steps, **training},
        "heldout": {"sampling": sampling, **engine},
        "evaluation": {"sampling": sampling, **size.evaluation},
        **{section: fields for section, fields in size.other.items() if not (alone and section == "mining")},
    }


def _published(info: TargetInfo, model: Path) -> str | None:
    """Return the hub id of a drafter that was published for the target; None if there is none that fits."""
    from draftsmith.stages.drafters import checkpoint  # imports torch, and the other commands read this module

    for pattern in _PUBLISHED if info.kind == "hub" else ():
        drafter = pattern.format(info.source.rpartition("/")[2])
        try:
            folder = fetch_metadata(drafter, None, "sft.init_from")
            checkpoint.check_shape(folder, model)
        except DraftsmithError:
            continue
        return drafter
    return None


def _shape(info: TargetInfo, size: Size) -> dict[str, Any]:
    """Return the shape of a new drafter, which reads layers of the target from its second to its last but two."""
    layers = max(1, min(5, info.num_layers // size.layers))
    features = max(layers, min(5, info.num_layers - 3))
    shape = {"num_layers": layers, "block_size": size.block_size}
    return shape if features == layers else {**shape, "num_target_features": features}


def _counts(path: str, size: Size) -> tuple[int, int, float]:
    """Return how many of the prompts that a run finds in files train, how many measure, and the held-out share, which
    is larger if there are few.
    """
    places: dict[str, float] = {}  # text -> its hash in [0, 1); held out if below the share
    train = held_out = unread = 0
    try:
        rows = prompt_rows(JsonlSource(path=path), read_rows(match_files([path], path)), RejectLog("", 1.0))
        for _, prompt in rows:
            if prompt.messages:
                places[prompt.text_hash] = hash_fraction(prompt_identity(prompt.messages))
            else:  # token ids, whose text the run decodes
                unread += 1
            if 0.8 * (len(places) + unread) > max(size.answers, size.measured / HELDOUT_SHARE):
                break
    except DraftsmithError:  # it does not exist yet, which the check reports
        return size.answers, size.measured, HELDOUT_SHARE
    for share in (HELDOUT_SHARE, _LARGER_SHARE):
        known = sum(place < share for place in places.values())
        held_out, train = known + int(0.6 * share * unread), len(places) - known + int((1 - 1.4 * share) * unread)
        if held_out >= _FEWEST:
            break
    return max(1, min(size.answers, train)), max(2, min(size.measured, held_out)), share


_COMMENTS = {
    "registry": "its model line: successive drafters, one of which serves",
    "prompts": 'a row is {"prompt": …} or {"messages": …}; held-out ones measure, and never train',
    "logs": 'a row is {"messages": …, "completion": …} or token ids; on a schedule set `since: 7d` or `last`',
    "rollout": "the target's answers, which SFT learns from",
    "sft": "where the line begins. If a drafter serves already: {init_from: FOLDER or hub id, steps: 0}",
    "assisted": "the target's answers, which OPD learns from",
    "opd": "one pass over the answers",
}
_ALONE = {  # comments of a config without OPD
    "sft": "where the line begins. If a drafter serves already: init_from: FOLDER or hub id, in place of drafter",
    "opd": "SFT alone is the refresh, without mining, OPD and the control",
}


def _as_text(sections: Mapping[str, Any], title: str) -> str:
    """Return the sections as YAML, a line for each, or for each of its fields if it is long."""
    lines, comments = [f"# {title}"], _COMMENTS if sections["opd"] else _COMMENTS | _ALONE
    for name, value in sections.items():
        comment = f"  # {comments[name]}" if name in comments else ""
        whole = f"{name}: {_as_yaml(value)}"
        if len(whole) + len(comment) <= _WIDTH or not isinstance(value, dict):
            lines.append(whole + comment)
        else:
            lines += [f"{name}:{comment}", *(f"  {field}: {_as_yaml(inner)}" for field, inner in value.items())]
    return "\n".join(lines) + "\n"


def _as_yaml(value: Any) -> str:
    """Return a value as YAML inside of {…}, quoted if it must be."""
    text = yaml.safe_dump({"v": value}, default_flow_style=True, allow_unicode=True, sort_keys=False, width=sys.maxsize)
    return text.removeprefix("{v: ").removesuffix("}\n")
