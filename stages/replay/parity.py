"""The parity gate: the verify steps that an engine served against replay of the same answers with the same drafter.

An engine that loads a checkpoint wrongly (another rotary base, layers off by one, another dtype) still gives correct
answers, because verification is lossless: only the steps tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.contract import Operational

MaxParityMismatch = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="share of served verify steps that replay may contradict: near-ties in bf16, more of them the less "
        "a drafter is trained (seen: 5 to 18 %); a wrong drafter contradicts nearly all. In float32 with greedy "
        "decoding none may. 1: never fail",
    ),
    Operational(),
]
LOGPROB_TOLERANCE = 1e-3  # float32: kernels of other shapes differ by about 1e-5
CERTAIN = 10  # proposals that replay accepts: an engine that accepted none of so many has not used this drafter

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


@dataclass(frozen=True)
class Gate:
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
        return DraftsmithError(
            f"{self.section}: {self.subject}{what} ({share:.1%}, {bound}): the engine did not serve this drafter, or "
            "computes it differently; check rotary settings, layer ids and dtype"
        )


def check_steps(gate: Gate, served: pa.Table, replayed: pa.Table) -> dict[str, Any]:
    """Compare recorded with replayed steps on the trajectories that have recorded ones.

    served, replayed: tables with the columns of TRACE. A step differs if the other side has no step at its anchor, or
    one with other proposals or another length. Raises DraftsmithError if too many differ, or float32 log-probs of the
    target are apart.
    """
    import numpy as np

    from draftsmith.artifacts.parquet import ordered

    known = served["trajectory_id"].unique().to_pylist()
    replayed = ordered(replayed, "trajectory_id", known)
    _, in_served, in_replayed = np.intersect1d(_keys(served, known), _keys(replayed, known), return_indices=True)
    equal = _same(served.take(in_served), replayed.take(in_replayed))
    total = max(served.num_rows, replayed.num_rows)
    different = total - int(equal.sum())
    share = different / total if total else 0.0
    if share > gate.limit:
        raise gate.refuse(f"{different} of {total} verify steps served by the engine differ from replay", share)
    figures = {"served_steps": served.num_rows, "different_steps": different, "mismatch_share": share}
    apart = _largest_difference(served.take(in_served[equal]), replayed.take(in_replayed[equal]))
    if apart is not None:
        figures["largest_logprob_difference"] = apart
        if gate.float32 and gate.allowed < 1 and not apart <= LOGPROB_TOLERANCE:
            raise DraftsmithError(
                f"{gate.section}: {gate.subject}the target's log-probs that the engine recorded differ from replay's "
                f"by up to {apart:.2g} in float32 ({LOGPROB_TOLERANCE:g} is allowed): the engine serves another "
                "target, or computes it in another dtype; check its options"
            )
    return figures


def check_tau(gate: Gate, committed: int, served_steps: int, replayed_steps: int) -> dict[str, Any]:
    """Compare how many steps the engine counted for the same answers with replay: needs no recorded trace.

    committed: tokens behind the first one of each answer. Raises DraftsmithError if tau is too far off, or if the
    engine accepted nothing where replay accepts.
    """
    replayed_tau = committed / replayed_steps
    served_tau = committed / served_steps if served_steps else 1.0
    apart = abs(served_tau - replayed_tau) / replayed_tau
    unused = served_tau <= 1.0 and committed - replayed_steps >= CERTAIN and gate.limit < 1
    if apart > gate.limit or unused:
        raise gate.refuse(f"tau is {served_tau:.3f} as served and {replayed_tau:.3f} in replay of the answers", apart)
    return {"served_tau": served_tau, "replayed_tau": replayed_tau, "tau_difference": apart}


def _keys(table: pa.Table, trajectories: list[str]) -> np.ndarray:
    """[rows] int64: one number a (trajectory, anchor)."""
    import numpy as np

    from draftsmith.artifacts.parquet import places

    return (places(table, "trajectory_id", trajectories) << 32) + table["anchor"].to_numpy().astype(np.int64)


def _same(a: pa.Table, b: pa.Table) -> np.ndarray:
    """[rows] bool: as many accepted of the same proposals."""
    import numpy as np
    import pyarrow.compute as pc

    from draftsmith.artifacts.parquet import padded

    longest = max((pc.max(pc.list_value_length(t["proposed_ids"])).as_py() or 0 for t in (a, b)), default=0)
    proposed = [padded(table, "proposed_ids", longest, -1, np.int64) for table in (a, b)]
    equal: np.ndarray = (proposed[0] == proposed[1]).all(1) & (a["accepted"].to_numpy() == b["accepted"].to_numpy())
    return equal


def _largest_difference(served: pa.Table, replayed: pa.Table) -> float | None:
    """Of the target's log-probs where both sides have them; both have the same proposals."""
    import numpy as np
    import pyarrow.compute as pc

    from draftsmith.artifacts.parquet import padded

    both = pc.and_(pc.is_valid(served["target_logprobs"]), pc.is_valid(replayed["target_logprobs"]))
    tables = served.filter(both), replayed.filter(both)
    lengths = [pc.list_value_length(table["target_logprobs"]).to_numpy() for table in tables]
    longest = max((int(each.max()) for each in lengths if len(each)), default=0)
    a, b = (padded(table, "target_logprobs", longest, np.nan, np.float64) for table in tables)
    judged = ~np.isnan(b) & (np.arange(longest) < lengths[0][:, None])  # beyond the end of the answer replay has none
    if not judged.any():
        return None
    with np.errstate(invalid="ignore"):  # both may be -inf, and are equal then
        apart = np.where(a == b, 0.0, np.abs(a - b))[judged]
    return float(np.nan_to_num(apart, nan=np.inf).max())
