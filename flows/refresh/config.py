"""The config of a refresh: one frozen model is YAML schema, flow parameter, overrides, MLflow's params and keys."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationInfo, model_validator

from draftsmith.flows.config.errors import models_at
from draftsmith.flows.config.load import FROM_FILE
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.refresh.line import RegistryConfig
from draftsmith.flows.refresh.promotion_hook import HookConfig
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.prompt_config import SPLITS, JsonlSource
from draftsmith.stages.data.prompts import PromptsConfig
from draftsmith.stages.data.time_window import LAST
from draftsmith.stages.drafters.stage import ChampionConfig
from draftsmith.stages.engines.config import SamplingConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.drift import DriftConfig
from draftsmith.stages.evaluation.gate_rules import GateConfig
from draftsmith.stages.replay.stage import MiningConfig
from draftsmith.stages.report.stage import ReportConfig
from draftsmith.stages.runtime.stage import Config
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.training.config import OpdConfig, SftConfig

# held-out prompts of a refresh from logs alone: enough for an interval of a few percent
_OF_LOGS = {"train": 0, "validation": 16, "heldout": 128, "max_prompt_tokens": 2048, "too_long": "skip"}
_MEASURED = ("validation", "heldout")  # the splits that drafters are measured on, and chosen
_READ_ALIKE = ("max_bad_share", "chat_template_kwargs")  # a prompt is the same in both sections


class RefreshOptions(Config):
    """Which comparisons the refresh makes beside the drafters themselves."""

    control: bool = True
    """Also continue SFT for as many steps and blocks as OPD: the drafter that OPD has to beat."""


class RefreshConfig(RunOptions):
    """One refresh of a drafter."""

    refresh: RefreshOptions = RefreshOptions()
    target: TargetConfig
    prompts: PromptsConfig
    logs: LogsConfig | None = None
    """Answers that the target gave in production. They take the place of `rollout` and of `assisted`, which may then be
    left out and are not read: SFT is trained on them, they are mined with the SFT drafter, and OPD is trained on them.
    Only held-out prompts are answered by the target here."""
    rollout: RolloutConfig | None = None
    """The target's answers that SFT is trained on."""
    sft: SftConfig = SftConfig()
    assisted: RolloutConfig | None = None
    """Rollout with the SFT drafter in the loop: the trajectories that are mined and that OPD is trained on."""
    mining: MiningConfig = MiningConfig()
    opd: OpdConfig = OpdConfig()
    heldout: RolloutConfig = RolloutConfig(splits=_MEASURED)
    """The target's answers to held-out prompts, which drafters are compared on."""
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig | None = None
    """The line of drafters that this refresh goes on with: from its champion, to its next one. Without it a refresh
    stands alone: it begins as section `sft` says, and promotes nothing."""
    drift: DriftConfig = DriftConfig()
    gate: GateConfig = GateConfig()
    on_promote: HookConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, data: Any, info: ValidationInfo) -> Any:
        """What is left out of `heldout`; and beside logs: without sources held-out prompts are rows of the logs, new
        ones first, sampled as the answers were."""
        if info.context == FROM_FILE and isinstance(data, dict):
            _refuse_what_is_filled_in(data)
        if not isinstance(data, dict):
            return data
        made = dict(data)
        if isinstance(data.get("heldout"), dict):
            made["heldout"] = {"splits": _MEASURED, **data["heldout"]}
        if not isinstance(data.get("logs"), dict):
            return made
        logs = data["logs"]
        paths, given = logs.get("paths"), data.get("prompts", {})
        if paths and isinstance(given, dict) and "sources" not in given:
            of_rows = ("since", "filter", "fields")
            given_too = {name: logs[name] for name in of_rows if logs.get(name) is not None}
            read = {name: logs[name] for name in _READ_ALIKE if logs.get(name) is not None}
            each = [paths] if isinstance(paths, str) else paths
            sources = [{"kind": "jsonl", "path": path, **given_too} for path in each]
            made["prompts"] = {"sources": sources, **_OF_LOGS, **read, **given, "of_logs": True}
        sampled = {
            "temperature": logs.get("temperature", 0),
            "top_p": logs.get("top_p", 1),
            "top_k": logs.get("top_k", 0),
        }
        for section, fields in {"heldout": {"splits": _MEASURED}, "evaluation": {}}.items():
            given = data.get(section, {})
            if isinstance(given, dict):
                own = given.get("sampling", {})
                sampling = {**sampled, **own} if isinstance(own, dict) else own
                made[section] = {**fields, **given, "sampling": sampling}
        return made

    @model_validator(mode="after")
    def _answers_come_from_somewhere(self) -> RefreshConfig:
        if self.logs is None:
            for name in ("rollout", "assisted"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is required: give this section, or logs with answers of the target")
        return self

    @model_validator(mode="after")
    def _logs_are_no_benchmark(self) -> RefreshConfig:
        read = self.logs.paths if self.logs is not None else []
        for index, source in enumerate(self.prompts.sources):
            if source.heldout_share == 1 and isinstance(source, JsonlSource) and source.path in read:
                raise ValueError(
                    f"prompts.sources.{index}.heldout_share: 1 holds out every row of {source.path}, which section "
                    "logs trains on: give a share below 1"
                )
        return self

    @model_validator(mode="after")
    def _what_is_measured_is_there(self) -> RefreshConfig:
        if "heldout" not in self.heldout.splits:
            raise ValueError(
                f"heldout.splits: {list(self.heldout.splits)} lacks heldout, which drafters are measured on: add it"
            )
        if self.prompts.prompt_count("heldout") == 0:
            raise ValueError("prompts.heldout: drafters are measured on this split: give its number")
        if self.evaluation.block_sizes and self.prompts.prompt_count("validation") == 0:
            raise ValueError("prompts.validation: evaluation.block_sizes needs this split: give its number")
        counts = self.heldout.counts({split: self.prompts.prompt_count(split) for split in SPLITS})
        if not counts["heldout"]:
            raise ValueError(
                "heldout: skip and prompts leave out all of split heldout, which drafters are measured on. Change "
                f"them, or lower the counts in section prompts (they are taken in the order {', '.join(SPLITS)})."
            )
        return self

    @model_validator(mode="after")
    def _a_line_chooses_its_challenger(self) -> RefreshConfig:
        if self.registry is not None and "validation" not in self.heldout.splits:
            raise ValueError("heldout.splits: add validation: the challenger is chosen on its answers (registry)")
        return self

    @model_validator(mode="after")
    def _a_champion_is_of_a_line(self) -> RefreshConfig:
        if self.registry is None and self.sft.init_from == CHAMPION:
            raise ValueError("sft.init_from: `champion` needs section registry, which names the line")
        if self.registry is not None and self.registry.restart and self.sft.init_from == CHAMPION:
            raise ValueError("registry.restart: sft.init_from says `champion`; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _what_was_read_is_known(self) -> RefreshConfig:
        if self.registry is None:
            needs = "`last` needs section registry, whose champion says what was read"
            if self.logs is not None and self.logs.since == LAST:
                raise ValueError(f"logs.since: {needs}")
            if _since_last(self.prompts):
                raise ValueError(f"prompts.sources: since: {needs}")
            if self.logs is not None and self.logs.replay_share:
                raise ValueError(
                    "logs.replay_share: needs section registry, whose champion says what it was trained on"
                )
        return self

    @property
    def experiment(self) -> str | None:
        """One a drafter line: its refreshes are compared with each other."""
        return self.registry.name if self.registry is not None else None

    @property
    def external_programs(self) -> dict[str, str]:
        command = self.on_promote.command if self.on_promote is not None else None
        return {"on_promote.command": command[0]} if command else {}

    @property
    def champion(self) -> ChampionConfig | None:
        """Who serves, of a resolved config."""
        return self.registry.champion if self.registry is not None else None

    @model_validator(mode="after")
    def _time_limits_name_nodes(self) -> RefreshConfig:
        no_nodes = {*RunOptions.model_fields, "refresh", "registry", "on_promote"}
        self.stages.require_nodes({*type(self).model_fields, "champion", "control", "earlier", "report"} - no_nodes)
        return self


def _refuse_what_is_filled_in(data: dict[str, Any]) -> None:
    """Raise ValueError for a field that a run looks up: it would be replaced without a word."""
    for section, given in data.items():
        for model in models_at(RefreshConfig, [section]) if isinstance(given, dict) else []:
            for name in model.filled_in() if issubclass(model, Config) else []:
                if name in given:
                    raise ValueError(f"{section}.{name} is filled in by the run. Remove it.")


def _since_last(prompts: PromptsConfig) -> bool:
    return any(isinstance(source, JsonlSource) and source.since == LAST for source in prompts.sources)


def prompts_since(prompts: PromptsConfig, read_until: str | None) -> PromptsConfig:
    """With the time that `last` means, in place of it."""
    sources = [
        source.model_copy(update={"since": read_until})
        if isinstance(source, JsonlSource) and source.since == LAST
        else source
        for source in prompts.sources
    ]
    return prompts.model_copy(update={"sources": sources})


CHAMPION = "champion"  # of `sft.init_from`: that of the registry, and random weights where there is none


def starts_from_champion(config: RefreshConfig) -> bool:
    """Whether SFT goes on from the champion; `sft.init_from` is where a line begins, and begins again if asked to."""
    return config.registry is not None and config.champion is not None and not config.registry.restart


def sft_config(config: RefreshConfig) -> SftConfig:
    """Of the warm-start: what `init_from: champion` means is the graph's business."""
    if config.sft.init_from != CHAMPION and not starts_from_champion(config):
        return config.sft  # where the line begins
    start = {"init_from": None, "init_revision": None, "adopt": config.sft.steps == 0}
    return config.sft.model_copy(update=start)


def mining_config(config: RefreshConfig) -> MiningConfig:
    """Return how much is mined: what OPD's anchors and its loss read."""
    table = "sample"
    if config.opd.reads_table:
        table = "scored" if config.opd.loss.needs_scores else "full"
    return config.mining.model_copy(update={"table": table})


def drift_config(config: RefreshConfig) -> DriftConfig:
    """The champion drafts as drafters do when their figures are taken."""
    return config.drift.model_copy(update={"drafting": config.evaluation.drafted()})


# of `measured_with`: what a version was measured with whose settings were kept before a field was added
DEFAULT_SAMPLING = {
    f"heldout.sampling.{name}": value for name, value in SamplingConfig().model_dump(mode="json").items()
}


def measured_with(config: RefreshConfig) -> dict[str, Any]:
    """The settings that tau depends on, beside drafter, target and prompts, by field."""
    sections = {"heldout.sampling": config.heldout.sampling, "drafting": config.evaluation.drafted()}
    return {
        f"{section}.{name}": value
        for section, given in sections.items()
        for name, value in given.model_dump(mode="json").items()
    }


def report_config(config: RefreshConfig) -> ReportConfig:
    """Return who serves, and what the line's champions were worth until now."""
    if config.registry is None:
        return ReportConfig()
    serves = (config.champion.line, config.champion.version) if config.champion is not None else None
    return ReportConfig(champion=serves, history=config.registry.history, line=config.registry.name)


def control_config(config: RefreshConfig) -> SftConfig:
    """The control of a refresh."""
    return config.sft.continued(config.opd)
