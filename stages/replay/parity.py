"""The parity gate: the verify steps that an engine served against replay of the same answers with the same drafter.

An engine that loads a checkpoint wrongly (another rotary base, layers off by one, another dtype) still gives correct
answers, because verification is lossless: only the steps tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.stage import NotInKey

MaxParityMismatch = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="share of served verify steps that replay may contradict: near-ties in bf16, more of them the less "
        "a drafter is trained (seen: 5 to 18 %); a wrong drafter contradicts nearly all. In float32 with greedy "
        "decoding none may. tau as served may not be measurably lower than replay's in any case. 1: never fail",
    ),
    NotInKey(),
]
LOGPROB_TOLERANCE = 1e-3  # float32: kernels of other shapes differ by about 1e-5
# Proposals that replay accepts, and steps that an engine needed more than replay: so few may be near-ties.
CERTAIN = 10
# By how much the served tau may be lower than that of replay. Near-ties in bf16 change up to 18 % of the steps, some
# for the better and some for the worse; were they split 60 to 40, tau of 2 would lose 18 % · 20 % · 1 / 2 = 1.8 %.
TAU_TOLERANCE = 0.02
PARITY_LEVEL = 0.99  # one-sided: a refusal ends a run of hours
FEWEST_ANSWERS = 5  # with fewer their spread is a guess; max_parity_mismatch holds for them alone
_CAUSE = "the engine did not serve this drafter, or computes it differently; check rotary settings, layer ids and dtype"

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from draftsmith.stages.data.trajectories import Trajectory
    from draftsmith.stages.replay.trace import Trace


@dataclass(frozen=True)
class ParityTolerance:
    """How far served and replayed steps may be apart.

    section: of the config, for the error. float32: served and replayed in float32. greedy: decoded so.
    """

    section: str
    float32: bool
    greedy: bool
    allowed: float  # max_parity_mismatch
    subject: str = ""  # whose steps, for the error, e.g. "drafter sft: "

    @property
    def limit(self) -> float:
        """Share of steps that may differ."""
        return 0.0 if self.float32 and self.greedy and self.allowed < 1 else self.allowed

    def refuse(self, what: str, share: float) -> DraftsmithError:
        bound = "float32 with greedy decoding allows none"
        if self.limit or not (self.float32 and self.greedy):
            bound = f"{self.section}.max_parity_mismatch allows {self.limit:.1%}"
        return DraftsmithError(f"{self.section}: {self.subject}{what} ({share:.1%}, {bound}): {_CAUSE}")


def trace_rows(trajectories: Sequence[Trajectory], traces: Sequence[Trace]) -> list[dict[str, Any]]:
    """Replayed steps as rows of TRACE."""
    return [
        {
            "trajectory_id": trajectory.trajectory_id,
            "step": s,
            "anchor": anchor,
            "accepted": int(trace.accepted[s]),
            "proposed_ids": trace.proposed[s].tolist(),
            "target_logprobs": None,
        }
        for trajectory, trace in zip(trajectories, traces, strict=True)
        for s, anchor in enumerate(trace.anchors.tolist())
    ]


COMPARED = ("trajectory_id", "anchor", "accepted", "proposed_ids", "target_logprobs")  # columns that a comparison reads


def check_steps(gate: ParityTolerance, served: pa.Table, replayed: pa.Table) -> dict[str, Any]:
    """Compare recorded with replayed steps on the trajectories that have recorded ones, at once."""
    comparison = StepComparison()
    comparison.add(served, replayed)
    return comparison.check(gate)


class StepComparison:
    """Recorded against replayed steps, some trajectories after the others."""

    def __init__(self) -> None:
        self._served = self._replayed = self._equal = 0
        self._apart: float | None = None

    def add(self, served: pa.Table, replayed: pa.Table) -> None:
        """Tables with the columns `COMPARED`, of trajectories that come in no other call; those that only `replayed`
        has are left out. A step differs if the other side has no step at its anchor, or one with other proposals or
        another length."""
        import numpy as np

        from draftsmith.artifacts.tables.parquet import select_in_order

        known = served["trajectory_id"].unique()
        replayed = select_in_order(replayed, "trajectory_id", known)
        _, in_served, in_replayed = np.intersect1d(_keys(served, known), _keys(replayed, known), return_indices=True)
        equal = _same(served.take(in_served), replayed.take(in_replayed))
        self._served += served.num_rows
        self._replayed += replayed.num_rows
        self._equal += int(equal.sum())
        apart = _largest_difference(served.take(in_served[equal]), replayed.take(in_replayed[equal]))
        if apart is not None:
            self._apart = apart if self._apart is None else max(self._apart, apart)

    def check(self, gate: ParityTolerance) -> dict[str, Any]:
        """Raises DraftsmithError if too many differ, or float32 log-probs of the target are apart."""
        total = max(self._served, self._replayed)
        different = total - self._equal
        share = different / total if total else 0.0
        if share > gate.limit:
            raise gate.refuse(f"{different} of {total} verify steps served by the engine differ from replay", share)
        figures = {"served_steps": self._served, "different_steps": different, "mismatch_share": share}
        if self._apart is not None:
            figures["largest_logprob_difference"] = self._apart
            if gate.float32 and gate.allowed < 1 and not self._apart <= LOGPROB_TOLERANCE:
                raise DraftsmithError(
                    f"{gate.section}: {gate.subject}the target's log-probs that the engine recorded differ from "
                    f"replay's by up to {self._apart:.2g} in float32 ({LOGPROB_TOLERANCE:g} is allowed): the engine "
                    "serves another target, or computes it in another dtype; check its options"
                )
        return figures


def check_tau(gate: ParityTolerance, committed: np.ndarray, served: np.ndarray, replayed: np.ndarray) -> dict[str, Any]:
    """Compare how many steps the engine counted for the same answers with replay: needs no recorded trace.

    committed, served, replayed: [answers] tokens behind the first one, verify steps that the engine counted (0: it
    drafted nothing), and those of replay. Raises DraftsmithError if the served tau is measurably lower than that of
    replay, is farther off than `gate.allowed`, or if the engine accepted nothing where replay accepts; in float32 with
    greedy decoding if any answer's count is another one.
    """
    import numpy as np

    from draftsmith.stages.runtime.statistics import jackknife

    counted = np.where(served == 0, committed, served).astype(np.float64)
    tokens, steps = float(committed.sum()), float(replayed.sum())
    served_tau, replayed_tau = tokens / float(counted.sum()), tokens / steps
    # as a share of replay's tau: the tokens are the same, so only steps are left of it
    apart = jackknife(lambda ours, theirs: ours / theirs - 1, replayed.astype(np.float64), counted)
    high = apart.upper(PARITY_LEVEL) if apart.units >= FEWEST_ANSWERS else None
    figures = {
        "answers": apart.units,
        "served_tau": served_tau,
        "replayed_tau": replayed_tau,
        "tau_difference": apart.value,
        "tau_difference_high": high,
    }
    if gate.allowed >= 1:
        return figures
    lost = float(counted.sum()) - steps  # steps that the engine needed more than replay
    lower = high is not None and high < -TAU_TOLERANCE and lost >= CERTAIN
    unused = served_tau <= 1.0 and tokens - steps >= CERTAIN
    exact = gate.limit == 0 and bool((counted != replayed).any())
    if lower or unused or exact or abs(apart.value) > gate.limit:
        what = f"tau is {served_tau:.3f} as served and {replayed_tau:.3f} in replay of the answers"
        if lower and high is not None and gate.limit:
            raise DraftsmithError(
                f"{gate.section}: {gate.subject}{what}, lower by {-high:.1%} at least ({TAU_TOLERANCE:.0%} is allowed, "
                f"at {PARITY_LEVEL:.0%} over {apart.units} answers): {_CAUSE}"
            )
        raise gate.refuse(what, abs(apart.value))
    return figures


def _keys(table: pa.Table, trajectories: pa.Array) -> np.ndarray:
    """[rows] int64: one number a (trajectory, anchor)."""
    import numpy as np

    from draftsmith.artifacts.tables.parquet import index_in

    return (index_in(table, "trajectory_id", trajectories) << 32) + table["anchor"].to_numpy().astype(np.int64)


def _same(a: pa.Table, b: pa.Table) -> np.ndarray:
    """[rows] bool: as many accepted of the same proposals."""
    import numpy as np
    import pyarrow.compute as pc

    from draftsmith.artifacts.tables.parquet import pad_lists

    longest = max((pc.max(pc.list_value_length(t["proposed_ids"])).as_py() or 0 for t in (a, b)), default=0)
    proposed = [pad_lists(table, "proposed_ids", longest, -1, np.int64) for table in (a, b)]
    equal: np.ndarray = (proposed[0] == proposed[1]).all(1) & (a["accepted"].to_numpy() == b["accepted"].to_numpy())
    return equal


def _largest_difference(served: pa.Table, replayed: pa.Table) -> float | None:
    """Of the target's log-probs where both sides have them; both have the same proposals."""
    import numpy as np
    import pyarrow.compute as pc

    from draftsmith.artifacts.tables.parquet import pad_lists

    both = pc.and_(pc.is_valid(served["target_logprobs"]), pc.is_valid(replayed["target_logprobs"]))
    tables = served.filter(both), replayed.filter(both)
    lengths = [pc.list_value_length(table["target_logprobs"]).to_numpy() for table in tables]
    longest = max((int(each.max()) for each in lengths if len(each)), default=0)
    a, b = (pad_lists(table, "target_logprobs", longest, np.nan, np.float64) for table in tables)
    judged = ~np.isnan(b) & (np.arange(longest) < lengths[0][:, None])  # beyond the end of the answer replay has none
    if not judged.any():
        return None
    with np.errstate(invalid="ignore"):  # both may be -inf, and are equal then
        apart = np.where(a == b, 0.0, np.abs(a - b))[judged]
    return float(np.nan_to_num(apart, nan=np.inf).max())
