"""The code digest follows every project import, and ignores what cannot change a result."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store import code_digest as code_digest_module
from draftsmith.artifacts.store.code_digest import code_digest

SOURCES = {
    "stages/__init__.py": "",
    "stages/engines/body.py": '"""Rollout."""\nimport json\nfrom draftsmith.artifacts import tables\n\n\n'
    'def run(x):\n    """Do."""\n'
    "    from draftsmith.stages.engines import embedded\n    return embedded.go(tables.N, x)  # a comment\n",
    "stages/engines/__init__.py": "KINDS = ['draftsmith.stages.engines.remote', 'draftsmith.stages.engines.absent']\n",
    "stages/engines/embedded.py": "from ..sampling import draw\n\n\ndef go(n, x):\n    return draw(n + x)\n",
    "stages/engines/remote.py": "URL = 'a'\n",
    "stages/sampling.py": "def draw(x):\n    return x + 1\n",
    "stages/unrelated.py": "X = 1\n",
    "artifacts/__init__.py": "",
    "artifacts/tables.py": "N = 1\n",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def digest_after(project: Path, name: str, old: str, new: str) -> tuple[str, str]:
    before = code_digest("draftsmith.stages.engines.body", project)
    text = (project / name).read_text()
    assert old in text
    (project / name).write_text(text.replace(old, new, 1))
    return before, code_digest("draftsmith.stages.engines.body", project)


@pytest.mark.parametrize(
    ("changes", "name", "old", "new"),
    [
        (False, "stages/engines/body.py", "# a comment", "# another"),
        (False, "stages/engines/body.py", '"""Do."""', '"""Do it, with care."""'),
        (False, "stages/engines/body.py", '"""Rollout."""', ""),
        (False, "stages/engines/body.py", "    return", "\n\n    return"),
        (False, "stages/sampling.py", "x + 1", "(x  +  1)"),
        (False, "stages/unrelated.py", "X = 1", "X = 2"),
        (True, "stages/engines/body.py", "tables.N, x", "tables.N, x + 1"),
        (True, "artifacts/tables.py", "N = 1", "N = 2"),  # from package import module
        (True, "stages/engines/embedded.py", "n + x", "n - x"),  # imported inside a function
        (True, "stages/sampling.py", "x + 1", "x + 2"),  # a helper, through a relative import
        (True, "stages/engines/__init__.py", "KINDS = [", "KINDS = ['more', "),  # __init__ on the way
        (True, "stages/engines/remote.py", "'a'", "'b'"),  # named in a registry
        (True, "stages/__init__.py", "", "import os"),
    ],
)
def test_only_a_change_of_imported_code_changes_the_digest(
    changes: bool, name: str, old: str, new: str, project: Path
) -> None:
    """Comments, docstrings, layout and other modules do not."""
    before, after = digest_after(project, name, old, new)
    assert (before != after) == changes


def test_moving_modules_does_not_change_the_digest(project: Path) -> None:
    before = code_digest("draftsmith.stages.engines.body", project)
    (project / "stages/engines/sampling").mkdir()
    (project / "stages/engines/sampling/__init__.py").write_text('"""Sampling."""\n')
    (project / "stages/sampling.py").rename(project / "stages/engines/sampling/draw.py")
    engine = project / "stages/engines/embedded.py"
    engine.write_text(engine.read_text().replace("from ..sampling", "from draftsmith.stages.engines.sampling.draw"))
    (project / "stages/engines/remote.py").rename(project / "stages/remote.py")
    registry = project / "stages/engines/__init__.py"
    registry.write_text(registry.read_text().replace("stages.engines.remote", "stages.remote"))
    (project / "stages/engines/body.py").rename(project / "stages/collect.py")
    assert code_digest("draftsmith.stages.collect", project) == before


def test_importing_a_name_from_another_module_changes_the_digest(project: Path) -> None:
    (project / "stages/other.py").write_text(
        "def draw(x):\n    return x\n\n\nfrom draftsmith.stages.sampling import Y\n"
    )
    _, unchanged = digest_after(project, "stages/engines/embedded.py", "import draw", "import draw\nimport json")
    name = "stages/engines/embedded.py"
    (project / name).write_text((project / name).read_text() + "\n\nfrom draftsmith.stages.other import Z\n")
    before, after = digest_after(project, name, "from ..sampling import draw", "from ..other import draw")
    assert before != after and before != unchanged


def test_an_unknown_module_is_an_error(project: Path) -> None:
    for module in ("draftsmith.stages.absent", "stages.rollout", "draftsmith"):
        with pytest.raises(DraftsmithError, match=f"no module {module}"):
            code_digest(module, project)


def test_parsed_sources_are_cached_beside_compiled_modules_and_damage_is_detected(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest() -> str:
        code_digest_module._source.cache_clear()  # as in a new process
        return code_digest("draftsmith.stages.engines.body", project)

    monkeypatch.setattr("sys.dont_write_bytecode", True)
    plain = digest()
    assert not list(project.rglob("*.json"))
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    assert digest() == plain
    (kept,) = (project / "stages" / "__pycache__").glob("sampling.*.json")
    with monkeypatch.context() as unread:
        unread.setattr(code_digest_module, "_parse_source", pytest.fail)
        assert digest() == plain
    for damage in ("{", "[]", kept.read_text().replace('"stamp": "', '"stamp": "0'), "{}"):
        kept.write_text(damage)
        assert digest() == plain
    (project / "stages/sampling.py").write_text(SOURCES["stages/sampling.py"].replace("x + 1", "x + 2"))
    changed = digest()
    assert changed != plain
    kept.write_text(kept.read_text().replace('"identity": "', '"identity": "0'))
    assert digest() != changed, "the cache is used"
