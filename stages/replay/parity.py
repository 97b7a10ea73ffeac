"""The parity gate: compares the verify steps that an engine served with replay of the same answers.

An engine that loads a checkpoint wrongly (another rotary base, layers off by one, another dtype) still gives correct
answers, because verification is lossless. Only the steps differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import index_in, pad_lists, select_in_order
from draftsmith.stages.runtime.statistics import jackknife

LOGPROB_TOLERANCE = 1e-3  # float32: kernels of other shapes differ by about 1e-5
# Fewer proposals that replay accepts, or fewer steps that an engine needed more than replay, may all be near-ties.
CERTAIN = 10
# The largest share by which served tau may be below replay's. Near-ties in bf16 change up to 18 % of the steps, some
# for the better and some for the worse. If 60 % of these were for the worse, tau of 2 would lose
# 18 % · 20 % · 1 / 2 = 1.8 %.
TAU_TOLERANCE = 0.02
PARITY_LEVEL = 0.99  # one-sided, and high: a refusal ends a run that took hours
FEWEST_ANSWERS = 5  # fewer give no useful estimate of the error; then max_parity_mismatch alone decides
_CAUSE = "The engine served another drafter, or computes it differently. Check rotary settings, layer ids and dtype."

ParityMetrics: TypeAlias = dict[str, float | None]
# Whether near-ties alone explain the served steps of a trajectory (`near_ties.py`), by its id
ExplainedByTies: TypeAlias = Callable[[str, pa.Table], bool]


@dataclass(frozen=True)
class ParityTolerance:
    """The allowed differences between served and replayed steps."""

    section: str  # section of the config, for the error
    float32: bool  # both were computed in float32
    greedy: bool  # decoding was greedy
    allowed: float  # max_parity_mismatch
    same_target: bool = True  # the server computes it like transformers; otherwise the target changes steps too
    subject: str = ""  # owner of the steps, for the error, e.g. "drafter sft: "

    @property
    def limit(self) -> float:
        return 0.0 if self.exact and self.greedy and self.allowed < 1 else self.allowed

    @property
    def exact(self) -> bool:
        """Return whether log-probs and proposals are equal but for the order of float32's sums."""
        return self.float32 and self.same_target

    def error(self, problem: str, share: float) -> DraftsmithError:
        """Return the error for a share of steps over the limit."""
        bound = "float32 with greedy decoding allows none"
        if self.limit or not (self.exact and self.greedy):
            bound = f"{self.section}.max_parity_mismatch allows {self.limit:.1%}"
        return DraftsmithError(f"{self.section}: {self.subject}{problem} ({share:.1%}, {bound}). {_CAUSE}")


COMPARED = ("trajectory_id", "anchor", "accepted", "proposed_ids", "target_logprobs")  # columns that a comparison reads


def check_steps(tolerance: ParityTolerance, served: pa.Table, replayed: pa.Table) -> dict[str, float]:
    """Compare all served steps with replayed ones. Raises like `StepComparison.check`."""
    comparison = StepComparison(tolerance)
    comparison.add(served, replayed)
    return comparison.check()


class StepComparison:
    """Compares served with replayed steps, a few trajectories at a time."""

    def __init__(self, tolerance: ParityTolerance, explained: ExplainedByTies = lambda *_: False) -> None:
        """Begin without steps. explained: asked only where no step may differ."""
        self._tolerance, self._explained = tolerance, explained
        self.tied = set[str]()  # trajectories whose steps differ by near-ties alone: they are not compared
        self._served = self._replayed = self._equal = 0
        self._largest_difference: float | None = None

    def add(self, served: pa.Table, replayed: pa.Table) -> None:
        """Compare the steps of trajectories that come in no other call.

        Both tables have the columns `COMPARED`. Trajectories that only `replayed` has are ignored. A step differs if
        the other side has no step at its anchor, or one with other proposals or with another number of accepted ones.
        Below float32, proposals after the first rejected one may differ: verification ignores them, and
        a block of 15 has a near-tie among them more often than not. An engine that reports no proposals is compared by
        the numbers of accepted proposals.
        """
        known = served["trajectory_id"].unique()
        replayed = select_in_order(replayed, "trajectory_id", known)
        if self._tolerance.limit == 0 and (tied := self._tied_among(served, replayed)):
            self.tied |= tied
            served, replayed = (
                table.filter(pc.invert(pc.is_in(table["trajectory_id"], pa.array(sorted(tied)))))
                for table in (served, replayed)
            )
        exact = self._tolerance.exact
        in_served, in_replayed, equal = _pairs(served, replayed, exact=exact)
        self._served += served.num_rows
        self._replayed += replayed.num_rows
        self._equal += int(equal.sum())
        pair = served.take(in_served[equal]), replayed.take(in_replayed[equal])
        difference = _largest_difference(*pair, exact=exact)
        if difference is not None:
            self._largest_difference = max(difference, self._largest_difference or 0.0)

    def _tied_among(self, served: pa.Table, replayed: pa.Table) -> set[str]:
        """Return the trajectories whose steps differ by near-ties, up to the first that differs otherwise."""
        places, tied = _pairs(served, replayed, exact=self._tolerance.exact), set[str]()
        different = set[str]()
        for table, same in ((served, places[0][places[2]]), (replayed, places[1][places[2]])):
            alone = np.setdiff1d(np.arange(table.num_rows), same)
            different |= set(table["trajectory_id"].take(alone).to_pylist())
        for name in sorted(different):
            if not self._explained(name, served.filter(pc.equal(served["trajectory_id"], name))):
                break
            tied.add(name)
        return tied

    def check(self) -> dict[str, float]:
        """Return the metrics of the comparison.

        Raises DraftsmithError if too many steps differ, or if the target's log-probs in float32 do.
        """
        tolerance, total = self._tolerance, max(self._served, self._replayed)
        different = total - self._equal
        share = different / total if total else 0.0
        if share > tolerance.limit:
            raise tolerance.error(f"{different} of {total} verify steps served by the engine differ from replay", share)
        metrics: dict[str, float] = {
            "served_steps": self._served,
            "different_steps": different,
            "mismatch_share": share,
        }
        largest = self._largest_difference
        if largest is not None:
            metrics["largest_logprob_difference"] = largest
            if tolerance.exact and tolerance.allowed < 1 and not largest <= LOGPROB_TOLERANCE:
                raise DraftsmithError(
                    f"{tolerance.section}: {tolerance.subject}the target's log-probs that the engine recorded differ "
                    f"from replay's by up to {largest:.2g} in float32 ({LOGPROB_TOLERANCE:g} is allowed). The engine "
                    "serves another target, or computes it in another dtype: check its options."
                )
        return metrics


def check_tau(
    tolerance: ParityTolerance, committed: np.ndarray, served: np.ndarray, replayed: np.ndarray
) -> ParityMetrics:
    """Compare the number of steps that the engine counted with replay of the same answers; needs no recorded trace.

    committed: [answers] tokens after the first one.
    served: [answers] verify steps that the engine counted; 0 where it drafted nothing.
    replayed: [answers] verify steps of replay.

    Raises DraftsmithError if the served tau differs by more than the tolerance, or if the engine accepted nothing where
    replay accepts. With the same target it also fails at a served tau that is measurably lower, and with greedy
    decoding in float32 at any answer whose counts differ.
    """
    counted = np.where(served == 0, committed, served).astype(np.float64)
    tokens, steps = float(committed.sum()), float(replayed.sum())
    served_tau, replayed_tau = tokens / float(counted.sum()), tokens / steps
    # as a share of replay's tau: the tokens are the same, so only the steps matter
    difference = jackknife(lambda ours, theirs: ours / theirs - 1, replayed.astype(np.float64), counted)
    high = difference.upper(PARITY_LEVEL) if difference.units >= FEWEST_ANSWERS else None
    metrics: ParityMetrics = {
        "answers": difference.units,
        "served_tau": served_tau,
        "replayed_tau": replayed_tau,
        "tau_difference": difference.value,
        "tau_difference_high": high,
    }
    if tolerance.allowed >= 1:
        return metrics
    extra_steps = float(counted.sum()) - steps  # steps of the engine in excess of replay
    lower = tolerance.same_target and high is not None and high < -TAU_TOLERANCE and extra_steps >= CERTAIN
    unused = served_tau <= 1.0 and tokens - steps >= CERTAIN
    inexact = tolerance.limit == 0 and bool((counted != replayed).any())
    if lower or unused or inexact or abs(difference.value) > tolerance.limit:
        problem = f"tau is {served_tau:.3f} as served and {replayed_tau:.3f} in replay of the answers"
        if lower and high is not None and tolerance.limit:
            raise DraftsmithError(
                f"{tolerance.section}: {tolerance.subject}{problem}, lower by at least {-high:.1%} "
                f"({TAU_TOLERANCE:.0%} is allowed, at {PARITY_LEVEL:.0%} over {difference.units} answers). {_CAUSE}"
            )
        raise tolerance.error(problem, abs(difference.value))
    return metrics


def _pairs(served: pa.Table, replayed: pa.Table, *, exact: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of steps at the same anchors, in both tables, and bool: whether they are the same by `_same`."""
    known = served["trajectory_id"].unique()
    _, ours, theirs = np.intersect1d(_keys(served, known), _keys(replayed, known), return_indices=True)
    return ours, theirs, _same(served.take(ours), replayed.take(theirs), exact=exact)


def _keys(table: pa.Table, trajectories: pa.Array) -> np.ndarray:
    """Return int64 [rows]: a unique number per trajectory and anchor."""
    return (index_in(table, "trajectory_id", trajectories) << 32) + table["anchor"].to_numpy().astype(np.int64)


def _same(a: pa.Table, b: pa.Table, *, exact: bool) -> np.ndarray:
    """Return bool [rows]: whether both steps accept as many proposals, and have as many and the same.

    exact: all proposals must be the same; otherwise those that decide verification. They are not compared if no step
    of `a` has any.
    """
    longest = max((pc.max(pc.list_value_length(t["proposed_ids"])).as_py() or 0 for t in (a, b)), default=0)
    ours, theirs = (pad_lists(table, "proposed_ids", longest, -1, np.int64) for table in (a, b))
    same = ours == theirs
    if not exact:
        same |= ~_decisive(a, longest) & (ours >= 0) & (theirs >= 0)
    same |= bool((ours < 0).all())
    equal: np.ndarray = same.all(1) & (a["accepted"].to_numpy() == b["accepted"].to_numpy())
    return equal


def _decisive(steps: pa.Table, proposals: int) -> np.ndarray:
    """Return bool [rows, proposals]: the accepted proposals and the first rejected one."""
    decisive: np.ndarray = np.arange(proposals) <= steps["accepted"].to_numpy()[:, None]
    return decisive


def _largest_difference(served: pa.Table, replayed: pa.Table, *, exact: bool) -> float | None:
    """Return the largest difference of the target's log-probs, of the steps for which both tables have them.

    These steps passed `_same` with this `exact`. None if there is no such step.
    """
    both = pc.and_(pc.is_valid(served["target_logprobs"]), pc.is_valid(replayed["target_logprobs"]))
    tables = served.filter(both), replayed.filter(both)
    lengths = [pc.list_value_length(table["target_logprobs"]).to_numpy() for table in tables]
    longest = max((int(counts.max()) for counts in lengths if len(counts)), default=0)
    a, b = (pad_lists(table, "target_logprobs", longest, np.nan, np.float64) for table in tables)
    scored = ~np.isnan(b) & (np.arange(longest) < lengths[0][:, None])  # replay scores nothing after the answer's end
    if not exact:
        scored &= _decisive(tables[0], longest)  # later ones may belong to other proposals
    if not scored.any():
        return None
    with np.errstate(invalid="ignore"):  # both may be -inf, and are equal then
        difference = np.where(a == b, 0.0, np.abs(a - b))[scored]
    return float(np.nan_to_num(difference, nan=np.inf).max())
