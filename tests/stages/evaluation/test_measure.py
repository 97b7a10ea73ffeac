"""The stage `evaluation` on the tiny target: complete metrics, tau by replay, exact outputs in float32."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.store.manifest import content_id, describe_files
from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TIMED_RUNS, TRAJECTORIES
from draftsmith.stages.data.trajectories import load_trajectories
from draftsmith.stages.evaluation import load_curve
from draftsmith.stages.evaluation import speed_embedded as embedded
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.repetitions import steady
from draftsmith.stages.evaluation.speed_embedded import Decoder, EmbeddedSpeedTest
from draftsmith.stages.evaluation.stage import STAGE, preflight
from draftsmith.stages.runtime.stage import Shard
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.stages.bench import Bench, tau
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.drafter import DrafterArtifacts

CONFIG: dict[str, Any] = {
    "sampling": {"max_new_tokens": 32}, "speed_prompts": 5, "validation_prompts": 2, "block_sizes": [3, 8, 16],
    "exactness_prompts": 4, "concurrency": 2, "rounds": 5,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _as_many_rounds_as_asked_for() -> Iterator[None]:
    """However busy the machine is that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "steady", lambda *_: True)
        patch.setattr(load_curve, "IN_FLIGHT", (1, 4, 32))
        patch.setattr(load_curve, "SHARE", 1000)
        yield


QUICK = CONFIG | {"rounds": 1, "speed_prompts": 2, "exactness_prompts": 0, "block_sizes": None}


@pytest.fixture(scope="module")
def opd(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts) -> Path:
    """A drafter a little different from the trained one."""
    made = tiny_drafter
    inputs = {"target": made.target, "trajectories": made.rollout, "drafter": made.drafter}
    ctx = RecordingContext.under(tmp_path_factory.mktemp("opd"), inputs)
    return ctx.run(SFT, steps=6, learning_rate=3e-3, compute_dtype="float32").out


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts) -> DrafterArtifacts:
    """The test bed's artifacts with a quarter of the held-out answers to replay."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("target", "prompts", "rollout", "drafter"):
        (folder / name).symlink_to(tiny_drafter.root / name)
    shutil.copytree(tiny_drafter.heldout, folder / "heldout")
    file = folder / "heldout" / "trajectories.parquet"
    rows = read_table(file, TRAJECTORIES).to_pylist()
    heldout = [row for row in rows if row["split"] == "heldout"]
    write_table(file, TRAJECTORIES, [row for row in rows if row not in heldout[15:]])
    return DrafterArtifacts(folder)


def inputs(made: DrafterArtifacts, **drafters: Path) -> dict[str, Path]:
    return {
        "target": made.target, "prompts": made.prompts, "trajectories": made.heldout, "sft": made.drafter, **drafters,
    }  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts, opd: Path) -> RecordingContext:
    given = inputs(tiny_drafter, opd=opd, control=tiny_drafter.drafter)
    return RecordingContext.under(tmp_path_factory.mktemp("evaluation"), given).run(STAGE, **CONFIG)


def metrics_of(ctx: RecordingContext) -> dict[str, Any]:
    content: dict[str, Any] = ctx.json("evaluation.json")
    return content


def test_tau_is_that_of_sequential_replay(
    evaluated: RecordingContext, tiny_drafter: DrafterArtifacts, bench: Bench
) -> None:
    stored = load_trajectories(tiny_drafter.heldout, ["heldout"]).trajectories
    traces = bench.sequential_traces(stored, "trained")
    found = metrics_of(evaluated)["drafters"]["sft"]
    assert found["tau"] == pytest.approx(tau(traces))
    assert found["verify_steps"] == sum(len(trace.anchors) for trace in traces)
    assert found["tau_low"] < found["tau"] < found["tau_high"]
    accepted = np.concatenate([trace.accepted for trace in traces])
    assert found["accepted_histogram"] == np.bincount(accepted, minlength=8).tolist()
    assert found["acceptance_by_offset"][0] == pytest.approx(
        sum(int((trace.accepted >= 1).sum()) for trace in traces) / found["verify_steps"]
    )


def test_acceptance_of_shards_is_that_of_one_process_and_measured_seconds_are_no_content(
    evaluated: RecordingContext, tmp_path: Path
) -> None:
    """Evaluations that differ only in shards and time give gate and report the same keys."""
    config = EvaluationConfig.model_validate(QUICK | {"exactness_prompts": CONFIG["exactness_prompts"]})
    parts = [RecordingContext.under(tmp_path / str(index), evaluated.inputs) for index in range(3)]
    for index, part in enumerate(parts):
        STAGE.shard(part, config, Shard(index, 3))
    joined = RecordingContext.under(tmp_path / "joined", evaluated.inputs, shards=[part.out for part in parts])
    STAGE.run(joined, config)
    assert not (joined.work / "replayed").exists()  # only by the shards
    assert metrics_of(joined)["speed"] != metrics_of(evaluated)["speed"]
    ids = [content_id(describe_files(ctx.out, STAGE.volatile)) for ctx in (evaluated, joined)]
    assert ids[0] == ids[1]
    content = joined.json("acceptance.json")
    assert content["drafters"] == metrics_of(evaluated)["drafters"]
    assert {each["kind"] for each in content["comparisons"]} <= {"tau"}
    replayed = [part.json("shard.json")["heldout"] for part in parts]
    assert all(replayed) and sum(replayed) == metrics_of(joined)["heldout_trajectories"]


def test_differences_are_those_of_the_same_answers(evaluated: RecordingContext) -> None:
    drafters = metrics_of(evaluated)["drafters"]
    to_sft = drafters["opd"]["differences"]["sft"]
    assert to_sft["value"] == pytest.approx(drafters["opd"]["tau"] - drafters["sft"]["tau"])
    assert drafters["control"]["differences"] == {"sft": {"value": 0, "low": 0, "high": 0}}  # the same drafter
    assert drafters["opd"]["differences"]["control"] == to_sft


def test_every_pair_has_its_verdicts_which_hold_together(evaluated: RecordingContext) -> None:
    found = metrics_of(evaluated)
    of_pairs = [("opd", "sft"), ("opd", "control"), ("control", "sft")]
    compared = [(v["kind"], v["arm"], v["other"]) for v in found["verdicts"]]
    assert sorted(compared) == sorted((kind, *pair) for kind in ("tau", "speed") for pair in of_pairs)
    for verdict in found["verdicts"]:
        assert verdict["level"] == pytest.approx(1 - 0.05 / 6)
        assert verdict["low"] <= verdict["value"] <= verdict["high"]
        place = "drafters" if verdict["kind"] == "tau" else "speed"
        single = found[place][verdict["arm"]]["differences" if place == "drafters" else "ratios"][verdict["other"]]
        assert single["value"] == pytest.approx(verdict["value"])
        assert verdict["low"] <= single["low"] and single["high"] <= verdict["high"]  # a single one needs less
        if verdict["kind"] == "tau":
            assert verdict["prompts"] == found["drafters"]["sft"]["prompts"]
        else:
            assert (verdict["turns"], verdict["prompts"]) == (5, 5)
    same = next(v for v in found["verdicts"] if (v["kind"], v["arm"]) == ("tau", "control"))
    assert same["different"] is False
    assert found["training_seeds"] == {"sft": None, "control": None, "opd": None}  # plain folders, no artifacts


def test_the_metrics_are_complete_and_outputs_identical_in_float32(evaluated: RecordingContext) -> None:
    found = metrics_of(evaluated)
    assert found["exactness"] == {
        "serving_dtype": "float32", "identical_share": 1.0, "compared_outputs": 5 * 15, "median_margin": None,
        "largest_margin": None, "fp32_prompts": 4, "fp32_identical": 4,
    }  # fmt: skip
    assert "(+1)" in found["definition_of_tau"]
    assert found["heldout_trajectories"] == 60
    assert (found["temperature"], found["concurrency"], found["head_tokens"]) == (0, 2, None)
    candidates = found["block_size_candidates"]
    assert candidates.keys() == {"sft", "opd", "control"} and found["validation_prompts"] == 2
    assert all(each.keys() == {"3", "8"} for each in candidates.values())  # 16 is more than was trained
    assert found["speed"].keys() == {"plain", "sft", "opd", "control"}
    for arm in ("sft", "opd", "control"):
        speed = found["speed"][arm]
        fastest = max(candidates[arm], key=candidates[arm].__getitem__)
        assert speed["block_size"] == int(fastest) and speed["turns"] == 5
        assert speed["speedup_low"] <= speed["speedup"] <= speed["speedup_high"]
        assert speed["tau_served"] > 1.5 and speed["identical_share"] == 1
        assert speed["draft_share"] > 0 and speed["verify_share"] > 0
        assert speed["draft_share"] + speed["verify_share"] < 1
        assert len(speed["accepted_histogram"]) == int(fastest)
        assert speed["request_tokens_per_s_median"] > 0
    (setting,) = found["speed_by_setting"]
    assert setting == {"temperature": 0, "concurrency": 2, "arms": found["speed"]}
    assert (found["engine"], found["parity"]) == ("embedded", None)
    assert 0 <= found["loop_share"] <= 1
    assert found["tau_without_loops"].keys() == {"sft", "opd", "control"}
    assert evaluated.summaries["tau_sft"] == found["drafters"]["sft"]["tau"]
    assert evaluated.summaries["speedup_opd"] == found["speed"]["opd"]["speedup"]
    assert evaluated.summaries["plain_tokens_per_s"] > 0


def test_steps_are_timed_and_speeds_predicted_by_the_requests_in_flight(evaluated: RecordingContext) -> None:
    found = EvaluationResult.read(evaluated.out)
    timed = {(each.arm, each.block_size) for each in found.step_times if each.concurrency == 1}
    assert timed == {("plain", 1), *((arm, n) for arm in ("plain", "sft", "opd", "control") for n in (2, 4, 8))}
    plain = [each for each in found.step_times if (each.arm, each.block_size) == ("plain", 8)]
    assert [each.concurrency for each in plain] == [1, 4, 32] and all(each.ms > 0 for each in plain)
    for arm in ("sft", "opd", "control"):
        curve = found.load_curve(arm)
        assert [each.concurrency for each in curve] == [1, 4, 32]
        assert all(each.error and each.tokens_per_s > 0 and each.block_size in (2, 4, 8) for each in curve)


def test_every_arm_has_a_row_for_every_prompt(evaluated: RecordingContext, tiny_drafter: DrafterArtifacts) -> None:
    rows = read_table(evaluated.out / "requests.parquet", REQUESTS).to_pylist()
    assert len(rows) == 5 * 4 * 5
    answers = {
        row["prompt_id"]: row["response_ids"]
        for row in read_table(tiny_drafter.heldout / "trajectories.parquet", TRAJECTORIES).to_pylist()
    }
    for row in rows:
        assert row["tokens"] == min(32, len(answers[row["prompt_id"]]))
        assert row["first_difference"] == -1 and np.isnan(row["margin"])
        assert row["identical"] is (None if row["arm"] == "plain" else True)
        assert (row["verify_steps"] > 0) == (row["arm"] != "plain")
        assert row["block_size"] == metrics_of(evaluated)["speed"][row["arm"]].get("block_size", 1)
        assert row["latency_seconds"] > 0 and row["concurrency"] == 2
        assert row["response_ids"] == answers[row["prompt_id"]][:32]
        assert (row["accepted"] is None) == (row["arm"] == "plain")


def test_arms_alternate_by_small_batches_and_runs_are_their_sums(evaluated: RecordingContext) -> None:
    turns = read_table(evaluated.out / "turns.parquet", TIMED_RUNS).to_pylist()
    requests = read_table(evaluated.out / "requests.parquet", REQUESTS).to_pylist()
    arms = ["plain", "sft", "control", "opd"]
    assert {(turn["round"], turn["arm"]) for turn in turns} >= {(r, arm) for r in range(5) for arm in arms}
    for turn in turns:
        own = [r for r in requests if (r["round"], r["arm"]) == (turn["round"], turn["arm"])]
        assert (turn["prompts"], turn["tokens"], turn["batches"]) == (5, sum(r["tokens"] for r in own), 2)
        assert turn["verify_steps"] == sum(r["verify_steps"] for r in own)
        # two in flight: longer than any request, shorter than one after the other
        latencies = [r["latency_seconds"] for r in own]
        assert max(latencies) <= turn["wall_seconds"] < sum(latencies)
        assert turn["others_share"] is None or 0 <= turn["others_share"] <= 1.01
    speed = metrics_of(evaluated)["speed"]["sft"]
    own = [turn for turn in turns if turn["arm"] == "sft"]
    assert speed["tokens_per_s"] == pytest.approx(sum(t["tokens"] for t in own) / sum(t["wall_seconds"] for t in own))


def test_every_prompt_is_decoded_by_all_arms_before_the_next_one(
    tmp_path: Path, few: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, seen, threads = EmbeddedSpeedTest.decode, [], set()

    def noted(
        self: EmbeddedSpeedTest, target: Any, decoder: Decoder, prompts: Any, setting: Any, *rest: Any, **more: Any
    ) -> Any:
        if not rest and "max_new" not in more and target is self.target:
            seen.append((decoder.drafter is None, [prompt.prompt_id for prompt in prompts]))
            threads.add(torch.get_num_threads())
        return decode(self, target, decoder, prompts, setting, *rest, **more)

    monkeypatch.setattr(EmbeddedSpeedTest, "decode", noted)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ctx = RecordingContext.under(tmp_path, inputs(few))
        ctx.run(STAGE, **QUICK | {"rounds": 2, "speed_prompts": 3, "concurrency": 1})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    prompts = [prompt for _, prompt in seen]
    assert len(seen) == 12 and all(len(prompt) == 1 for prompt in prompts)
    assert prompts[::2] == prompts[1::2], "both arms, then the next prompt"
    first = [plain for plain, _ in seen[::2]]
    assert first[3:] == [not plain for plain in first[:3]], "every second round reverses the order"
    assert threads == {1}
    found = metrics_of(ctx)
    assert found["speed"]["sft"]["turns"] == 2
    (over_plain,) = [each for each in found["comparisons"] if (each["kind"], each["other"]) == ("speed", "plain")]
    assert over_plain["units"] == 3, "prompts are the repetitions"


def test_repetitions_that_disagree_are_measured_again_now_and_by_the_next_run(
    tmp_path: Path, few: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second answer of a drafter takes three times as long, by a clock of the test."""
    decode, calls = EmbeddedSpeedTest.decode, itertools.count()

    def disturbed(self: EmbeddedSpeedTest, target: Any, decoder: Decoder, *rest: Any, **more: Any) -> Any:
        answers, wall = decode(self, target, decoder, *rest, **more)
        if decoder.drafter is not None:
            for answer in answers:
                answer.seconds = wall = wall * (1 + 9 * (next(calls) % 2))
        return answers, wall

    monkeypatch.setattr(EmbeddedSpeedTest, "decode", disturbed)
    monkeypatch.setattr(embedded, "steady", steady)
    ctx = RecordingContext.under(tmp_path, inputs(few))
    ctx.run(STAGE, **QUICK | {"rounds": 2, "speed_prompts": 3, "concurrency": 1})
    found = metrics_of(ctx)
    assert found["speed"]["sft"]["turns"] == 4
    assert ("noise", ["sft"]) in [(doubt["kind"], doubt["arms"]) for doubt in found["speed_warnings"]]
    assert ctx.summaries["inconclusive"] == 1.0


def test_the_contexts_of_every_arm_are_substrings_of_its_answers(
    evaluated: RecordingContext, tiny_drafter: DrafterArtifacts, bench: Bench
) -> None:
    contexts = evaluated.json("contexts.json")
    assert contexts.keys() == {"sft", "control", "opd"}
    stored = load_trajectories(tiny_drafter.heldout, ["heldout"]).trajectories
    texts = {t.trajectory_id: bench.target.tokenizer.decode(t.tokens) for t in stored}
    for found in contexts.values():
        overall = [each for each in found if "slice" not in each]
        worst = [each for each in overall if each["kind"] == "worst"]
        assert 0 < len(worst) <= 10 and len(overall) - len(worst) <= 2
        assert [each["tau"] for each in worst] == sorted(each["tau"] for each in worst)
        for each in found:
            committed = "".join(step["accepted"] + step["chosen"] for step in each["steps"])
            assert each["before"] + committed + each["after"] in texts[each["trajectory_id"]]
    assert min(each["tau"] for each in contexts["sft"]) < metrics_of(evaluated)["drafters"]["sft"]["tau"]


def test_an_interrupted_evaluation_goes_on_with_the_next_round(tmp_path: Path, few: DrafterArtifacts) -> None:
    """Chosen block sizes and finished rounds stay; an unfinished round is measured again as a whole."""
    config = QUICK | {"rounds": 3, "block_sizes": CONFIG["block_sizes"]}
    first = StoppingContext.under(tmp_path, inputs(few), stop_after=9, unit="answers")
    with pytest.raises(StageInterrupted):
        first.run(STAGE, **config)
    kept = [read_table(path, TIMED_RUNS) for path in sorted(first.work.glob("rounds/*/turns.parquet"))]
    assert len(kept) == 2
    sizes = first.work / "block_sizes.json"
    chosen = json.loads(sizes.read_text())
    chosen["sft"]["3"] = 2 * max(chosen["sft"].values())  # what is there is not measured again
    sizes.write_text(json.dumps(chosen))

    ctx = RecordingContext.under(tmp_path, inputs(few)).run(STAGE, **config)
    turns = read_table(ctx.out / "turns.parquet", TIMED_RUNS)
    assert turns.slice(0, 4).to_pylist() == [row for table in kept for row in table.to_pylist()]
    assert [row["block_size"] for row in turns.slice(4).to_pylist() if row["arm"] == "sft"] == [3]
    assert metrics_of(ctx)["block_size_candidates"] == chosen
    speed = [v for v in metrics_of(ctx)["verdicts"] if v["kind"] == "speed"]
    assert speed == []  # a single drafter is compared with nothing


def test_replays_and_float32_answers_are_not_computed_twice(
    tmp_path: Path, few: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed stored answer shows that it is read and not computed again."""
    load, asked = Target.load, []

    def loaded(folder: Path, *, dtype: str | None = None, **named: Any) -> Target:
        asked.append(dtype)
        return load(folder, dtype=dtype, **named)

    monkeypatch.setattr(Target, "load", loaded)
    config = QUICK | {"speed_prompts": 1, "exactness_prompts": 4}
    first = RecordingContext.under(tmp_path, inputs(few)).run(STAGE, **config)
    assert metrics_of(first)["exactness"]["fp32_identical"] == 4
    assert asked == [None, "float32"], "whatever dtype is served"
    kept = json.loads((first.work / "exactness.json").read_text())
    assert [len(answers) for answers in kept.values()] == [4, 4]
    kept["1"][2] = [0]
    (first.work / "exactness.json").write_text(json.dumps(kept))
    (replayed,) = first.work.glob("replayed/heldout/traces/*.parquet")
    touched = replayed.stat().st_mtime_ns

    again = RecordingContext.under(tmp_path, inputs(few)).run(STAGE, **config)
    assert metrics_of(again)["exactness"]["fp32_identical"] == 3
    assert [path.stat().st_mtime_ns for path in first.work.glob("replayed/heldout/traces/*.parquet")] == [touched]
    same = ("drafters", "sets", "validation_tau")
    assert {name: metrics_of(again)[name] for name in same} == {name: metrics_of(first)[name] for name in same}


def test_every_drafter_decodes_with_its_own_block(
    tmp_path: Path, few: DrafterArtifacts, opd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock says that blocks of 3 are fast for one drafter and blocks of 8 for the other."""
    decode = EmbeddedSpeedTest.decode

    def timed(self: EmbeddedSpeedTest, target: Any, decoder: Decoder, *rest: Any, **more: Any) -> Any:
        answers, wall = decode(self, target, decoder, *rest, **more)
        drafter = decoder.drafter
        is_sft = drafter is not None and drafter is seen.setdefault("sft", drafter)
        return answers, (0.1 if (decoder.block_size == 3) == is_sft else 1.0) if drafter else wall

    seen: dict[str, Any] = {}  # the first drafter that decodes is SFT's
    monkeypatch.setattr(EmbeddedSpeedTest, "decode", timed)
    ctx = RecordingContext.under(tmp_path, inputs(few, opd=opd))
    ctx.run(STAGE, **QUICK | {"block_sizes": CONFIG["block_sizes"]})
    speed = metrics_of(ctx)["speed"]
    assert (speed["sft"]["block_size"], speed["opd"]["block_size"]) == (3, 8)
    assert "decoding with blocks of 3 (sft), 8 (opd)" in ctx.logs
    assert [v["different"] for v in metrics_of(ctx)["verdicts"] if v["kind"] == "speed"] == [None]  # of one turn


def test_one_drafter_and_a_reduced_head(tmp_path: Path, few: DrafterArtifacts, bench: Bench) -> None:
    found = metrics_of(RecordingContext.under(tmp_path, inputs(few)).run(STAGE, **QUICK, head_tokens=150))
    assert found["drafters"].keys() == {"sft"}
    stored = load_trajectories(few.heldout, ["heldout"]).trajectories
    traces = bench.sequential_traces(stored, "trained", head_tokens=150)
    assert found["drafters"]["sft"]["tau"] == pytest.approx(tau(traces))
    assert found["block_size_candidates"] == {}
    assert found["speed"]["sft"]["block_size"] == 8
    assert found["exactness"]["fp32_prompts"] == 0 and found["exactness"]["identical_share"] == 1


def test_every_setting_is_reported_and_answers_depend_on_neither_load_nor_drafter(
    tmp_path: Path, few: DrafterArtifacts
) -> None:
    """Outputs do not depend on how many are in flight, nor sampled ones on the drafter."""
    settings: dict[str, Any] = {"concurrency": [1, 3], "temperatures": [0, 1.0], "sampling": {"max_new_tokens": 16}}
    settings |= {"rounds": 2, "speed_prompts": 3}
    ctx = RecordingContext.under(tmp_path, inputs(few)).run(STAGE, **QUICK | settings)
    found = metrics_of(ctx)
    places = [(s["temperature"], s["concurrency"]) for s in found["speed_by_setting"]]
    assert places == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert found["speed"] == found["speed_by_setting"][0]["arms"]
    assert (found["temperature"], found["concurrency"]) == (0, 1)
    speedups = {
        (e["temperature"], e["concurrency"]): np.exp(e["value"]) for e in found["comparisons"] if "set" not in e
    }
    of_settings = [s["arms"]["sft"]["speedup"] for s in found["speed_by_setting"]]
    assert [speedups[place] for place in places] == pytest.approx(of_settings), "what the gate reads"
    assert found["exactness"]["identical_share"] == 1 and found["exactness"]["compared_outputs"] == 2 * 4 * 3
    assert ctx.summaries["speedup_sft"] == found["speed"]["sft"]["speedup"]
    assert ctx.summaries["speedup_sft.t1.c3"] == found["speed_by_setting"][3]["arms"]["sft"]["speedup"]
    rows = read_table(ctx.out / "requests.parquet", REQUESTS).to_pylist()
    answers: dict[tuple[float, int, str], set[tuple[int, ...]]] = {}
    for row in rows:
        answers.setdefault((row["temperature"], row["round"], row["prompt_id"]), set()).add(tuple(row["response_ids"]))
    assert len(rows) == 2 * 4 * 2 * 3 and len(answers) == 12
    assert all(len(same) == 1 for same in answers.values())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"engine": {"kind": "sglang", "urls": ["http://a"]}},
            "engine.urls: running servers cannot serve newly",
        ),
        ({"engine": {"kind": "sglang", "launch": {}, "python": "p"}, "head_tokens": 9}, "only the embedded engine"),
        ({"concurrency": []}, "concurrency"),
        ({"concurrency": 0}, "concurrency"),
        ({"temperatures": [-1]}, "temperatures"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EvaluationConfig.model_validate(config)


def test_missing_answers_drafters_and_too_long_answers_are_errors(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    given = inputs(tiny_drafter)
    longest = {"sampling": {"max_new_tokens": 1020}}  # fits by itself, but not after a prompt
    for changed, config, message in (
        (given | {"trajectories": tiny_drafter.rollout}, {}, "no answer of split heldout, only of train"),
        (given, longest, "the longest prompt and 1020 new tokens need"),
        ({name: path for name, path in given.items() if name != "sft"}, {}, "drafter"),
    ):
        with pytest.raises(DraftsmithError, match=message):
            RecordingContext.under(tmp_path, changed).run(STAGE, **CONFIG | config)
    with pytest.raises(DraftsmithError, match=r"sampling\.max_new_tokens: 5000 does not fit"):
        preflight(EvaluationConfig.model_validate({"sampling": {"max_new_tokens": 5000}}), tiny_drafter.target)
