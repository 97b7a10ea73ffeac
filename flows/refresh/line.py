"""The model line of a refresh: successive drafters of one target, as versions of a registered model in MLflow.

A plan looks up the line's champion here; a promotion writes the tags that the next refresh reads.
"""

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
from tempfile import TemporaryDirectory
from typing import Annotated

from pydantic import Field, JsonValue, ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import UPLOADED, home
from draftsmith.artifacts.identifiers import LineName, ServerUrl, absolute_path, sha256_digest
from draftsmith.artifacts.results.data import LogsSummary
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.local import REPLACED, Store
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact, InputEntry, read_manifest, sha256_file
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.registry import PROMOTED, Registry, Version, describe_wrong_tracker
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.stages.data.logs.earlier import TABLE, EarlierConfig
from draftsmith.stages.data.prompts import (
    HuggingFaceSource,
    JsonlSource,
    PromptsConfig,
    PromptSource,
    ReasoningGymSource,
)
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.stage import ChampionConfig
from draftsmith.stages.runtime.stage import Config, FilledIn

log = logging.getLogger(__name__)

_MAX_POINTS = 300  # of a line's history
_MAX_METRICS_CHARS = 4900  # MLflow keeps 5,000 characters of a tag
_MAX_RULES_CHARS = 250
_SHORT_SET = ("tau", "low", "prompts")  # metrics of a set that are stored if there are many sets
_MEASURED_WITH = "measured_with"
FASTEST_BLOCK = "fastest_block"  # tag: the block size that decoded fastest, with the anchor
STEP_COSTS = "step_costs"  # tag: seconds of drafting by requests in flight, and of verifying by tokens
SCHEDULE = "schedule"  # tag: proposals by requests in flight, [[fewest, most, proposals], …]
CONFIDENCE = "confidence"  # tag: the calibration of a confidence head
BLOCK_SIZE = "drafting.block_size"  # one of the settings that metrics were measured with
_SHARES, _BY, _SUFFIXES = "heldout_shares", "heldout_by", "suffixes"
REFRESHED_AT = "refreshed_at"  # tag: when a refresh last ended with this version
MAX_CLOCK_SKEW_DAYS = 1 / 24  # between two hosts


class RegistryConfig(Config):
    """The model line that a refresh continues."""

    name: Annotated[LineName, Field(description="registered model in MLflow")]
    upload: Annotated[
        bool, Field(description="copy weights into MLflow's artifact store too, for machines without the store")
    ] = False
    approve: Annotated[
        bool,
        Field(
            description="a person approves each promotion: a deployment's run is suspended until it is resumed in "
            "Prefect; any other run ends, and `draftsmith promote` promotes"
        ),
    ] = False
    servers: Annotated[
        tuple[ServerUrl, ...],
        Field(description="servers that draft with the champion: swapped after a promotion, one after the other"),
    ] = ()
    restart: Annotated[
        bool,
        FilledIn(),
        Field(
            description="option --restart, of one command: start from section `sft`, without a champion or instead of "
            "it; an existing one must still be beaten"
        ),
    ] = False
    champion: Annotated[ChampionConfig | None, FilledIn(), Field(description="the champion when the plan is made")] = (
        None
    )
    answers: Annotated[
        EarlierConfig | None, FilledIn(), Field(description="the logged answers that the champion was trained on")
    ] = None
    history: Annotated[
        tuple[dict[str, JsonValue], ...], FilledIn(), Field(description="tau of the line's drafters over time")
    ] = ()
    refreshed_at: Annotated[str | None, FilledIn(), Field(description="when the line's last refresh ended")] = None
    measured_with: Annotated[dict[str, JsonValue], FilledIn()] = Field(
        default={}, description="settings that the champion's metrics were measured with"
    )
    read_until: Annotated[
        str | None, FilledIn(), Field(description="time of the newest logged row that the champion's refresh read")
    ] = None


def registry() -> Registry:
    """Return the registry of this home's MLflow, or of `MLFLOW_TRACKING_URI`."""
    return Registry(Tracking(home()))


def artifact_folder(version: Version) -> Path:
    """Return the folder of a version's artifact, fetched if the store is a bucket."""
    store = open_store(home())
    return store.localize(find_artifact(version, store) or version.path)


def find_artifact(version: Version | InputEntry, store: Store) -> Path | None:
    """Return the folder in this home with the version's content; None if there is none.

    The path that a version states is another one if the home was moved or copied, or if the same key was made again.
    """
    current = store.path(version.stage, version.key)
    for folder in (current, *current.parent.glob(f"{REPLACED}{current.name}-*")):
        with suppress(DraftsmithError):  # damaged: there may be another copy, or an upload
            if (folder / MANIFEST).is_file() and read_manifest(folder).content_id == version.content_id:
                return folder
    return None


def drafter_checkpoint(version: Version) -> Path:
    """Return the checkpoint of a version's drafter: from the store, or else its upload if there is one.

    Only a version with an upload is checked for damage, since no other has a copy to fall back to. A plan calls this,
    so files that were not touched since their last check are not read again.
    """
    store = open_store(home())
    if (folder := find_artifact(version, store)) is not None:
        try:
            if version.uploaded:
                store.verify_once(Artifact(folder, read_manifest(folder)), and_elsewhere=False)
        except DraftsmithError as damage:
            log.warning("%s: %s Using the uploaded copy.", version, damage)
            return download_upload(version)
        return folder / DRAFTER_FOLDER
    checkpoint = version.path / DRAFTER_FOLDER
    if not version.uploaded or checkpoint.is_dir():
        return checkpoint
    if store.manifest_at(version.stage, version.key) is not None:  # in a bucket, or replaced under the same key
        return artifact_folder(version) / DRAFTER_FOLDER
    return download_upload(version)


def download_upload(version: Version) -> Path:
    """Return this home's copy of a version's upload. Raises DraftsmithError if it is not what was registered."""
    expected = sha256_digest(version.tags.get("drafter_digest"), where=f"{version}: tag draftsmith.drafter_digest")
    folder = home() / UPLOADED / expected[:16] / DRAFTER_FOLDER
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".tmp-", dir=folder.parent) as scratch:
            copy = registry().download(version, Path(scratch))
            with suppress(OSError):  # another process was faster
                copy.rename(folder)
        if not folder.is_dir():
            raise DraftsmithError(f"{folder}: cannot be written. Check the disk.")
    if drafter_digest(folder) != expected:
        shutil.rmtree(folder)
        raise DraftsmithError(
            f"{version}: the copy in MLflow's artifact store is not what was registered. Run the same command again, "
            "or mount the store."
        )
    with suppress(OSError):  # the home may be read-only
        os.utime(folder.parent)  # `draftsmith prune` keeps recently used copies
    return folder


def with_current_champion(line: RegistryConfig) -> RegistryConfig:
    """Return the section with the line's champion and what its refresh read, filled in from the registry."""
    lines = registry()
    version, versions = lines.champion(line.name), lines.versions(line.name)
    current = RegistryConfig(**line.model_dump(exclude=set(line.filled_in()) - {"restart"}))
    if version is None:
        if not line.restart:
            _check_starts(line, versions)
        return current
    return current.model_copy(
        update={
            "champion": champion_config(version),
            "answers": earlier_answers(version),
            "history": tuple(history(line.name)),
            "refreshed_at": max(
                (at for other in versions if (at := other.tags.get(REFRESHED_AT))),
                default=version.tags.get("promoted_at") or version.created_at,
            ),
            "measured_with": version.json(_MEASURED_WITH, {}),
            "read_until": version.tags.get("read_until") or None,
        }
    )


def earlier_answers(version: Version) -> EarlierConfig | None:
    """Return the logged answers that a version was trained on, without fields that a later Draftsmith wrote."""
    if not (given := version.json("answers", {})):
        return None
    where = f"{version}: tag draftsmith.answers"
    absolute_path(given.get("folder"), where=where)
    sha256_digest(given.get("sha256"), where=where)
    try:
        return EarlierConfig.model_validate({n: value for n, value in given.items() if n in EarlierConfig.model_fields})
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise DraftsmithError(f"{where}: {field}: {error.errors()[0]['msg']}. Correct it, or remove it.") from None


def _check_starts(line: RegistryConfig, versions: Sequence[Version]) -> None:
    """Raise DraftsmithError if a line without a champion had one, has one in another MLflow, or serves one.

    A drafter that only beats decoding without a drafter would replace it.
    """
    tracking = Tracking(home())
    if not versions and (elsewhere := describe_wrong_tracker(tracking)) is not None:
        raise DraftsmithError(
            f"{line.name}: it has no version here; {elsewhere}, or start the line here (option --restart)."
        )
    served = [version for version in versions if "promoted_at" in version.tags]
    if served:
        last = max(served, key=lambda version: (version.tags["promoted_at"], version.number))  # times are in seconds
        raise DraftsmithError(
            f"{last.line}: it has no champion, but {last} was one: the alias or its version was deleted in MLflow. "
            f"Promote a version (`draftsmith promote {last.line}@{last.number}`), or start again without one (option "
            "--restart)."
        )
    if line.servers:
        raise DraftsmithError(
            f"{line.name}: it has no champion in {tracking.public_uri}, but servers that draft with one "
            "(registry.servers). Set MLFLOW_TRACKING_URI as on the line's other hosts, or start the line with option "
            "--restart."
        )


def check_held_out(line: str, prompts: PromptsConfig) -> None:
    """Raise DraftsmithError if prompts that measured a version of the line would now be training prompts.

    That happens if fewer prompts are held out than then, or if they are chosen by another text (prompt and suffix).
    """
    remedy = "prompts that measured it would be trained on. Set it back, or start another line (`registry.name`)."
    shares, suffixes = held_out_shares(prompts), _suffixes(prompts)
    for version in registry().versions(line):
        by = version.tags.get(_BY, prompts.heldout_by)  # a killed run may have left no tags
        if by != prompts.heldout_by:
            raise DraftsmithError(
                f"prompts: heldout_by is {prompts.heldout_by}, and {version} was measured with {by}: {remedy}"
            )
        for source, share in version.json(_SHARES, {}).items():
            now = shares.get(source, shares[""])
            if now < share:
                raise DraftsmithError(
                    f"prompts{f', source {source}' if source else ''}: heldout_share is {now:g}, and {version} was "
                    f"measured with {share:g}: {remedy}"
                )
        for source, known in version.json(_SUFFIXES, {}).items():
            if not suffixes.get(source, set()) <= set(known):
                raise DraftsmithError(
                    f"prompts, source {source}: it has a suffix that {version} was not measured with: {remedy}"
                )


def held_out_shares(prompts: PromptsConfig) -> dict[str, float]:
    """Return heldout_share by source, and under the empty name that of all other sources."""
    by_source = {_source_name(s): s.heldout_share for s in prompts.sources if s.heldout_share is not None}
    return {"": prompts.heldout_share, **by_source}


def _suffixes(prompts: PromptsConfig) -> dict[str, set[str]]:
    """Return the digests of the suffixes by source; a source may be listed several times.

    White space is ignored, as it is when held-out prompts are chosen (`data/held_out.py`).
    """
    digests: dict[str, set[str]] = {}
    for source in prompts.sources:
        text = re.sub(r"\s+", " ", source.suffix).rstrip()
        digests.setdefault(_source_name(source), set()).add(hashlib.sha256(text.encode()).hexdigest()[:12])
    return digests


def _source_name(source: PromptSource) -> str:
    match source:
        case JsonlSource():
            return source.path
        case HuggingFaceSource():
            return source.id
        case ReasoningGymSource():
            return ", ".join(source.tasks)


def history(line: str) -> list[dict[str, JsonValue]]:
    """Return tau on all prompts at each promotion, refusal and drift check of the line, oldest first."""
    lines = registry()
    # promotions by hand measure nothing; a version that was promoted again has the metrics of its last promotion
    measured_at = {event.version: event.at for event in lines.events(line) if event.what == PROMOTED}
    versions = [
        {
            "at": measured_at.get(version.number) or version.created_at,
            "version": version.number,
            "what": "promoted" if version.tags.get("promoted_at") else "refused",
            **version.metrics()["all"],
        }
        for version in lines.versions(line)
        if "all" in version.metrics()
    ]
    checks = [{"what": "checked"} | check.to_json() for check in lines.drift(line)]
    return sorted(versions + checks, key=lambda point: str(point["at"]))[-_MAX_POINTS:]


def champion_config(version: Version) -> ChampionConfig:
    """Return the config of stage `champion` for a version."""
    return ChampionConfig(
        line=version.line,
        version=version.number,
        folder=str(drafter_checkpoint(version)),
        content_id=version.content_id,
        drafter_digest=version.tags.get("drafter_digest", ""),
        promoted_at=version.tags.get("promoted_at", ""),
        figures=version.metrics(),
    )


def age_days(refreshed_at: str | None) -> float:
    """Return the days since a refresh; 0 if there was none, below `-MAX_CLOCK_SKEW_DAYS` if a clock is wrong."""
    if refreshed_at is None:
        return 0.0
    return (datetime.now(UTC) - datetime.fromisoformat(refreshed_at)).total_seconds() / 86400


def version_tags(
    evaluation: EvaluationResult,
    decision: GateDecision,
    artifact: Path,
    prompts: PromptsConfig,
    settings: Mapping[str, JsonValue],
) -> dict[str, str]:
    """Return the tags of a challenger's version: its metrics, target, parents and the gate's decision.

    artifact: folder of the challenger's. settings: what its tau depends on (`measured_with`).
    """
    from draftsmith.stages.drafters.checkpoint import read_info  # imports torch, and planning must not

    arm, folder = decision.challenger, artifact / DRAFTER_FOLDER
    info, drafter = read_info(folder), evaluation.drafters[arm]
    speed = evaluation.speed.get(arm)
    return {
        "arm": arm,
        "drafter_digest": drafter_digest(folder),
        "target_digest": info.target_digest,
        "parents": json.dumps(info.parents[-8:]),
        "tau": f"{drafter.tau:.4f}",
        "tau_interval": json.dumps([drafter.tau_low, drafter.tau_high]),
        "speedup": f"{speed.speedup:.4f}" if speed and speed.speedup is not None else "",
        FASTEST_BLOCK: str((speed and speed.block_size) or ""),
        STEP_COSTS: json.dumps(evaluation.step_costs(arm)),
        SCHEDULE: json.dumps(evaluation.schedule(arm)),
        "speedup_interval": json.dumps([speed and speed.speedup_low, speed and speed.speedup_high]),
        "figures": json.dumps(promotion_metrics(evaluation, arm)),
        _MEASURED_WITH: json.dumps({**settings, BLOCK_SIZE: drafter.block_size}),
        CONFIDENCE: drafter.confidence.model_dump_json() if drafter.confidence is not None else "",
        "decision": decision.sentence[:4000],
        "outcome": decision.outcome,
        "rules": failed_rules(decision),
        **prompt_tags(prompts),
    }


def failed_rules(decision: GateDecision) -> str:
    """Return the names of the broken rules, then of the inconclusive ones; empty if all passed."""
    kinds = {
        "broken": [rule.name for rule in decision.failed if rule.broken],
        "inconclusive": [rule.name for rule in decision.failed if not rule.broken],
    }
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)[:_MAX_RULES_CHARS]


def prompt_tags(prompts: PromptsConfig) -> dict[str, str]:
    """Return the tags from which `check_held_out` knows the prompts that measured a version."""
    return {
        _SHARES: json.dumps(held_out_shares(prompts)),
        _BY: prompts.heldout_by,
        _SUFFIXES: json.dumps(_suffixes(prompts), default=sorted),
    }


def tag_refreshed(version: Version) -> None:
    """Tag the version with the time at which a refresh ended, and remove tags of clocks that were ahead."""
    lines = registry()
    for other in lines.versions(version.line):
        if age_days(other.tags.get(REFRESHED_AT) or None) < -MAX_CLOCK_SKEW_DAYS:
            lines.tag(other, {REFRESHED_AT: ""})
    lines.tag(version, {REFRESHED_AT: datetime.now(UTC).isoformat(timespec="seconds")})


def log_tags(logs: Path) -> dict[str, str]:
    """Return the tags that name a version's logged answers and the time from which `since: last` reads next."""
    summary = LogsSummary.read(logs)
    artifact = {"folder": str(logs), "sha256": sha256_file(logs / TABLE)}
    answers = EarlierConfig.model_validate({**artifact, **summary.given_by})
    return {"answers": answers.model_dump_json(), "read_until": summary.window.newest or ""}


def promotion_metrics(evaluation: EvaluationResult, arm: str) -> dict[str, dict[str, float | None]]:
    """Return an arm's tau and speed-up with their intervals on all prompts, and on as many slices as a tag holds.

    Later drift checks compare tau with these.
    """
    drafter, speed = evaluation.drafters[arm], evaluation.speed[arm].to_json() if arm in evaluation.speed else {}
    overall = {"tau": drafter.tau, "low": drafter.tau_low, "high": drafter.tau_high}
    overall |= {name: speed[name] for name in ("speedup", "speedup_low", "speedup_high") if name in speed}
    overall = _rounded({**overall, "prompts": drafter.prompts})
    sets = {name: _rounded(arms[arm].to_json()) for name, arms in evaluation.sets.items()}
    if len(json.dumps({"all": overall, **sets})) > _MAX_METRICS_CHARS:
        sets = {name: {key: metrics[key] for key in _SHORT_SET if key in metrics} for name, metrics in sets.items()}
    while len(json.dumps({"all": overall, **sets})) > _MAX_METRICS_CHARS:
        sets.popitem()
    return {"all": overall, **sets}


def _rounded(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in metrics.items()}
