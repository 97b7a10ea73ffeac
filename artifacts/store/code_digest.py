"""Digest of the code that makes an artifact: a stage's module and every project module that it imports.

What a module computes counts, where it lives does not: the store would otherwise make everything again whenever a file
is moved or a folder renamed. So a module is known by its source, and an import by the source that it leads to.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import platform
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError

PACKAGE = "draftsmith"
_SHORT = 16  # hex digits of a source's identity where it is only shown and compared
_ROOT = Path(__file__).resolve().parents[2]  # the folder that is the package: a checkout's, or an installed one


def code_digest(module: str, root: Path = _ROOT) -> str:
    """sha256 over the closure of `module`: comments, docstrings, layout and places of modules do not count, any other
    change does.

    Imports are followed wherever they stand (in functions too), with the `__init__` of every package on the way, and
    so is a string that is a module's dotted name: a registry of implementations imported by name.
    """
    sources = _closure(module, root)
    entries = set()
    for source in sources.values():
        leads_to = sorted(f"{what} {sources[target].identity}" for target, what in source.imports if target in sources)
        entries.add("\0".join([source.identity, *leads_to]))
    return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()


def code_modules(module: str, root: Path = _ROOT) -> dict[str, str]:
    """What the digest is over, module by module: the name of each, and the start of the sha256 of its bare source."""
    return {name: source.identity[:_SHORT] for name, source in sorted(_closure(module, root).items())}


def _closure(module: str, root: Path) -> dict[str, _Source]:
    """The sources of `module` and of every project module that it leads to, by name."""
    if _file(module, root) is None:
        raise DraftsmithError(f"no module {module} under {root}: the stage's module must belong to {PACKAGE}")
    sources: dict[str, _Source] = {}
    waiting = _with_parents(module)
    while waiting:
        name = waiting.pop()
        if name not in sources and (path := _file(name, root)) is not None:
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            sources[name] = _source(path.read_text(encoding="utf-8"), package, path)
            waiting += [parent for target, _ in sources[name].imports for parent in _with_parents(target)]
    return sources


@dataclass(frozen=True)
class _Source:
    """A module: what it says without its imports of the project, and what it imports from where."""

    identity: str  # sha256 of the bare source
    imports: tuple[tuple[str, str], ...]  # (dotted name that may be a module, the names taken from it)


def _file(module: str, root: Path) -> Path | None:
    """Of a project module; None if `module` names something else, or the package itself, which has no file."""
    package, *parts = module.split(".")
    if package != PACKAGE or not parts:
        return None
    base = root.joinpath(*parts)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


@lru_cache(maxsize=1024)
def _source(text: str, package: str, path: Path) -> _Source:
    """Of the text in this file. What was read once lies beside Python's compiled modules, where those are kept: parsing
    200 modules takes seconds."""
    try:
        memory = Path(importlib.util.cache_from_source(str(path))).with_suffix(".draftsmith.json")
    except NotImplementedError:  # a Python that compiles nothing to a file
        return _parse_source(text, package)
    stamp = hashlib.sha256("\0".join([_parser_version(), package, text]).encode()).hexdigest()
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: it is read again
        known = json.loads(memory.read_bytes())
        if known["stamp"] == stamp:
            return _Source(known["identity"], tuple((target, what) for target, what in known["imports"]))
    source = _parse_source(text, package)
    if not sys.dont_write_bytecode:
        with suppress(DraftsmithError):
            write_text(memory, json.dumps({"stamp": stamp, **asdict(source)}), durable=False)
    return source


@cache
def _parser_version() -> str:
    """What the reading of a source depends on beside the source: this module, and Python's grammar."""
    return f"{platform.python_version()} {Path(__file__).read_text(encoding='utf-8')}"


def _parse_source(text: str, package: str) -> _Source:
    bare = _BareSource(package)
    tree = bare.visit(ast.parse(text))
    return _Source(hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), tuple(bare.imports))


class _BareSource(ast.NodeTransformer):
    """Takes out strings that are statements (docstrings), imports of the project, and names of its modules."""

    def __init__(self, package: str) -> None:
        self._package = package
        self.imports: list[tuple[str, str]] = []

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            code = [statement for statement in body if not _is_string(statement)]
            node.body = code or [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        own = [alias for alias in node.names if alias.name.partition(".")[0] == PACKAGE]
        self.imports += [(alias.name, f"import as {alias.asname}") for alias in own]
        node.names = [alias for alias in node.names if alias not in own]
        return node if node.names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        base = node.module or ""
        if node.level:
            parents = self._package.split(".")[: len(self._package.split(".")) - node.level + 1]
            base = ".".join([*parents, base] if base else parents)
        if base.partition(".")[0] != PACKAGE:
            return node
        for alias in node.names:  # of a module, or a module of a package
            taken = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
            self.imports += [(base, taken), (f"{base}.{alias.name}", f"module as {alias.asname or alias.name}")]
        return None

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and _is_module_name(node.value):
            self.imports.append((node.value.partition(":")[0], "named"))
            return ast.copy_location(ast.Constant(""), node)
        return node


def _is_string(statement: ast.stmt) -> bool:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def _is_module_name(text: str) -> bool:
    """`draftsmith.stages.training.sft.stage`, or `draftsmith.flows.refresh.flow:refresh`."""
    module, _, attribute = text.partition(":")
    parts = module.split(".")
    return parts[0] == PACKAGE and len(parts) > 1 and all(p.isidentifier() for p in parts) and "." not in attribute
