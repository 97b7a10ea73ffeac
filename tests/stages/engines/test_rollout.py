"""Stage `rollout`: its tables, its continuation after an interruption, and its errors.

Shards of an unfinished one are complete or absent, and an answer has the rows of one shard only.
"""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.store.manifest import content_id, describe_files
from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import PROMPTS, QUESTIONS, TIMINGS, TRACE, TRAJECTORIES
from draftsmith.stages.data.stored_prompts import load_prompts
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import TOKENS_FILE
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.partial_answers import SCHEMAS, PartialAnswers
from draftsmith.stages.engines.stage import STAGE, RolloutConfig, preflight
from draftsmith.stages.replay.steps import recorded_steps
from draftsmith.stages.targets.info import INFO_FILE, load_tokenizer, model_path
from tests.stages.bench import Bench
from tests.stages.drafters.edits import set_fields
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.random_target import TEXT_TOKENS


def config(**fields: Any) -> RolloutConfig:
    return RolloutConfig.model_validate(
        {
            "splits": ["heldout"],
            "prompts": 22,
            "sampling": {"max_new_tokens": 40},
            "engine": {"slots": 4},
            "rows_per_shard": 3,
            **fields,
        }
    )


def context(
    folder: Path, made: DrafterArtifacts, *, drafter: bool = False, stop_after: int | None = None
) -> StoppingContext:
    inputs = {"target": made.target, "prompts": made.prompts, **({"drafter": made.drafter} if drafter else {})}
    return StoppingContext.under(folder, inputs, stop_after=stop_after)


def rolled_out(folder: Path, made: DrafterArtifacts, *, drafter: bool = False, **fields: Any) -> StoppingContext:
    """Run the stage to its end."""
    ctx = context(folder, made, drafter=drafter)
    STAGE.run(ctx, config(**fields))
    return ctx


def rows(ctx: RecordingContext) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(ctx.out / "trajectories.parquet", TRAJECTORIES).to_pylist()
    return found


@pytest.fixture(scope="module")
def assisted(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts) -> RecordingContext:
    """A rollout with a drafter that nothing disturbed."""
    return rolled_out(tmp_path_factory.mktemp("whole"), tiny_drafter, drafter=True)


def test_answers_are_the_targets_in_the_order_of_the_prompts(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, bench: Bench
) -> None:
    ctx = rolled_out(tmp_path, tiny_drafter)
    prompts = load_prompts(tiny_drafter.prompts, ["heldout"])[:22]
    written = rows(ctx)
    assert [row["prompt_id"] for row in written] == [p.prompt_id for p in prompts]
    compared = 0
    for row, prompt in zip(written, prompts, strict=True):
        assert row["trajectory_id"] == f"{prompt.prompt_id}/0"
        assert row["prompt_ids"] == prompt.token_ids
        assert (row["split"], row["temperature"], row["top_p"], row["engine"]) == ("heldout", 0, 1, "embedded")
        assert row["finish_reason"] in ("stop", "length")
        if prompt.prompt_id in bench.greedy:
            assert row["response_ids"] == bench.greedy[prompt.prompt_id][:40]
            compared += 1
    assert compared > 15
    assert {row["verify_steps"] for row in read_table(ctx.out / "timings.parquet", TIMINGS).to_pylist()} == {0}
    assert not (ctx.out / "trace.parquet").exists() and not (ctx.out / "trace.json").exists()
    assert ctx.summaries["answers"] == 22
    assert ctx.summaries["response_tokens"] == sum(len(row["response_ids"]) for row in written)
    assert "tau" not in ctx.summaries
    assert (22, 22, "answers") in ctx.progressed
    assert ctx.progressed[-1] == (44, 44, "rows written"), "of trajectories and timings"


@pytest.mark.parametrize(("drafter", "temperature"), [(False, 0.0), (True, 1.0)], ids=["plain", "assisted, sampled"])
def test_an_interrupted_run_continues_and_gives_the_same_bytes(
    drafter: bool, temperature: float, tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    sampling = {"max_new_tokens": 40, "temperature": temperature}
    whole = rolled_out(tmp_path / "whole", tiny_drafter, drafter=drafter, sampling=sampling)
    for stop_after in (1, 8):
        with pytest.raises(StageInterrupted):
            cut = context(tmp_path / "cut", tiny_drafter, drafter=drafter, stop_after=stop_after)
            STAGE.run(cut, config(sampling=sampling))
    last = rolled_out(tmp_path / "cut", tiny_drafter, drafter=drafter, sampling=sampling)
    assert any("6 answers of an earlier attempt kept, 16 still missing" in line for line in last.logs)
    names = ["trajectories.parquet"] + (["trace.parquet", "trace.json"] if drafter else [])
    for name in names:
        assert (last.out / name).read_bytes() == (whole.out / name).read_bytes(), name
    assert last.summaries["answers"] == 22


@pytest.mark.parametrize(
    ("table", "column"),
    [("trajectories", "response_ids"), ("timings", None), ("trace", None), ("trace", "proposed_ids")],
)
def test_a_damaged_last_shard_is_generated_again(
    table: str, column: str | None, tmp_path: Path, tiny_drafter: DrafterArtifacts, assisted: RecordingContext
) -> None:
    """column: of which a bit is flipped; None: the file is cut off."""
    with pytest.raises(StageInterrupted):
        STAGE.run(context(tmp_path, tiny_drafter, drafter=True, stop_after=9), config())
    shard = sorted((tmp_path / "work" / table).glob("shard-*.parquet"))[-1]
    if column is None:
        shard.write_bytes(shard.read_bytes()[:-40])
    else:
        damage_column(shard, column)
    last = rolled_out(tmp_path, tiny_drafter, drafter=True)
    assert column or any(line.startswith("6 answers of an earlier attempt kept") for line in last.logs)
    for name in ("trajectories.parquet", "trace.parquet"):
        assert (last.out / name).read_bytes() == (assisted.out / name).read_bytes(), name
    timings = read_table(last.out / "timings.parquet", TIMINGS).to_pylist()
    assert [row["trajectory_id"] for row in timings] == [row["trajectory_id"] for row in rows(last)]


def test_an_assisted_rollout_gives_the_same_text_and_records_its_trace(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    plain = rolled_out(tmp_path / "a", tiny_drafter)
    assisted = rolled_out(tmp_path / "b", tiny_drafter, drafter=True, drafting={"block_size": 5})
    assert rows(assisted) == rows(plain)
    trace = read_table(assisted.out / "trace.parquet", TRACE).to_pylist()
    by_answer = {row["trajectory_id"]: row for row in rows(assisted)}
    for before, row in zip([None, *trace], trace, strict=False):
        answer = by_answer[row["trajectory_id"]]
        if row["step"] == 0:
            assert row["anchor"] == len(answer["prompt_ids"])
        else:
            assert before is not None and row["step"] == before["step"] + 1
            assert row["anchor"] == before["anchor"] + before["accepted"] + 1
        assert len(row["proposed_ids"]) == 4
    served = json.loads((assisted.out / "trace.json").read_text())
    digest = drafter_digest(tiny_drafter.drafter / DRAFTER_FOLDER)
    assert served == {
        "drafter_digest": digest, "block_size": 5, "head_tokens": None,
        "engine": "embedded", "dtype": "float32", "temperature": 0,
    }  # fmt: skip
    drafted = sum(len(row["response_ids"]) - 1 for row in by_answer.values())
    assert assisted.summaries["tau"] == pytest.approx(drafted / len(trace))
    assert assisted.summaries["tau"] > 2


@pytest.fixture
def conversations(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> Path:
    """Prompts of the tiny drafter, the first two of which begin conversations."""
    folder = Path(shutil.copytree(tiny_drafter.prompts, tmp_path / "prompts"))
    first, second = load_prompts(folder, ["heldout"]).ids[:2]
    questions = {first: ["And then?", "Why?"], second: ["Why?"]}
    asked = [{"prompt_id": prompt, "questions": later} for prompt, later in questions.items()]
    write_table(folder / "questions.parquet", QUESTIONS, [row | {"chat_template_kwargs": "{}"} for row in asked])
    return folder


def test_every_question_of_a_conversation_follows_the_answer_to_the_one_before(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, conversations: Path
) -> None:
    def made(name: str, stop_after: int | None = None) -> StoppingContext:
        ctx = context(tmp_path / name, tiny_drafter, drafter=True, stop_after=stop_after)
        return replace(ctx, inputs={**ctx.inputs, "prompts": conversations})

    whole, cfg = made("whole"), config(prompts=4)
    STAGE.run(whole, cfg)
    written = {row["trajectory_id"]: row for row in rows(whole)}
    ids = load_prompts(conversations, ["heldout"]).ids[:4]
    turns = [(ids[0], 3), (ids[1], 2), (ids[2], 1), (ids[3], 1)]
    assert list(written) == [f"{prompt}/{turn}" for prompt, count in turns for turn in range(count)]
    tokenizer = load_tokenizer(model_path(tiny_drafter.target))
    for turn, question in ((1, "And then?"), (2, "Why?")):
        before, after = written[f"{ids[0]}/{turn - 1}"], written[f"{ids[0]}/{turn}"]
        answer = tokenizer.decode(before["response_ids"], skip_special_tokens=True)
        text = tokenizer.decode(after["prompt_ids"])
        assert f"{answer}<|im_end|>" in text and text.rpartition("user\n")[2].startswith(question)
    assert whole.summaries["answers"] == 7
    for stop_after in (1, 4):
        with pytest.raises(StageInterrupted):
            STAGE.run(made("cut", stop_after), cfg)
    last = made("cut")
    STAGE.run(last, cfg)
    for name in ("trajectories.parquet", "trace.parquet"):
        assert (last.out / name).read_bytes() == (whole.out / name).read_bytes()
    with pytest.raises(DraftsmithError, match=r"positions.*1024"):
        STAGE.run(made("long"), config(prompts=4, sampling={"max_new_tokens": 320}))


def test_a_reduced_head_that_the_drafter_cannot_have_is_logged(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    drafter = Path(shutil.copytree(tiny_drafter.drafter, tmp_path / "drafter"))
    (drafter / DRAFTER_FOLDER / TOKENS_FILE).unlink()
    ctx = context(tmp_path, tiny_drafter, drafter=True)
    ctx = replace(ctx, inputs={**ctx.inputs, "drafter": drafter})
    STAGE.run(ctx, config(drafting={"head_tokens": 5}))
    assert any("head_tokens has no effect" in line for line in ctx.logs)


def test_the_seed_of_the_run_decides_sampled_answers(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    cfg = config(prompts=12, sampling={"max_new_tokens": 30, "temperature": 1.2})
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        ctx = context(tmp_path / name, tiny_drafter)
        ctx.seed = seed
        STAGE.run(ctx, cfg)
        runs.append([row["response_ids"] for row in rows(ctx)])
    assert runs[0] == runs[1] != runs[2]
    stored = load_trajectories(tmp_path / "a" / "out")
    assert stored.sampling.temperature == pytest.approx(1.2)
    assert len(stored.trajectories) == 12


def test_skip_and_prompts_select_from_the_splits(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    splits = ["validation", "heldout"]
    ctx = rolled_out(tmp_path, tiny_drafter, splits=splits, skip=6, prompts=4, sampling={"max_new_tokens": 2})
    expected = load_prompts(tiny_drafter.prompts, splits)[6:10]
    assert [row["prompt_id"] for row in rows(ctx)] == [p.prompt_id for p in expected]


@pytest.mark.parametrize("fields", [{"skip": 60}, {"splits": ["absent"]}])
def test_no_prompts_left_is_one_clear_error(
    fields: dict[str, Any], tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    with pytest.raises(DraftsmithError, match="are skipped") as caught:
        rolled_out(tmp_path, tiny_drafter, **fields)
    assert "\n" not in str(caught.value)


def test_an_answer_that_does_not_fit_the_context_is_refused_before_work(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    with pytest.raises(DraftsmithError, match=r"10\d\d positions.*1024.*sampling"):
        rolled_out(tmp_path, tiny_drafter, sampling={"max_new_tokens": 1020})
    preflight(config(sampling={"max_new_tokens": 1023}), tiny_drafter.target)
    with pytest.raises(DraftsmithError, match=r"sampling\.max_new_tokens: 1024 does not fit"):
        preflight(config(sampling={"max_new_tokens": 1024}), tiny_drafter.target)


def test_logged_answers_take_the_place_of_a_rollout(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, assisted: RecordingContext
) -> None:
    """Rows of a log, in any order; the target is not loaded."""
    logged = [
        {
            "prompt_token_ids": row["prompt_ids"], "completion_token_ids": row["response_ids"],
            "finish_reason": row["finish_reason"], "temperature": row["temperature"],
        }
        for row in rows(assisted)
    ]  # fmt: skip
    path = tmp_path / "answers.jsonl"

    def answered(name: str, lines: list[dict[str, Any]], **fields: Any) -> RecordingContext:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return rolled_out(tmp_path / name, tiny_drafter, answers=str(path), **fields)

    taken = rows(answered("taken", [*logged[::-1], {**logged[0], "completion_token_ids": [5, 6]}]))
    columns = ("trajectory_id", "split", "prompt_ids", "response_ids", "finish_reason", "temperature")
    assert [[row[name] for name in columns] for row in taken] == [
        [row[name] for name in columns] for row in rows(assisted)
    ]
    with pytest.raises(DraftsmithError, match="answers"):
        answered("missing", logged[1:])
    with pytest.raises(DraftsmithError, match="temperature"):
        answered("hot", logged, sampling={"max_new_tokens": 40, "temperature": 0.5})
    with pytest.raises(DraftsmithError, match="row 1: token id outside"):
        answered("of another model", [{**logged[0], "completion_token_ids": [5, 10**6]}, *logged[1:]])


@pytest.fixture
def in_bfloat16(plain_artifact: Path, tmp_path: Path) -> dict[str, Path]:
    """Return the random target in bfloat16, and prompts for it."""
    target, prompts = Path(shutil.copytree(plain_artifact, tmp_path / "target")), tmp_path / "prompts"
    set_fields(INFO_FILE, dtype="bfloat16")(target)
    draw = random.Random(0)
    rows = [
        {
            "prompt_id": f"p{index}",
            "source": "random",
            "split": "train",
            "messages": [],
            "token_ids": [draw.randrange(TEXT_TOKENS) for _ in range(draw.randint(2, 12))],
        }
        for index in range(40)
    ]
    write_table(prompts / "prompts.parquet", PROMPTS, rows)
    return {"target": target, "prompts": prompts}


def test_an_interruption_changes_no_answer_in_half_precision(in_bfloat16: dict[str, Path], tmp_path: Path) -> None:
    config = RolloutConfig.model_validate(
        {"sampling": {"max_new_tokens": 60, "temperature": 1.0}, "engine": {"slots": 5}, "rows_per_shard": 16}
    )

    def rollout(name: str, *stops: int, **changes: Any) -> str:
        for stop in stops:
            with pytest.raises(StageInterrupted):
                STAGE.run(StoppingContext.under(tmp_path / name, in_bfloat16, stop_after=stop), config)
        last = StoppingContext.under(tmp_path / name, in_bfloat16)
        STAGE.run(last, config.model_copy(update=changes))
        return content_id(describe_files(last.out, STAGE.volatile))

    whole = rollout("whole")
    assert rollout("cut", 3, 22) == whole
    if rollout("other", rows_per_shard=7) == whole:
        pytest.skip("on this processor nothing depends on the batch: what is above shows nothing")


SPLITS = {"a": "train", "b": "train"}


def answer(name: str, response: list[int], accepted: list[int] | None = None) -> Completion:
    """Return an answer with recorded verify steps, or without."""
    steps = recorded_steps(
        2 + len(response), [(index, kept, [7, 8, 9], None) for index, kept in enumerate(accepted or [])]
    )
    request = Request(name, [1, 2], 8)
    return Completion(request, response, "length", steps, verify_steps=len(accepted or []))


def tables_of(parts: PartialAnswers, ids: list[str]) -> dict[str, pa.Table]:
    """Return complete tables, in the order of the answers."""
    rows = parts.rows(ids)
    return {name: rows[name].take(range(len(ids)), schema.columns.names) for name, schema in SCHEMAS.items()}


def contents(parts: PartialAnswers, ids: list[str]) -> list[tuple[str, list[int], list[int]]]:
    """Return (id, response, accepted of its trace) of every answer."""
    tables = tables_of(parts, ids)
    steps = tables["trace"].to_pylist()
    return [
        (
            row["trajectory_id"],
            row["response_ids"],
            [step["accepted"] for step in steps if step["trajectory_id"] == row["trajectory_id"]],
        )
        for row in tables["trajectories"].to_pylist()
    ]


def test_an_answer_generated_again_without_a_trace_loses_the_old_trace(tmp_path: Path) -> None:
    """Killed between the trace's shard and the answers', and the servers of the second attempt have no plug-in."""
    killed = PartialAnswers(tmp_path)
    killed.append([answer("a/0", [3, 4, 5], [2])], SPLITS, "first")
    killed.append([answer("b/0", [6, 7], [0, 0])], SPLITS, "first")
    (tmp_path / "trajectories" / "shard-00001.parquet").unlink()
    again = PartialAnswers(tmp_path)
    assert again.finished(with_trace=True) == {"a/0"}
    again.append([answer("b/0", [6, 8])], SPLITS, "second")
    assert contents(again, ["a/0", "b/0"]) == [("a/0", [3, 4, 5], [2]), ("b/0", [6, 8], [])]
    assert tables_of(again, ["a/0", "b/0"])["timings"].num_rows == 2


def test_an_answer_generated_again_for_its_trace_has_the_rows_of_its_last_shard(tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path)
    parts.append([answer("b/0", [6, 7]), answer("a/0", [3])], SPLITS, "first")  # counted, but not recorded
    counted = [row | {"verify_steps": 2} for row in tables_of(parts, ["a/0", "b/0"])["timings"].to_pylist()]
    write_table(tmp_path / "timings" / "shard-00000.parquet", TIMINGS, counted)
    assert (parts.finished(with_trace=False), parts.finished(with_trace=True)) == ({"a/0", "b/0"}, set())
    parts.append([answer("a/0", [4, 5], [1])], SPLITS, "second")
    assert parts.finished(with_trace=True) == {"a/0"}
    assert contents(parts, ["a/0", "b/0"]) == [("a/0", [4, 5], [1]), ("b/0", [6, 7], [])]


def test_an_answer_that_a_recording_engine_gave_without_steps_is_not_generated_again(tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path)
    retracted = replace(answer("b/0", [6, 7]), verify_steps=2)
    parts.append([answer("a/0", [3, 4], [1]), retracted], SPLITS, "e")
    assert PartialAnswers(tmp_path).finished(with_trace=True) == {"a/0", "b/0"}


def damage_column(path: Path, column: str) -> None:
    """Flip a bit in the data of a column, so that whoever reads it finds its checksum wrong."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    (chunk,) = (c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema.split(".")[0] == column)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("table", "column"),
    [("trajectories", "prompt_ids"), ("trajectories", "response_ids"), ("trace", "proposed_ids"), ("trace", "anchor")],
)
def test_resuming_reads_no_tokens_and_no_steps(table: str, column: str, tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path)
    for name in ("a/0", "b/0"):
        parts.append([answer(name, list(range(3, 60)), [2] * 9)], SPLITS, "e")
    damage_column(tmp_path / table / "shard-00001.parquet", column)
    resumed = PartialAnswers(tmp_path)
    assert resumed.finished(with_trace=True) == {"a/0", "b/0"}
    assert resumed.drop_damaged() and not resumed.drop_damaged()
    assert resumed.finished(with_trace=True) == {"a/0"}
