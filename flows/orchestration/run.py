"""A run: it plans once, makes builds as tasks of a flow run, and ends in MLflow and Prefect."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from prefect.client.schemas.objects import State
from prefect.exceptions import Pause
from prefect.states import Cancelled, Completed, Failed

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted, one_line
from draftsmith.artifacts.home import home
from draftsmith.artifacts.host import bypass_proxy_for_localhost
from draftsmith.artifacts.redaction import redact_logs
from draftsmith.artifacts.results.data import LogsSummary, day
from draftsmith.artifacts.results.gate import ReviewResult
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.store.retention import artifacts_in_use
from draftsmith.artifacts.tracking.refresh_runs import (
    CONTINUE,
    OUTCOME,
    VERSION,
    RefreshRun,
    close_dead_runs,
    describe_misplaced_files,
    log_models,
)
from draftsmith.artifacts.tracking.registry import note_tracker
from draftsmith.artifacts.tracking.runs import NOTE, Tracking
from draftsmith.artifacts.tracking.terms import Status
from draftsmith.flows.config.options import RunOptions, check_runner
from draftsmith.flows.execution.display import Display
from draftsmith.flows.execution.machine import check_home
from draftsmith.flows.execution.make import RunContext
from draftsmith.flows.execution.retry import with_retries
from draftsmith.flows.orchestration.flow_run import (
    Cancellation,
    CancelledError,
    announce,
    deployed,
    page_url,
    resumed,
    show_verdict,
)
from draftsmith.flows.orchestration.tasks import run_node, run_shards
from draftsmith.flows.planning.graph import Selection
from draftsmith.flows.planning.listings import forget_listings, note_listings, read_listings
from draftsmith.flows.planning.plan import (
    Build,
    Conclusion,
    EarlyEnd,
    Pipeline,
    RunReview,
    early_end,
    plan,
    planned_listings,
    to_check,
)
from draftsmith.stages.runtime.invocation import COMMAND, invocation

T = TypeVar("T")


class Run(RunContext):
    """One run of a pipeline: what it plans, what it has made so far, and how it ends.

    A command prepares it, and its flow finds it. A deployment's flow creates it. It is the context of its stages too.
    """

    def __init__(self, pipeline: Pipeline, config: RunOptions, selection: Selection) -> None:
        """Begin a run. config: `prepare` resolves it."""
        super().__init__(home(), config, Display(), Tracking(home(), config.experiment))
        self.pipeline, self.selection = pipeline, selection
        if not selection.alone:
            self.pool = run_shards
        self.plan: list[Build] = []
        self.end: EarlyEnd | None = None  # where it may end before the last node of the plan
        self.forced: set[str] = set()  # nodes to make although the store has them
        self.made: dict[str, Artifact] = {}  # by node
        self.conclusion: Conclusion | None = None
        self.error: BaseException | None = None  # the body's or the conclusion's
        self.ended = False  # whether the body has ended
        self._given = config.model_dump(mode="json", exclude_defaults=True, exclude={"stages"})
        self._states: dict[str, State[Any] | None] = {}  # of the nodes' tasks
        self._cancellation = Cancellation()
        self._record = RefreshRun(self.tracking, config.name, self._given, pipeline.data)

    @classmethod
    def of(
        cls,
        pipeline: Pipeline,
        config: RunOptions,
        force: Collection[str] | None = None,
        start: Collection[str] | None = None,
        until: Collection[str] | None = None,
    ) -> Run:
        """Return the run of this flow: the one that its command has prepared, or a deployment's new one.

        force, start, until: nodes, as in `Selection`.
        """
        prepared = CURRENT.get()
        return prepared or cls(pipeline, config, Selection.from_options(force, start, until, deployed=deployed()))

    # -- before ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Check store and MLflow, resolve the config, and plan. Raises DraftsmithError if it cannot be run."""
        check_runner(self.config.stages)
        for check in (self.store.check, self.tracking.check):
            self.retry(check)
        if (warning := describe_misplaced_files(self.tracking)) is not None:
            self.display.line(f"warning: {warning}")
        self.config = self.retry(lambda: self.pipeline.resolve(self.config))
        # after a suspension without `--force`: forced nodes were made before it
        selection = replace(self.selection, force=()) if resumed() else self.selection
        self.plan = self.retry(lambda: plan(self.config, self.store, self.pipeline, selection))
        self.end = early_end(self.pipeline, self.config, self.plan, self.store, selection)
        self.forced = selection.forced([build.node for build in self.plan])

    @property
    def whole(self) -> bool:
        """Return whether the run makes all nodes. Otherwise it never promotes: it lets a person look first."""
        return not self.selection.until

    @property
    def asked(self) -> set[str]:
        """Return the nodes that a person asked for, by `--force` and `--from`."""
        return self.selection.asked([build.node for build in self.plan])

    @property
    def folders(self) -> Mapping[str, Path]:
        """Return the folders of what is made, by node; looking one up fetches its files."""
        return self.store.folders(self.made)

    # -- meanwhile ---------------------------------------------------------------------------------------------------

    def do(self, body: Callable[[Run], Conclusion | None]) -> State[Any] | dict[str, Artifact]:
        """Run the body of a flow, and return its artifacts, or the flow's state if it has a conclusion.

        A conclusion is also an event such as `draftsmith.promoted`. `draftsmith stage` calls this outside of a flow.
        Raises the first DraftsmithError; finished nodes stay in the store.
        """
        redact_logs()
        bypass_proxy_for_localhost()  # a deployment's run does not come through the command
        logging.getLogger("draftsmith").setLevel(logging.INFO)  # else Prefect does not show the stages' lines
        limit_s = 60 * self.config.stages.lock_wait_minutes
        try:
            with (
                Cancellation() as self._cancellation,
                artifacts_in_use(self.home, self.config.name, self.display.line, limit_s=limit_s, check=self.check),
                self._recorded(),
            ):
                self.conclusion = body(self)
            if self.conclusion is not None:
                announce(self.config.name, self.conclusion)
                self.error = self.conclusion.error
        except BaseException as error:
            self.error = error
            if isinstance(error, CancelledError):
                return Cancelled(message=str(error))
            raise
        finally:
            self.ended = True
        if self.conclusion is None:
            return self.made
        if self.conclusion.error is not None:  # automations tell it from a failed run by its name
            return Failed(name=self.conclusion.name, message=self.conclusion.message, data=self.conclusion.error)
        return Completed(name=self.conclusion.name, message=self.conclusion.message, data=self.made)

    def _begin(self) -> None:
        """Prepare the run, unless its command has, and make the checks before its first stage."""
        if (page := page_url()) is not None:
            self.display.line(f"Prefect: {page}")
        if not self.plan:
            check_home(self.home, self.config)
            self.prepare()
        close_dead_runs(self.tracking, self.store)
        self.display.newer_files(self.plan)
        self.display.lines(self.pipeline.check(to_check(self.plan, self.end)))

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Begin the run, and end it in MLflow, however the body ends; but not one of `draftsmith stage`."""
        self._begin()
        run, planned = self.config.name, planned_listings(self.plan)
        if self.selection.alone:
            yield
            if planned:
                note_listings(run, {**read_listings(run, ended=True), **planned}, ended=not read_listings(run))
            return
        listings = {**read_listings(run), **planned}
        note_listings(run, listings)
        try:
            yield
            self._record.find_or_open(self.made)
        except Pause:  # until a person approves; the resumed run reuses what is made
            self._end("FINISHED")
            raise
        except BaseException as error:
            self._end(*self._failure(error))
            raise
        if self.whole:
            note_listings(run, listings, ended=True)
        self._end("FINISHED")
        if self.conclusion is not None:
            self.display.line(self.conclusion.message)

    def make_all(self) -> None:
        """Make every node, in order."""
        for build in self.plan:
            self.make(build)

    def make(self, build: Build) -> Artifact:
        """Make or reuse an artifact as a task of the flow run, from what is made so far; make the checks it allows."""
        self.check()
        upstream = [self._states[source] for source in dict.fromkeys(build.node.inputs.values())]
        try:
            made, state = run_node(self, build.complete(self.made), upstream, force=build.name in self.forced)
        except DraftsmithError as error:
            if build.node.config.listing is not None:
                forget_listings(self.config.name, error)
            raise
        self.made[build.name], self._states[build.name] = made, state
        self.display.lines(self.pipeline.check_after(build.node, to_check(self.plan, self.end), self.folders))
        return made

    def retry(self, work: Callable[[], T]) -> T:
        """Return `work()`, repeated for minutes while a service cannot be reached."""
        return with_retries(work, self.config.stages, self.display.line)

    def check(self) -> None:
        """Raise `CancelledError` if the run was cancelled in Prefect."""
        self._cancellation.check()

    # -- MLflow ------------------------------------------------------------------------------------------------------

    def refresh_run(self) -> str | None:
        """Return the id of the run in MLflow that encloses those of its stages; None for `draftsmith stage`."""
        return None if self.selection.alone else self._record.open()

    @property
    def mlflow_id(self) -> str | None:
        """Return the id of this run in MLflow, or of the earlier one with exactly the same artifacts."""
        return self._record.find_or_open(self.made)

    def show_comparison(self) -> None:
        """Log to MLflow the drafters that an evaluation compared, and show the verdict on the flow run's page."""
        run_id = self.mlflow_id
        if "evaluation" in self.made and (drafters := self.pipeline.compared(self.folders)):
            log_models(self.tracking, self.made["evaluation"].manifest, run_id, drafters)
        if (review := self._review) is not None:
            show_verdict(self.config.name, f"{review.description}{self.tracking.link(run_id)}", self.display.line)

    def note_tracker(self) -> None:
        """Note in which MLflow a version is about to be registered."""
        note_tracker(self.tracking)

    @property
    def _review(self) -> RunReview | None:
        return self.pipeline.review(self.folders)

    def _failure(self, error: BaseException) -> tuple[Status, str]:
        """Return how an error ends the run in MLflow, with its description: the command that continues it."""
        if (command := self._continuing_command()) is not None:
            error.add_note(command)
        how = f"{CONTINUE} `{command or 'the same command'}`."
        if isinstance(error, Exception) and not isinstance(error, StageInterrupted):
            return "FAILED", f"**Failed.** {one_line(error)} {how}"
        return "KILLED", f"**Stopped.** {how}"

    def _continuing_command(self) -> str | None:
        """Return the command that continues the run and makes no complete node again; None if no command began it."""
        if (began := os.environ.get(COMMAND)) is None:
            return None
        force = {name for name in self.forced if name not in self.made or self.made[name].reused}
        if self.whole and not force and not self.selection.start:
            force |= set(self.pipeline.sticky_force(self.config, self.asked))
        named = {"--force": sorted(force), "--from": self.selection.start, "--until": self.selection.until}
        options = [word for option, names in named.items() for name in names for word in (option, name)]
        restart = getattr(getattr(self.config, "registry", None), "restart", False)
        return invocation(began, None).run(*options, *["--restart"] * restart)

    def _end(self, status: Status, ending: str = "") -> None:
        """End the run in MLflow with metrics and tags of headline, review and conclusion. ending: why it failed."""
        metrics, tags = self._metrics_and_tags()
        if ending:
            tags[NOTE] = f"{ending}\n\n{tags.get(NOTE, '')}".strip()
        name, page = self.pipeline.report
        report = [self.folders[name] / file for file in (page, ReviewResult.FILE)] if name in self.made else []
        self._record.close(
            status,
            self.made,
            metrics,
            [path for path in report if path.is_file()],
            tags,
            name=self._mlflow_name(tags),
            concluded=self.conclusion is not None,
        )
        if self.tracking.had_failures and status != "KILLED":  # stages may have ended while MLflow was lost
            close_dead_runs(self.tracking, self.store)

    def _metrics_and_tags(self) -> tuple[dict[str, float], dict[str, str]]:
        headline, metrics, tags = self.made.get(self.pipeline.headline), dict[str, float](), dict[str, str]()
        if headline is not None:
            metrics |= headline.manifest.metrics
        if (review := self._review) is not None:
            metrics |= review.metrics
            concluded = self.conclusion is not None
            tags = {**review.tags, NOTE: review.concluded_description if concluded else review.description}
            if self.conclusion is None and self.pipeline.concludes(self.config):
                tags.pop(OUTCOME, None)
                tags[NOTE] = f"**No action yet.**\n\n{review.description}"
        if self.conclusion is not None:
            metrics |= self.conclusion.metrics
            tags |= self.conclusion.tags
            if NOTE not in tags or self.conclusion.overrules_review:
                tags[NOTE] = f"**{self.conclusion.name}.** {self.conclusion.message}"
        return metrics, tags

    def _mlflow_name(self, tags: Mapping[str, str]) -> str | None:
        """Return the run's name in MLflow, such as `week of 24 Nov: promoted @3`; None without an outcome."""
        if OUTCOME not in tags:
            return None
        logs = LogsSummary.read_if_there(self.made["logs"].path) if "logs" in self.made else None
        when = (logs.window.text if logs is not None else "") or day(datetime.now(UTC))
        version = tags.get(VERSION, "").rpartition("@")[2]
        return f"{when}: {tags[OUTCOME]}{f' @{version}' if version else ''}"


CURRENT: ContextVar[Run | None] = ContextVar("run", default=None)  # prepared by a command
