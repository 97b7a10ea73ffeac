"""Writes configs/reference.md: every field of a config with its type, default and meaning, read from the models.

Run `python -m tests.config_reference` after a field has changed; a test compares the page with the models.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.stages.runtime.stage import Config, NotInKey

PAGE = Path(__file__).parents[1] / "configs" / "reference.md"
_HEAD = """# Every config field

Generated from the models by `python -m tests.config_reference`; do not edit. A field in *italics* is no part of a cache
key: a new value makes no artifact again. Nor does one in section `stages`. [How a config is
written](README.md#how-a-config-is-written).
"""
Model = type[BaseModel]


def models_in(annotation: Any) -> Iterator[Model]:
    """Yield the models that a field's type names, in order."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def type_text(annotation: Any) -> str:
    """Return a type as a reader of YAML would say it."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        kinds = [kind for argument in arguments if argument is not type(None) if (kind := type_text(argument))]
        return " or ".join(dict.fromkeys(kinds))
    if origin in (list, tuple, set, frozenset):
        inner = " or ".join(dict.fromkeys(type_text(argument) for argument in arguments if argument is not ...))
        return f"list of {inner}"
    if origin is not None:
        return f"{type_text(arguments[0])}: {type_text(arguments[1])}" if len(arguments) == 2 else str(origin)
    names = {str: "text", int: "integer", float: "number", bool: "`true`, `false`", Path: "path", Any: "any"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def default_text(info: FieldInfo) -> str:
    """Return a field's default as YAML, or that it must be given."""
    value = info.get_default(call_default_factory=True) if info.default_factory is None else info.default_factory()  # type: ignore[call-arg]
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return ""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def summary(model: Model) -> str:
    """Return the first paragraph of a model's docstring."""
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def docstrings(model: Model) -> dict[str, str]:
    """Return the text that stands under a field in the source: name -> text, those of base classes too."""
    texts: dict[str, str] = {}
    for owner in reversed([each for each in model.__mro__ if issubclass(each, BaseModel) and each is not BaseModel]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in itertools.pairwise(body.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return texts


def rows(model: Model) -> Iterator[str]:
    """Yield a table row for each field of a model that a file may set."""
    filled = model.filled_in() if issubclass(model, Config) else []
    below = docstrings(model)
    for name, info in model.model_fields.items():
        if name in filled:
            continue
        shown = f"*`{name}`*" if any(isinstance(mark, NotInKey) for mark in info.metadata) else f"`{name}`"
        inner = list(dict.fromkeys(models_in(info.annotation)))
        links = " ".join(f"[{each.__name__}](#{each.__name__.lower()})" for each in inner)
        meaning = info.description or below.get(name) or ("; ".join(map(summary, inner)) if inner else "")
        cells = (shown, links or type_text(info.annotation), default_text(info), "" if name == "kind" else meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """Return the page: the sections of a refresh, then every model that they are made of, once."""
    waiting: list[Model] = [RefreshConfig]
    parts, done = [_HEAD], set[Model]()
    while waiting:
        model = waiting.pop(0)
        if model in done:
            continue
        done.add(model)
        table = "\n".join(rows(model))
        head = "| field | value | default | meaning |\n|---|---|---|---|"
        parts.append(f"## {model.__name__}\n\n{summary(model)}\n\n{head}\n{table}\n")
        filled = model.filled_in() if issubclass(model, Config) else []
        fields = [info for name, info in model.model_fields.items() if name not in filled]
        waiting += [each for info in fields for each in models_in(info.annotation)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
