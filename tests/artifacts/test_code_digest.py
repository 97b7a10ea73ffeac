"""The code digest follows every project import and ignores what cannot change a result."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifacts.code_digest import code_digest
from artifacts.errors import DraftsmithError

SOURCES = {
    "stages/__init__.py": "",
    "stages/rollout.py": '"""Rollout."""\nimport json\nfrom artifacts import tables\n\n\ndef run(x):\n    """Do."""\n'
    "    from stages.engines import embedded\n    return embedded.go(tables.N, x)  # a comment\n",
    "stages/engines/__init__.py": "KINDS = ['stages.engines.remote', 'stages.engines.absent']\n",
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
    before = code_digest("stages.rollout", project)
    text = (project / name).read_text()
    assert old in text
    (project / name).write_text(text.replace(old, new, 1))
    return before, code_digest("stages.rollout", project)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stages/rollout.py", "# a comment", "# another"),
        ("stages/rollout.py", '"""Do."""', '"""Do it, with care."""'),
        ("stages/rollout.py", '"""Rollout."""', ""),
        ("stages/rollout.py", "    return", "\n\n    return"),
        ("stages/sampling.py", "x + 1", "(x  +  1)"),
        ("stages/unrelated.py", "X = 1", "X = 2"),
    ],
)
def test_comments_docstrings_layout_and_unrelated_modules_do_not_count(
    project: Path, name: str, old: str, new: str
) -> None:
    before, after = digest_after(project, name, old, new)
    assert before == after


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("stages/rollout.py", "tables.N, x", "tables.N, x + 1"),
        ("artifacts/tables.py", "N = 1", "N = 2"),  # from package import module
        ("stages/engines/embedded.py", "n + x", "n - x"),  # imported inside a function
        ("stages/sampling.py", "x + 1", "x + 2"),  # a helper, through a relative import
        ("stages/engines/__init__.py", "KINDS = [", "KINDS = ['more', "),  # __init__ on the way
        ("stages/engines/remote.py", "'a'", "'b'"),  # named in a registry
        ("stages/__init__.py", "", "import os"),
    ],
)
def test_a_change_anywhere_in_the_closure_counts(project: Path, name: str, old: str, new: str) -> None:
    before, after = digest_after(project, name, old, new)
    assert before != after


def test_an_unknown_module_is_an_error(project: Path) -> None:
    with pytest.raises(DraftsmithError, match=r"no module stages\.absent"):
        code_digest("stages.absent", project)


def test_modules_of_the_project_have_digests_of_their_own() -> None:
    assert code_digest("stages.contract") != code_digest("artifacts.store")
