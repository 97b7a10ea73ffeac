"""Recorded answers of any number and length, made and not generated, with the verify steps of a made-up drafter.

Every answer is drawn from a generator of its own, so tokens and steps are the same wherever they are asked for. Tokens
are uniform and log-probs normal: nothing in them compresses or repeats, which is the worst case for disk and tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.parquet import Rows, ShardWriter, TableWriter, to_table
from draftsmith.artifacts.schemas import PROMPTS, TIMINGS, TRACE, TRAJECTORIES
from draftsmith.stages.drafters.config import DFlashConfig, DraftingConfig
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.replay.scoring import StepScores
from draftsmith.stages.replay.trace import Trace, Trajectory
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed import random_target
from tests.testbed.context import RecordingContext

VOCABULARY, POSITIONS = 4096, 8192
TEXT = VOCABULARY - 2  # without mask and end
PROMPT, BLOCK, TOP_K = 64, 8, 4
# of a verify step, by accepted proposals: tau is about 4.8
_ACCEPTED = np.array([0.15, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.25])
_ROLLOUT = {"timings": TIMINGS, "trace": TRACE, "trajectories": TRAJECTORIES}
_SHARD = 32  # answers, as a rollout writes them


@dataclass(frozen=True)
class Recorded:
    """`answers` answers of `tokens` tokens each."""

    answers: int
    tokens: int

    def trajectory(self, index: int) -> Trajectory:
        ids = np.random.default_rng([index, 0]).integers(0, TEXT, PROMPT + self.tokens).tolist()
        return Trajectory(f"{index:08d}/0", ids, PROMPT)

    def trace(self, index: int) -> Trace:
        """A walk of verify steps over the answer."""
        rng, length, K = np.random.default_rng([index, 1]), PROMPT + self.tokens, BLOCK - 1
        accepted = rng.choice(BLOCK, self.tokens, p=_ACCEPTED)
        anchors = PROMPT + np.concatenate([[0], np.cumsum(accepted + 1)[:-1]])
        anchors = anchors[anchors <= length - 2]
        accepted = np.minimum(accepted[: len(anchors)], length - 1 - anchors)
        proposed = rng.integers(0, TEXT, (len(anchors), K))
        logprobs = -np.abs(rng.standard_normal((len(anchors), K), dtype=np.float32))
        return Trace(length, anchors, accepted, proposed, logprobs, len(anchors))

    def scores(self, index: int, trace: Trace) -> StepScores:
        """What the target says of the trace's proposals."""
        rng, shape = np.random.default_rng([index, 2]), trace.proposed.shape
        logprobs = -np.abs(rng.standard_normal(shape, dtype=np.float32))
        logprobs[np.arange(shape[1]) >= trace.judged[:, None]] = np.nan
        top = -np.sort(np.abs(rng.standard_normal((shape[0], TOP_K), dtype=np.float32)))
        return StepScores(logprobs, rng.integers(0, TEXT, (shape[0], TOP_K)), top)

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
        shards = {name: ShardWriter(work / name, schema) for name, schema in _ROLLOUT.items()}
        for start in range(0, self.answers, _SHARD):
            for name, rows in self._rollout(range(start, min(start + _SHARD, self.answers))).items():
                shards[name].append(rows)

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
        traces = {f"{index:08d}/0": (trace := self.trace(index), self.scores(index, trace)) for index in indices}
        return {
            "timings": [_timing(name, trace) for name, (trace, _) in traces.items()],
            "trace": pa.concat_tables(
                [_steps(name, trace, scores.target_logprobs) for name, (trace, scores) in traces.items()]
            ),
            "trajectories": [_answer(self.trajectory(index)) for index in indices],
        }

    def _trajectories(self) -> Iterator[Trajectory]:
        return (self.trajectory(index) for index in range(self.answers))


def _timing(name: str, trace: Trace) -> dict[str, Any]:
    seconds = dict.fromkeys(("seconds", "first_token_seconds", "draft_seconds", "verify_seconds"), 1.0)
    return {"trajectory_id": name, "verify_steps": len(trace.anchors), **seconds}


def _steps(name: str, trace: Trace, target_logprobs: np.ndarray) -> pa.Table:
    columns = {
        "trajectory_id": pa.repeat(name, len(trace.anchors)),
        "step": np.arange(len(trace.anchors)),
        "anchor": trace.anchors,
        "accepted": trace.accepted,
        "proposed_ids": _lists(trace.proposed),
        "target_logprobs": _lists(target_logprobs),
    }
    return to_table(TRACE, pa.table(columns))


def _lists(values: np.ndarray) -> pa.Array:
    rows, width = values.shape
    return pa.ListArray.from_arrays(np.arange(0, (rows + 1) * width, width, dtype=np.int32), values.reshape(-1))


def _answer(each: Trajectory) -> dict[str, Any]:
    ids = np.array(each.tokens, dtype=np.int32)
    row = {"trajectory_id": each.trajectory_id, "prompt_id": each.trajectory_id[:-2], "split": "train", "sample": 0}
    said = {"finish_reason": "length", "temperature": 0.0, "top_p": 1.0, "seed": 0, "engine": "made"}
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
