"""The public Python API: load a target, drafters and answers, compare drafters by replay, run a refresh.

`import draftsmith` offers these names, and imports this module when one of them is first used. This module must not
import Prefect, whose environment `refresh` sets first.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home, home_umask
from draftsmith.artifacts.host import bypass_proxy_for_localhost
from draftsmith.artifacts.store.manifest import MANIFEST, read_manifest
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tables.readers import RowReader
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.flows.config.load import config_from_fields, read_config
from draftsmith.flows.orchestration.launch import launch
from draftsmith.flows.planning.graph import Selection
from draftsmith.flows.refresh.diff import version_diff
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.flows.refresh.measurements import resolve_drafter
from draftsmith.flows.refresh.versions import find_artifact
from draftsmith.stages.data.logs.filter import RowFilter, prompt_id
from draftsmith.stages.data.logs.rows import AnswerReader, LoggedRow
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.row_files import RejectLog, match_files, read_rows
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory, load_trajectories, trajectory_lengths
from draftsmith.stages.drafters import checkpoint
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.evaluation.acceptance import acceptance_table, has_loop, tau_difference
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import AcceptanceStats
from draftsmith.stages.runtime.facts import Facts
from draftsmith.stages.runtime.statistics import Estimate
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.config import Dtype
from draftsmith.stages.targets.info import INFO_FILE
from draftsmith.stages.targets.sampling import SamplingParams

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODELS = "models:/"  # of MLflow's URIs: models:/LINE@champion, models:/LINE/3
_MAX_BAD_SHARE = 0.01  # same as `logs.max_bad_share`
_COLUMNS = ("tau", "tau_low", "tau_high", "prompts", "verify_steps", "block_size", "tau_without_loops")


def load_target(
    source: str | Path,
    *,
    dtype: Dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> Target:
    """Load a frozen causal language model.

    source: a model's folder, a hub id (Qwen/Qwen3-4B), a .gguf file, `package:NAME` (the .gguf file of an installed
    Python package), or the artifact folder of a stage `target`.
    dtype: dtype of weights and computation; by default bfloat16, or an artifact's own dtype.
    device: torch device; by default a GPU if there is one.
    revision: commit, tag or branch of a hub id; by default the main branch.

    Raises DraftsmithError if the model cannot be loaded, or if no drafter can be trained for it.
    """
    folder = Path(source).expanduser()
    if (folder / INFO_FILE).is_file():
        return Target.load(folder, dtype, device)
    return Target.from_source(source, dtype or "bfloat16", device, revision)


def load_drafter(source: str | Path, target: Target) -> Drafter:
    """Load a drafter for a target, in the target's dtype and on its device.

    source: a checkpoint's folder, the artifact folder of a stage `sft` or `opd`, a hub id (z-lab/Qwen3-4B-DFlash-b16),
    or a registered version: `LINE@champion`, `LINE@3`, `models:/LINE@champion`, `models:/LINE/3`.

    Raises DraftsmithError if it is missing or damaged, or was trained for another target, such as the same model in
    another dtype or revision.
    """
    text = str(source)
    if text.startswith(_MODELS):
        text = text.removeprefix(_MODELS).replace("/", "@", 1)
    return checkpoint.load_drafter(resolve_drafter(text)[1], target)


@dataclass(frozen=True, eq=False, repr=False)
class Answers(Facts, Sequence[Trajectory]):
    """N answers of a target. Each has `tokens` (ids of prompt and answer) and `prompt_length`."""

    trajectories: Sequence[Trajectory]
    prompts: list[str]  # [N] names of the prompts; answers to the same prompt count as one observation
    sampling: SamplingParams  # temperature (0: greedy), top_p and top_k of the answers
    rejected: Mapping[str, int] = field(default_factory=dict)  # reason -> number of unused rows

    def _facts(self) -> Mapping[str, object]:
        lengths = trajectory_lengths(self.trajectories)
        drawn = f"temperature {self.sampling.temperature:g}, {self.sampling.truncation}"
        return {
            "answers": len(self),
            "prompts": len(set(self.prompts)),
            "sampling": "greedy" if self.sampling.greedy else drawn,
            **({"mean length": f"{lengths.mean():.0f} tokens with the prompt"} if len(self) else {}),
            **({"rejected": sum(self.rejected.values())} if self.rejected else {}),
        }

    def __len__(self) -> int:
        return len(self.trajectories)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> Answers: ...

    def __getitem__(self, index: int | slice) -> Trajectory | Answers:
        if isinstance(index, slice):
            return Answers(self.trajectories[index], self.prompts[index], self.sampling, self.rejected)
        return self.trajectories[index]


def read_answers(
    source: str | Path,
    target: Target | None = None,
    *,
    splits: Collection[str] | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    chat_template_kwargs: Mapping[str, bool | int | float | str | None] | None = None,
    fields: Mapping[str, str] | None = None,
) -> Answers:
    """Read a target's answers, from an artifact or from files with rows like those of a config's section `logs`.

    source: the artifact folder of a rollout or of stage `logs`; or a file of JSON Lines or Parquet, a folder, a glob or
    an address such as s3://bucket/logs/. A row has `messages` and `completion`, or `prompt_token_ids` and
    `completion_token_ids`.
    target: the target that gave the answers; needed for files, whose text its tokenizer reads.
    splits: the splits of an artifact that are read (train, validation, heldout); by default all.
    temperature, top_p, top_k: the sampling of a file's answers (temperature 0: greedy). Rows with other values
    are rejected.
    chat_template_kwargs: for files, the arguments that the service passed to the chat template.
    fields: our field -> its name in a file's rows, as in `logs.fields` of a config: {"completion": "answer"}.

    Raises DraftsmithError if no answer is usable, or if more than 1 % of the rows are unreadable. `rejected` counts the
    unused rows by reason.
    """
    folder = Path(source).expanduser()
    if (folder / "trajectories.parquet").is_file():
        stored = load_trajectories(folder, splits)
        rejected = {"answer shorter than two tokens": stored.too_short} if stored.too_short else {}
        return Answers(stored.trajectories, stored.prompts, stored.sampling, rejected)
    if target is None:
        raise DraftsmithError(f"{source}: rows of a file need the target that gave the answers. Pass it as `target`.")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    config = LogsConfig.model_validate(
        {
            "paths": [str(source)],
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
            "fields": dict(fields or {}),
            **sampling,
        }
    )
    rows = _AnswerRows(config, target)
    taken = [
        answer
        for row in read_rows(match_files(config.paths, "read_answers"))
        if (answer := rows.accept(row)) is not None
    ]
    rows.rejects.check()
    if not taken:
        raise DraftsmithError(
            f"{source}: none of {rows.rejects.rows} rows is usable ({rows.rejects.describe()}). Correct them."
        )
    prompts = [prompt_id(np.asarray(answer.tokens[: answer.prompt_length], np.int32)) for answer in taken]
    return Answers(taken, prompts, config.sampling, Counter(rows.rejects.reasons))


class _AnswerRows(RowFilter[Trajectory]):
    """Converts rows to trajectories with the tokenizer of a loaded target."""

    def __init__(self, config: LogsConfig, target: Target):
        super().__init__(config, RejectLog("the allowed share", _MAX_BAD_SHARE))
        self._reader = AnswerReader(target.tokenizer, target.info, config)

    def _convert(self, row: LoggedRow, time: datetime | None) -> Trajectory:  # noqa: ARG002
        answer = self._reader.read(row)
        tokens = answer.prompt_ids + answer.response_ids
        return Trajectory(row.where, tokens, len(answer.prompt_ids))


@dataclass(frozen=True, eq=False, repr=False)
class Comparison:
    """Acceptance of drafters on the same answers, with statistics over prompts as in an evaluation."""

    tallies: Mapping[str, AcceptanceStats]  # drafter -> committed tokens and verify steps of each answer
    prompts: Sequence[str]  # [N] the prompt of each answer
    table: Mapping[str, Mapping[str, Any]]  # drafter -> its metrics, as in `acceptance.json` of an evaluation

    def to_pandas(self) -> pd.DataFrame:
        """Return a row for each drafter, in the order given to `compare`.

        `tau` is the acceptance length, committed tokens per verify step ("+1"). Its 95 % interval over `prompts` is
        from `tau_low` to `tau_high` (missing for one prompt). `tau_without_loops` omits answers that repeat themselves.
        """
        rows = {name: {column: metrics[column] for column in _COLUMNS} for name, metrics in self.table.items()}
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(_COLUMNS))

    def __repr__(self) -> str:
        return self.to_pandas().to_string(float_format="{:.3f}".format)

    def _repr_html_(self) -> str:
        return str(self.to_pandas().to_html(float_format="{:.3f}".format))

    def difference(self, drafter: str, other: str) -> Estimate:
        """Return tau of one drafter minus tau of another (tokens per verify step), paired over prompts.

        The result has `value`, `error` (standard error) and `interval(level)`, by default 95 %, None for one prompt.
        To test k differences together, use level 1 - 0.05 / k. Raises DraftsmithError for an unknown name.
        """
        for name in (drafter, other):
            if name not in self.tallies:
                raise DraftsmithError(f"{name}: no such drafter in this comparison. Use {', '.join(self.tallies)}.")
        return tau_difference(self.tallies[drafter], self.tallies[other], self.prompts)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the share of proposals accepted at each offset, a line for each drafter, and return the axes.

        ax: matplotlib axes; by default those of a new figure.
        """
        if ax is None:
            from matplotlib import pyplot  # slow to import, and only plots need it

            ax = pyplot.figure().add_subplot()
        for name, metrics in self.table.items():
            shares = metrics["acceptance_by_offset"]
            ax.plot(range(1, len(shares) + 1), shares, marker="o", label=f"{name}: tau {metrics['tau']:.3f}")
        ax.set(xlabel="offset of the proposal", ylabel="share accepted", ylim=(0, 1.02))
        ax.legend()
        return ax


def compare(target: Target, drafters: Mapping[str, Drafter], answers: Answers) -> Comparison:
    """Replay drafters on the same answers of their target and return their acceptance, paired.

    drafters: name -> drafter from `load_drafter`, for this target. Each drafts with its trained block size.

    Warns if, according to the store, a drafter was trained on the prompts of some answers.
    Raises DraftsmithError if there is no drafter or no answer.
    """
    if not drafters or not isinstance(drafters, Mapping):
        raise DraftsmithError("compare: no drafter was given. Pass them by name, such as {'sft': drafter}.")
    if not isinstance(answers, Answers) or not answers:
        raise DraftsmithError("compare: no answers were given. Pass what read_answers returns.")
    ids = [prompt_id(np.asarray(answer.tokens[: answer.prompt_length])) for answer in answers]
    for name, drafter in drafters.items():
        trained = _trained_prompts(drafter.folder) if drafter.folder is not None else set()
        if count := sum(id_ in trained for id_ in ids):
            warnings.warn(
                f"{name} was trained on the prompts of {count} of {len(ids)} answers, where its tau is higher than on "
                "others. Compare on held-out answers, such as those of its refresh: read_answers(FOLDER of the node "
                "`heldout`).",
                stacklevel=2,
            )
    options = ReplayOptions(sampling=answers.sampling, with_proposals=False)
    tallies = Replayer(target, options).acceptance(drafters, answers.trajectories)
    looping = [has_loop(answer.tokens[answer.prompt_length :]) for answer in answers]
    table = acceptance_table(tallies, answers.prompts, looping)
    metrics = {name: acceptance.to_json() for name, acceptance in table.items()}
    return Comparison(tallies, answers.prompts, metrics)


def diff(first: str, second: str) -> pd.DataFrame:
    """Compare two versions of model lines by what their refreshes stored, as `draftsmith diff` does.

    first, second: `my-line@1`, `my-line@champion`, or a line for its champion. Returns a table of text with a column
    for each. Its rows are gate, data, tau by slice and speed with 95 % intervals, and the config fields that differ.
    Each version was measured in its own refresh. If that of the second compared it with the first, a column `gain` is
    on the same prompts. Raises DraftsmithError for an unknown version.
    """
    (_, *columns), rows = version_diff(first, second)
    return pd.DataFrame([row[1:] for row in rows], [row[0] for row in rows], columns)


def _trained_prompts(checkpoint: Path) -> set[str]:
    """Return the prompts (`prompt_id`) that a checkpoint and those before it were trained on, as far as the store says.

    checkpoint: a drafter's folder; outside an artifact the result is empty.
    """
    artifact, prompts = checkpoint.parent, set[str]()
    if not (artifact / MANIFEST).is_file():
        return prompts
    with suppress(DraftsmithError):  # part of its history is damaged
        manifest, store = read_manifest(artifact), open_store(home())
        for before in ("folder", "init_from"):  # of a copied champion, or of the drafter that SFT began with
            if folder := manifest.config.get(before):
                prompts |= _trained_prompts(Path(folder).expanduser())
        for name, entry in manifest.inputs.items():
            if (source := find_artifact(entry, store)) is None:
                continue
            if name == "drafter":
                prompts |= _trained_prompts(source / DRAFTER_FOLDER)
            elif name == "trajectories" and manifest.config.get("steps"):
                for rows in RowReader(source / "trajectories.parquet", TRAJECTORIES).row_groups(["prompt_ids"]):
                    prompts |= {prompt_id(ids.values.to_numpy()) for ids in rows["prompt_ids"]}
    return prompts


@dataclass(frozen=True, repr=False)
class RefreshResult(Facts):
    """The result of a refresh."""

    artifacts: Mapping[str, Path]  # node -> folder of its artifact
    outcome: str | None  # promoted, refused, inconclusive, waiting, current or unserved; None: no line, or `until`
    message: str  # the outcome with its reason

    def _facts(self) -> Mapping[str, object]:
        told = {"outcome": self.outcome, "because": self.message} if self.outcome is not None else {}
        return {**told, "artifacts": ", ".join(self.artifacts) or "none"}


def refresh(
    config: str | Path | Mapping[str, Any],
    *,
    until: str | Collection[str] | None = None,
    force: str | Collection[str] | None = None,
) -> RefreshResult:
    """Run a refresh as `draftsmith run` does: make what is missing, evaluate, and promote if the gate says so.

    config: the path of a YAML file, or its fields; `extends` and other paths are relative to the current directory.
    until: make only these nodes and what they need; nothing is promoted.
    force: make these nodes again although the store has them, such as `target`; with `drift`, refresh whatever tau is.

    Artifacts go to the store under `DRAFTSMITH_HOME` (by default .draftsmith). Progress is printed. A drafter that is
    not promoted is an outcome, not an error.

    Raises DraftsmithError if the config is wrong or a stage fails, RetryableError if the same call may succeed later.
    Finished artifacts are reused then.
    """
    if isinstance(config, Mapping):
        options = config_from_fields(config, REFRESH.config)
    else:
        options = read_config(config, (), REFRESH.config)
    forced, last = ([names] if isinstance(names, str) else names for names in (force, until))
    selection = Selection.from_options(forced, None, last)
    bypass_proxy_for_localhost()
    with home_umask(home()):
        run = launch(options, REFRESH, selection)
    if run.conclusion is None:
        return RefreshResult(run.folders, None, "")
    return RefreshResult(run.folders, run.conclusion.name.lower(), run.conclusion.message)
