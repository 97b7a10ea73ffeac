"""Whatever a file holds, reading it gives a value or one of our errors of one line: never a traceback.

Few examples by default; `HYPOTHESIS_PROFILE=thorough` tries many (`tests/conftest.py`).
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.redaction import find_secrets, redacted
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import MANIFEST, read_manifest
from draftsmith.flows.config.load import read_config
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.stages.data.row_formats import RejectedRow, row_messages
from tests.test_bad_input import base
from tests.testbed.artifacts import committed

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXT)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
FIELDS = st.sampled_from(["messages", "conversations", "prompt", "completion"])
TURN = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "type", "text"]), JSON, max_size=4)
ROW = st.dictionaries(
    st.one_of(FIELDS, TEXT),
    st.one_of(JSON, st.lists(TURN, max_size=3), st.sampled_from(["user", "assistant"])),
    max_size=6,
)


@contextmanager
def ours() -> Iterator[None]:
    """Nothing but our own error, in one line, or the reason why a row is set aside may come out."""
    try:
        yield
    except RejectedRow as reason:
        assert "\n" not in str(reason)
    except DraftsmithError as error:
        assert str(error) and "\n" not in str(error).strip()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a nested one."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def replaced(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    changed = copy.deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return changed


def changed(document: Any) -> st.SearchStrategy[Any]:
    """The document with other values in one or two places."""
    one = st.builds(lambda path, value: (path, value), st.sampled_from(sorted(places(document), key=str)), JSON)
    return one.map(lambda change: replaced(document, *change))


def with_file(name: str, content: bytes, read: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder, ours():
        (Path(folder) / name).write_bytes(content)
        read(Path(folder) / name)


@given(st.one_of(st.binary(max_size=60), TEXT.map(str.encode)))
def test_any_bytes_as_a_config(content: bytes) -> None:
    with_file("run.yaml", content, lambda path: read_config(path, [], RefreshConfig))


@given(changed(base()))
def test_any_value_in_a_config(config: Any) -> None:
    text = yaml.safe_dump(config, allow_unicode=True).encode()
    with_file("run.yaml", text, lambda path: read_config(path, [], RefreshConfig))


@given(st.lists(st.one_of(TEXT, st.builds("{}={}".format, st.sampled_from(["sft.steps", "a.b", "name"]), TEXT))))
def test_any_override_is_applied_or_refused_with_a_reason(overrides: list[str]) -> None:
    with_file("run.yaml", yaml.safe_dump(base()).encode(), lambda path: read_config(path, overrides, RefreshConfig))


@given(JSON)
def test_a_config_without_secrets_has_none_after_masking(config: Any) -> None:
    for place, why in find_secrets(config):
        assert isinstance(place, str) and why
    text = json.dumps(config)
    assert redacted(redacted(text)) == redacted(text)


@given(ROW, st.one_of(st.none(), FIELDS))
def test_any_prompt_row_is_read_or_refused_with_a_reason(row: dict[str, Any], name: str | None) -> None:
    with ours():
        assert row_messages(row, name, "rows.jsonl, row 1")


def manifest() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        ref = committed(Store(Path(folder)), "sft", {"data.txt": "x"}, config={"a": 1})
        return json.loads((ref.path / MANIFEST).read_text())


MADE = manifest()


@given(st.one_of(changed(MADE).map(lambda data: json.dumps(data).encode()), st.binary(max_size=40)))
def test_any_manifest_is_read_or_refused_with_a_reason(content: bytes) -> None:
    with_file(MANIFEST, content, lambda path: read_manifest(path.parent))


@given(st.text(alphabet="./ab\0\\", min_size=1, max_size=12))
def test_no_file_of_a_manifest_leads_out_of_its_folder(name: str) -> None:
    data = {**MADE, "files": {name: MADE["files"]["data.txt"]}}
    data.pop("checksum", None)

    def read(path: Path) -> None:
        for file in read_manifest(path.parent).files:
            assert (path.parent / file).resolve().is_relative_to(path.parent.resolve())

    with_file(MANIFEST, json.dumps(data).encode(), read)
