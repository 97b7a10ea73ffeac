"""The champion of a model line when a refresh is planned, and what its refresh has read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from pydantic import JsonValue, ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.identifiers import absolute_path, sha256_digest
from draftsmith.artifacts.tracking.registry import CHAMPION as ALIAS
from draftsmith.artifacts.tracking.registry import PROMOTED, Version, describe_wrong_tracker
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.refresh.config import CHAMPION, RefreshConfig, RegistryConfig, prompts_since
from draftsmith.flows.refresh.versions import (
    BY,
    KIND,
    MEASURED_WITH,
    REFRESHED_AT,
    SHARES,
    SUFFIXES,
    drafter_checkpoint,
    registry,
)
from draftsmith.stages.data.logs.earlier import EarlierConfig, is_available
from draftsmith.stages.data.prompts.stage import (
    HuggingFaceSource,
    JsonlSource,
    PromptsConfig,
    PromptSource,
    ReasoningGymSource,
)
from draftsmith.stages.data.time_window import LAST
from draftsmith.stages.drafters.champion import ChampionConfig
from draftsmith.stages.runtime.stage import Config

_MAX_POINTS = 300  # most points of a line's history


def resolve(config: RefreshConfig) -> RefreshConfig:
    """Return the config with the line's champion filled in, and with the time that `since: last` means."""
    if config.registry is None:
        return config
    versions = registry().versions(config.registry.name)
    check_held_out(versions, config.prompts)
    if config.registry.restart and _deployed():
        raise DraftsmithError(
            "registry.restart: every run of a deployment would start the line again. Run the config once with "
            "`draftsmith run CONFIG --restart`."
        )
    line = with_current_champion(config.registry, versions)
    if line.restart and line.champion is not None and config.sft.init_from == CHAMPION:
        raise DraftsmithError(
            f"--restart contradicts sft.init_from `champion`, which is version {line.champion.version}. Remove the "
            "option, or change the field."
        )
    sections: dict[str, Config] = {"registry": line, "prompts": prompts_since(config.prompts, line.read_until)}
    if config.logs is not None and config.logs.since == LAST:
        sections["logs"] = config.logs.model_copy(update={"after": line.read_until})
    if config.logs is not None and not config.logs.replay_share and line.answers and not is_available(line.answers):
        # on a machine without the store: late rows are skipped, and the refresh goes on
        sections["registry"] = line.model_copy(update={"answers": None})
    return config.model_copy(update=sections)


def restarted(config: RunOptions) -> RefreshConfig:
    """Return the config of a refresh that starts its line again. Raises DraftsmithError if it names no line."""
    if not isinstance(config, RefreshConfig) or config.registry is None:
        raise DraftsmithError("--restart: the config names no model line (registry.name). Remove the option.")
    return config.model_copy(update={"registry": config.registry.model_copy(update={"restart": True})})


def _deployed() -> bool:
    from draftsmith.flows.orchestration.flow_run import deployed  # imports Prefect, and planning must not

    return deployed()


def with_current_champion(line: RegistryConfig, versions: Sequence[Version]) -> RegistryConfig:
    """Return the section with the line's champion and what its refresh read, filled in from the line's versions."""
    version = next((version for version in versions if ALIAS in version.aliases), None)
    current = RegistryConfig(**line.model_dump(exclude=set(line.filled_in()) - {"restart"}))
    if version is None:
        if not line.restart:
            _check_starts(line, versions)
        return current
    return current.model_copy(
        update={
            "champion": champion_config(version),
            "answers": earlier_answers(version),
            "history": tuple(history(line.name, versions)),
            "refreshed_at": max(
                (at for other in versions if (at := other.tags.get(REFRESHED_AT))),
                default=version.tags.get("promoted_at") or version.created_at,
            ),
            "measured_with": version.json(MEASURED_WITH, {}),
            "read_until": version.tags.get("read_until") or None,
        }
    )


def champion_config(version: Version) -> ChampionConfig:
    """Return the config of stage `champion` for a version."""
    return ChampionConfig(
        line=version.line,
        version=version.number,
        folder=str(drafter_checkpoint(version)),
        content_id=version.content_id,
        drafter_digest=version.tags.get("drafter_digest", ""),
        kind=version.tags.get(KIND, ""),
        promoted_at=version.tags.get("promoted_at", ""),
        figures=version.metrics(),
    )


def earlier_answers(version: Version) -> EarlierConfig | None:
    """Return the logged answers that a version was trained on, without fields that a later Draftsmith wrote."""
    if not (answers := version.json("answers", {})):
        return None
    where = f"{version}: tag draftsmith.answers"
    absolute_path(answers.get("folder"), where=where)
    sha256_digest(answers.get("sha256"), where=where)
    try:
        known = {name: value for name, value in answers.items() if name in EarlierConfig.model_fields}
        return EarlierConfig.model_validate(known)
    except ValidationError as error:
        field = ".".join(map(str, error.errors()[0]["loc"]))
        raise DraftsmithError(f"{where}: {field}: {error.errors()[0]['msg']}. Correct it, or remove it.") from None


def _check_starts(line: RegistryConfig, versions: Sequence[Version]) -> None:
    """Raise DraftsmithError if a line without a champion had one, has one in another MLflow, or serves one.

    Otherwise a drafter that only beats the baseline would replace it.
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


def check_held_out(versions: Sequence[Version], prompts: PromptsConfig) -> None:
    """Raise DraftsmithError if prompts that measured one of the line's versions would now be training prompts.

    That happens if fewer prompts are held out than then, or if they are chosen by another text (prompt and suffix).
    """
    remedy = "prompts that measured it would be trained on. Set it back, or start another line (`registry.name`)."
    shares, suffixes = held_out_shares(prompts), suffix_digests(prompts)
    for version in versions:
        by = version.tags.get(BY, prompts.heldout_by)  # a killed run may have left no tags
        if by != prompts.heldout_by:
            raise DraftsmithError(
                f"prompts: heldout_by is {prompts.heldout_by}, and {version} was measured with {by}: {remedy}"
            )
        for source, share in version.json(SHARES, {}).items():
            now = shares.get(source, shares[""])
            if now < share:
                raise DraftsmithError(
                    f"prompts{f', source {source}' if source else ''}: heldout_share is {now:g}, and {version} was "
                    f"measured with {share:g}: {remedy}"
                )
        for source, known in version.json(SUFFIXES, {}).items():
            if not suffixes.get(source, set()) <= set(known):
                raise DraftsmithError(
                    f"prompts, source {source}: it has a suffix that {version} was not measured with: {remedy}"
                )


def held_out_shares(prompts: PromptsConfig) -> dict[str, float]:
    """Return heldout_share by source; the empty name has the share of all other sources."""
    by_source = {_source_name(s): s.heldout_share for s in prompts.sources if s.heldout_share is not None}
    return {"": prompts.heldout_share, **by_source}


def suffix_digests(prompts: PromptsConfig) -> dict[str, set[str]]:
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


def history(line: str, versions: Sequence[Version]) -> list[dict[str, JsonValue]]:
    """Return tau on all prompts at each promotion, refusal and drift check of the line, oldest first."""
    lines = registry()
    # promotions by hand measure nothing; a version that was promoted again has the metrics of its last promotion
    measured_at = {event.version: event.at for event in lines.events(line) if event.what == PROMOTED}
    points = [
        {
            "at": measured_at.get(version.number) or version.created_at,
            "version": version.number,
            "what": "promoted" if version.tags.get("promoted_at") else "refused",
            **version.metrics()["all"],
        }
        for version in versions
        if "all" in version.metrics()
    ]
    checks = [{"what": "checked"} | check.to_json() for check in lines.drift(line)]
    return sorted(points + checks, key=lambda point: str(point["at"]))[-_MAX_POINTS:]
