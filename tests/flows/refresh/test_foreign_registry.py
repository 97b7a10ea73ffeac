"""A registry that others write to: identifiers are parsed where they enter, and fields of a later version are ignored.

MLflow's own entities stand for the answers of a server that may send anything.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Param, Run, RunData, RunInfo, RunTag
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag, RegisteredModel, RegisteredModelTag
from mlflow.entities.model_registry.registered_model_alias import RegisteredModelAlias

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home as current_home
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.refresh_runs import artifact_folders, close_dead_runs
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.champion import history, resolve, with_current_champion
from draftsmith.flows.refresh.config import RegistryConfig
from draftsmith.flows.refresh.versions import drafter_checkpoint, registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from tests.artifacts.test_identifiers import HOSTILE
from tests.flows.refresh.line_runs import config_of, finished, gated
from tests.test_properties import changed

LINE, DIGEST = "a-line", "0123456789abcdef" * 4
EVENT = {"at": "2026-01-01T00:00:00+00:00", "by": "a@b", "what": "promoted", "version": 1, "before": None, "why": "why"}
CHECK = {"at": "2026-01-02T00:00:00+00:00", "version": 1, "tau": 2.5, "decision": "current"}
ANSWERS = {"folder": "/store/logs/0123", "sha256": DIGEST, "target_digest": DIGEST, "tokenizer_digest": DIGEST}
# What a server answers, by where it enters; each place gets hostile values.
HONEST: dict[str, str] = {
    "name": LINE,
    "number": "1",
    "source": "file:///store/opd/0123",
    "alias": "1",
    "model: draftsmith.event.000000.1": json.dumps(EVENT),
    "model: draftsmith.drift.000000": json.dumps([CHECK]),
    "version: draftsmith.stage": "opd",
    "version: draftsmith.key": DIGEST,
    "version: draftsmith.content_id": DIGEST,
    "version: draftsmith.drafter_digest": DIGEST,
    "version: draftsmith.uploaded": "",
    "version: draftsmith.answers": json.dumps(ANSWERS),
    "version: draftsmith.figures": json.dumps({"all": {"tau": 2.5}}),
    "version: draftsmith.measured_with": "{}",
    "version: draftsmith.version_record": json.dumps({"decision": "better"}),
    "version: draftsmith.promoted_at": "2026-01-01T00:00:00+00:00",
    "version: draftsmith.read_until": "2026-01-01T00:00:00Z",
    "run: home": "host:/srv/home",
    "run: stage": "refresh",
    "run: key": "0123456789abcdef",
    "run: made.report": "report/0123456789abcdef#0123456789abcdef",
}
TEXTS = HOSTILE.filter(lambda value: isinstance(value, str))
RECORDS: dict[str, Any] = {**EVENT, **CHECK, **ANSWERS, "all": {"tau": 2.5}, "key": "../..", "content_id": "../.."}
JSON_TEXTS = changed(RECORDS).map(json.dumps)
EVENT_NAMES = st.builds(lambda text: f"model: draftsmith.event.{text}", st.text() | st.integers().map(str))


@contextmanager
def answering(answers: Mapping[str, str]) -> Iterator[None]:
    """Make MLflow's client return what a server answers."""

    def tags(prefix: str, kind: Callable[..., Any]) -> list[Any]:
        return [kind(name.removeprefix(prefix), text) for name, text in answers.items() if name.startswith(prefix)]

    def version(*_: object, **__: object) -> ModelVersion:
        return ModelVersion(
            answers["name"],
            answers["number"],
            0,
            source=answers["source"],
            tags=tags("version: ", ModelVersionTag),
            aliases=["champion"],
        )

    def model(*_: object) -> RegisteredModel:
        return RegisteredModel(
            answers["name"],
            aliases=[RegisteredModelAlias("champion", answers["alias"])],
            tags=tags("model: ", RegisteredModelTag),
        )

    def run(*_: object) -> Run:
        params = [Param("made.report", answers["run: made.report"])]
        labels = [RunTag(f"{name}", answers[f"run: {name}"]) for name in ("home", "stage", "key")]
        return Run(
            RunInfo("0" * 32, "0", "user", "RUNNING", 0, None, "active", run_name="weekly"), RunData((), params, labels)
        )

    with pytest.MonkeyPatch.context() as patch:
        for name, answer in (
            ("get_registered_model", model),
            ("get_model_version", version),
            ("search_model_versions", lambda *_, **__: [version()]),
            ("search_runs", lambda *_, **__: [run()]),
            ("get_run", run),
            ("set_tag", lambda *_: None),
            ("set_terminated", lambda *_: None),
        ):
            patch.setattr(MlflowClient, name, answer)
        yield


def uses(folder: Path) -> dict[str, Callable[[], object]]:
    """Return what reads a registry, by name."""
    lines, tracking = registry(), Tracking(current_home())
    return {
        "champion": lambda: lines.champion(LINE),
        "versions": lambda: lines.versions(LINE),
        "needed": lines.needed_content_ids,
        "events": lambda: lines.events(LINE),
        "champions": lambda: registry_commands.champions(Display(), LINE),
        "history": lambda: history(LINE, lines.versions(LINE)),
        "resolve": lambda: with_current_champion(RegistryConfig(name=LINE), lines.versions(LINE)),
        "checkpoint": lambda: drafter_checkpoint(lines.version(LINE, 1)),
        "export": lambda: registry_commands.export(Display(), LINE, folder / "exported"),
        "report": lambda: artifact_folders(tracking, "weekly", "report"),
        "dead runs": lambda: close_dead_runs(tracking, Store(current_home() / "store")),
    }


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A home, and next to it the files that a path leading out of it would reach."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        outside = Path(folder) / DRAFTER_FOLDER
        outside.mkdir()
        (outside / "config.json").write_text("{}")
        (Path(folder) / "manifest.json").write_text("{}")
        patch.setenv("DRAFTSMITH_HOME", f"{folder}/home")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        Tracking(current_home()).connect()
        yield Path(folder)


def tree(place: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and not path.is_relative_to(place / "home")
    }


def test_an_upload_without_an_address_is_none(place: Path) -> None:
    with answering({**HONEST, "version: draftsmith.uploaded": "\r"}), pytest.raises(DraftsmithError, match="not here"):
        uses(place)["export"]()


@pytest.mark.parametrize("entry", [*HONEST, "model: draftsmith.event.…"])
@given(data=st.data())
def test_whatever_a_registry_holds_nothing_outside_the_home_is_touched(
    entry: str, data: st.DataObject, place: Path
) -> None:
    name = data.draw(EVENT_NAMES) if entry.endswith("…") else entry
    value: Any = data.draw(TEXTS if not HONEST.get(name, "").startswith(("{", "[{")) else TEXTS | JSON_TEXTS)
    before = tree(place)
    with answering({**HONEST, name: value}):
        for use in uses(place).values():
            try:
                use()
            except DraftsmithError as error:
                assert str(error).isprintable() and "\n" not in str(error)
    assert tree(place) == before and not (place / "exported").exists()


def test_an_honest_registry_is_read(place: Path) -> None:
    with answering(HONEST):
        found = uses(place)
        assert [event.version for event in registry().events(LINE)] == [1]
        assert found["report"]() == {"report": "/srv/home/store/report/0123456789abcdef"}
        resolved = with_current_champion(RegistryConfig(name=LINE), registry().versions(LINE))
    assert resolved.champion is not None and resolved.champion.drafter_digest == DIGEST
    assert resolved.answers is not None and resolved.answers.sha256 == DIGEST


def with_a_later_field(value: Any) -> Any:
    """Return a record with a field that this version does not know, also in the records inside it."""
    if isinstance(value, list):
        return [with_a_later_field(each) for each in value]
    inner = {name: with_a_later_field(part) if isinstance(part, dict) else part for name, part in value.items()}
    return {**inner, "made_up": {"by": "a later version"}}


def test_fields_of_a_later_version_are_ignored(line: str, home: Path, drafters: list[Artifact]) -> None:
    store, config = Store(home / "store"), config_of(line)
    for drafter in drafters:
        finished(config, gated(store, drafter))
    client, lines = Tracking(home).connect()[0], registry()
    lines.add_drift(line, {**CHECK, "version": 2})
    confidence = dict.fromkeys(("scale", "shift", "fitted_on", "decisions", "confidence", "accepted", "error"), 1)
    lines.tag(lines.version(line, 2), {"answers": json.dumps(ANSWERS), "confidence": json.dumps(confidence)})
    for name, text in client.get_registered_model(line).tags.items():
        client.set_registered_model_tag(line, name, json.dumps(with_a_later_field(json.loads(text))))
    changed = set()
    for version in (lines.version(line, 1), lines.version(line, 2)):
        for name, text in version.tags.items():
            if text.startswith("{") and name not in ("heldout_shares", "suffixes"):  # by source
                lines.tag(version, {name: json.dumps(with_a_later_field(json.loads(text))), "made_up": "later"})
                changed.add(name)
    assert changed >= {"figures", "measured_with", "answers", "confidence"}

    display = Display()
    registry_commands.champions(display, line)
    planned = resolve(config)
    assert planned.champion is not None and planned.champion.version == 2
    registry_commands.rollback(display, line, "", dry_run=False)
    registry_commands.promote(display, f"{line}@2", "", dry_run=False)
    assert [event.version for event in lines.events(line)] == [1, 2, 1, 2]
