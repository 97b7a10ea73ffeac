"""Model lines in MLflow's model registry: versions that point to artifacts, and the one that serves.

A line is a registered model. A version is one drafter: its source is the artifact in the store, and its tags describe
it, its target and its metrics (`version_record` has most of them). The alias `champion` is the version that serves,
`previous` the champion before it, and `challenger` the last version that was compared with the champion. Each event of
a line (promotion, rollback, drift check) is a tag of the registered model. Unlike in runs, a failure of MLflow is an
error here: a promotion that is not recorded did not happen.

A home also records in which MLflow servers it registered versions: only together they know which artifacts are needed.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, ValidationError

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.errors import DraftsmithError, RetryableError, find_disk_error, from_os_error
from draftsmith.artifacts.identifiers import (
    IdentifierError,
    file_path,
    iso_time,
    line_name,
    plain_name,
    run_id,
    sha256_digest,
    upload_address,
    version_number,
)
from draftsmith.artifacts.locks import Lock, locked, user_name
from draftsmith.artifacts.results.base import Record, SetMetrics
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.client import sqlite_file, weights_timeout
from draftsmith.artifacts.tracking.runs import LOCKED, SCHEMA_MISMATCH, Tracking, first_line, is_permission_error
from draftsmith.artifacts.tracking.terms import escape_markdown, paginate

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
_TAG, _EVENT, _DRIFT = "draftsmith.", "draftsmith.event.", "draftsmith.drift."
_EVENT_NAME = re.compile(re.escape(_EVENT) + r"(\d{6})\.\d{1,9}")
_IDENTITY = ("stage", "key", "content_id")
# Tags of a version that are shown; and one for each server that drafts with it. All others are one tag, a JSON object.
_SHOWN = ("tau", "speedup", "outcome", "rules", "promoted_at", "refreshed_at", "uploaded")
_RECORD, _SERVER = "version_record", "server."  # MLflow sorts them by name, and this one is long
_MOST_CHECKS_CHARS = 4500  # of drift checks in one tag: a database keeps 5,000
# Tags with the metrics of a version at its promotion, which drift checks compare with.
PROMOTION_TAGS = (
    *("figures", "measured_with", "tau", "tau_interval", "speedup", "speedup_interval"),
    *("decision", "outcome", "rules", "report"),
)
_DRAFTER = "drafter"  # folder of an artifact that servers load, and of its copy in MLflow
# Parts of error messages for which a retry does not help.
_PERMANENT = ("not a database", "malformed", "readonly", "unable to open database", SCHEMA_MISMATCH)
TRACKERS_FILE = "registered-in"  # file in the home: every MLflow with versions of its drafters, one per line
_OWN_DATABASE = "mlflow.db"  # stands for the home's own database, which moves with it
_AS_THE_RUNS = "Set MLFLOW_TRACKING_URI as it was in those runs"
PROMOTED, BY_HAND, ROLLED_BACK = "promoted", "promoted by hand", "rolled back to"  # values of `LineEvent.what`
_RIVAL_S, _POLL_S = 60.0, 1.0  # how long a promotion waits for the end of another home's, and how often it looks
_CORRECT = "Correct it in MLflow, or remove it"
# Parsers of tags whose values become parts of paths, requests and plans. A tag may be missing, or empty.
_PARSERS: Mapping[str, Callable[..., str]] = {
    **dict.fromkeys(("key", "content_id", "drafter_digest"), sha256_digest),
    **dict.fromkeys(("promoted_at", "refreshed_at", "read_until"), iso_time),
    "stage": plain_name,
}
RecordT = TypeVar("RecordT", bound=Record)
Json = TypeVar("Json", dict[str, Any], list[Any])


class ChampionMovedError(DraftsmithError):
    """Another refresh has promoted a drafter of this line meanwhile."""


@dataclass(frozen=True)
class Version:
    """One drafter of a line."""

    line: str
    number: int
    source: str  # the artifact's URI
    stage: str
    key: str
    content_id: str
    tags: Mapping[str, str] = field(default_factory=dict)  # without the prefix `draftsmith.`
    aliases: tuple[str, ...] = ()
    created_at: str = ""  # ISO 8601, UTC
    run_id: str = ""  # of the refresh in MLflow that registered it

    def __str__(self) -> str:
        return f"{self.line} version {self.number}"

    @property
    def path(self) -> Path:
        """Return the artifact's folder, on a machine that shares the store."""
        return file_path(self.source, where=f"{self}: source")

    @property
    def uploaded(self) -> str:
        """Return the drafter's address in MLflow's artifact store (`runs:/ID/drafter`); empty if not uploaded."""
        addresses = self.tags.get("uploaded", "").split()
        return addresses[0] if len(addresses) == 1 else ""  # several: adapters and their base, of an earlier release

    @property
    def waits(self) -> bool:
        """Return whether the gate passed it and its promotion still waits for approval."""
        return self.tags.get("outcome") == "promoted" and "promoted_at" not in self.tags

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Return its metrics at its promotion by slice (tag `figures`); empty if nothing was measured."""
        figures, where = self.json("figures", {}), f"{self}: tag {_TAG}figures"
        return {name: _validated(SetMetrics, metrics, where).to_json() for name, metrics in figures.items()}

    def json(self, tag: str, default: Json) -> Json:
        """Return the value of a tag that holds JSON, or the default without the tag. Raises DraftsmithError."""
        if not (text := self.tags.get(tag)):
            return default
        value = _parsed_json(text, where := f"{self}: tag {_TAG}{tag}")
        if not isinstance(value, type(default)):
            kind = "object" if isinstance(default, dict) else "list"
            raise DraftsmithError(f"{where}: not a JSON {kind}. {_CORRECT}.")
        return value


class LineEvent(Record):
    """A promotion or rollback of a line."""

    at: str  # ISO 8601, UTC
    by: str  # user@host
    what: str  # promoted, promoted by hand, rolled back to
    version: int = Field(ge=1)
    before: int | None = Field(ge=1)  # version of the champion until then
    why: str


class DriftCheck(SetMetrics):
    """The drift check of a champion: its metrics on all prompts, and the decision."""

    at: str  # ISO 8601, UTC
    version: int
    decision: str = ""


class Registry:
    """The model lines in one MLflow."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    # -- reading -------------------------------------------------------------------------------------------------

    def champion(self, line: str) -> Version | None:
        """Return the version that serves; None if there is none."""
        return self.alias(line, CHAMPION)

    def alias(self, line: str, alias: str) -> Version | None:
        """Return the version with an alias; None if the line or the alias does not exist."""
        with self._client() as client:
            model = self._model(client, line)
            number = None if model is None else model.aliases.get(alias)
            return None if number is None else _version(client.get_model_version(line, number))

    def version(self, line: str, number: int) -> Version:
        """Return a version by number. Raises DraftsmithError if it does not exist."""
        with self._client() as client:
            from mlflow.exceptions import MlflowException  # here: importing mlflow takes seconds

            try:
                return _version(client.get_model_version(line, str(number)))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        numbers = ", ".join(str(version.number) for version in self.versions(line)) or "none"
        raise DraftsmithError(f"{line} has no version {number}. It has {numbers} (`draftsmith champions {line}`).")

    def versions(self, line: str) -> list[Version]:
        """Return the versions of a line, oldest first; none if the line does not exist."""
        with self._client() as client:
            if (model := self._model(client, line)) is None:
                return []
            versions = client.search_model_versions(f"name = '{line}'", max_results=10_000)
            for version in versions:  # a search returns no aliases, and one request per version is slow
                aliases = [name for name, number in model.aliases.items() if int(number) == int(version.version)]
                version.aliases = aliases
            return sorted(map(_version, versions), key=lambda version: version.number)

    def content_ids(self) -> set[str]:
        """Return the content ids of all versions of all lines."""
        return set(self._content_ids().values())

    def needed_content_ids(self) -> set[str]:
        """Return the content ids of all versions that an alias or the last event names: current and previous ones."""
        with self._client() as client:
            models = paginate(client.search_registered_models)
            named = {(model.name, number) for model in models for number in _named_versions(model)}
        return {content for version, content in self._content_ids().items() if version in named}

    def events(self, line: str) -> list[LineEvent]:
        """Return the promotions and rollbacks of a line, oldest first."""
        with self._client() as client:
            return list(_events(self._model(client, line)).values())

    def drift(self, line: str) -> list[DriftCheck]:
        """Return the results of drift checks of a line's champions, oldest first."""
        with self._client() as client:
            model = self._model(client, line)
            return [_validated(DriftCheck, check, where) for where, checks in _checks(model) for check in checks]

    def resolve(self, text: str) -> Version:
        """Return the version of `LINE@ALIAS`, `LINE@3`, or `LINE` for its champion. Raises DraftsmithError."""
        line, _, which = text.partition("@")
        which = which or CHAMPION
        if which.isdecimal():
            return self.version(line, version_number(which, where=text))
        version = self.alias(line, which)
        if version is None:
            numbers = ", ".join(f"@{version.number}" for version in self.versions(line))
            if not numbers:
                raise self.unknown_line(line)
            raise DraftsmithError(f"{text}: {line} has no {which}. Its versions are {numbers}.")
        return version

    def names(self) -> list[str]:
        """Return the names of all lines, without registered models whose names no line can have."""
        names = []
        with self._client() as client:
            for model in paginate(client.search_registered_models):
                with suppress(IdentifierError):
                    names.append(line_name(model.name))
        return sorted(names)

    def unknown_line(self, line: str) -> DraftsmithError:
        """Return the error for a line that does not exist."""
        existing = ", ".join(self.names()) or "no line yet"
        return DraftsmithError(
            f"{line}: no refresh has registered a drafter under this name (registry.name). {self._tracking.public_uri} "
            f"has {existing}."
        )

    # -- writing -------------------------------------------------------------------------------------------------

    def register(self, line: str, ref: Artifact, tags: Mapping[str, str], *, run_id: str | None = None) -> Version:
        """Register an artifact as a version of a line, which is created if need be; equal content is registered once.

        Updates the tags of a version that exists already, except `PROMOTION_TAGS` if it was promoted.
        """
        self._tracking.require_writable()
        identity = {name: str(getattr(ref, name)) for name in _IDENTITY}
        with self._client() as client:
            with self._line_lock(line, "registering"):
                same = [version for version in self.versions(line) if version.content_id == ref.content_id]
                existing = same[-1] if same else None
                tagged = {**identity, **tags}
                number = self._create(client, line, ref, run_id, tagged) if existing is None else existing.number
            fixed = PROMOTION_TAGS if existing is not None and "promoted_at" in existing.tags else ()
            self._tag(client, line, number, {**identity, **{n: value for n, value in tags.items() if n not in fixed}})
            with self._line_lock(line, "registering"):
                model = self._model(client, line)
                if model is None or int(model.aliases.get(CHAMPION, 0)) != number:
                    client.set_registered_model_alias(line, CHALLENGER, str(number))
            return _version(client.get_model_version(line, str(number)))

    def _create(
        self, client: MlflowClient, line: str, ref: Artifact, run_id: str | None, tags: Mapping[str, str]
    ) -> int:
        """Create a version together with its tags: without them a killed run's version would be registered again."""
        if self._model(client, line) is None:
            client.create_registered_model(line, description="A model line of Draftsmith. It has no champion yet.")
        is_server = self._tracking.uri.startswith(("http://", "https://"))  # a server refuses file paths
        source = f"draftsmith-store:{ref.path}" if is_server else ref.uri
        named = {f"{_TAG}{name}": value for name, value in _with_record(tags).items()}
        return int(client.create_model_version(line, source=source, run_id=run_id, tags=named).version)

    def upload(self, version: Version, folder: Path, run_id: str | None) -> None:
        """Copy a version's checkpoint to MLflow's artifact store, under a run, for machines without the store.

        Raises RetryableError if there is no run.
        """
        if run_id is None:
            raise RetryableError(
                f"{version}: the drafter cannot be uploaded, since MLflow has no run of this refresh. Check that "
                "MLflow can be reached."
            )
        with self._client() as client:
            with weights_timeout():
                client.log_artifacts(run_id, str(folder), _DRAFTER)
            self._tag(client, version.line, version.number, {"uploaded": f"runs:/{run_id}/{_DRAFTER}"})

    def download(self, version: Version, folder: Path) -> Path:
        """Download a version's upload into a folder. Return its checkpoint there."""
        run_id, _, name = version.uploaded.removeprefix("runs:/").partition("/")
        with self._client() as client, weights_timeout():
            from mlflow.exceptions import MlflowException  # here: importing mlflow takes seconds

            try:
                files = client.list_artifacts(run_id, name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                files = []
            if not files:
                raise DraftsmithError(
                    f"{version}: MLflow no longer has {version.uploaded}. Restore that run, mount the store, or "
                    "promote another version."
                )
            return Path(client.download_artifacts(run_id, name, str(folder)))

    def promote(
        self,
        version: Version,
        *,
        expected: Version | None,
        why: str,
        what: str = PROMOTED,
        tags: Mapping[str, str] = {},
    ) -> None:
        """Make a version the champion, and the champion `previous`.

        MLflow may fail between two requests, so the event is written first and `previous` last: the same call again, or
        `complete_promotion`, continues. In one home a lock serializes promotions. Other homes do not see it, so the
        alias is compared again before it is moved, and `_settle` finds out afterwards whose promotion counts.

        expected: the champion that the decision was made against. Raises ChampionMovedError if another one serves now:
        of two concurrent promotions, one has to decide again. why: the reason. what: the kind of event.
        tags: tags of the version, written only if the promotion goes ahead.
        """
        self._tracking.require_writable()
        line, number = version.line, version.number
        with self._client() as client, self._line_lock(line, f"promotion of {version}"):
            model = self._model(client, line)
            since = None if expected is None else expected.number
            events = _events(model)
            name, last = max(events.items(), default=("", None))
            resumed = last is not None and (last.version, last.before, last.what) == (number, since, what)
            self._check_champion(model, version, since, resumed=resumed)
            if last is not None and resumed:
                at = last.at
            else:
                at = datetime.now(UTC).isoformat(timespec="seconds")
                by = f"{user_name()}@{platform.node()}"
                event = LineEvent(at=at, by=by, what=what, version=number, before=since, why=why[:1000])
                name = f"{_EVENT}{_next_index(events):06d}.{number}"  # unique even if two homes promote concurrently
                client.set_registered_model_tag(line, name, json.dumps(event.to_json()))
                try:
                    self._check_champion(self._model(client, line), version, since)
                except ChampionMovedError:
                    client.delete_registered_model_tag(line, name)
                    raise
            self._tag(client, line, number, tags)
            if _champion(model) != number:
                client.set_registered_model_alias(line, CHAMPION, str(number))
            self._settle(client, version, since, name)
            if CHALLENGER in (model.aliases if model is not None else {}):
                client.delete_registered_model_alias(line, CHALLENGER)
            client.set_model_version_tag(line, str(number), f"{_TAG}promoted_at", at)
            champion = _version(client.get_model_version(line, str(number)))
            client.update_registered_model(line, _description(champion, what, why))
            if since is not None and since != number:
                client.set_registered_model_alias(line, PREVIOUS, str(since))

    def _settle(self, client: MlflowClient, version: Version, since: int | None, name: str) -> None:
        """Return once the promotion with event `name` counts; raise ChampionMovedError if another home's counts.

        MLflow has no compare-and-set, so two homes may both find the champion that they expect, and both move the
        alias. The last one to move it wins. Both write their event before they compare, so the first one to move the
        alias sees the other's event, and waits until the other has moved the alias too or has withdrawn its event. An
        event that stays for `_RIVAL_S` belongs to a killed process and is removed. If that process lives after all, it
        finds its event gone and puts the alias back.
        """
        line, number, give_up = version.line, version.number, time.monotonic() + _RIVAL_S
        while True:
            model = self._model(client, line)
            events, champion = _events(model), _champion(model)
            if champion != number or name not in events:
                break
            if not (rivals := self._rivals(events, version, since)):
                return
            if time.monotonic() > give_up:
                for rival in rivals:
                    client.delete_registered_model_tag(line, rival)
                return
            time.sleep(_POLL_S)
        if name in events:
            client.delete_registered_model_tag(line, name)
        elif champion == number and events:
            champion = events[max(events)].version
            client.set_registered_model_alias(line, CHAMPION, str(champion))
        by = next((f" by {event.by}" for event in reversed(events.values()) if event.version == champion), "")
        raise ChampionMovedError(
            f"{line}: version {champion} was promoted{by} at the same time and is the champion, version {number} is "
            f"not. Decide again (`draftsmith champions {line}`)."
        )

    def _rivals(self, events: Mapping[str, LineEvent], version: Version, since: int | None) -> list[str]:
        """Return the event names of other versions' unfinished promotions against the same champion."""
        began = max((name for name, event in events.items() if event.version == since), default="")
        later = {name: event for name, event in events.items() if name > began and event.before == since}
        same = {name: event for name, event in later.items() if event.version != version.number}
        if not same:
            return []
        ended = {other.number: other.tags.get("promoted_at", "") for other in self.versions(version.line)}
        return [name for name, event in same.items() if event.version in ended and ended[event.version] < event.at]

    def _check_champion(self, model: Any, version: Version, expected: int | None, *, resumed: bool = False) -> None:
        """Raise ChampionMovedError if a version other than `expected` serves; if `resumed`, `version` may serve."""
        champion = _champion(model)
        if champion != expected and not (resumed and champion == version.number):
            raise ChampionMovedError(
                f"{version.line}: version {champion} is now the champion, but the decision was made against "
                f"{'none' if expected is None else f'version {expected}'}. Decide again."
            )

    def complete_promotion(self, line: str) -> LineEvent | None:
        """Finish a promotion that was interrupted before `previous` was set; return its event, or None."""
        events, champion, previous = self.events(line), self.champion(line), self.alias(line, PREVIOUS)
        if not events or champion is None:
            return None
        last = events[-1]
        complete = previous is not None and previous.number == last.before
        if complete or champion.number != last.version or last.before in (None, last.version):
            return None
        if last.before not in {version.number for version in self.versions(line)}:  # deleted in MLflow since
            return None
        self.promote(champion, expected=self.version(line, last.before), why=last.why, what=last.what)
        return last

    def rollback_event(self, version: Version) -> LineEvent | None:
        """Return the event by which a person replaced a version, unless it became the champion again since."""
        events = [event for event in self.events(version.line) if version.number in (event.version, event.before)]
        if not events or events[-1].what not in (BY_HAND, ROLLED_BACK) or events[-1].version == version.number:
            return None
        return events[-1]

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version; a tag `decision` also becomes its description."""
        self._tracking.require_writable()
        with self._client() as client:
            self._tag(client, version.line, version.number, tags)

    def add_drift(self, line: str, result: Mapping[str, object]) -> None:
        """Record the result of a drift check, unless it repeats the last one."""
        self._tracking.require_writable()
        with self._client() as client, self._line_lock(line, f"drift check of {line}"):
            earlier = self.drift(line)
            if earlier and {**earlier[-1].to_json(), "at": None} == {**result, "at": None}:
                return
            tags = _checks(self._model(client, line))
            checks = [*(tags[-1][1] if tags else ()), dict(result)]
            if len(tags) and len(json.dumps(checks)) <= _MOST_CHECKS_CHARS:
                tags.pop()
            else:
                checks = checks[-1:]
            client.set_registered_model_tag(line, f"{_DRIFT}{len(tags):06d}", json.dumps(checks))

    # -- inside --------------------------------------------------------------------------------------------------

    def _content_ids(self) -> dict[tuple[str, int], str]:
        """Return (line, version) -> content id."""
        with self._client() as client:
            versions = {(v.name, int(v.version)): _tags(v) for v in paginate(client.search_model_versions)}
        return {version: tags["content_id"] for version, tags in versions.items() if "content_id" in tags}

    def _tag(self, client: MlflowClient, line: str, number: int, tags: Mapping[str, str]) -> None:
        known = client.get_model_version(line, str(number)).tags.get(f"{_TAG}{_RECORD}", "")
        for name, value in _with_record(tags, known).items():
            client.set_model_version_tag(line, str(number), f"{_TAG}{name}", value)
        if "decision" in tags:
            client.update_model_version(line, str(number), description=tags["decision"])

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """Yield MLflow's client, and turn its errors into one clear DraftsmithError, retryable where that may help."""
        try:
            client, _ = self._tracking.connect()
            yield client
        except DraftsmithError:
            raise
        except Exception as error:
            raise self._to_error(error) from error

    def _to_error(self, error: Exception) -> DraftsmithError:
        reason = first_line(error)
        if getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
            return DraftsmithError(f"MLflow's model registry refused this: {reason}. Correct the name or the value.")
        if (disk_error := find_disk_error(error)) is not None:  # not any OSError: connection errors are OSErrors too
            return from_os_error(disk_error, "MLflow's model registry:")
        if not self._tracking.is_default or any(text in reason for text in (LOCKED, *_PERMANENT)):
            permanent = (
                (self._tracking.is_default and LOCKED not in reason)
                or SCHEMA_MISMATCH in reason
                or is_permission_error(error)
            )
            return (DraftsmithError if permanent else RetryableError)(self._tracking.unusable_message(error))
        return RetryableError(f"MLflow's model registry failed ({reason}). Check that MLflow can be reached.")

    def _line_lock(self, line: str, what: str) -> AbstractContextManager[Lock]:
        """Return the lock of a line in this home."""
        return locked(self._tracking.folder / "registry" / f".lock-{line}", what)

    def _model(self, client: MlflowClient, line: str) -> Any:
        """Return the registered model with aliases and tags; None if it does not exist."""
        from mlflow.exceptions import MlflowException  # here: importing mlflow takes seconds

        line_name(line)
        try:
            return client.get_registered_model(line)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def _description(champion: Version, what: str, why: str) -> str:
    """Return a registered model's description in Markdown: the champion, why, and the report."""
    since = f"{what.removesuffix(' to')} {champion.tags['promoted_at']}"
    lines = [f"**Champion: version {champion.number}**, {since}.", escape_markdown(why)]
    if (decision := champion.tags.get("decision", why)) != why:  # a person has promoted it
        lines.append(f"Its gate: {escape_markdown(decision)}")
    if report := champion.tags.get("report"):
        lines.append(f"Report: {escape_markdown(report)}")
    return "\n\n".join(lines)


def _with_record(tags: Mapping[str, str], known: str = "") -> dict[str, str]:
    """Return the tags as they are stored: the shown ones, and the others in the record. known: the record until now."""
    shown = {name: value for name, value in tags.items() if name in _SHOWN or name.startswith(_SERVER)}
    record = {name: value for name, value in tags.items() if name not in shown}
    return shown | ({_RECORD: json.dumps(json.loads(known or "{}") | record)} if record else {})


def _tags(entry: Any) -> dict[str, str]:
    """Return the tags of an MLflow model version without their prefix, including those in the record."""
    tags = {name.removeprefix(_TAG): value for name, value in entry.tags.items() if name.startswith(_TAG)}
    where = f"{entry.name} version {entry.version}: tag {_TAG}{_RECORD}"
    record = _parsed_json(tags.pop(_RECORD, "") or "{}", where)
    if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
        raise DraftsmithError(f"{where}: not a JSON object of texts. {_CORRECT}.")
    return tags | record


def _version(entry: Any) -> Version:
    """Convert an MLflow model version to a `Version`. Raises DraftsmithError for a tag that we cannot have written."""
    line = line_name(entry.name, where="a registered model")
    number = version_number(entry.version, where=f"{line}: a version")
    tags = _tags(entry)
    where = f"{line} version {number}: tag {_TAG}"
    for name, parse in _PARSERS.items():
        if value := tags.get(name):
            parse(value, where=f"{where}{name}")
    for address in tags.get("uploaded", "").split():
        upload_address(address, where=f"{where}uploaded")
    stage, key, content_id = (tags.pop(name, "") for name in _IDENTITY)
    created = datetime.fromtimestamp(entry.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
    source = str(entry.source).replace("draftsmith-store:", "file://")
    run = run_id(entry.run_id, where=f"{line} version {number}: run") if entry.run_id else ""
    return Version(line, number, source, stage, key, content_id, tags, tuple(entry.aliases), created, run)


def _champion(model: Any) -> int | None:
    """Return the number of a registered model's champion; None if there is none."""
    alias = None if model is None else model.aliases.get(CHAMPION)
    return None if alias is None else version_number(alias, where=f"{model.name}: alias {CHAMPION}")


def _events(model: Any) -> dict[str, LineEvent]:
    """Return the promotions and rollbacks of a registered model by the names of their tags, oldest first."""
    names = sorted(filter(_EVENT_NAME.fullmatch, () if model is None else model.tags))
    return {name: _record(LineEvent, model, name) for name in names}


def _checks(model: Any) -> list[tuple[str, list[Any]]]:
    """Return the drift checks of a registered model by tag, with its place for errors, oldest first."""
    by_tag = []
    for name in sorted(name for name in (() if model is None else model.tags) if name.startswith(_DRIFT)):
        checks = _parsed_json(model.tags[name], where := f"{model.name}: tag {name}")
        by_tag.append((where, checks if isinstance(checks, list) else [checks]))  # earlier releases wrote a single one
    return by_tag


def _next_index(events: Mapping[str, LineEvent]) -> int:
    return 1 + max((int(match[1]) for name in events if (match := _EVENT_NAME.fullmatch(name))), default=-1)


def _record(kind: type[RecordT], model: Any, tag: str) -> RecordT:
    """Return the record in a registered model's tag. Fields that a later version of Draftsmith wrote are ignored."""
    where = f"{model.name}: tag {tag}"
    return _validated(kind, _parsed_json(model.tags[tag], where), where)


def _validated(kind: type[RecordT], fields: object, where: str) -> RecordT:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "content"
        raise DraftsmithError(f"{where}: {field}: {first['msg']}. {_CORRECT}.") from None


def _parsed_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DraftsmithError(f"{where}: not readable JSON. {_CORRECT}.") from None


def _named_versions(model: Any) -> set[int]:
    """Return the versions named by an alias, or by the last event, which may not have set `previous` yet."""
    last = [number for event in list(_events(model).values())[-1:] for number in (event.version, event.before)]
    return {int(number) for number in (*model.aliases.values(), *last) if number}


def note_tracker(tracking: Tracking) -> None:
    """Record that versions are registered in this MLflow. Call this before the first one is."""
    if _tracker_name(tracking) not in _noted_trackers(tracking):
        doing = disk_errors("noting where versions are registered:")
        with doing, (tracking.folder / TRACKERS_FILE).open("a", encoding="utf-8") as file:
            file.write(_tracker_name(tracking) + "\n")


def describe_other_trackers(tracking: Tracking) -> str | None:
    """Return why this MLflow does not know all artifacts that lines need, and the remedy; None if it does."""
    noted, here = _noted_trackers(tracking), _tracker_name(tracking)
    if others := sorted(noted - {here}):
        advice = "" if here in noted else f"{_how_to_switch(noted)}. "
        return (
            f"versions were registered in {', '.join(others)}, which {here} does not know. {advice}If those are "
            f"abandoned, remove them from {tracking.folder / TRACKERS_FILE}"
        )
    database = sqlite_file(tracking.uri)
    if not noted and database is not None and not database.is_file():  # another host shares the bucket
        return f"{database} does not exist: runs of this home were tracked elsewhere. {_AS_THE_RUNS}"
    return None


def describe_wrong_tracker(tracking: Tracking) -> str | None:
    """Return where this home registered its versions, and the remedy, if this MLflow has none of them; else None."""
    noted, here = _noted_trackers(tracking), _tracker_name(tracking)
    if not noted or here in noted:
        return None
    return (
        f"versions of this home were registered in {', '.join(sorted(noted))}, none in {here}. {_how_to_switch(noted)}"
    )


def _how_to_switch(noted: set[str]) -> str:
    return _AS_THE_RUNS if noted != {_OWN_DATABASE} else "Unset MLFLOW_TRACKING_URI"


def _noted_trackers(tracking: Tracking) -> set[str]:
    path = tracking.folder / TRACKERS_FILE
    return set(path.read_text("utf-8").splitlines()) if path.is_file() else set()


def _tracker_name(tracking: Tracking) -> str:
    return _OWN_DATABASE if tracking.is_default else tracking.public_uri
