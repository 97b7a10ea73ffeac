"""Constructions that are wrong wherever they stand are in no docstring, comment, string or page."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["artifacts", "configs", "flows", "stages", "tests"]
FILES = sorted(
    file
    for folder in [ROOT, *(ROOT / name for name in FOLDERS)]
    for file in (folder.glob("*") if folder == ROOT else folder.rglob("*"))
    if file.suffix in {".py", ".md", ".yaml"} and ".cache" not in file.parts and file != Path(__file__)
)
# construction -> what to write instead
WRONG = {
    r"\bas of `": "same as in `",
    r"\bin so many\b": "the name of the number",
    r"\bin vain\b": "to no effect",
    r"\botherwise than\b": "differently from",
    r"\b\w+: that (?:it|the|an?|is|are|was|were|has|have)": "a noun first: tokens that it reads",
    r"; left out: ": "by default",
    r"\bthe given[.,;:]": "the noun",
    r"\balso if\b": "even if",
    r"\b[Gg]ive another\b": "choose another",
    r"\banother \w+ than\b": "a different one from",
    r"\b(?:is|are) as (?:that|those) of\b": "like those of",
    r", for which of\b": "because which of",
}


def paragraphs(file: Path) -> Iterator[str]:
    """Yield the texts of a file: strings and comments of Python, blocks between empty lines of everything else."""
    text = file.read_text("utf-8")
    if file.suffix != ".py":
        yield from text.split("\n\n")
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
    block: list[str] = []
    last = 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield " ".join(block)
                block = []
            block.append(token.string.lstrip("# "))
            last = token.start[0]
    yield " ".join(block)


@pytest.fixture(scope="module")
def texts() -> list[tuple[Path, str]]:
    return [(file, " ".join(paragraph.split())) for file in FILES for paragraph in paragraphs(file)]


@pytest.mark.parametrize("construction", WRONG)
def test_no_text_has_it(construction: str, texts: list[tuple[Path, str]]) -> None:
    hits = [
        f"{file.relative_to(ROOT)}: {text[max(0, hit.start() - 40) : hit.end() + 20]!r}: write {WRONG[construction]!r}"
        for file, text in texts
        for hit in re.finditer(construction, text)
    ]
    assert not hits, "\n".join(hits)
