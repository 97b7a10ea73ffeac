"""Reading a run's YAML file and `--set` overrides into a config model, with errors of one line."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from draftsmith.artifacts.errors import DraftsmithError

ModelT = TypeVar("ModelT", bound=BaseModel)
_PathKey = tuple[int | str, ...]
_OVERRIDE = "--set"
_DEFAULT_KINDS = {
    "drafter": "dflash",
    "engine": "embedded",
    "revision": "procedural",
}  # of sections that may leave `kind` out


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

    Raises `DraftsmithError`: one line that names the file, the field and what to do.
    """
    path = Path(path)
    data = _read_yaml(path)
    changed = [_apply_override(data, override) for override in overrides]
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise DraftsmithError(_describe(error, path, changed, model)) from None


def kind_of(path: Path | str) -> Any:
    """The field `kind` of a config file, which says what it describes; None without one."""
    return _read_yaml(Path(path)).get("kind")


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the fields of `change`: mappings field by field, everything else replaced.

    A mapping that is given another `kind`, or a `preset`, is replaced as a whole: fields of the old one would not fit.
    """
    result = dict(base)
    for name, value in change.items():
        known = result.get(name)
        if isinstance(known, dict) and isinstance(value, dict) and "preset" not in value:
            kind = known.get("kind", _DEFAULT_KINDS.get(name))
            value = merged(known, value) if value.get("kind", kind) == kind else value
        result[name] = value
    return result


def _read_yaml(path: Path, beneath: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a file; `extends: other.yaml` lays them over those of another file, found beside this one."""
    if path in beneath:
        raise DraftsmithError(f"{path}: extends: the files extend each other: remove one of the lines")
    data = _read_mapping(path)
    if (other := data.pop("extends", None)) is None:
        return data
    if not isinstance(other, str):
        raise DraftsmithError(f"{path}: extends: expected the name of a YAML file, got {_short(other)}")
    return merged(_read_yaml(path.parent / other, (*beneath, path)), data)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise DraftsmithError(f"{path}: no such config file: give the path of a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DraftsmithError(f"{path}: cannot read the config: {reason}") from None
    data = _unshared(_parse(text, str(path)))
    if not isinstance(data, dict):
        raise DraftsmithError(f"{path}: expected a mapping of fields such as 'name: my-run', got {_short(data)}")
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
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark and where != _OVERRIDE else ""
        raise DraftsmithError(f"{where}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise DraftsmithError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply_override(data: dict[str, Any], override: str) -> _PathKey:
    """Set one field in `data`, creating sections on the way; returns the field's path."""
    name, separator, text = override.partition("=")
    steps = name.strip().split(".")
    if not separator or not all(steps):
        raise DraftsmithError(f"{_OVERRIDE} {override}: expected FIELD=VALUE, such as {_OVERRIDE} sft.steps=200")
    value = _parse(text, f"{_OVERRIDE} {override}")
    here: Any = data
    path: list[int | str] = []
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        shown = ".".join(steps[:position]) or "the config"
        if isinstance(here, list):
            if not step.isdecimal() or int(step) >= len(here):
                raise DraftsmithError(
                    f"{_OVERRIDE} {override}: {shown} is a list of {len(here)} in the file: "
                    + (f"use an index from 0 to {len(here) - 1}" if here else "set the whole list")
                )
            key: int | str = int(step)
        elif isinstance(here, dict):
            key = step
            if not last and here.get(key) is None:
                # A misspelt section must be named as it was written, so it is left to the validation below.
                here[key] = {}
        else:
            raise DraftsmithError(f"{_OVERRIDE} {override}: {shown} is {_short(here)} in the file, it has no fields")
        path.append(key)
        if last:
            here[key] = value
        else:
            here = here[key]
    return tuple(path)


# -- errors ----------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a text (put it in quotes)",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "path_type": "a path",
    "none_required": "nothing (null)",
}


def _describe(error: ValidationError, path: Path, changed: list[_PathKey], model: type[BaseModel]) -> str:
    """The first error in one line; how many more there are at its end."""
    details = error.errors(include_url=False)
    # A misspelt field often makes another one "missing": the misspelling is the cause.
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    details = _choices_of_all_members(details, model)
    first = details[0]
    location = _path_of(first["loc"], model, keep_last=first["type"] == "extra_forbidden")
    field = ".".join(str(part) for part in location)
    overridden = any(change[: len(location)] == location or location[: len(change)] == change for change in changed)
    if not field:
        source = str(path)
    elif overridden and first["type"] != "missing":
        source = f"{_OVERRIDE} {field}"
    else:
        source = f"{path}: {field}"
    others = len(details) - 1
    more = f" (and {others} more error{'s' if others > 1 else ''})" if others else ""
    return f"{source}: {_problem(first, location, field, model)}{more}"


def _choices_of_all_members(details: list[Any], model: type[BaseModel]) -> list[Any]:
    """One error for a union of choices in place of one for each of its members."""

    def at(detail: Any) -> _PathKey | None:
        return _path_of(detail["loc"], model, keep_last=False) if detail["type"] == "literal_error" else None

    first, place = details[0], at(details[0])
    if place is None:
        return details
    same = [detail for detail in details if at(detail) == place]
    choices = [choice for detail in same for choice in re.findall(r"'[^']*'", detail["ctx"]["expected"])]
    merged_error = {**first, "msg": f"Input should be one of {', '.join(dict.fromkeys(choices))}"}
    return [merged_error, *(detail for detail in details if detail not in same)]


def _problem(detail: Any, location: _PathKey, field: str, model: type[BaseModel]) -> str:
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return _unknown_field(location, model)
    if kind == "missing":
        return f"this field is required: add it to the file or pass {_OVERRIDE} {field}=VALUE"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {_short(value)}: change the value"
    message = " ".join(detail["msg"].split()).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.removeprefix("Input should be ")
    if message != detail["msg"] and detail["msg"].startswith("Input should be "):
        return f"expected {message}, got {_short(value)}: change the value"
    return message


def _unknown_field(location: _PathKey, model: type[BaseModel]) -> str:
    name = str(location[-1])
    siblings = sorted({sibling for section in _sections(model, location[:-1]) for sibling in section.model_fields})
    prefix = [str(part) for part in location[:-1]]
    if name in siblings:  # of a section that comes in several kinds
        return f"a field of another kind of {'.'.join(prefix)}: remove it, or write the whole section anew"
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"unknown field, did you mean {'.'.join([*prefix, close[0]])}?"
    elsewhere = [path for path in _field_paths(model) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"unknown field here, did you mean {' or '.join(elsewhere[:3])}?"
    return f"unknown field, remove it or use one of: {', '.join(siblings)}"


def _path_of(location: Sequence[int | str], model: type[BaseModel], *, keep_last: bool) -> _PathKey:
    """Pydantic's location without the names of union members that it puts between the fields."""
    kept: list[int | str] = []
    for position, part in enumerate(location):
        known = (
            isinstance(part, int)
            or _is_open(model, kept)
            or any(part in section.model_fields for section in _sections(model, kept))
        )
        if known or (keep_last and position == len(location) - 1):
            kept.append(part)
    return tuple(kept)


def _is_open(model: type[BaseModel], path: Sequence[int | str]) -> bool:
    """Whether `path` leads to a mapping with free names."""
    return any(typing.get_origin(annotation) is dict for annotation in _annotations(model, path))


def _sections(model: type[BaseModel], path: Sequence[int | str]) -> list[type[BaseModel]]:
    """The models that may stand at `path`."""
    return [a for a in _annotations(model, path) if isinstance(a, type) and issubclass(a, BaseModel)]


def _annotations(model: type[BaseModel], path: Sequence[int | str]) -> list[Any]:
    found: list[Any] = [model]
    for part in path:
        found = [member for annotation in found for member in _step(annotation, part)]
    return found


def _step(annotation: Any, part: int | str) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if part in annotation.model_fields:
            yield from _members(annotation.model_fields[str(part)].annotation)
        return
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        yield from _members(arguments[1])
    elif isinstance(part, int) and arguments:
        yield from _members(arguments[0])


def _members(annotation: Any) -> Iterator[Any]:
    """The members of a union, or the annotation itself, without `Annotated`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _field_paths(model: type[BaseModel], prefix: str = "", depth: int = 0) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if depth < 4:
            for member in _members(field.annotation):
                if isinstance(member, type) and issubclass(member, BaseModel):
                    yield from _field_paths(member, f"{prefix}{name}.", depth + 1)


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
