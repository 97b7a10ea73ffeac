"""Digest of the code that makes an artifact: a stage's module and every project module that it imports.

The digest depends on what a module contains, not on its path: moving a file or renaming a folder must not invalidate
every artifact. So a module is identified by its source, and an import by the source of the imported module.
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
_SHORT = 16  # hex digits of a source's identity in a manifest, where it is only shown and compared
_ROOT = Path(__file__).resolve().parents[2]  # the folder of the package, in a checkout or installed


def code_digest(module: str, root: Path = _ROOT) -> str:
    """Return the sha256 over `module` and all project modules that it imports, directly or not.

    Comments, docstrings, layout and paths of modules do not count; any other change does. Imports are followed
    everywhere, also in functions, with the `__init__` of every package on the way. A string that is a module's dotted
    name counts as an import: registries import implementations by name.
    """
    sources = _closure(module, root)
    entries = set()
    for source in sources.values():
        imports = sorted(f"{names} {sources[target].identity}" for target, names in source.imports if target in sources)
        entries.add("\0".join([source.identity, *imports]))
    return hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()


def code_modules(module: str, root: Path = _ROOT) -> dict[str, str]:
    """Return the modules that the digest covers: name -> start of the sha256 of its bare source."""
    return {name: source.identity[:_SHORT] for name, source in sorted(_closure(module, root).items())}


def _closure(module: str, root: Path) -> dict[str, _Source]:
    """Return the sources of `module` and of every project module that it imports, directly or not, by name."""
    if _file(module, root) is None:
        raise DraftsmithError(f"no module {module} under {root}. A stage's module must belong to {PACKAGE}.")
    sources: dict[str, _Source] = {}
    to_read = _with_parents(module)
    while to_read:
        name = to_read.pop()
        if name not in sources and (path := _file(name, root)) is not None:
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            sources[name] = _source(path.read_text(encoding="utf-8"), package, path)
            to_read += [parent for target, _ in sources[name].imports for parent in _with_parents(target)]
    return sources


@dataclass(frozen=True)
class _Source:
    """A parsed module: the identity of its source without project imports, and those imports."""

    identity: str  # sha256 of the bare source
    imports: tuple[tuple[str, str], ...]  # (dotted name that may be a module, names imported from it)


def _file(module: str, root: Path) -> Path | None:
    """Return the file of a project module; None for any other name, and for the package itself."""
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
    """Parse a module's text, with a cache next to Python's compiled modules: parsing 200 modules takes seconds."""
    try:
        cache_file = Path(importlib.util.cache_from_source(str(path))).with_suffix(".draftsmith.json")
    except NotImplementedError:  # this Python writes no compiled files
        return _parse_source(text, package)
    stamp = hashlib.sha256("\0".join([_parser_version(), package, text]).encode()).hexdigest()
    with suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged: parsed again
        cached = json.loads(cache_file.read_bytes())
        if cached["stamp"] == stamp:
            return _Source(cached["identity"], tuple((target, names) for target, names in cached["imports"]))
    source = _parse_source(text, package)
    if not sys.dont_write_bytecode:
        with suppress(DraftsmithError):
            write_text(cache_file, json.dumps({"stamp": stamp, **asdict(source)}), durable=False)
    return source


@cache
def _parser_version() -> str:
    """Return the version of the parser: Python's version and the text of this module."""
    return f"{platform.python_version()} {Path(__file__).read_text(encoding='utf-8')}"


def _parse_source(text: str, package: str) -> _Source:
    bare = _BareSource(package)
    tree = bare.visit(ast.parse(text))
    return _Source(hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), tuple(bare.imports))


class _BareSource(ast.NodeTransformer):
    """Removes docstrings, imports of project modules, and strings that name them; collects the imports."""

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
        project = [alias for alias in node.names if alias.name.partition(".")[0] == PACKAGE]
        self.imports += [(alias.name, f"import as {alias.asname}") for alias in project]
        node.names = [alias for alias in node.names if alias not in project]
        return node if node.names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        base = node.module or ""
        if node.level:
            parents = self._package.split(".")[: len(self._package.split(".")) - node.level + 1]
            base = ".".join([*parents, base] if base else parents)
        if base.partition(".")[0] != PACKAGE:
            return node
        for alias in node.names:  # a name in a module, or a module in a package
            imported = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
            self.imports += [(base, imported), (f"{base}.{alias.name}", f"module as {alias.asname or alias.name}")]
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
    """Return whether a string is like `draftsmith.stages.training.sft.stage` or `draftsmith.flows.api:refresh`."""
    module, _, attribute = text.partition(":")
    parts = module.split(".")
    return parts[0] == PACKAGE and len(parts) > 1 and all(p.isidentifier() for p in parts) and "." not in attribute
