"""Recorded answers of any number and length, made and not generated, with the verify steps of a made-up drafter.

Tokens are uniform and log-probs normal: nothing in them compresses, which is the worst case for disk and tables. There
are 64 different answers, each to any number of prompts (some megabytes stay in the memory of who makes them): those
that share a page of a table are different. Tokens and steps are the same wherever they are asked for.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.parquet import Rows, TableWriter, to_table
from draftsmith.artifacts.parts import Parts
from draftsmith.artifacts.schemas import PROMPTS, TIMINGS, TRACE, TRAJECTORIES
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.drafters.dflash.shape import DFlashConfig
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.replay.scoring import StepScores
from draftsmith.stages.replay.trace import Trace, Trajectory
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed import random_target
from tests.testbed.context import RecordingContext

VOCABULARY, POSITIONS = 4096, 8192
TEXT = VOCABULARY - 2  # without mask and end
PROMPT, BLOCK = 64, 8
# of a verify step, by accepted proposals: tau is about 4.8
_ACCEPTED = np.array([0.15, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.25])
_ROLLOUT = {"timings": TIMINGS, "trace": TRACE, "trajectories": TRAJECTORIES}
_SHARD = 32  # answers, as a rollout writes them
_DIFFERENT = 64  # answers


@dataclass(frozen=True)
class Recorded:
    """`answers` answers of `tokens` tokens each."""

    answers: int
    tokens: int

    def trajectory(self, index: int) -> Trajectory:
        """The prompt begins with the index, so that no two are the same."""
        ids = [*divmod(index, TEXT), *_tokens(index % _DIFFERENT, PROMPT + self.tokens)[2:]]
        return Trajectory(f"{index:08d}/0", ids, PROMPT)

    def trace(self, index: int) -> Trace:
        """A walk of verify steps over the answer."""
        return _trace(index % _DIFFERENT, self.tokens)

    def scores(self, index: int) -> StepScores:
        """What the target says of the trace's proposals."""
        return _scores(index % _DIFFERENT, self.tokens)

    def write_logs(self, path: Path) -> None:
        """JSON Lines of token ids, as a service may log them."""
        with path.open("w") as file:
            for each in self._trajectories():
                row = {"prompt_token_ids": each.tokens[:PROMPT], "completion_token_ids": each.tokens[PROMPT:]}
                file.write(json.dumps(row) + "\n")

    def write_prompts(self, folder: Path) -> None:
        """The artifact of stage `prompts`."""
        with TableWriter(folder / "prompts.parquet", PROMPTS) as table:
            for each in self._trajectories():
                said = [{"role": "user", "content": each.trajectory_id}]
                row = {"prompt_id": each.trajectory_id[:-2], "source": "made", "split": "train", "messages": said}
                table.append([row | {"token_ids": each.tokens[:PROMPT]}])

    def write_shards(self, work: Path) -> None:
        """The shards of a rollout with a drafter that has all its answers, but has not put them together."""
        parts = Parts(work, _ROLLOUT)
        for start in range(0, self.answers, _SHARD):
            parts.append(self._rollout(range(start, min(start + _SHARD, self.answers))))

    def write_rollout(self, folder: Path, drafter: Path) -> None:
        """Its artifact. drafter: the checkpoint that is said to have drafted."""
        with ExitStack() as opened:
            tables = {
                name: opened.enter_context(TableWriter(folder / f"{name}.parquet", schema))
                for name, schema in _ROLLOUT.items()
            }
            for start in range(0, self.answers, _SHARD):
                for name, rows in self._rollout(range(start, min(start + _SHARD, self.answers))).items():
                    tables[name].append(rows)
        told = {"drafter_digest": drafter_digest(drafter), **DraftingConfig().model_dump()}
        told |= {"engine": "made", "dtype": "float32", "temperature": 0.0}
        (folder / "trace.json").write_text(json.dumps(told))

    def _rollout(self, indices: range) -> dict[str, Rows]:
        """Rows of each table."""
        return {
            "timings": [_timing(f"{index:08d}/0", self.trace(index)) for index in indices],
            "trace": pa.concat_tables([_steps(index, self.tokens) for index in indices]),
            "trajectories": [_answer(self.trajectory(index)) for index in indices],
        }

    def _trajectories(self) -> Iterator[Trajectory]:
        return (self.trajectory(index) for index in range(self.answers))


@functools.lru_cache(_DIFFERENT)
def _tokens(index: int, count: int) -> list[int]:
    ids: list[int] = np.random.default_rng([index, 0]).integers(0, TEXT, count).tolist()
    return ids


@functools.lru_cache(_DIFFERENT)
def _trace(index: int, tokens: int) -> Trace:
    rng, length, K = np.random.default_rng([index, 1]), PROMPT + tokens, BLOCK - 1
    accepted = rng.choice(BLOCK, tokens, p=_ACCEPTED)
    anchors = PROMPT + np.concatenate([[0], np.cumsum(accepted + 1)[:-1]])
    anchors = anchors[anchors <= length - 2]
    accepted = np.minimum(accepted[: len(anchors)], length - 1 - anchors)
    proposed = rng.integers(0, TEXT, (len(anchors), K))
    return Trace(length, anchors, accepted, proposed, len(anchors))


@functools.lru_cache(_DIFFERENT)
def _scores(index: int, tokens: int) -> StepScores:
    trace = _trace(index, tokens)
    rng, shape = np.random.default_rng([index, 2]), trace.proposed.shape
    logprobs = -np.abs(rng.standard_normal(shape, dtype=np.float32))
    logprobs[np.arange(shape[1]) >= trace.judged[:, None]] = np.nan
    return StepScores(logprobs, -np.abs(rng.standard_normal(shape[0], dtype=np.float32)))


def _timing(name: str, trace: Trace) -> dict[str, Any]:
    seconds = dict.fromkeys(("seconds", "first_token_seconds", "draft_seconds", "verify_seconds"), 1.0)
    return {"trajectory_id": name, "verify_steps": len(trace.anchors), "retractions": 0, **seconds}


def _steps(index: int, tokens: int) -> pa.Table:
    """Rows of TRACE."""
    table = _nameless(index % _DIFFERENT, tokens)
    return table.set_column(0, TRACE.columns.field(0), pa.repeat(f"{index:08d}/0", table.num_rows))


@functools.lru_cache(_DIFFERENT)
def _nameless(index: int, tokens: int) -> pa.Table:
    trace = _trace(index, tokens)
    columns = {
        "trajectory_id": pa.repeat("", len(trace.anchors)),
        "step": np.arange(len(trace.anchors)),
        "anchor": trace.anchors,
        "accepted": trace.accepted,
        "proposed_ids": _lists(trace.proposed),
        "target_logprobs": _lists(_scores(index, tokens).target_logprobs),
    }
    return to_table(TRACE, pa.table(columns))


def _lists(values: np.ndarray) -> pa.Array:
    rows, width = values.shape
    return pa.ListArray.from_arrays(np.arange(0, (rows + 1) * width, width, dtype=np.int32), values.reshape(-1))


def _answer(each: Trajectory) -> dict[str, Any]:
    ids = np.array(each.tokens, dtype=np.int32)
    row = {"trajectory_id": each.trajectory_id, "prompt_id": each.trajectory_id[:-2], "split": "train", "sample": 0}
    said = {"finish_reason": "length", "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "engine": "made"}
    return row | said | {"prompt_ids": ids[:PROMPT], "response_ids": ids[PROMPT:]}


def write_models(folder: Path) -> None:
    """Artifacts `target` and `drafter`: as small as they can be, so that what is measured is data."""
    from draftsmith.stages.drafters.base import DrafterInfo
    from draftsmith.stages.drafters.checkpoint import create_drafter, save_drafter
    from draftsmith.stages.stored import DRAFTER_FOLDER
    from draftsmith.stages.target import STAGE, TargetConfig

    random_target.write_model(folder / "model", vocabulary=VOCABULARY, positions=POSITIONS)
    context = RecordingContext(folder / "target", folder / "target.work")
    STAGE.run(context, TargetConfig(source=str(folder / "model"), dtype="float32"))
    target = Target.load(folder / "target", device="cpu")
    shape = DFlashConfig(num_layers=1, block_size=BLOCK, target_layer_ids=(0,), intermediate_size=32)
    drafter = create_drafter(shape, target, 0)
    drafter.info = DrafterInfo(target_digest=target.info.digest)
    save_drafter(drafter, folder / "drafter" / DRAFTER_FOLDER, target.dtype)
