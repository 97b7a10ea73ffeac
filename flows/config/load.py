"""Loads a run's YAML file and `--set` overrides into a config model, with errors of one line."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.config.errors import OVERRIDE, PathKey, describe_errors, show_value

ModelT = TypeVar("ModelT", bound=BaseModel)
Fields = dict[str, Any]  # of a config, as YAML gives them
FROM_FILE = {"from_file": True}  # validation context: a person wrote this config, the run has filled in nothing
_MAX_VALUES = 100_000  # of a file, with its aliases written out
_DEFAULT_KINDS = {"drafter": "dflash", "engine": "embedded"}  # of sections that may leave `kind` out
_OPTIONAL = ("opd",)  # sections that null leaves out of a run, although they have defaults

_TEXT, _MERGE, _INTEGER = (f"tag:yaml.org,2002:{name}" for name in ("str", "merge", "int"))  # merge: of `<<`


class _Loader(yaml.SafeLoader):
    """Loads YAML in which a repeated field is an error, and `1e-3` is a number as in YAML 1.2."""

    def get_single_node(self) -> yaml.Node | None:
        """Return the file's values. Raises before aliases are expanded to too many."""
        node = super().get_single_node()
        if node is not None and _count_values(node, {}) > _MAX_VALUES:
            problem = f"with its aliases expanded it has over {_MAX_VALUES:,} values. Use fewer aliases."
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _name_error(key, "a field's name must be a string, no {…} or […]. Put a template in quotes.")
            name = key.value
            if key.tag == _INTEGER:  # a name of gate.loads
                key.tag = _TEXT
            if key.tag not in (_TEXT, _MERGE):  # `on`, `no` and the like, fractions, dates, nothing
                value = name or "nothing"
                raise _name_error(
                    key, f'a field\'s name must be a string, and YAML reads {value} differently. Write "{name}".'
                )
            if name in seen:
                raise _name_error(key, f"field {name!r} appears twice. Keep one.")
            seen.add(name)
        return super().construct_mapping(node, deep)


def _count_values(node: yaml.Node, counts: dict[yaml.Node, int]) -> int:
    """Return the number of values under a node, with aliases expanded. counts: those of nodes already counted."""
    if node not in counts:
        inner = () if isinstance(node, yaml.ScalarNode) else node.value
        inner = chain(*inner) if isinstance(node, yaml.MappingNode) else inner
        counts[node] = 1 + sum(_count_values(child, counts) for child in inner)
    return counts[node]


def _name_error(key: yaml.Node, message: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, message, key.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_config(path: Path | str, overrides: Sequence[str], model: type[ModelT]) -> ModelT:
    """Return the config of a run.

    overrides: strings such as `sft.steps=200` or `prompts.sources.0.count=64`.

    Raises `DraftsmithError` with one line: the file, every field that is wrong, and the remedy.
    """
    data = _read_yaml(Path(path))
    overridden = [_apply_override(data, override) for override in overrides]
    return _validate(data, Path(path), overridden, model)


def config_from_fields(fields: Mapping[str, object], model: type[ModelT]) -> ModelT:
    """Return the config with these fields, given as Python objects.

    `extends` names a file relative to the current directory, or a shipped config. Raises `DraftsmithError` as
    `read_config` does.
    """
    data = _unshared(dict(fields))
    if (other := data.pop("extends", None)) is not None:
        data = merge_configs(_read_yaml(_extended_file(other, Path(), "config")), data)
    return _validate(data, Path("config"), [], model)


def _validate(data: Fields, path: Path, overridden: list[PathKey], model: type[ModelT]) -> ModelT:
    try:
        config = model.model_validate(data, context=FROM_FILE)
    except ValidationError as error:
        raise DraftsmithError(describe_errors(error, path, overridden, model, data)) from None
    for key in _booleans_read_as_numbers(data, config):
        field = ".".join(map(str, key))
        where = f"{OVERRIDE} {field}" if key in overridden else f"{path}: {field}"
        raise DraftsmithError(
            f"{where}: expected a number, got true or false (as YAML reads yes, no, on, off). Change the value."
        )
    return config


def _booleans_read_as_numbers(data: Any, value: Any, key: PathKey = ()) -> Iterator[PathKey]:
    """Yield the fields in which validation turned true or false into 1 or 0.

    data: the value as written; value: the same after validation.
    """
    if isinstance(data, bool) and type(value) in (int, float):
        yield key
    elif isinstance(data, dict):
        fields = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for name, inner in data.items():
            yield from _booleans_read_as_numbers(inner, fields.get(name), (*key, name))
    elif isinstance(data, list) and isinstance(value, list | tuple):
        for index, (inner, validated) in enumerate(zip(data, value, strict=False)):
            yield from _booleans_read_as_numbers(inner, validated, (*key, index))


def merge_configs(base: Fields, change: Fields) -> Fields:
    """Return `base` with the fields of `change`: mappings are merged field by field, everything else is replaced.

    A mapping with another `kind`, or a `preset`, replaces the old one as a whole, whose fields would not fit. Null
    removes a mapping, so that its defaults hold again; of `opd` it stays, and leaves the section out.
    """
    result = dict(base)
    for name, value in change.items():
        old = result.get(name)
        if _restores_defaults(name, old, value):
            del result[name]
            continue
        if isinstance(old, dict) and isinstance(value, dict) and "preset" not in value:
            kind = old.get("kind", _DEFAULT_KINDS.get(name))
            value = merge_configs(old, value) if value.get("kind", kind) == kind else value
        result[name] = value
    return result


def _restores_defaults(name: str, old: Any, value: Any) -> bool:
    """Return whether a value removes a section, so that its defaults hold again."""
    return isinstance(old, dict) and value is None and name not in _OPTIONAL


def shipped_configs() -> Path:
    """Return the folder of the shipped configs: `configs` next to `flows`, installed or not."""
    return Path(__file__).resolve().parents[2] / "configs"


def _read_yaml(path: Path, extending: tuple[Path, ...] = ()) -> Fields:
    """Return the fields of a file, merged over those of the file that it extends.

    extending: the files that extend this one.
    """
    data, resolved = _read_mapping(path), path.resolve()
    if resolved in extending:
        raise DraftsmithError(f"{path}: extends: the files extend each other. Remove one of the lines.")
    if (other := data.pop("extends", None)) is None:
        return data
    return merge_configs(_read_yaml(_extended_file(other, path.parent, str(path)), (*extending, resolved)), data)


def _extended_file(other: Any, folder: Path, where: str) -> Path:
    """Return the file that `extends` names: one in `folder`, else a shipped config."""
    if not isinstance(other, str):
        raise DraftsmithError(f"{where}: extends: expected a file name, got {show_value(other)}. Name a YAML file.")
    file, shipped = folder / other, shipped_configs() / other.removeprefix("configs/")
    if not file.exists() and not shipped.is_file():
        raise DraftsmithError(
            f"{where}: extends: {file} does not exist, nor is it a shipped config. Give a path relative to {folder}, "
            "or a name such as configs/model.yaml."
        )
    return file if file.exists() else shipped


def _read_mapping(path: Path) -> Fields:
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise DraftsmithError(f"{path}: no such config file. Give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DraftsmithError(
            f"{path}: cannot read the config: {reason}. Give the path of a readable YAML file."
        ) from None
    data = _parse(text, str(path))
    if not isinstance(data, dict):
        raise DraftsmithError(
            f"{path}: expected a mapping of fields, got {show_value(data)}. Write fields such as 'name: my-run'."
        )
    return data


def _unshared(value: Any) -> Any:
    """Return a copy in which every YAML alias is a separate object, so that an override changes only one field."""
    if isinstance(value, dict):
        return {name: _unshared(inner) for name, inner in value.items()}
    return [_unshared(inner) for inner in value] if isinstance(value, list) else value


def _parse(text: str, where: str) -> Any:
    try:
        return _unshared(yaml.load(text, Loader=_Loader))
    except RecursionError:
        raise DraftsmithError(f"{where}: an alias contains itself, or is nested too deep. Expand it.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark and where != OVERRIDE else ""
        problem = error.problem or error.context or ""
        if problem.startswith("but found another document"):
            problem = "a second document begins here. Keep one in a file."
        if error.context == "while scanning an alias":
            problem = f"{problem}. Put a string that begins with * in quotes."
        raise DraftsmithError(f"{where}{line}: not valid YAML: {problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise DraftsmithError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply_override(data: Fields, override: str) -> PathKey:
    """Set one field in `data`, with new sections on the way if needed, and return its key."""
    name, separator, text = override.partition("=")
    steps = name.strip().split(".")
    if not separator or not all(steps):
        raise DraftsmithError(f"{OVERRIDE} {override}: expected FIELD=VALUE, such as {OVERRIDE} sft.steps=200.")
    value = _parse(text, f"{OVERRIDE} {override}")
    section: Any = data
    path: list[int | str] = []
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        section_name = ".".join(steps[:index]) or "the config"
        if isinstance(section, list):
            if not step.isdecimal() or int(step) >= len(section):
                raise DraftsmithError(
                    f"{OVERRIDE} {override}: {section_name} is a list of {len(section)} in the file. "
                    + (f"Use an index from 0 to {len(section) - 1}." if section else "Set the whole list.")
                )
            key: int | str = int(step)
        elif isinstance(section, dict):
            key = step
            if not last and section.get(key) is None:
                # Validation reports a misspelt section under the name that was written.
                section[key] = {}
        else:
            raise DraftsmithError(
                f"{OVERRIDE} {override}: {section_name} is {show_value(section)} in the file, without fields. Set "
                f"{section_name} itself."
            )
        path.append(key)
        if last and isinstance(section, dict) and _restores_defaults(step, section.get(key), value):
            del section[key]
        elif last:
            section[key] = value
        else:
            section = section[key]
    return tuple(path)
