"""The config of a refresh: one model for YAML, overrides, flow parameters, MLflow's params and cache keys."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, JsonValue, ValidationInfo, model_validator

from draftsmith.artifacts.identifiers import LineName, ServerUrl
from draftsmith.flows.config.errors import models_at
from draftsmith.flows.config.load import FROM_FILE
from draftsmith.flows.config.options import RunOptions
from draftsmith.stages.data.logs.earlier import EarlierConfig
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.prompts.stage import SPLITS, JsonlSource, PromptsConfig
from draftsmith.stages.data.time_window import LAST
from draftsmith.stages.drafters.champion import ChampionConfig
from draftsmith.stages.drafters.registry import is_native
from draftsmith.stages.engines.config import ServerEngineConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.drift import DriftConfig
from draftsmith.stages.evaluation.gate import GateConfig
from draftsmith.stages.replay.stage import MiningConfig
from draftsmith.stages.report.stage import HistoryPoint, ReportConfig
from draftsmith.stages.runtime.stage import Config, FilledIn
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.training.config import OpdConfig, SftConfig

# held-out prompts of a refresh from logs only: enough for an interval of a few percent
_LOG_PROMPTS = {"train": 0, "validation": 16, "heldout": 128, "max_prompt_tokens": 2048, "too_long": "skip"}
_MEASURED = ("validation", "heldout")  # splits: the challenger is chosen on one, drafters are measured on the other
_SHARED = ("max_bad_share", "chat_template_kwargs")  # fields that prompts take from logs


class RefreshOptions(Config):
    """Options of the comparisons that a refresh makes."""

    control: bool = True
    """Also continue SFT for as many steps and blocks as OPD: the drafter that OPD must beat."""


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
            description="option --restart of one command: start from section `sft`, even if there is a champion; it "
            "must still be beaten"
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


class RefreshConfig(RunOptions):
    """One refresh of a drafter."""

    refresh: RefreshOptions = RefreshOptions()
    target: TargetConfig
    prompts: PromptsConfig
    logs: LogsConfig | None = None
    """Answers that the target gave in production. They replace sections `rollout` and `assisted`, which are then not
    read: SFT and OPD are trained on these answers, and they are mined with the SFT drafter. The target then only
    answers held-out prompts."""
    rollout: RolloutConfig | None = None
    """The target's answers that SFT is trained on."""
    sft: SftConfig = SftConfig()
    assisted: RolloutConfig | None = None
    """Rollout with the SFT drafter: the answers that are mined and that OPD is trained on."""
    mining: MiningConfig = MiningConfig()
    opd: OpdConfig | None = OpdConfig()
    """How OPD trains the SFT drafter. `opd: null` skips mining, OPD and the control, and ignores sections `assisted`
    and `mining`: the SFT drafter is then the challenger."""
    heldout: RolloutConfig = RolloutConfig(splits=_MEASURED)
    """The target's answers to held-out prompts, on which drafters are compared."""
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig | None = None
    """The model line that this refresh continues from its champion. Without it a refresh starts from section `sft` and
    promotes nothing."""
    drift: DriftConfig = DriftConfig()
    gate: GateConfig = GateConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any, info: ValidationInfo) -> Any:
        """Fill in the splits of `heldout`, and what follows from section logs.

        Without sources, held-out prompts are rows of the logs, new ones first. Answers are sampled like logged ones.
        """
        if not isinstance(data, dict):
            return data
        if info.context == FROM_FILE:
            _reject_filled_in(data)
        filled = dict(data)
        if isinstance(data.get("heldout"), dict):
            filled["heldout"] = {"splits": _MEASURED, **data["heldout"]}
        if not isinstance(data.get("logs"), dict):
            return filled
        logs = data["logs"]
        paths, prompts = logs.get("paths"), data.get("prompts", {})
        if paths and isinstance(prompts, dict) and "sources" not in prompts:
            row_fields = {name: logs[name] for name in ("since", "filter", "fields") if logs.get(name) is not None}
            shared = {name: logs[name] for name in _SHARED if logs.get(name) is not None}
            all_paths = [paths] if isinstance(paths, str) else paths
            sources = [{"kind": "jsonl", "path": path, **row_fields} for path in all_paths]
            filled["prompts"] = {"sources": sources, **_LOG_PROMPTS, **shared, **prompts, "of_logs": True}
        sampled = {
            "temperature": logs.get("temperature", 0),
            "top_p": logs.get("top_p", 1),
            "top_k": logs.get("top_k", 0),
        }
        for section, fields in {"heldout": {"splits": _MEASURED}, "evaluation": {}}.items():
            section_data = data.get(section, {})
            if isinstance(section_data, dict):
                section_sampling = section_data.get("sampling", {})
                sampling = {**sampled, **section_sampling} if isinstance(section_sampling, dict) else section_sampling
                filled[section] = {**fields, **section_data, "sampling": sampling}
        return filled

    @model_validator(mode="after")
    def _has_answers(self) -> RefreshConfig:
        if self.logs is None:
            for name in ("rollout",) if self.opd is None else ("rollout", "assisted"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is required. Add this section, or logs with answers of the target.")
        if self.assisted is not None and self.assisted.answers is not None:
            raise ValueError("assisted.answers: logged answers have no verify steps. Remove it.")
        return self

    @model_validator(mode="after")
    def _trains(self) -> RefreshConfig:
        native = is_native(self.sft.drafter.kind)
        if self.opd is None and self.sft.steps == 0 and not native:
            raise ValueError("opd: without it, sft.steps: 0 trains nothing. Set sft.steps, or keep section opd.")
        return self

    @model_validator(mode="after")
    def _times_servers_around_loads(self) -> RefreshConfig:
        if self.gate.loads and isinstance(self.evaluation.engine, ServerEngineConfig):
            numbers = sorted(self.evaluation.concurrency)
            if beyond := [load for load in self.gate.loads if not numbers[0] <= load <= numbers[-1]]:
                raise ValueError(
                    f"gate.loads: servers are timed with {numbers} requests in flight, and {beyond} is out of range. "
                    "Add it to evaluation.concurrency, or remove it."
                )
        return self

    @model_validator(mode="after")
    def _leaves_logs_to_train_on(self) -> RefreshConfig:
        read = self.logs.paths if self.logs is not None else []
        for index, source in enumerate(self.prompts.sources):
            if source.heldout_share == 1 and isinstance(source, JsonlSource) and source.path in read:
                raise ValueError(
                    f"prompts.sources.{index}.heldout_share: 1 holds out every row of {source.path}, which section "
                    "logs trains on. Give a share below 1."
                )
        return self

    @model_validator(mode="after")
    def _has_measured_splits(self) -> RefreshConfig:
        if "heldout" not in self.heldout.splits:
            raise ValueError(
                f"heldout.splits: {list(self.heldout.splits)} lacks heldout, on which drafters are measured. Add it."
            )
        if self.prompts.prompt_count("heldout") == 0:
            raise ValueError("prompts.heldout: no prompts, and drafters are measured on them. Give their number.")
        if self.evaluation.block_sizes and self.prompts.prompt_count("validation") == 0:
            raise ValueError("prompts.validation: no prompts, but evaluation.block_sizes needs some. Give a number.")
        counts = self.heldout.counts({split: self.prompts.prompt_count(split) for split in SPLITS})
        if not counts["heldout"]:
            raise ValueError(
                "heldout: skip and prompts leave out all of split heldout, on which drafters are measured. Change "
                f"them, or lower the counts in section prompts (they are used in the order {', '.join(SPLITS)})."
            )
        return self

    @model_validator(mode="after")
    def _fits_its_line(self) -> RefreshConfig:
        if self.registry is not None:
            if "validation" not in self.heldout.splits:
                raise ValueError("heldout.splits: lacks validation, where the challenger is chosen (registry). Add it.")
            return self
        if self.sft.init_from == CHAMPION:
            raise ValueError("sft.init_from: `champion` needs section registry, which names the line. Add it.")
        needs = "`last` needs section registry, whose champion states what was read. Add it."
        if self.logs is not None and self.logs.since == LAST:
            raise ValueError(f"logs.since: {needs}")
        if any(isinstance(source, JsonlSource) and source.since == LAST for source in self.prompts.sources):
            raise ValueError(f"prompts.sources: since: {needs}")
        if self.logs is not None and self.logs.replay_share:
            raise ValueError(
                "logs.replay_share: needs section registry, whose champion states what it was trained on. Add it."
            )
        return self

    @property
    def experiment(self) -> str | None:
        """Return the MLflow experiment: one for each line, so that its refreshes are compared."""
        return self.registry.name if self.registry is not None else None

    @property
    def skipped(self) -> tuple[str, ...]:
        """Return the nodes that `opd: null` skips."""
        if self.opd is not None:
            return ()
        assisted, control = ("assisted",) * (self.logs is None), ("control",) * self.refresh.control
        return (*assisted, "mining", "opd", *control)

    @property
    def champion(self) -> ChampionConfig | None:
        """Return the champion of a resolved config."""
        return self.registry.champion if self.registry is not None else None

    @model_validator(mode="after")
    def _time_limits_name_nodes(self) -> RefreshConfig:
        no_nodes = {*RunOptions.model_fields, "refresh", "registry"}
        self.stages.require_nodes({*type(self).model_fields, "champion", "control", "earlier"} - no_nodes)
        return self


def _reject_filled_in(data: dict[str, Any]) -> None:
    """Raise ValueError for a field that a run fills in, and would overwrite."""
    for section, fields in data.items():
        for model in models_at(RefreshConfig, [section]) if isinstance(fields, dict) else []:
            for name in model.filled_in() if issubclass(model, Config) else []:
                if (section, name) == ("registry", "restart") and name in fields:
                    raise ValueError("registry.restart: applies to one command. Remove it, and use option --restart.")
                if name in fields:
                    raise ValueError(f"{section}.{name} is filled in by the run. Remove it.")


def prompts_since(prompts: PromptsConfig, read_until: str | None) -> PromptsConfig:
    """Return prompts with the time that `since: last` means."""
    sources = [
        source.model_copy(update={"since": read_until})
        if isinstance(source, JsonlSource) and source.since == LAST
        else source
        for source in prompts.sources
    ]
    return prompts.model_copy(update={"sources": sources})


CHAMPION = "champion"  # value of `sft.init_from`: the line's champion, or random weights without one


def starts_from_champion(config: RefreshConfig) -> bool:
    """Return whether SFT continues the champion; `sft.init_from` is where a line starts or restarts.

    A native head continues only a native head, and not with `sft.steps: 0`, which reads the target's.
    """
    if config.registry is None or config.champion is None or config.registry.restart:
        return False
    native = is_native(config.sft.drafter.kind)
    return native == is_native(config.champion.kind) and not (native and config.sft.steps == 0)


def sft_config(config: RefreshConfig) -> SftConfig:
    """Return the config of SFT. A drafter to continue is its input in the graph, not `init_from`."""
    if config.sft.init_from != CHAMPION and not starts_from_champion(config):
        return config.sft
    start = {"init_from": None, "init_revision": None, "adopt": config.sft.steps == 0}
    return config.sft.model_copy(update=start)


def mining_config(config: RefreshConfig, opd: OpdConfig) -> MiningConfig:
    """Return the config of mining with the table that OPD's anchors and loss read."""
    table = "sample"
    if opd.reads_table:
        table = "scored" if opd.loss.needs_scores else "full"
    return config.mining.model_copy(update={"table": table})


def waits_for_mining(config: RefreshConfig, opd: OpdConfig) -> bool:
    """Return whether OPD reads the mined table: its steps, or the size of its blocks where it is not the drafter's."""
    return opd.reads_table or config.mining.drafting.block_size is not None


def drift_config(config: RefreshConfig) -> DriftConfig:
    """Return the config of the drift check, in which the champion drafts as in an evaluation."""
    return config.drift.model_copy(update={"drafting": config.evaluation.drafted()})


def evaluation_config(config: RefreshConfig) -> EvaluationConfig:
    """Return the config of the evaluation, which measures again if the gate could not decide on the speed."""
    judged = config.registry is not None and config.gate.judge_speed
    return config.evaluation.model_copy(update={"min_speedup": config.gate.min_speedup if judged else None})


def measured_with(config: RefreshConfig) -> dict[str, JsonValue]:
    """Return the settings that tau depends on besides drafter, target and prompts, by field."""
    sections = {"heldout.sampling": config.heldout.sampling, "drafting": config.evaluation.drafted()}
    return {
        f"{section}.{name}": value
        for section, fields in sections.items()
        for name, value in fields.model_dump(mode="json").items()
    }


def report_config(config: RefreshConfig) -> ReportConfig:
    """Return the config of the report: the champion, and tau of the line over time."""
    if config.registry is None:
        return config.report
    serves = (config.champion.line, config.champion.version) if config.champion is not None else None
    history = tuple(map(HistoryPoint.model_validate, config.registry.history))
    return config.report.model_copy(update={"champion": serves, "history": history, "line": config.registry.name})


def control_config(config: RefreshConfig, opd: OpdConfig) -> SftConfig:
    """Return the config of the control: SFT continued for as long as OPD."""
    return config.sft.continued(opd)
