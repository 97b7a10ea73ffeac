"""Reading the data of a training step: its answers and their mined verify steps, as one of several ranks.

Answers of 1,000 random tokens after prompts of 100, a verify step every three tokens with 15 proposals, as rollout and
mining store them. `decoded` reads row groups of the Parquet files, as everything but training does; `mapped` reads the
copy that a training makes (`MappedReader`), whose time is the last table's. Answers are padded twice, for the target's
forward and for the batch, as for features that are not kept. Medians over steps, in milliseconds of wall and CPU time.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from draftsmith.artifacts.tables.parquet import TableWriter
from draftsmith.artifacts.tables.readers import MappedReader, RowReader
from draftsmith.artifacts.tables.schemas import TRAJECTORIES, VERIFY_STEPS, TableSchema
from draftsmith.stages.data.trajectories import TOKEN_COLUMNS, TrajectoryRows, load_trajectories, pad_tokens
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.training.batches import trajectories_of_step
from draftsmith.stages.training.opd.verify_steps import STEP_COLUMNS, MinedTable, load_mined
from tests.benchmarks import harness

PROMPT, PROPOSALS, TOKENS_PER_STEP = 100, 15, 3
TABLES = {"trajectories": (TRAJECTORIES, TOKEN_COLUMNS), "verify_steps": (VERIFY_STEPS, STEP_COLUMNS)}
BATCH = 200  # answers that are written together


def lists(values: np.ndarray, length: int) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), pa.array(values))


def token_ids(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return ids of a vocabulary of 150,000, about as frequent as words are."""
    return np.minimum(rng.zipf(1.2, count), 150_000).astype(np.int32)


def filled(schema: TableSchema, rows: int, **columns: object) -> pa.Table:
    """Return a table whose omitted columns hold a constant."""
    constant = {pa.string(): "-", pa.int32(): 0, pa.int64(): 0, pa.float32(): 0.0}
    return pa.table(
        {f.name: columns.get(f.name, pa.array([constant.get(f.type)] * rows, f.type)) for f in schema.columns}
    )


def write_tables(folder: Path, answers: int, tokens: int) -> None:
    rng, steps = np.random.default_rng(0), tokens // TOKENS_PER_STEP
    with (
        TableWriter(folder / "trajectories.parquet", TRAJECTORIES) as trajectories,
        TableWriter(folder / "verify_steps.parquet", VERIFY_STEPS) as verify_steps,
    ):
        for start in range(0, answers, BATCH):
            count = min(BATCH, answers - start)
            names = pa.array([f"{index:032x}/0" for index in range(start, start + count)])
            trajectories.append(
                filled(
                    TRAJECTORIES,
                    count,
                    trajectory_id=names,
                    prompt_ids=lists(token_ids(count * PROMPT, rng), PROMPT),
                    response_ids=lists(token_ids(count * tokens, rng), tokens),
                )
            )
            step, rows = np.tile(np.arange(steps, dtype=np.int32), count), steps * count
            accepted = rng.integers(0, 2 * TOKENS_PER_STEP, rows).astype(np.int32)
            verify_steps.append(
                filled(
                    VERIFY_STEPS,
                    rows,
                    trajectory_id=names.take(np.repeat(np.arange(count), steps)),
                    step=step,
                    anchor=PROMPT + TOKENS_PER_STEP * step,
                    accepted=accepted,
                    committed=accepted + 1,
                    rejected_offset=accepted + 1,
                    proposed_ids=lists(token_ids(rows * PROPOSALS, rng), PROPOSALS),
                    target_logprobs=lists(-rng.exponential(2, rows * PROPOSALS).astype(np.float32), PROPOSALS),
                )
            )


def clocks(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU milliseconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)


def read_answers(stored: TrajectoryRows, own: list[int]) -> None:
    answers = [stored[i] for i in own]
    for _ in range(2):
        pad_tokens(answers, torch.device("cpu"))


def read_steps(mined: MinedTable, own: list[int]) -> None:
    for i in own:
        mined.steps_of(i)


def make_copy(folder: Path, table: str) -> list[object]:
    """Copy a table as a training does; return a row of the report."""
    (schema, columns), path, copy = TABLES[table], folder / f"{table}.parquet", folder / f"{table}.arrow"
    times = clocks(lambda: RowReader(path, schema).write_copy(copy, columns))
    return [
        table,
        path.stat().st_size / 1e6,
        copy.stat().st_size / 1e6,
        *(milliseconds / 1e3 for milliseconds in times),
    ]


def load(folder: Path, *, mapped: bool) -> tuple[TrajectoryRows, MinedTable]:
    """Load both tables."""
    readers = (
        MappedReader(folder / f"{table}.parquet", schema, folder / f"{table}.arrow") if mapped else None
        for table, (schema, _) in TABLES.items()
    )
    stored = load_trajectories(folder, reader=next(readers)).trajectories
    return stored, load_mined(folder, stored, PROPOSALS + 1, reader=next(readers))


def measure(
    stored: TrajectoryRows, mined: MinedTable, per_step: int, ranks: Ranks, repetitions: int
) -> tuple[float, ...]:
    """Return answers a rank, then medians of milliseconds: answers, their CPU time, verify steps, their CPU time."""
    times = []
    for step in range(repetitions):
        indices = trajectories_of_step(len(stored), per_step, step, seed=0)
        own = [indices[row] for row in ranks.assigned_rows(stored.lengths[indices].tolist())]
        answers, steps = partial(read_answers, stored, own), partial(read_steps, mined, own)
        times.append((*clocks(answers), *clocks(steps)))
    return len(own), *(harness.median(column) for column in zip(*times, strict=True))


def main() -> None:
    options = harness.parser(__doc__, repetitions=20)
    options.add_argument("--answers", type=int, default=16_000)
    options.add_argument("--tokens", type=int, default=1_000, help="of an answer")
    options.add_argument("--per-step", type=int, default=21, help="answers in a step")
    options.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    chosen = harness.parsed(options)
    with tempfile.TemporaryDirectory(prefix="draftsmith-step-data-") as name:
        folder = Path(name)
        write_tables(folder, chosen.answers, chosen.tokens)
        copies = [make_copy(folder, table) for table in TABLES]
        rows = [
            [reading, world, *measure(stored, mined, chosen.per_step, Ranks(0, world), chosen.repetitions)]
            for reading in ("decoded", "mapped")
            for stored, mined in [load(folder, mapped=reading == "mapped")]
            for world in chosen.ranks
        ]
    harness.print_table(
        f"{chosen.per_step} of {chosen.answers:,} answers of {chosen.tokens:,} tokens a step",
        ["reading", "ranks", "answers a rank", "answers ms", "CPU ms", "verify steps ms", "CPU ms"],
        rows,
    )
    harness.print_table("Copies, once a training", ["table", "Parquet MB", "copy MB", "seconds", "CPU seconds"], copies)
    harness.report("step_data", {"rows": rows, "copies": copies}, chosen)


if __name__ == "__main__":
    harness.run(main)
