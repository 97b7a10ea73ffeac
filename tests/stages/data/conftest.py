"""Fixtures of the data's tests: targets with other chat templates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.testbed.random_target import resolved


@pytest.fixture(scope="session")
def with_template(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the artifact of the tiny target with another chat template; with none for ""."""
    made: dict[str, Path] = {}

    def of(template: str) -> Path:
        if template not in made:
            folder = tmp_path_factory.mktemp("templated")
            shutil.copytree(tiny_target, folder / "model")
            (folder / "model" / "chat_template.jinja").unlink()
            if template:
                (folder / "model" / "chat_template.jinja").write_text(template)
            made[template] = resolved(folder)
        return made[template]

    return of
