"""Drafter lines in MLflow's model registry: versions that point to artifacts, and who of them serves.

A line is a registered model. A version is one drafter: its source is the artifact in the store, and its tags say what
it is, what it was made for and what it was worth. The alias `champion` is the version that serves, `previous` the one
before it, `challenger` the last one that was measured against it. What happened to a line (promotions, rollbacks, drift
checks) is a tag of the line for each event. Nothing here is tolerant of a lost MLflow: a promotion that nobody can see
is none.
"""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, find_disk_error, from_os_error
from draftsmith.artifacts.locks import Lock, locked, user_name
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.artifacts.tracking.client import weights_timeout
from draftsmith.artifacts.tracking.runs import LOCKED, SCHEMA_MISMATCH, Tracking, first_line, is_permission_error
from draftsmith.artifacts.tracking.terms import escape_markdown, paginate

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
_TAG, _EVENT, _DRIFT = "draftsmith.", "draftsmith.event.", "draftsmith.drift."
_IDENTITY = ("stage", "key", "content_id")
# tags of what a version was worth when it was promoted: drift checks compare with that
PROMOTION_TAGS = (
    *("figures", "measured_with", "tau", "tau_interval", "speedup", "speedup_interval"),
    *("decision", "outcome", "rules", "report"),
)
_DRAFTER = "drafter"  # the folder of a version's artifact that servers load, and of its copy in MLflow
_LASTING = ("not a database", "malformed", "readonly", "unable to open database", SCHEMA_MISMATCH)  # no retry mends
PROMOTED, BY_HAND, ROLLED_BACK = "promoted", "promoted by hand", "rolled back to"  # of an event


class ChampionMovedError(DraftsmithError):
    """Another refresh has promoted a drafter of this line in the meantime."""


@dataclass(frozen=True)
class Version:
    """One drafter of a line."""

    line: str
    number: int
    source: str  # the artifact's URI
    stage: str
    key: str
    content_id: str
    tags: Mapping[str, str] = field(default_factory=dict)  # without our prefix
    aliases: tuple[str, ...] = ()
    created_at: str = ""  # ISO 8601, UTC

    def __str__(self) -> str:
        return f"{self.line} version {self.number}"

    @property
    def path(self) -> Path:
        """The artifact's folder, on a machine that shares the store."""
        return Path(unquote(urlparse(self.source).path))

    @property
    def uploaded(self) -> str:
        """Where MLflow's artifact store has its drafter (`runs:/ID/drafter`); empty if it was not uploaded."""
        return self.tags.get("uploaded", "")

    def metrics(self) -> dict[str, Any]:
        """What it was worth at its promotion (tag `figures`), empty where nothing was measured."""
        return dict(json.loads(self.tags.get("figures", "{}")))


@dataclass(frozen=True)
class LineEvent:
    """What was done to a line."""

    at: str  # ISO 8601, UTC
    by: str  # user@host
    what: str  # promoted, promoted by hand, rolled back to
    version: int
    before: int | None  # the champion until then
    why: str


class Registry:
    """The drafter lines of one MLflow."""

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    # -- reading -------------------------------------------------------------------------------------------------

    def champion(self, line: str) -> Version | None:
        return self.alias(line, CHAMPION)

    def alias(self, line: str, alias: str) -> Version | None:
        """The version that an alias of a line names; None if the line or the alias is not there."""
        with self._client() as client:
            found = self._model(client, line)
            number = None if found is None else found.aliases.get(alias)
            return None if number is None else _version(client.get_model_version(line, number))

    def version(self, line: str, number: int) -> Version:
        with self._client() as client:
            from mlflow.exceptions import MlflowException

            try:
                return _version(client.get_model_version(line, str(number)))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        known = ", ".join(str(each.number) for each in self.versions(line)) or "none"
        raise DraftsmithError(f"{line} has no version {number}: it has {known} (`draftsmith champions {line}`)")

    def versions(self, line: str) -> list[Version]:
        """Oldest first; none for a line that is not there."""
        with self._client() as client:
            if (model := self._model(client, line)) is None:
                return []
            found = client.search_model_versions(f"name = '{line}'", max_results=10_000)
            for each in found:  # a search does not say them, and to ask for each takes as long as there are versions
                each.aliases = [name for name, number in model.aliases.items() if int(number) == int(each.version)]
            return sorted(map(_version, found), key=lambda version: version.number)

    def content_ids(self) -> set[str]:
        """Of every version of every line."""
        return set(self._content_ids().values())

    def needed_content_ids(self) -> set[str]:
        """Of every version of every line that an alias names, or the last event: who serves, and who served before."""
        with self._client() as client:
            models = paginate(client.search_registered_models)
            named = {(model.name, number) for model in models for number in _named_versions(model)}
        return {content for version, content in self._content_ids().items() if version in named}

    def events(self, line: str) -> list[LineEvent]:
        """Oldest first."""
        return [LineEvent(**event) for event in self._line_tags(line, _EVENT)]

    def drift(self, line: str) -> list[dict[str, Any]]:
        """What drift checks of a line's champions saw, oldest first."""
        return self._line_tags(line, _DRIFT)

    def resolve(self, text: str) -> Version:
        """`LINE@champion`, `LINE@previous`, `LINE@3`, or `LINE` for its champion. Raises DraftsmithError."""
        line, _, which = text.partition("@")
        which = which or CHAMPION
        if which.isdecimal():
            return self.version(line, int(which))
        found = self.alias(line, which)
        if found is None:
            known = ", ".join(f"@{each.number}" for each in self.versions(line))
            if not known:
                raise self.unknown_line(line)
            raise DraftsmithError(f"{text}: {line} has no {which}: its versions are {known}")
        return found

    def unknown_line(self, line: str) -> DraftsmithError:
        """Of a line that is not there."""
        with self._client() as client:
            names = sorted(each.name for each in client.search_registered_models())
        there = f"{self._tracking.uri} has {', '.join(names)}" if names else f"{self._tracking.uri} has no line yet"
        return DraftsmithError(f"{line}: no refresh has registered a drafter under this name (registry.name): {there}")

    # -- writing -------------------------------------------------------------------------------------------------

    def register(
        self, line: str, ref: ArtifactRef, tags: Mapping[str, str], *, run_id: str | None = None, upload: bool = False
    ) -> Version:
        """Register an artifact as a version of a line, which is created if need be; equal content is registered once.

        Updates the tags of a version that exists already, except `PROMOTION_TAGS` if it was promoted.
        upload: also copy its drafter to MLflow's artifact store, under the run `run_id`, for machines that do not share
        the store; `download` fetches it there. Raises RetryableError if there is no run.
        """
        self._tracking.require_writable()
        identity = {name: str(getattr(ref, name)) for name in _IDENTITY}
        with self._client() as client:
            with self._line_lock(line, "registering"):
                found = [each for each in self.versions(line) if each.content_id == ref.content_id]
                known = found[-1] if found else None
                wanted = upload and (known is None or not known.uploaded)
                if wanted and run_id is None:
                    said = "MLflow has no run of this refresh, into which its drafter is to be uploaded"
                    raise RetryableError(f"{line}: {said}: see that MLflow is there")
                tagged = {**identity, **tags}
                number = self._create(client, line, ref, run_id, tagged) if known is None else known.number
            if wanted:
                with weights_timeout():
                    client.log_artifacts(run_id, str(ref.path / _DRAFTER), _DRAFTER)
                identity["uploaded"] = f"runs:/{run_id}/{_DRAFTER}"
            kept = PROMOTION_TAGS if known is not None and "promoted_at" in known.tags else ()
            self._tag(client, line, number, {**identity, **{n: value for n, value in tags.items() if n not in kept}})
            with self._line_lock(line, "registering"):
                model = self._model(client, line)
                if model is None or int(model.aliases.get(CHAMPION, 0)) != number:
                    client.set_registered_model_alias(line, CHALLENGER, str(number))
            return _version(client.get_model_version(line, str(number)))

    def _create(
        self, client: MlflowClient, line: str, ref: ArtifactRef, run_id: str | None, tags: Mapping[str, str]
    ) -> int:
        """A new version, with its tags at once: a killed run leaves none without, which would be registered again."""
        if self._model(client, line) is None:
            client.create_registered_model(line, description="A model line of Draftsmith. It has no champion yet.")
        served = self._tracking.uri.startswith(("http://", "https://"))  # which refuses paths that are not its own
        source = f"draftsmith-store:{ref.path}" if served else ref.uri
        named = {f"{_TAG}{name}": value for name, value in tags.items()}
        return int(client.create_model_version(line, source=source, run_id=run_id, tags=named).version)

    def download(self, version: Version, folder: Path) -> None:
        """The drafter that was uploaded with a version, as `folder`, which appears whole or not at all."""
        run_id, _, name = version.uploaded.removeprefix("runs:/").partition("/")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with self._client() as client, tempfile.TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as scratch:
            with weights_timeout():
                copied = Path(client.download_artifacts(run_id, name, scratch))
            with suppress(OSError):  # another process was faster
                copied.rename(folder)
            if not folder.is_dir():
                raise DraftsmithError(f"{folder}: cannot be written: see that the disk is there")

    def promote(
        self,
        version: Version,
        *,
        expected: Version | None,
        why: str,
        what: str = PROMOTED,
        tags: Mapping[str, str] = {},
    ) -> None:
        """Make a version the champion, and the champion the previous one.

        expected: the champion that the decision was made against. Raises ChampionMovedError if it is another one by
        now: of two refreshes that promote at once, the second has to decide again. tags: of the version, which say
        nothing of a promotion that comes to nothing. MLflow may be lost at any moment, so the event and they come first
        and `previous` last: the same call again, or `complete`, goes on where it was lost. In one home a lock keeps
        promotions apart. A home elsewhere knows no lock of ours: the alias is compared again before it is moved.
        """
        self._tracking.require_writable()
        with self._client() as client, self._line_lock(version.line, f"promotion of {version}"):
            model = self._model(client, version.line)
            since = None if expected is None else expected.number
            events = {n: text for n, text in (model.tags if model else {}).items() if n.startswith(_EVENT)}
            known = LineEvent(**json.loads(events[max(events)])) if events else None
            begun = known is not None and (known.version, known.before, known.what) == (version.number, since, what)
            self._check_champion(model, version, since, begun=begun)
            at = datetime.now(UTC).isoformat(timespec="seconds")
            if not begun:
                by = f"{user_name()}@{platform.node()}"
                event = LineEvent(at=at, by=by, what=what, version=version.number, before=since, why=why[:1000])
                after = 1 + max((int(n.removeprefix(_EVENT).partition(".")[0]) for n in events), default=-1)
                name = f"{_EVENT}{after:06d}.{version.number}"  # of two homes at once each has its own
                client.set_registered_model_tag(version.line, name, json.dumps(asdict(event)))
                try:
                    self._check_champion(self._model(client, version.line), version, since)
                except ChampionMovedError:
                    client.delete_registered_model_tag(version.line, name)
                    raise
            self._tag(client, version.line, version.number, tags)
            client.set_registered_model_alias(version.line, CHAMPION, str(version.number))
            if CHALLENGER in (model.aliases if model is not None else {}):
                client.delete_registered_model_alias(version.line, CHALLENGER)
            client.set_model_version_tag(version.line, str(version.number), f"{_TAG}promoted_at", at)
            champion = _version(client.get_model_version(version.line, str(version.number)))
            client.update_registered_model(version.line, _description(champion, what, why))
            if since is not None and since != version.number:
                client.set_registered_model_alias(version.line, PREVIOUS, str(since))

    def _check_champion(self, model: Any, version: Version, expected: int | None, *, begun: bool = False) -> None:
        """Raise ChampionMovedError if another version serves than expected. begun: `version` may serve already."""
        now = None if model is None else model.aliases.get(CHAMPION)
        before = None if now is None else int(now)
        if before != expected and not (begun and before == version.number):
            raise ChampionMovedError(
                f"{version.line}: version {before} is the champion by now, the decision was made against "
                f"{'none' if expected is None else f'version {expected}'}: decide again"
            )

    def complete_promotion(self, line: str) -> LineEvent | None:
        """End a promotion whose MLflow was lost between `champion` and `previous`; None if there is none."""
        events, champion, previous = self.events(line), self.champion(line), self.alias(line, PREVIOUS)
        if not events or champion is None:
            return None
        last = events[-1]
        ended = previous is not None and previous.number == last.before
        if ended or champion.number != last.version or last.before in (None, last.version):
            return None
        if last.before not in {each.number for each in self.versions(line)}:  # deleted in MLflow since, its alias too
            return None
        self.promote(champion, expected=self.version(line, last.before), why=last.why, what=last.what)
        return last

    def rollback_event(self, version: Version) -> LineEvent | None:
        """The event by which somebody took a version out of service, unless it was made the champion since."""
        about = [each for each in self.events(version.line) if version.number in (each.version, each.before)]
        if not about or about[-1].what not in (BY_HAND, ROLLED_BACK) or about[-1].version == version.number:
            return None
        return about[-1]

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """A `decision` among the tags is the version's description too."""
        self._tracking.require_writable()
        with self._client() as client:
            self._tag(client, version.line, version.number, tags)

    def add_drift(self, line: str, seen: Mapping[str, Any]) -> None:
        """Keep what a drift check saw, unless it is the last one again."""
        self._tracking.require_writable()
        with self._client() as client, self._line_lock(line, f"drift check of {line}"):
            known = self.drift(line)
            if known and {**known[-1], "at": None} == {**seen, "at": None}:
                return
            client.set_registered_model_tag(line, f"{_DRIFT}{len(known):06d}", json.dumps(dict(seen)))

    # -- inside --------------------------------------------------------------------------------------------------

    def _content_ids(self) -> dict[tuple[str, int], str]:
        """Content ids by line and version."""
        tag = f"{_TAG}content_id"
        with self._client() as client:
            found = paginate(client.search_model_versions)
            return {(each.name, int(each.version)): each.tags[tag] for each in found if tag in each.tags}

    def _tag(self, client: MlflowClient, line: str, number: int, tags: Mapping[str, str]) -> None:
        for name, value in tags.items():
            client.set_model_version_tag(line, str(number), f"{_TAG}{name}", value)
        if "decision" in tags:
            client.update_model_version(line, str(number), description=tags["decision"])

    @contextmanager
    def _client(self) -> Iterator[MlflowClient]:
        """Errors of MLflow are one clear error: worth a retry where a server may come back."""
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
            return DraftsmithError(f"MLflow's model registry refused this: {reason}: correct the name or the value")
        if (refused := find_disk_error(error)) is not None:  # a connection's errors are OSErrors too
            return from_os_error(refused, "MLflow's model registry:")
        if not self._tracking.is_default or any(known in reason for known in (LOCKED, *_LASTING)):
            lasts = (
                (self._tracking.is_default and LOCKED not in reason)
                or SCHEMA_MISMATCH in reason
                or is_permission_error(error)
            )
            return (DraftsmithError if lasts else RetryableError)(self._tracking.unusable_message(error))
        return RetryableError(f"MLflow's model registry failed ({reason}): see that MLflow is there")

    def _line_lock(self, line: str, what: str) -> AbstractContextManager[Lock]:
        """Return the lock of a line in this home."""
        return locked(self._tracking.folder / "registry" / f".lock-{line}", what)

    def _line_tags(self, line: str, prefix: str) -> list[dict[str, Any]]:
        """What the tags of a line hold that begin so, oldest first."""
        with self._client() as client:
            found = self._model(client, line)
            tags = {} if found is None else found.tags
            return [json.loads(tags[name]) for name in sorted(tags) if name.startswith(prefix)]

    def _model(self, client: MlflowClient, line: str) -> Any:
        """The registered model with aliases and tags; None if there is none."""
        from mlflow.exceptions import MlflowException

        try:
            return client.get_registered_model(line)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def _description(champion: Version, what: str, why: str) -> str:
    """Return the description of a registered model, in Markdown: who is champion, why, and where the report is."""
    since = f"{what.removesuffix(' to')} {champion.tags['promoted_at']}"
    lines = [f"**Champion: version {champion.number}**, {since}.", escape_markdown(why)]
    if report := champion.tags.get("report"):
        lines.append(f"Report: `{report}`")
    return "\n\n".join(lines)


def _version(found: Any) -> Version:
    """A version of MLflow's as one of ours."""
    tags = {name.removeprefix(_TAG): value for name, value in found.tags.items() if name.startswith(_TAG)}
    stage, key, content_id = (tags.pop(name, "") for name in _IDENTITY)
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC).isoformat(timespec="seconds")
    source = str(found.source).replace("draftsmith-store:", "file://")
    return Version(found.name, int(found.version), source, stage, key, content_id, tags, tuple(found.aliases), created)


def _named_versions(model: Any) -> set[int]:
    """By an alias, or by the last event: one that was cut off has yet to make the champion before it `previous`."""
    events = sorted(name for name in model.tags if name.startswith(_EVENT))
    last = json.loads(model.tags[events[-1]]) if events else {}
    return {int(number) for number in (*model.aliases.values(), last.get("version"), last.get("before")) if number}
