"""Stage `mining`: its table, its summary recomputed from the table, and its parity with served steps."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import TIMINGS, TRACE, VERIFY_STEPS
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import TOKENS_FILE, load_drafter, save_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.stage import STAGE as ROLLOUT
from draftsmith.stages.replay.stage import STAGE, MiningConfig
from draftsmith.stages.runtime.stage import Shard
from tests.stages.bench import Bench
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.drafter import DrafterArtifacts


@pytest.fixture(scope="module")
def assisted(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts) -> Path:
    """Decode 24 greedy answers with the drafter, and record the trace."""
    made = tiny_drafter
    inputs = {"target": made.target, "prompts": made.prompts, "drafter": made.drafter}
    ctx = RecordingContext.under(tmp_path_factory.mktemp("assisted"), inputs)
    return ctx.run(ROLLOUT, splits=["heldout"], prompts=24, sampling={"max_new_tokens": 60}).out


Mine = Callable[..., RecordingContext]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts, assisted: Path) -> Mine:
    """Return what mines the assisted rollout, or `answers`, with the drafter of the test bed or another one."""

    def run(
        folder: Path | None = None, *, answers: Path = assisted, drafter: Path = tiny_drafter.drafter,
        stop_after: int | None = None, **config: Any,
    ) -> RecordingContext:  # fmt: skip
        inputs = {"target": tiny_drafter.target, "drafter": drafter, "trajectories": answers}
        ctx = StoppingContext.under(folder or tmp_path_factory.mktemp("mined"), inputs, stop_after=stop_after)
        return ctx.run(STAGE, **{"tokens_per_target_forward": 600, **config})

    return run


@pytest.fixture(scope="module")
def mined(mine: Mine) -> RecordingContext:
    return mine()


def table(ctx: RecordingContext) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(ctx.out / "verify_steps.parquet", VERIFY_STEPS).to_pylist()
    return rows


def summary(ctx: RecordingContext) -> dict[str, Any]:
    content: dict[str, Any] = ctx.json("summary.json")
    return content


def assert_same_bytes(ours: RecordingContext, expected: RecordingContext) -> None:
    for name in ("verify_steps.parquet", "summary.json"):
        assert (ours.out / name).read_bytes() == (expected.out / name).read_bytes(), name


def test_the_table_equals_the_served_trace(mined: RecordingContext, assisted: Path) -> None:
    columns = ["trajectory_id", "step", "anchor", "accepted", "proposed_ids"]
    served = read_table(assisted / "trace.parquet", TRACE, columns).to_pylist()
    assert [{name: row[name] for name in columns} for row in table(mined)] == served
    found = summary(mined)
    assert found["parity"] == {
        "served_steps": len(served), "different_steps": 0, "mismatch_share": 0.0,
        "answers": len({row["trajectory_id"] for row in served}), "served_tau": found["tau"],
        "replayed_tau": found["tau"], "tau_difference": 0.0, "tau_difference_high": 0.0,
    }  # fmt: skip
    assert mined.summaries["parity_mismatch"] == mined.summaries["parity_tau_difference"] == 0


def test_rows_agree_with_the_trajectory(mined: RecordingContext, assisted: Path) -> None:
    """Proposals after the end of an answer are neither accepted nor rejected."""
    tokens, kinds = {t.trajectory_id: t.tokens for t in load_trajectories(assisted).trajectories}, set()
    for row in table(mined):
        rest = tokens[row["trajectory_id"]][row["anchor"] + 1 :]
        accepted, proposed, rejected = row["accepted"], row["proposed_ids"], row["rejected_offset"]
        assert rest[:accepted] == proposed[:accepted]
        assert row["committed"] == min(accepted + 1, len(rest))
        assert row["committed_id"] == (rest[accepted] if row["committed"] > accepted else -1)
        assert rejected == (accepted + 1 if accepted < min(len(proposed), len(rest)) else 0)
        judged = [not np.isnan(value) for value in row["target_logprobs"]]
        assert judged == [k < len(rest) for k in range(len(proposed))]
        assert row["judged"] == sum(judged)
        kinds.add((all(judged), rejected > 0))
        if rejected:  # greedy text: the target's best token was committed
            assert row["target_logprobs"][accepted] < row["best_logprob"] <= 0
        else:
            assert np.isnan(row["best_logprob"])
    assert len(kinds) == 4


def test_the_summary_agrees_with_the_table(mined: RecordingContext, bench: Bench) -> None:
    rows, found = table(mined), summary(mined)
    assert found["steps"] == len(rows)
    assert found["tau"] == pytest.approx(np.mean([row["committed"] for row in rows]))
    assert found["tau"] > 2
    assert "(+1)" in found["definition_of_tau"]
    errors = [row for row in rows if row["rejected_offset"]]
    assert found["error_positions"] == len(errors)
    certain = sum(np.exp(row["best_logprob"]) >= 0.9 for row in errors)
    assert 0 < certain < len(errors)
    assert found["certain_errors"] == {"at_least": 0.9, "share": pytest.approx(certain / len(errors))}
    assert mined.summaries["certain_error_share"] == found["certain_errors"]["share"]
    histogram = Counter(row["accepted"] for row in rows)
    assert found["accepted_histogram"] == [histogram[n] for n in range(8)]
    for k in range(1, 8):
        judged = [row for row in rows if not np.isnan(row["target_logprobs"][k - 1])]
        accepted = sum(row["accepted"] >= k for row in judged)
        assert found["acceptance_by_offset"][k - 1] == pytest.approx(accepted / len(judged))
    rejected = Counter(row["proposed_ids"][row["accepted"]] for row in errors)
    assert {entry["id"]: entry["count"] for entry in found["most_rejected"]}.items() <= rejected.items()
    assert found["most_rejected"][0]["count"] == max(rejected.values())
    assert found["most_rejected"][0]["token"] == bench.target.tokenizer.decode([found["most_rejected"][0]["id"]])
    pairs = Counter((row["proposed_ids"][row["accepted"]], row["committed_id"]) for row in errors)
    assert [entry["count"] for entry in found["most_frequent_corrections"]] == [n for _, n in pairs.most_common(20)]
    assert found["evaluated_blocks_per_step"] >= 1
    assert found["trajectories_too_short"] == 0
    for name in ("tau", "steps", "error_positions", "evaluated_blocks_per_step"):
        assert mined.summaries[name] == found[name]
    assert mined.progressed[-1] == (found["steps"], found["steps"], "steps put together")


def test_an_interrupted_run_continues_and_gives_the_same_bytes(
    tmp_path: Path, mine: Mine, mined: RecordingContext
) -> None:
    """Answers of a damaged shard are mined again, and counted once."""
    for count in (1, 2):
        with pytest.raises(StageInterrupted):
            mine(tmp_path, stop_after=0)
        shards = sorted((tmp_path / "work" / "verify_steps").glob("shard-*"))
        assert len(shards) == count
    shards[-1].write_bytes(shards[-1].read_bytes()[:-30])
    assert_same_bytes(mine(tmp_path), mined)


@pytest.mark.parametrize("count", [3, 40])  # of few groups: some shards have none
def test_shards_give_the_same_bytes_as_one_process(
    count: int, tmp_path: Path, assisted: Path, mined: RecordingContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MiningConfig(tokens_per_target_forward=600)
    parts = [RecordingContext.under(tmp_path / str(index), mined.inputs) for index in range(count)]
    for index, part in enumerate(parts):
        STAGE.shard(part, config, Shard(index, count))
    counts = [part.json("shard.json")["trajectories"] for part in parts]
    assert sum(counts) == len(load_trajectories(assisted).trajectories) and sum(n > 0 for n in counts) >= 3
    assert all(part.progressed[-1][:2] == (n, n) for part, n in zip(parts, counts, strict=True) if n)
    joined = RecordingContext.under(tmp_path / "joined", mined.inputs, shards=[part.out for part in parts])
    monkeypatch.setattr("draftsmith.stages.targets.causal_lm.Target.load", None)  # nothing is left to compute
    STAGE.run(joined, config)
    assert_same_bytes(joined, mined)


@pytest.mark.parametrize("how", ["scored", "full", "sample"])
def test_only_as_much_is_mined_as_is_read(
    how: str, mine: Mine, mined: RecordingContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group size does not matter. The sample is always the same, and passes the parity gate."""
    monkeypatch.setattr("draftsmith.stages.replay.body.SAMPLE", 7)
    other = mine(table=how, tokens_per_target_forward=4000)
    names = {row["trajectory_id"] for row in table(other)}
    counted = summary(other)["trajectories"], summary(other)["parity"]["answers"]
    assert (len(names), len(names)) == counted == ((7, 7) if how == "sample" else (24, 24))
    expected = [row for row in table(mined) if row["trajectory_id"] in names]
    for row, of_all in zip(table(other), expected, strict=True):
        for name in row.keys() - {"target_logprobs", "best_logprob"}:
            assert row[name] == of_all[name], name
        logprobs = of_all["target_logprobs"]
        if how != "scored" and row["rejected_offset"]:
            logprobs[row["rejected_offset"] :] = [np.nan] * (len(logprobs) - row["rejected_offset"])
        np.testing.assert_allclose(row["target_logprobs"], logprobs, atol=5e-4)
        np.testing.assert_allclose(row["best_logprob"], of_all["best_logprob"], atol=5e-4)
    again = mine(table=how, tokens_per_target_forward=4000)
    assert str(table(again)) == str(table(other))  # NaN is not equal to itself


@pytest.fixture(scope="module")
def other_drafter(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts, bench: Bench) -> Path:
    """Return the artifact of a drafter with disturbed weights."""
    import torch

    folder = tmp_path_factory.mktemp("other")
    drafter = load_drafter(tiny_drafter.drafter / DRAFTER_FOLDER, bench.target)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    save_drafter(drafter, folder / DRAFTER_FOLDER, torch.float32)
    return folder


def test_another_drafter_is_mined_on_the_same_answers_without_parity(
    mine: Mine, other_drafter: Path, mined: RecordingContext
) -> None:
    ctx = mine(drafter=other_drafter)
    assert summary(ctx)["parity"] is None and "parity_mismatch" not in ctx.summaries
    assert summary(ctx)["tau"] < summary(mined)["tau"]


Retell = Callable[..., Path]


@pytest.fixture
def retell(tmp_path: Path, assisted: Path) -> Retell:
    """Return what copies the assisted rollout with changes in trace.json and rewritten tables, as of another engine."""

    def retell(
        trace: list[dict[str, Any]] | None = None, steps: Callable[[int], int] = lambda n: n, **changes: Any
    ) -> Path:
        folder = Path(shutil.copytree(assisted, tmp_path / "retold", dirs_exist_ok=True))
        served_with = json.loads((folder / "trace.json").read_text())
        (folder / "trace.json").write_text(json.dumps({**served_with, **changes}))
        if trace is not None:
            write_table(folder / "trace.parquet", TRACE, trace)
        rows = read_table(folder / "timings.parquet", TIMINGS).to_pylist()
        rows = [{**row, "verify_steps": steps(row["verify_steps"])} for row in rows]
        write_table(folder / "timings.parquet", TIMINGS, rows)
        return folder

    return retell


@pytest.fixture
def trace(assisted: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(assisted / "trace.parquet", TRACE).to_pylist()
    return rows


def test_a_trace_served_by_another_drafter_is_refused(mine: Mine, retell: Retell, other_drafter: Path) -> None:
    """trace.json claims the digest of the mined drafter, but the steps differ."""
    faked = retell(drafter_digest=drafter_digest(other_drafter / DRAFTER_FOLDER))
    with pytest.raises(DraftsmithError, match="served another drafter") as caught:
        mine(answers=faked, drafter=other_drafter)
    assert "\n" not in str(caught.value)
    allowed = mine(answers=faked, drafter=other_drafter, max_parity_mismatch=1)
    assert summary(allowed)["parity"]["mismatch_share"] > 0.1


def test_one_other_step_is_refused_in_float32_and_allowed_in_bfloat16(
    mine: Mine, retell: Retell, trace: list[dict[str, Any]]
) -> None:
    trace[3]["accepted"] += 1
    with pytest.raises(DraftsmithError, match=f"mining: 1 of {len(trace)} verify steps .*greedy decoding allows none"):
        mine(answers=retell(trace))
    allowed: list[dict[str, Any]] = [{"dtype": "bfloat16"}, {"temperature": 1.0}, {"differs": ["quantization fp8"]}]
    for changes in allowed:
        assert summary(mine(answers=retell(trace, **changes)))["parity"]["different_steps"] == 1


def test_recorded_log_probs_are_compared(
    mine: Mine, retell: Retell, trace: list[dict[str, Any]], mined: RecordingContext
) -> None:
    for row, own in zip(trace, table(mined), strict=True):
        row["target_logprobs"] = [value + 1e-4 for value in own["target_logprobs"]]
        row["target_logprobs"] = [-5.0 if np.isnan(value) else value for value in row["target_logprobs"]]
    found = summary(mine(answers=retell(trace)))["parity"]["largest_logprob_difference"]
    assert found == pytest.approx(1e-4, rel=0.05)
    trace[-1]["target_logprobs"][0] -= 0.01
    with pytest.raises(DraftsmithError, match=r"by up to 0\.0099 in float32"):
        mine(answers=retell(trace))


def test_without_a_trace_the_counted_steps_are_compared(mine: Mine, retell: Retell) -> None:
    ctx = mine(answers=retell([]))
    assert summary(ctx)["parity"]["tau_difference"] == 0 and "parity_mismatch" not in ctx.summaries
    with pytest.raises(DraftsmithError, match=r"tau is .* as served and .* in replay"):
        mine(answers=retell([], steps=lambda n: n + 1))


@pytest.mark.parametrize("recorded", [True, False])
def test_the_steps_of_a_retracted_answer_are_not_compared(
    recorded: bool, mine: Mine, retell: Retell, trace: list[dict[str, Any]]
) -> None:
    """Its server read it again, which gave a token without a verify step: later steps differ."""
    folder = retell([row for row in trace if recorded and row["trajectory_id"] != trace[0]["trajectory_id"]])
    timings = read_table(folder / "timings.parquet", TIMINGS).to_pylist()
    (row,) = (row for row in timings if row["trajectory_id"] == trace[0]["trajectory_id"])
    row["verify_steps"] += 1
    write_table(folder / "timings.parquet", TIMINGS, timings)
    with pytest.raises(DraftsmithError, match=r"tau is .* in replay .*float32 with greedy decoding allows none"):
        mine(answers=folder)
    row["retractions"] = 1
    write_table(folder / "timings.parquet", TIMINGS, timings)
    answers = summary(mine(answers=folder))["parity"]["answers"]
    assert answers == len({step["trajectory_id"] for step in trace}) - 1
    write_table(folder / "timings.parquet", TIMINGS, [{**each, "retractions": 1} for each in timings])
    ctx = mine(answers=folder)
    assert any(f"{len(timings)} of {len(timings)} answers were retracted" in line for line in ctx.logs)


def test_parity_is_of_the_same_drafting_settings(mine: Mine, retell: Retell, trace: list[dict[str, Any]]) -> None:
    """An explicit block size equals the trained default."""
    for ctx in (mine(drafting={"block_size": 8}), mine(answers=retell(trace, block_size=8))):
        assert summary(ctx)["parity"]["different_steps"] == 0
    ctx = mine(drafting={"block_size": 4})
    assert summary(ctx)["parity"] is None
    assert any("drafted with other settings (block_size 8)" in line for line in ctx.logs)
    assert summary(ctx)["block_size"] == 4
    assert {len(row["proposed_ids"]) for row in table(ctx)} == {3}


def test_head_tokens_without_frequent_tokens_are_logged_and_ignored(
    tmp_path: Path, mine: Mine, tiny_drafter: DrafterArtifacts, mined: RecordingContext, retell: Retell
) -> None:
    """Without the file of frequent tokens it drafts from all tokens, whatever `head_tokens` is."""
    drafter = Path(shutil.copytree(tiny_drafter.drafter, tmp_path / "drafter"))
    (drafter / DRAFTER_FOLDER / TOKENS_FILE).unlink()
    served = retell(drafter_digest=drafter_digest(drafter / DRAFTER_FOLDER))
    ctx = mine(answers=served, drafter=drafter, drafting={"head_tokens": 5})
    assert any("head_tokens has no effect" in line for line in ctx.logs)
    assert (ctx.out / "verify_steps.parquet").read_bytes() == (mined.out / "verify_steps.parquet").read_bytes()
    assert summary(ctx)["parity"]["different_steps"] == 0
