"""The drafter line of a refresh: its champion when the plan is made, its new version when the gate has decided."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import UPLOADED, home
from draftsmith.artifacts.store.checksums import Checksums
from draftsmith.artifacts.store.local import REPLACED, Store
from draftsmith.artifacts.store.manifest import MANIFEST, ArtifactRef, InputEntry, read_manifest, sha256_file
from draftsmith.artifacts.tracking.registry import PROMOTED, Registry, Version
from draftsmith.artifacts.tracking.registry_homes import describe_wrong_tracker
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.stages.data.load import DRAFTER_FOLDER
from draftsmith.stages.data.logs.rehearsal_stage import TABLE, EarlierConfig
from draftsmith.stages.data.prompt_config import HuggingFaceSource, JsonlSource, PromptSource, ReasoningGymSource
from draftsmith.stages.data.prompts import PromptsConfig
from draftsmith.stages.drafters.stage import ChampionConfig
from draftsmith.stages.runtime.stage import Config, FilledIn

log = logging.getLogger(__name__)

_MOST_POINTS = 300  # of a line's history
_MOST_CHARACTERS = 4900  # of a version's figures: MLflow keeps 5,000 of a tag
_MOST_OF_RULES = 250  # characters
_OF_A_SET = ("tau", "low", "prompts")  # what is kept where there are many
_MEASURED_WITH = "measured_with"
FASTEST_BLOCK = "fastest_block"  # what decoded fastest, the anchor included
BLOCK_SIZE = "drafting.block_size"  # among the settings that figures were taken with
_SHARES, _BY, _SUFFIXES = "heldout_shares", "heldout_by", "suffixes"
REFRESHED_AT = "refreshed_at"  # a version's tag: when a refresh came to it last
MAX_CLOCK_SKEW_DAYS = 1 / 24  # by which the clocks of two hosts may differ


class RegistryConfig(Config):
    """Which line of drafters a refresh goes on with."""

    name: Annotated[str, Field(pattern=r"^[\w][\w.-]*$", description="registered model in MLflow")]
    upload: Annotated[
        bool, Field(description="copy weights into MLflow's artifact store too, for machines without the store")
    ] = False
    restart: Annotated[
        bool,
        Field(
            description="begin as section `sft` says, although there is a champion, which must still be beaten; for "
            "one refresh: --set registry.restart=true"
        ),
    ] = False
    approve: Annotated[
        bool,
        Field(
            description="a person says yes before a promotion: a deployment's run is suspended until it is resumed in "
            "Prefect; any other run ends, and `draftsmith promote` promotes"
        ),
    ] = False
    champion: Annotated[ChampionConfig | None, FilledIn(), Field(description="who serves when the plan is made")] = None
    answers: Annotated[
        EarlierConfig | None, FilledIn(), Field(description="the logged answers that the champion was trained on")
    ] = None
    history: Annotated[
        tuple[dict[str, Any], ...], FilledIn(), Field(description="what the line's drafters were worth, and when")
    ] = ()
    refreshed_at: Annotated[
        str | None, FilledIn(), Field(description="when a refresh of the line came to its gate last")
    ] = None
    measured_with: Annotated[dict[str, Any], FilledIn()] = Field(
        default={}, description="settings that the champion's figures were taken with"
    )
    read_until: Annotated[
        str | None, FilledIn(), Field(description="time of the newest logged row that the champion's refresh has read")
    ] = None


def registry() -> Registry:
    """That of this home's MLflow, or of `MLFLOW_TRACKING_URI`."""
    return Registry(Tracking(home()))


def artifact_folder(version: Version) -> Path:
    """Its artifact, on this machine: fetched if the store is a bucket."""
    from draftsmith.artifacts.store.mirror import open_store

    store = open_store(home())
    return store.localize(find_artifact(version, store) or version.path)


def find_artifact(version: Version | InputEntry, store: Store) -> Path | None:
    """Its artifact where a version does not say it is: in a home that was moved or is a copy, or set aside when the
    same key was made again. None too if the key has other content now."""
    folder = store.path(version.stage, version.key)
    for place in (folder, *folder.parent.glob(f"{REPLACED}{folder.name}-*")):
        with suppress(DraftsmithError):  # a damaged one is none: there may be another, or what was uploaded
            if (place / MANIFEST).is_file() and read_manifest(place).content_id == version.content_id:
                return place
    return None


def checkpoint_of(version: Version) -> Path:
    """Its drafter: in the store where that is here and, of a version that was uploaded, whole; else a copy of what was
    uploaded with it. Of another nothing is verified: there is no copy to take."""
    from draftsmith.artifacts.store.mirror import open_store

    store = open_store(home())
    if (folder := find_artifact(version, store)) is not None:
        if version.uploaded and (damaged := _damaged_file(store, folder)) is not None:
            log.warning("%s: %s is damaged: what was uploaded is taken", version, damaged)
            return download_upload(version)
        return folder / DRAFTER_FOLDER
    checkpoint = version.path / DRAFTER_FOLDER
    if not version.uploaded or checkpoint.is_dir():
        return checkpoint
    if store.manifest_at(version.stage, version.key) is not None:  # in a bucket, or of the same key here
        return artifact_folder(version) / DRAFTER_FOLDER
    return download_upload(version)


def _damaged_file(store: Store, folder: Path) -> Path | None:
    """Of an artifact's drafter, one that is not as it was written. What nobody touched is not read again, and what a
    bucket has is not fetched: a plan is shown without it."""
    checksums, manifest = Checksums(home()), read_manifest(folder)
    for name, entry in store.files_to_verify(manifest.ref(folder), manifest).items():
        if name.startswith(f"{DRAFTER_FOLDER}/"):
            try:
                whole = checksums.sha256(folder / name) == entry.sha256
            except OSError:
                whole = False
            if not whole:
                return folder / name
    return None


def download_upload(version: Version) -> Path:
    """What was uploaded with a version, in this home. Raises DraftsmithError if it is not what was registered."""
    from draftsmith.stages.drafters.digest import drafter_digest

    wanted = version.tags.get("drafter_digest", "")
    folder = home() / UPLOADED / (wanted or version.content_id)[:16] / DRAFTER_FOLDER
    if not folder.is_dir():
        registry().download(version, folder)
    if wanted and drafter_digest(folder) != wanted:
        shutil.rmtree(folder)
        raise DraftsmithError(
            f"{version}: the copy in MLflow's artifact store is not what was registered: run the same command again, "
            "or mount the store"
        )
    with suppress(OSError):  # of a home that may only be read
        os.utime(folder.parent)  # in use: `draftsmith prune` leaves it
    return folder


def with_current_champion(line: RegistryConfig) -> RegistryConfig:
    """With who serves now, and what was read and learned for it."""
    known = registry()
    version = known.champion(line.name)
    found = RegistryConfig(name=line.name, upload=line.upload, restart=line.restart, approve=line.approve)
    if version is None:
        if not line.restart:
            _check_begins(line.name, known.versions(line.name))
        return found
    return found.model_copy(
        update={
            "champion": champion_config(version),
            "answers": _answers_of(version),
            "history": tuple(history(line.name)),
            "refreshed_at": max(
                (at for each in known.versions(line.name) if (at := each.tags.get(REFRESHED_AT))),
                default=version.tags.get("promoted_at") or version.created_at,
            ),
            "measured_with": json.loads(version.tags.get(_MEASURED_WITH) or "{}"),
            "read_until": version.tags.get("read_until") or None,
        }
    )


def _check_begins(line: str, versions: Sequence[Version]) -> None:
    """Of a line without a champion: what serves now would be replaced by whatever beats plain decoding."""
    if not versions and (elsewhere := describe_wrong_tracker(Tracking(home()))) is not None:  # who forgot a variable
        raise DraftsmithError(
            f"{line}: it has no version here; {elsewhere}, or begin the line here (`--set registry.restart=true`)."
        )
    served = [each for each in versions if "promoted_at" in each.tags]
    if served:
        last = max(served, key=lambda each: (each.tags["promoted_at"], each.number))  # to the second
        raise DraftsmithError(
            f"{last.line}: it has no champion, and {last} has been one: the alias, or the version that had it, was "
            f"deleted in MLflow: have one serve (`draftsmith promote {last.line}@{last.number}`), or begin again "
            "without one (`--set registry.restart=true`)"
        )


def _answers_of(version: Version) -> EarlierConfig | None:
    """The logged answers that it was trained on; None if there were none."""
    said = version.tags.get("answers")
    return EarlierConfig.model_validate_json(said) if said else None


def check_held_out(line: str, prompts: PromptsConfig) -> None:
    """A smaller held-out class than a refresh of the line measured with, or one that is decided by another text (a
    suffix is a part of it), would train on what was measured then."""
    asked, suffixes = held_out_shares(prompts), _suffixes(prompts)
    for version in registry().versions(line):
        by = version.tags.get(_BY, prompts.heldout_by)  # of one that a killed run left without them
        if by != prompts.heldout_by:
            raise DraftsmithError(
                f"prompts: heldout_by is {prompts.heldout_by}, and {version} was measured with {by}: prompts that "
                "measured it would be trained on. Set it back, or begin another line (`registry.name`)"
            )
        for source, share in json.loads(version.tags.get(_SHARES) or "{}").items():
            now = asked.get(source, asked[""])
            if now < share:
                raise DraftsmithError(
                    f"prompts{f', source {source}' if source else ''}: heldout_share is {now:g}, and {version} was "
                    f"measured with {share:g}: prompts that measured it would be trained on. Set it back, or begin "
                    "another line (`registry.name`)"
                )
        for source, known in json.loads(version.tags.get(_SUFFIXES) or "{}").items():
            if not suffixes.get(source, set()) <= set(known):
                raise DraftsmithError(
                    f"prompts, source {source}: it has a suffix that {version} was not measured with: prompts "
                    "that measured it would be trained on. Set it back, or begin another line (`registry.name`)"
                )


def held_out_shares(prompts: PromptsConfig) -> dict[str, float]:
    """heldout_share by source; that of the section, which holds for all others, under the empty name."""
    own = {_source_name(each): each.heldout_share for each in prompts.sources if each.heldout_share is not None}
    return {"": prompts.heldout_share, **own}


def _suffixes(prompts: PromptsConfig) -> dict[str, set[str]]:
    """Digests of the suffixes by source, which may be there several times. Blank space counts as little as it does for
    the class (`data/held_out.py`)."""
    found: dict[str, set[str]] = {}
    for each in prompts.sources:
        text = re.sub(r"\s+", " ", each.suffix).rstrip()
        found.setdefault(_source_name(each), set()).add(hashlib.sha256(text.encode()).hexdigest()[:12])
    return found


def _source_name(source: PromptSource) -> str:
    match source:
        case JsonlSource():
            return source.path
        case HuggingFaceSource():
            return source.id
        case ReasoningGymSource():
            return ", ".join(source.tasks)


def history(line: str) -> list[dict[str, Any]]:
    """tau of the line's drafters on all prompts: at each promotion, each refusal, and each drift check since. Oldest
    first."""
    known = registry()
    # what a person did took no figures; what was promoted once more has those of then
    measured_at = {event.version: event.at for event in known.events(line) if event.what == PROMOTED}
    promoted = [
        {
            "at": measured_at.get(each.number) or each.created_at,
            "version": each.number,
            "what": "promoted" if each.tags.get("promoted_at") else "refused",
            **each.metrics()["all"],
        }
        for each in known.versions(line)
        if "all" in each.metrics()
    ]
    checked = [{"what": "checked"} | seen for seen in known.drift(line)]
    return sorted(promoted + checked, key=lambda point: str(point["at"]))[-_MOST_POINTS:]


def champion_config(version: Version) -> ChampionConfig:
    return ChampionConfig(
        line=version.line,
        version=version.number,
        folder=str(checkpoint_of(version)),
        content_id=version.content_id,
        drafter_digest=version.tags.get("drafter_digest", ""),
        promoted_at=version.tags.get("promoted_at", ""),
        figures=version.metrics(),
    )


def age_days(refreshed_at: str | None, now: datetime | None = None) -> float:
    """Since a refresh; 0 if there was none, below `-MAX_CLOCK_SKEW_DAYS` if a clock is wrong."""
    if refreshed_at is None:
        return 0.0
    return ((now or datetime.now(UTC)) - datetime.fromisoformat(refreshed_at)).total_seconds() / 86400


def version_tags(
    evaluation: Mapping[str, Any],
    decision: Mapping[str, Any],
    ref: ArtifactRef,
    prompts: PromptsConfig,
    settings: Mapping[str, Any],
) -> dict[str, str]:
    """What a version says of itself: what it was worth, for which target, where it comes from, what was decided.
    settings: what its tau depends on (`measured_with`)."""
    from draftsmith.stages.drafters.checkpoint import read_info
    from draftsmith.stages.drafters.digest import drafter_digest

    arm, folder = decision["challenger"], ref.path / DRAFTER_FOLDER
    info, drafter = read_info(folder), evaluation["drafters"][arm]
    speed = (evaluation.get("speed") or {}).get(arm) or {}
    return {
        "arm": arm,
        "drafter_digest": drafter_digest(folder),
        "target_digest": info.target_digest,
        "parents": json.dumps(info.parents[-8:]),
        "tau": f"{drafter['tau']:.4f}",
        "tau_interval": json.dumps([drafter["tau_low"], drafter["tau_high"]]),
        "speedup": f"{speed['speedup']:.4f}" if "speedup" in speed else "",
        FASTEST_BLOCK: str(speed.get("block_size") or ""),
        "speedup_interval": json.dumps([speed.get("speedup_low"), speed.get("speedup_high")]),
        "figures": json.dumps(promotion_metrics(evaluation, arm)),
        _MEASURED_WITH: json.dumps({**settings, BLOCK_SIZE: drafter.get("block_size")}),
        "decision": decision["sentence"][:4000],
        "outcome": decision["outcome"],
        "rules": failed_rules(decision),
        **prompt_tags(prompts),
    }


def failed_rules(decision: Mapping[str, Any]) -> str:
    """Return the rules of the gate that were broken, then those that were inconclusive; empty if all were passed."""
    failed = [rule for rule in decision["rules"] if not rule["passed"]]
    kinds = {
        "broken": [rule["name"] for rule in failed if rule["judged"]],
        "inconclusive": [rule["name"] for rule in failed if not rule["judged"]],
    }
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)[:_MOST_OF_RULES]


def prompt_tags(prompts: PromptsConfig) -> dict[str, str]:
    """Which prompts measure: a later refresh must not train on them."""
    return {
        _SHARES: json.dumps(held_out_shares(prompts)),
        _BY: prompts.heldout_by,
        _SUFFIXES: json.dumps(_suffixes(prompts), default=sorted),
    }


def tag_refreshed(version: Version) -> None:
    """A refresh has come to its end with this version: one that was lost before goes on. What a clock said that was
    ahead counts no more."""
    lines = registry()
    for each in lines.versions(version.line):
        if age_days(each.tags.get(REFRESHED_AT) or None) < -MAX_CLOCK_SKEW_DAYS:
            lines.tag(each, {REFRESHED_AT: ""})
    lines.tag(version, {REFRESHED_AT: datetime.now(UTC).isoformat(timespec="seconds")})


def log_tags(logs: ArtifactRef) -> dict[str, str]:
    """Which logged answers a version was trained on, and where the next refresh's `since: last` begins."""
    said = json.loads((logs.path / "logs.json").read_text("utf-8"))
    answers = EarlierConfig(folder=str(logs.path), sha256=sha256_file(logs.path / TABLE), **said["given_by"])
    return {"answers": answers.model_dump_json(), "read_until": said["window"]["newest"] or ""}


def promotion_metrics(evaluation: Mapping[str, Any], arm: str) -> dict[str, dict[str, Any]]:
    """tau and speed-up with their intervals, of all prompts and of as many sets as a tag can say: a drift check
    compares with tau later."""
    drafter, speed = evaluation["drafters"][arm], (evaluation.get("speed") or {}).get(arm) or {}
    overall = {"tau": drafter["tau"], "low": drafter["tau_low"], "high": drafter["tau_high"]}
    overall |= {name: speed[name] for name in ("speedup", "speedup_low", "speedup_high") if name in speed}
    overall = _rounded({**overall, "prompts": drafter["prompts"]})
    sets = {name: _rounded(arms[arm]) for name, arms in (evaluation.get("sets") or {}).items()}
    if len(json.dumps({"all": overall, **sets})) > _MOST_CHARACTERS:
        sets = {name: {key: each[key] for key in _OF_A_SET if key in each} for name, each in sets.items()}
    while len(json.dumps({"all": overall, **sets})) > _MOST_CHARACTERS:
        sets.popitem()
    return {"all": overall, **sets}


def _rounded(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
