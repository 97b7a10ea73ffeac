"""Digest of the code that makes an artifact: a stage's module and every project module that it imports."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from artifacts.errors import DraftsmithError

PACKAGES = ("flows", "stages", "artifacts")
_PROJECT = Path(__file__).resolve().parents[1]


def code_digest(module: str, root: Path = _PROJECT) -> str:
    """sha256 over the closure of `module`: comments, docstrings and layout do not count, any other change does.

    Imports are followed wherever they stand (in functions too), with the `__init__` of every package on the way, and
    so is a string that is a module's dotted name: a registry of implementations imported by name.
    """
    if (start := _source(module, root)) is None:
        raise DraftsmithError(f"no module {module} under {root}: the stage's module must belong to {PACKAGES}")
    sources, waiting = {module: start}, [module]
    while waiting:
        current = waiting.pop()
        path, text = sources[current]
        package = current if path.name == "__init__.py" else current.rpartition(".")[0]
        for name in _with_parents([current, *_names(text, package)]):
            if name not in sources and (source := _source(name, root)) is not None:
                sources[name] = source
                waiting.append(name)
    digest = hashlib.sha256()
    for name, (_, text) in sorted(sources.items()):
        digest.update(f"{name}\0{_bare(text)}\0".encode())
    return digest.hexdigest()


def _source(module: str, root: Path) -> tuple[Path, str] | None:
    """File and text of a project module; None if `module` names something else."""
    if module.partition(".")[0] not in PACKAGES:
        return None
    base = root.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path, path.read_text(encoding="utf-8")
    return None


def _with_parents(names: list[str]) -> Iterator[str]:
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


@lru_cache(maxsize=1024)
def _bare(text: str) -> str:
    """The source without comments, layout and strings that are statements (docstrings)."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            code = [statement for statement in body if not _is_string(statement)]
            node.body = code or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_string(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


@lru_cache(maxsize=1024)
def _names(text: str, package: str) -> list[str]:
    """Dotted names that may be project modules: imported ones, and strings that look like one."""
    names: list[str] = []
    for node in ast.walk(ast.parse(_bare(text))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_dotted_name(node.value):
            names.append(node.value)
    return names


def _is_dotted_name(text: str) -> bool:
    return text.startswith(PACKAGES) and all(part.isidentifier() for part in text.split("."))
