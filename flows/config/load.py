"""Reading a run's YAML file and `--set` overrides into a config model, with errors of one line."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.config.errors import OVERRIDE, PathKey, describe, short

ModelT = TypeVar("ModelT", bound=BaseModel)
OF_FILE = {"of_file": True}  # context of what a person wrote: fields that a run fills in are no part of it
_DEFAULT_KINDS = {"drafter": "dflash", "engine": "embedded"}  # of sections that may leave `kind` out


_NAMES = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")  # tags of what a field may be called, and of `<<`


class _Loader(yaml.SafeLoader):
    """YAML in which a field that stands twice is an error, and `1e-3` is a number as in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    "a field's name must be a text, no {…} or […]: put a template in quotes",
                    key.start_mark,
                )
            name = key.value
            if key.tag not in _NAMES:  # `on`, `no` and the like, numbers, dates, nothing
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"a field's name must be a text, and YAML reads {name or 'nothing'} as another value: write "
                    f'"{name}"',
                    key.start_mark,
                )
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"field {name!r} stands twice: keep one", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_config(path: Path | str, overrides: Sequence[str], model: type[ModelT]) -> ModelT:
    """The config of a run. `overrides` are texts such as `sft.steps=200` or `prompts.sources.0.count=64`.

    Raises `DraftsmithError`: one line that names the file, every field that is wrong, and what to do.
    """
    data = _read_yaml(Path(path))
    changed = [_apply_override(data, override) for override in overrides]
    return _validated(data, Path(path), changed, model)


def config_from_fields(fields: Mapping[str, Any], model: type[ModelT]) -> ModelT:
    """Return the config of fields that are given as objects.

    `extends` names a file relative to the current directory, or a shipped config. Raises `DraftsmithError` as
    `read_config` does.
    """
    data = _unshared(dict(fields))
    if (other := data.pop("extends", None)) is not None:
        data = merged(_read_yaml(_extended(other, Path(), "config")), data)
    return _validated(data, Path("config"), [], model)


def _validated(data: dict[str, Any], path: Path, changed: list[PathKey], model: type[ModelT]) -> ModelT:
    """changed: the fields that overrides have set."""
    try:
        config = model.model_validate(data, context=OF_FILE)
    except ValidationError as error:
        raise DraftsmithError(describe(error, path, changed, model, data)) from None
    for place in _taken_as_numbers(data, config):
        field = ".".join(map(str, place))
        where = f"{OVERRIDE} {field}" if place in changed else f"{path}: {field}"
        raise DraftsmithError(
            f"{where}: expected a number, got true or false (as yes, no, on, off are): change the value"
        )
    return config


def _taken_as_numbers(data: Any, value: Any, place: PathKey = ()) -> Iterator[PathKey]:
    """Where a number was made of a truth value: 1 or 0. data: as it was written; value: what was made of it."""
    if isinstance(data, bool) and type(value) in (int, float):
        yield place
    elif isinstance(data, dict):
        fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for name, inner in data.items():
            yield from _taken_as_numbers(inner, fields.get(name), (*place, name))
    elif isinstance(data, list) and isinstance(value, list | tuple):
        for index, (inner, made) in enumerate(zip(data, value, strict=False)):
            yield from _taken_as_numbers(inner, made, (*place, index))


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `change`: mappings field by field, everything else replaced.

    A mapping that is given another `kind`, or a `preset`, is replaced as a whole: fields of the old one would not fit.
    In place of a mapping, null takes it out: what it has by default holds again.
    """
    result = dict(base)
    for name, value in change.items():
        known = result.get(name)
        if isinstance(known, dict) and value is None:
            del result[name]
            continue
        if isinstance(known, dict) and isinstance(value, dict) and "preset" not in value:
            kind = known.get("kind", _DEFAULT_KINDS.get(name))
            value = merged(known, value) if value.get("kind", kind) == kind else value
        result[name] = value
    return result


def shipped_configs() -> Path:
    """Return the folder of the configs that Draftsmith comes with: `configs` beside `flows`, installed or not."""
    return Path(__file__).resolve().parents[2] / "configs"


def _read_yaml(path: Path, beneath: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a file; `extends: other.yaml` lays them over those of another file: relative to this one, else one
    of the shipped configs."""
    data, place = _read_mapping(path), path.resolve()
    if place in beneath:
        raise DraftsmithError(f"{path}: extends: the files extend each other: remove one of the lines")
    if (other := data.pop("extends", None)) is None:
        return data
    return merged(_read_yaml(_extended(other, path.parent, str(path)), (*beneath, place)), data)


def _extended(other: Any, folder: Path, where: str) -> Path:
    """Return the file that `extends` names: one in `folder`, else a shipped config."""
    if not isinstance(other, str):
        raise DraftsmithError(f"{where}: extends: expected the name of a YAML file, got {short(other)}")
    file, shipped = folder / other, shipped_configs() / other.removeprefix("configs/")
    if not file.exists() and not shipped.is_file():
        raise DraftsmithError(
            f"{where}: extends: {file} does not exist, nor is it a shipped config. Give a path relative to {folder}, "
            "or a name such as configs/model.yaml"
        )
    return file if file.exists() else shipped


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise DraftsmithError(f"{path}: no such config file: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DraftsmithError(f"{path}: cannot read the config: {reason}") from None
    try:
        data = _unshared(_parse(text, str(path)))
    except RecursionError:
        raise DraftsmithError(f"{path}: an alias stands inside what it means, or too deep: write it out") from None
    if not isinstance(data, dict):
        raise DraftsmithError(f"{path}: expected a mapping of fields such as 'name: my-run', got {short(data)}")
    return data


def _unshared(value: Any) -> Any:
    """A copy in which no two places are the same object: a YAML alias is a copy, an override changes one of them."""
    if isinstance(value, dict):
        return {name: _unshared(each) for name, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark and where != OVERRIDE else ""
        problem = error.problem or error.context or ""
        if problem.startswith("but found another document"):
            problem = "a second document begins here: keep one in a file"
        if error.context == "while scanning an alias":  # as which YAML reads what begins with a `*`
            problem = f"{problem}: put a text that begins with * in quotes"
        raise DraftsmithError(f"{where}{line}: not valid YAML: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise DraftsmithError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply_override(data: dict[str, Any], override: str) -> PathKey:
    """Set one field in `data`, creating sections on the way; returns the field's path."""
    name, separator, text = override.partition("=")
    steps = name.strip().split(".")
    if not separator or not all(steps):
        raise DraftsmithError(f"{OVERRIDE} {override}: expected FIELD=VALUE, such as {OVERRIDE} sft.steps=200")
    value = _parse(text, f"{OVERRIDE} {override}")
    here: Any = data
    path: list[int | str] = []
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        shown = ".".join(steps[:position]) or "the config"
        if isinstance(here, list):
            if not step.isdecimal() or int(step) >= len(here):
                raise DraftsmithError(
                    f"{OVERRIDE} {override}: {shown} is a list of {len(here)} in the file: "
                    + (f"use an index from 0 to {len(here) - 1}" if here else "set the whole list")
                )
            key: int | str = int(step)
        elif isinstance(here, dict):
            key = step
            if not last and here.get(key) is None:
                # A misspelt section must be named as it was written, so it is left to the validation below.
                here[key] = {}
        else:
            raise DraftsmithError(f"{OVERRIDE} {override}: {shown} is {short(here)} in the file, it has no fields")
        path.append(key)
        if last and value is None and isinstance(here, dict) and isinstance(here.get(key), dict):
            del here[key]  # as `merged` does
        elif last:
            here[key] = value
        else:
            here = here[key]
    return tuple(path)
