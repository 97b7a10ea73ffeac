"""Describes the errors of a config field by field, for the person who writes it."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from draftsmith.artifacts.redaction import shown

PathKey = tuple[int | str, ...]  # a field's path: names of sections, and indices in lists
OVERRIDE = "--set"

_EXPECTED = {
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "a string (put it in quotes)",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
    "path_type": "a path",
    "none_required": "nothing (null)",
}
_QUOTED = re.compile(r"'[^']*'")
_LENGTH = {"too_short": "a list", "string_too_short": "a string"}


def describe_errors(
    error: ValidationError, path: Path, overridden: list[PathKey], model: type[BaseModel], written: dict[str, Any]
) -> str:
    """Return all errors in one line: the file, then each field with its problem, misspelt fields first.

    overridden: the fields that `--set` has set. written: the config before validation. Errors of fields that validation
    has added are reported only if there are no others.
    """
    details = error.errors(include_url=False)
    as_written = [detail for detail in details if detail["type"] == "missing" or _is_in(written, detail, model)]
    details = as_written or details
    # A misspelt field often makes another one "missing": the misspelling is the cause.
    details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
    problems: list[str] = []
    while details:
        first, *details = _with_alternatives(details, model)
        location = _location(first, model)
        field = ".".join(str(step) for step in location)
        touched = any(key[: len(location)] == location or location[: len(key)] == key for key in overridden)
        by_override = touched and field and first["type"] != "missing"
        where = f"{OVERRIDE} {field}: " if by_override else f"{field}: " if field else ""
        problem = f"{where}{_problem(first, location, field, model)}"
        problem += "" if problem.endswith((".", "?")) else "."
        file_named = any(line.startswith(f"{path}: ") for line in problems)
        problems.append(problem if by_override or file_named else f"{path}: {problem}")
    return " ".join(dict.fromkeys(problems))


def _location(detail: Any, model: type[BaseModel]) -> PathKey:
    return _field_path(detail["loc"], model, keep_last=detail["type"] == "extra_forbidden")


def _is_in(written: Any, detail: Any, model: type[BaseModel]) -> bool:
    for step in _location(detail, model):
        try:
            written = written[step]
        except (LookupError, TypeError):
            return False
    return True


def _with_alternatives(details: list[Any], model: type[BaseModel]) -> list[Any]:
    """Merge the errors of all members of a union of types and choices into one, the first."""
    first, location = details[0], _location(details[0], model)
    if first["type"] not in (*_EXPECTED, "literal_error"):
        return details
    alike = [detail for detail in details if detail["type"] in (*_EXPECTED, "literal_error")]
    same = [detail for detail in alike if _location(detail, model) == location]
    choices = [choice for detail in same for choice in _QUOTED.findall(detail.get("ctx", {}).get("expected", ""))]
    types = [_EXPECTED[detail["type"]] for detail in same if detail["type"] in _EXPECTED]
    expected = [f"one of {', '.join(dict.fromkeys(choices))}"] if choices else []
    return [
        {**first, "wanted": " or ".join(dict.fromkeys(expected + types))},
        *(detail for detail in details if detail not in same),
    ]


def _problem(detail: Any, location: PathKey, field: str, model: type[BaseModel]) -> str:
    kind, value = detail["type"], detail.get("input")
    if kind == "extra_forbidden":
        return _unknown_field(location, model)
    if kind == "missing":
        return f"this field is required. Add it to the file, or pass {OVERRIDE} {field}=VALUE."
    expected = detail.get("wanted")
    if not expected and not isinstance(value, dict) and kind != "value_error" and models_at(model, location):
        expected = _EXPECTED["model_type"]  # a section with several kinds
    if expected:
        return f"expected {expected}, got {show_value(value)}. Change the value."
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _unknown_kind(detail)
    if kind in _LENGTH:
        fewest = detail["ctx"]["min_length"]
        return f"expected {_LENGTH[kind]} of length {fewest} or more, got {show_value(value)}. Change the value."
    if kind == "string_pattern_mismatch":
        return f"expected a string that matches {detail['ctx']['pattern']}, got {show_value(value)}. Change the value."
    message = " ".join(detail["msg"].split()).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message.removeprefix("Input should be ")
    if message != detail["msg"] and detail["msg"].startswith("Input should be "):
        return f"expected {message}, got {show_value(value)}. Change the value."
    return message


def _unknown_kind(detail: Any) -> str:
    name, value = str(detail["ctx"]["discriminator"]).strip("'"), detail.get("input")
    choices = detail["ctx"].get("expected_tags", "")
    if name.endswith("()"):  # a function that finds the kind of a section without the field
        name = "kind"
    if isinstance(value, dict) and name in value:
        return f"{name} is {show_value(value[name])}. Use one of {choices}."
    return f"the field {name} is missing; it decides which other fields there are. Add it."


def _unknown_field(location: PathKey, model: type[BaseModel]) -> str:
    name = str(location[-1])
    siblings = sorted({sibling for section in models_at(model, location[:-1]) for sibling in section.model_fields})
    prefix = [str(step) for step in location[:-1]]
    if name in siblings:
        return f"this field belongs to another kind of {'.'.join(prefix)}. Remove it, or rewrite the whole section."
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.6)
    if close:
        return f"unknown field. Did you mean {'.'.join([*prefix, close[0]])}?"
    elsewhere = dict.fromkeys(path for path in field_paths(model) if path.rpartition(".")[2] == name)
    if elsewhere:
        return f"unknown field here. Did you mean {' or '.join(list(elsewhere)[:3])}?"
    return f"unknown field. Remove it, or use one of: {', '.join(siblings)}."


def _field_path(location: Sequence[int | str], model: type[BaseModel], *, keep_last: bool) -> PathKey:
    """Remove the names of union members that pydantic puts between the fields of a location."""
    kept: list[int | str] = []
    for index, step in enumerate(location):
        is_field = (
            isinstance(step, int)
            or _is_open(model, kept)
            or any(step in section.model_fields for section in models_at(model, kept))
        )
        if is_field or (keep_last and index == len(location) - 1):
            kept.append(step)
    return tuple(kept)


def _is_open(model: type[BaseModel], path: Sequence[int | str]) -> bool:
    """Return whether `path` leads to a mapping with free names."""
    return any(typing.get_origin(annotation) is dict for annotation in _annotations(model, path))


def models_at(model: type[BaseModel], path: Sequence[int | str]) -> list[type[BaseModel]]:
    """Return the models that may stand at `path`."""
    return [a for a in _annotations(model, path) if isinstance(a, type) and issubclass(a, BaseModel)]


def _annotations(model: type[BaseModel], path: Sequence[int | str]) -> list[Any]:
    annotations: list[Any] = [model]
    for step in path:
        annotations = [member for annotation in annotations for member in _member_annotations(annotation, step)]
    return annotations


def _member_annotations(annotation: Any, step: int | str) -> Iterator[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if step in annotation.model_fields:
            yield from _members(annotation.model_fields[str(step)].annotation)
        return
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is dict:
        yield from _members(arguments[1])
    elif isinstance(step, int) and arguments:
        yield from _members(arguments[0])


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the members of a union, or the annotation itself, without `Annotated`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _members(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for member in typing.get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def field_paths(model: type[BaseModel], prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Yield all fields of a config, with their sections: `sft.steps`."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if depth < 4:
            for member in _members(field.annotation):
                if isinstance(member, type) and issubclass(member, BaseModel):
                    yield from field_paths(member, f"{prefix}{name}.", depth + 1)


def show_value(value: Any) -> str:
    """Return a config value as errors show it: short, on one line, without secrets."""
    if value is None:
        return "nothing"
    text = shown(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
