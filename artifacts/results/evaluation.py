"""Results of stages `evaluation` (and its `contexts.json`), `drift` and `diagnosis`: a JSON file each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from statistics import fmean
from typing import ClassVar

from pydantic import RootModel

from draftsmith.artifacts.results.base import Record, ResultFile, SetMetrics

CHAMPION, PLAIN = "champion", "plain"  # arms: the drafter that serves, and decoding without a drafter
NATIVE = "native"  # arm: the target's own head


class Difference(Record):
    """A difference between two drafters with its interval, None for a single prompt."""

    value: float
    low: float | None = None
    high: float | None = None


class ConfidenceCalibration(Record):
    """The error of a drafter's confidence on held-out answers, and the correction fitted on validation answers.

    A decision is a proposal whose predecessors were accepted. The corrected logit is scale · logit + shift.
    """

    scale: float
    shift: float
    fitted_on: int  # decisions
    decisions: int  # held-out
    confidence: float  # mean predicted probability
    accepted: float  # share
    error: float  # expected calibration error
    error_calibrated: float


class Acceptance(Record):
    """Acceptance metrics of one drafter by replay of held-out answers; tau may be of served answers."""

    tau: float
    tau_low: float | None = None
    tau_high: float | None = None
    tau_degrees: float | None = None  # degrees of freedom of its error
    prompts: int = 0
    verify_steps: int = 0
    block_size: int | None = None
    acceptance_by_offset: Sequence[float] = ()
    accepted_histogram: Sequence[int] = ()
    tau_without_loops: float | None = None
    differences: Mapping[str, Difference] = {}
    confidence: ConfidenceCalibration | None = None  # of a drafter with a confidence head, given validation answers
    tau_replayed: float | None = None  # by replay, where `tau` is of served answers


class SpeedMetrics(Record):
    """Speed metrics of one arm at one setting. Decoding without a drafter has no fields from `speedup` on."""

    tokens_per_s: float
    turns: int = 0  # timed runs
    prompts: int = 0
    first_token_s_median: float | None = None
    first_token_s_p95: float | None = None
    request_tokens_per_s_median: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    ratios: Mapping[str, Difference] = {}
    draft_ms_per_step: float | None = None
    verify_ms_per_step: float | None = None
    draft_share: float | None = None
    verify_share: float | None = None
    tau_served: float | None = None
    identical_share: float | None = None
    accepted_histogram: Sequence[int] = ()
    block_size: int | None = None


class SpeedTable(Record):
    """Speed of every arm at one setting."""

    temperature: float | None = None
    concurrency: int | None = None
    arms: Mapping[str, SpeedMetrics] = {}

    @property
    def name(self) -> str:
        """Return the setting as metric names have it: `c16.t0` for 16 requests in flight at temperature 0."""
        return setting_name(self.temperature, self.concurrency)


def setting_name(temperature: float | None, concurrency: int | None) -> str:
    """Return `c16.t0` for 16 requests in flight at temperature 0; empty where no speed was measured."""
    return "" if temperature is None or concurrency is None else f"c{concurrency}.t{temperature:g}"


class EstimateRecord(Record):
    """A value with its standard error."""

    value: float
    error: float | None  # None: unknown
    units: int
    degrees: float  # degrees of freedom of the error


class ArmComparison(Record):
    """The estimated difference between two arms: of tau, or of the logarithm of the speed."""

    kind: str  # tau or speed
    arm: str
    other: str
    value: float
    error: float | None
    units: int
    degrees: float
    set: str | None = None  # for tau: the slice; None: all prompts
    base: float | None = None  # for tau: the other arm's
    gain: EstimateRecord | None = None  # for tau: the difference as a share of the other arm's
    temperature: float | None = None  # for speed
    concurrency: int | None = None


class StepTime(Record):
    """The time of one step of the embedded engine with all requests in flight."""

    arm: str  # `plain`: the target alone verifies the tokens
    concurrency: int
    block_size: int  # tokens verified for each request
    ms: float


class LoadPoint(EstimateRecord):
    """The speed of an arm at a number of requests in flight, and the logarithm of its ratio to another arm's speed.

    Predicted for the embedded engine, measured on servers.
    """

    arm: str
    other: str
    concurrency: int
    block_size: int  # the arm's fastest one; on servers, the one that it decoded with
    tokens_per_s: float


class Verdict(Record):
    """A comparison of two arms whose interval is adjusted for the number of comparisons."""

    kind: str  # tau: a difference; speed: a factor
    arm: str
    other: str
    value: float
    prompts: int | None = None
    turns: int | None = None
    turns_needed: int | None = None
    low: float | None = None
    high: float | None = None
    level: float
    different: bool | None = None  # None: inconclusive


class SpeedWarning(Record):
    """A reason why speeds at one setting cannot be trusted."""

    kind: str  # one of the kinds in `stages/evaluation/speed_warnings.py`
    text: str
    temperature: float
    concurrency: int
    arms: Sequence[str] = ()  # arms that it concerns; empty: all

    def concerns(self, arm: str) -> bool:
        """Return whether the warning is about this arm."""
        return not self.arms or arm in self.arms


class Machine(Record):
    """The machine that speed was measured on."""

    cpu: str = ""
    cores: int | None = None
    memory_gb: int | None = None
    gpus: Sequence[str] = ()


class Exactness(Record):
    """Agreement of outputs with and without a drafter."""

    serving_dtype: str | None = None
    identical_share: float | None = None
    compared_outputs: int | None = None
    median_margin: float | None = None
    largest_margin: float | None = None
    fp32_prompts: int | None = None
    fp32_identical: int | None = None


class Parity(Record):
    """Agreement of a served drafter with replay."""

    served_steps: int | None = None
    different_steps: int | None = None
    mismatch_share: float | None = None
    largest_logprob_difference: float | None = None
    answers: int | None = None
    served_tau: float | None = None
    replayed_tau: float | None = None
    tau_difference: float | None = None
    tau_difference_high: float | None = None


class TargetDifference(ResultFile, Record):
    """How the served target differs from the one in transformers: settings, and log-probs of fixed tokens."""

    FILE: ClassVar[str] = "target-difference.json"

    settings: Sequence[str]  # differing settings, as servers report them: `kv_cache_dtype fp8_e4m3`
    tokens: int = 0
    mean: float | None = None  # mean absolute difference, nats; None: log-probs could not be compared
    largest: float | None = None

    @property
    def text(self) -> str:
        """Return the settings and the difference in words."""
        settings = ", ".join(self.settings)
        if self.mean is None or self.largest is None:
            return f"{settings}: log-probs could not be compared"
        return (
            f"{settings}: log-probs of {self.tokens} fixed tokens are {self.mean:.2g} nats from transformers' on "
            f"average, {self.largest:.2g} at most"
        )


class Look(Record):
    """One look at the speeds, which adds prompts to those of the looks before.

    `number` counts from 1, and `of` is the most that are allowed.
    """

    number: int = 1
    of: int = 1
    prompts: int = 0  # prompts that one look decodes
    seconds: float = 0.0  # duration of one look's timed runs


class EvaluationResult(ResultFile, Record):
    """The metrics of an evaluation. `acceptance.json` is the part that does not depend on time."""

    FILE: ClassVar[str] = "evaluation.json"
    ACCEPTANCE_FILE: ClassVar[str] = "acceptance.json"

    definition_of_tau: str = ""
    engine: str = ""
    temperature: float | None = None  # at the first setting, like `concurrency`
    concurrency: int | None = None
    head_tokens: int | None = None
    training_seeds: Mapping[str, int | None] = {}
    verdicts: Sequence[Verdict] = ()
    block_size_candidates: Mapping[str, Mapping[str, float]] = {}
    validation_prompts: int | None = None
    speed: Mapping[str, SpeedMetrics] = {}  # at the first setting
    speed_by_setting: Sequence[SpeedTable] = ()
    speed_warnings: Sequence[SpeedWarning] = ()
    look: Look = Look()
    machine: Machine = Machine()
    exactness: Exactness = Exactness()
    target_difference: TargetDifference | None = None  # if set, tau is of served answers
    parity: Mapping[str, Parity] | None = None
    heldout_trajectories: int | None = None
    outside_nucleus_share: float | None = None
    drafters: Mapping[str, Acceptance] = {}
    loop_share: float | None = None
    tau_without_loops: Mapping[str, float | None] = {}
    sets: Mapping[str, Mapping[str, SetMetrics]] = {}  # slice -> arm
    acceptance_by_offset: Mapping[str, Mapping[str, Sequence[float]]] = {}  # slice -> arm
    comparisons: Sequence[ArmComparison] = ()
    validation_tau: Mapping[str, float | None] | None = None
    chosen_on: int | None = None  # validation prompts of `validation_tau`
    step_times: Sequence[StepTime] = ()  # only of the embedded engine
    load: Sequence[LoadPoint] = ()

    @property
    def has_champion(self) -> bool:
        """Return whether a champion was among the drafters."""
        return CHAMPION in self.drafters

    @property
    def challenger(self) -> str:
        """Return the arm with the highest tau on the validation split; without one, the last training of a refresh."""
        arms = [arm for arm in self.drafters if arm not in (CHAMPION, NATIVE)]
        taus = {arm: tau for arm, tau in (self.validation_tau or {}).items() if arm in arms and tau is not None}
        if taus:
            return max((arm for arm in arms if arm in taus), key=taus.__getitem__)
        return "opd" if "opd" in arms else arms[-1]

    @property
    def better_arm(self) -> str | None:
        """Return the arm with the highest tau on held-out prompts if that is above the challenger's; else None."""
        taus = {arm: self.drafters[arm].tau for arm in self.validation_tau or {} if arm in self.drafters}
        best = max((arm for arm in taus if arm not in (CHAMPION, NATIVE)), key=taus.__getitem__, default=None)
        return best if best is not None and taus[best] > self.drafters[self.challenger].tau else None

    @property
    def setting(self) -> str:
        """Return the name of the first setting; empty where no speed was measured."""
        return setting_name(self.temperature, self.concurrency)

    def compared(self, kind: str, arm: str, other: str) -> list[ArmComparison]:
        """Return the comparisons of two arms: of tau by slice, or of speed by setting."""
        return [pair for pair in self.comparisons if (pair.kind, pair.arm, pair.other) == (kind, arm, other)]

    def load_curve(self, arm: str, other: str = PLAIN) -> list[LoadPoint]:
        """Return the speeds of an arm relative to another one, fewest requests in flight first."""
        return [point for point in self.load if (point.arm, point.other) == (arm, other)]

    @property
    def load_is_measured(self) -> bool:
        """Return whether `load` comes from timed runs of servers, not from the times of single steps."""
        return not self.step_times

    def schedule(self, arm: str) -> list[list[int]]:
        """Return [fewest, most, proposals] for each range of requests in flight.

        Empty unless speeds were predicted at several numbers, and the arm is faster than no drafter at one of them.

        proposals: those of the arm's fastest block size in the range. They are never 0, since vLLM's throughput
        collapses with it (vllm-project/vllm#49548). So a schedule cannot turn drafting off where that would be faster.
        """
        ranges: list[list[int]] = []
        curve = [] if self.load_is_measured else self.load_curve(arm)  # servers are timed with one block size
        if len(curve) < 2 or all(point.value <= 0 for point in curve):
            return []
        for point, following in zip_longest(curve, curve[1:]):
            most = point.concurrency if following is None else following.concurrency - 1
            proposals = point.block_size - 1
            if ranges and ranges[-1][2] == proposals:
                ranges[-1][1] = most
            else:
                ranges.append([point.concurrency, most, proposals])
        return ranges

    def step_costs(self, arm: str) -> tuple[dict[int, float], dict[int, float]]:
        """Return the seconds of drafting by requests in flight, and of verifying by tokens of all requests together.

        Empty unless steps were timed. Drafting time is a step's time minus the target's alone for as many tokens.
        """
        ms = {(step.arm, step.concurrency, step.block_size): step.ms for step in self.step_times}
        verifying: dict[int, list[float]] = {}
        for step in self.step_times:
            if step.arm == PLAIN:
                verifying.setdefault(step.concurrency * step.block_size, []).append(step.ms / 1e3)
        widest = {n: width for name, n, width in sorted(ms) if name == arm and (PLAIN, n, width) in ms}
        drafting = {n: round((ms[arm, n, width] - ms[PLAIN, n, width]) / 1e3, 6) for n, width in widest.items()}
        return drafting, {tokens: round(fmean(verifying[tokens]), 6) for tokens in sorted(verifying)}

    def slices(self, challenger: str) -> list[ArmComparison]:
        """Return the comparisons of tau with the champion on each slice."""
        return [pair for pair in self.compared("tau", challenger, CHAMPION) if pair.set is not None]

    def warnings_about(
        self, temperature: float | None, concurrency: int | None, arms: Collection[str], kinds: Collection[str]
    ) -> list[str]:
        """Return the texts of the warnings of these kinds about any of these arms at a setting."""
        return [
            warning.text
            for warning in self.speed_warnings
            if warning.kind in kinds
            and (warning.temperature, warning.concurrency) == (temperature, concurrency)
            and any(map(warning.concerns, arms))
        ]

    def is_unreliable(self, arm: str) -> bool:
        """Return whether there is a warning about the speed of an arm at the first setting."""
        first = self.temperature, self.concurrency
        return any((w.temperature, w.concurrency) == first and w.concerns(arm) for w in self.speed_warnings)


class ContextStep(Record):
    """The text of one verify step."""

    accepted: str
    rejected: str  # the proposal that the target did not choose
    dropped: str  # proposals after it
    chosen: str  # the target's choice; empty where the answer ends


class AnswerContext(Record):
    """Some verify steps of an answer, with the text around them."""

    kind: str  # worst or typical
    tau: float
    set: str
    trajectory_id: str
    position: int  # position of the first step in the answer
    before: str
    steps: Sequence[ContextStep]
    after: str
    slice: str | None = None  # slice in which it is among the worst; None: all answers


class Contexts(ResultFile, RootModel[dict[str, list[AnswerContext]]]):
    """For each arm, the stretches of answers where the fewest proposals were accepted, and typical ones."""

    FILE: ClassVar[str] = "contexts.json"
    INDENT: ClassVar[int] = 1


ALL = "all"  # all prompts, next to the single slices


class DriftResult(ResultFile, RootModel[dict[str, SetMetrics]]):
    """The champion's tau by slice, and on all prompts under `ALL`."""

    FILE: ClassVar[str] = "drift.json"

    @property
    def overall(self) -> SetMetrics:
        """Return the metrics on all prompts."""
        return self.root[ALL]


class ReplayChange(Record):
    """A change to replay, and how far the replayed steps then are from the served ones."""

    cause: str
    change: str = ""
    mismatch: float = 0.0  # share of verify steps that differ; without recorded steps, difference of their counts
    tau: float = 0.0


class DiagnosisResult(ResultFile, Record):
    """Why a server's steps differ from replay."""

    FILE: ClassVar[str] = "diagnosis.json"

    sentence: str
    agrees: bool
    served_tau: float | None = None
    as_it_is: ReplayChange | None = None  # replay without a change; None if the server itself names the cause
    causes: Sequence[ReplayChange] = ()
    tried: Sequence[ReplayChange] = ()
