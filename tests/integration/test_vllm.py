"""The engine on real vLLM servers on the CPU: its anchors are replay's, and a wrong drafter is named."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError, RefusedError
from draftsmith.artifacts.results.evaluation import DiagnosisResult
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TIMINGS, TRACE, TRAJECTORIES, TableSchema
from draftsmith.flows.cli.main import main
from draftsmith.flows.refresh.swap import served_by
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter
from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Completion
from draftsmith.stages.engines.config import VLLMEngineConfig
from draftsmith.stages.engines.registry import open_servers
from draftsmith.stages.engines.servers.api import BadAnswerError
from draftsmith.stages.engines.servers.http import ServerAnswer, key_header
from draftsmith.stages.engines.servers.identity import QUANTISED_TOLERANCE
from draftsmith.stages.engines.servers.process import free_ports
from draftsmith.stages.engines.servers.requirements import server_requirements, speculative_algorithm
from draftsmith.stages.engines.servers.state import NewDrafter
from draftsmith.stages.engines.stage import STAGE as ROLLOUT
from draftsmith.stages.engines.vllm.records import completion_payload, read_completion
from draftsmith.stages.engines.vllm.server import drafting_options
from draftsmith.stages.evaluation.diagnosis.stage import STAGE as DIAGNOSIS
from draftsmith.stages.evaluation.stage import STAGE as EVALUATION
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.proof import Proof, chances, log_probabilities, misfit, step_evidence
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.stage import STAGE as MINING
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.describe import describe
from draftsmith.stages.targets.info import model_path, write_target_info
from draftsmith.stages.targets.sampling import SamplingParams
from tests.faults.servers import mlflow_server
from tests.integration.swapping import dflash2, dspark, keep_from_servers, line_of_two, write_other_weights
from tests.stages.bench import GREEDY_TOKENS, Bench, step_rows, tau
from tests.stages.engines.swaps import Prover, swapped
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts
from tests.vllm_cpu.server import KEY, KEY_VARIABLE, LONGEST, MARKS, OPTIONS, PYTHON, launched, running_server

pytestmark = MARKS

PROMPTS, SAMPLED, SWAPPED = 12, 24, 3


@pytest.fixture(scope="module")
def python() -> Path:
    assert isinstance(PYTHON, Path)
    return PYTHON


def dflash(bench: Bench) -> Drafter:
    return bench.drafters["trained"]


def windowed(bench: Bench) -> Drafter:
    """Its layer reads 20 positions back, and the block in both directions."""
    made: Any = dflash2(bench)
    layers = ["sliding_attention"] * made.config.num_hidden_layers
    window = {"layer_types": layers, "sliding_window": 20, "use_sliding_window": True, "is_causal": False}
    made.config.update(window)
    return cast("Drafter", made)


@dataclass(frozen=True)
class Served:
    """A server, and what it drafts with."""

    kind: str
    url: str
    folder: Path  # of the drafter
    bench: Bench  # its drafter "it", and "trained"; prompts without a near-tie
    made: DrafterArtifacts
    mlflow: str  # URL at which it looks for MLflow's server

    def answers(
        self, count: int, work: Path, sampling: SamplingParams, new: int, *, stream: bool = False
    ) -> list[Completion]:
        """Return the answers to the first prompts, four in flight."""
        config = VLLMEngineConfig(kind="vllm", urls=(self.url,), api_key_env=KEY_VARIABLE, concurrency=4)
        required = server_requirements(
            config, self.made.target, self.folder, DraftingConfig(), LONGEST, measure_first_token=stream
        )
        requests = self.bench.requests(count, new, sampling)
        with open_servers(config, required, work, print) as engine:
            assert engine.records_trace
            done = {each.request.request_id: each for each in engine.generate(requests)}
        return [done[request.request_id] for request in requests]


MAKERS: dict[str, Callable[[Bench], Drafter]] = {
    "dflash": dflash, "dflash2": dflash2, "windowed": windowed, "dspark": dspark,
}  # fmt: skip


@pytest.fixture(scope="module", params=[*MAKERS, "eagle3"])
def served(
    request: pytest.FixtureRequest,
    python: Path,
    bench: Bench,
    tiny_drafter: DrafterArtifacts,
    tiny_eagle3: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    checkpoint = tiny_eagle3 / DRAFTER_FOLDER
    if kind in MAKERS:
        checkpoint = folder / "own"
        save_drafter(MAKERS[kind](bench), checkpoint, torch.float32)
    drafters = {"it": load_drafter(checkpoint, bench.target), "trained": bench.drafters["trained"]}
    mlflow = f"http://127.0.0.1:{free_ports(1)[0]}"
    with running_server(python, tiny_drafter.target, checkpoint, folder, mlflow=mlflow) as url:
        yield Served(kind, url, checkpoint, bench.with_drafters(drafters), tiny_drafter, mlflow)


def assert_steps_of(traces: list[Steps], answers: list[Completion]) -> None:
    for answer, trace in zip(answers, traces, strict=True):
        assert [row[:2] for row in step_rows(answer.steps)] == [row[:2] for row in step_rows(trace)]


def test_greedy_answers_are_the_targets_and_their_anchors_those_of_replay(served: Served, tmp_path: Path) -> None:
    bench = served.bench
    answers = served.answers(PROMPTS, tmp_path, SamplingParams(0.0), GREEDY_TOKENS)
    plain = bench.answered(PROMPTS)
    assert [answer.trajectory() for answer in answers] == plain
    traces = Replayer(bench.target).traces(bench.drafters, plain)
    assert_steps_of(traces["it"], answers)
    assert tau(traces["it"]) > 1.3
    others = [len(trace.anchors) for trace in traces["trained"]]
    assert served.kind == "dflash" or [len(step_rows(answer.steps)) for answer in answers] != others, (
        "what it has more shows"
    )


def test_a_streamed_answer_is_the_same(served: Served, tmp_path: Path) -> None:
    if served.kind != "dflash":
        pytest.skip("one kind is enough")
    whole = served.answers(4, tmp_path, SamplingParams(0.0), GREEDY_TOKENS)
    streamed = served.answers(4, tmp_path, SamplingParams(0.0), GREEDY_TOKENS, stream=True)
    for one, other in zip(whole, streamed, strict=True):
        assert (one.response_ids, one.finish_reason) == (other.response_ids, other.finish_reason)
        assert step_rows(one.steps) == step_rows(other.steps)
        assert 0 < other.first_token_seconds < other.seconds


def test_blocks_by_load_are_read(tiny_drafter: DrafterArtifacts, python: Path) -> None:
    options = drafting_options(tiny_drafter.drafter / DRAFTER_FOLDER, "DFLASH", 8, [[1, 3, 7], [4, 7, 3], [8, 16, 0]])
    program = """
import json, sys
from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup
config = json.loads(sys.argv[1])
print(*build_dynamic_sd_schedule_lookup(
    config["num_speculative_tokens_per_batch_size"], 20, config["num_speculative_tokens"]
)[1:])
"""
    config = options[options.index("--speculative-config") + 1]
    read = subprocess.run([python, "-c", program, config], check=True, capture_output=True, text=True)
    assert read.stdout.split() == ["7"] * 3 + ["3"] * 4 + ["0"] * 13


def deviation(bench: Bench, answers: list[Trajectory], temperature: float) -> float:
    """Return by how many standard deviations their log-probability differs from its expectation at a temperature."""
    surplus, variance = 0.0, 0.0
    for answer in answers:
        ids = torch.tensor([answer.tokens])
        with torch.no_grad():
            logits = bench.target.logits(bench.target.read(ids).hidden[0, answer.prompt_length - 1 : -1])
        log_p = (logits.double() / temperature).log_softmax(-1)
        p, tokens = log_p.exp(), ids[0, answer.prompt_length :, None]
        expected = (p * log_p).sum(-1)
        surplus += float(log_p.gather(-1, tokens).sum() - expected.sum())
        variance += float(((p * log_p**2).sum(-1) - expected**2).sum())
    return surplus / variance**0.5


CERTAIN = float(np.log(1e4))  # Wald: at the other temperature the likelihoods' ratio is so high in 1 of 10,000 runs
OTHER = {"dflash2": 4.0, "windowed": 4.0, "dspark": 2.0}  # temperatures


def evidence_against(temperature: float, bench: Bench, answers: list[Completion]) -> np.ndarray:
    """Return the evidence [3] of the accepted numbers, as `step_evidence`: for temperature 1 against another one."""
    steps = [(answer.trajectory(), answer.steps) for answer in answers if answer.steps is not None]
    drafter = Replayer(bench.target).prepare(bench.drafters["it"])
    other, one = (
        log_probabilities(chances(bench.target, drafter, steps, SamplingParams(each)), steps)
        for each in (temperature, 1.0)
    )
    return step_evidence(other, one, np.concatenate([trace.accepted for _, trace in steps])).sum(0)


def test_sampled_answers_are_the_targets_and_their_steps_follow_replay(served: Served, tmp_path: Path) -> None:
    """Another temperature would show, in the answers and in the accepted numbers of proposals that are sampled."""
    answers, bench = served.answers(SAMPLED, tmp_path, SamplingParams(1.0), 48), served.bench
    texts = [answer.trajectory() for answer in answers]
    assert abs(deviation(bench, texts, 1.0)) < 4 < abs(deviation(bench, texts, 1.5))

    if bench.drafters["it"].samples_proposals:
        evidence = evidence_against(OTHER[served.kind], bench, answers)
        assert misfit(evidence) < 4 and evidence[0] > CERTAIN
    else:  # every proposal is the argmax, so the answer decides the steps
        clear = {text.trajectory_id for text in bench.clear(texts, bench.drafters["it"])}
        compared = [i for i, text in enumerate(texts) if text.trajectory_id in clear]
        assert len(compared) > SAMPLED / 2
        options = ReplayOptions(sampling=SamplingParams(1.0))
        traces = Replayer(bench.target, options).traces({"it": bench.drafters["it"]}, texts)["it"]
        assert_steps_of([traces[i] for i in compared], [answers[i] for i in compared])


def test_several_answers_and_a_streamed_chunk_are_no_answer(served: Served) -> None:
    if served.kind != "dflash":
        pytest.skip("one kind is enough")
    request = served.bench.requests(1, 8)[0]
    payload = completion_payload(request, ())
    url, headers = f"{served.url}/v1/completions", key_header(KEY)
    several = httpx.post(url, json=payload | {"n": 2, "temperature": 1.0}, headers=headers, timeout=300)
    with pytest.raises(BadAnswerError, match="n > 1"):
        read_completion(request, ServerAnswer(several.json()), served.bench.target.info)
    with httpx.stream("POST", url, json=payload | {"stream": True}, headers=headers, timeout=300) as stream:
        chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    for chunk in chunks:
        with pytest.raises(BadAnswerError, match=r"streamed|no token ids"):
            read_completion(request, ServerAnswer(chunk), served.bench.target.info)


def swap(url: str, folder: Path, algorithm: str, block_size: int, *, proven: bool = True) -> None:
    """Write a checkpoint into the server; its steps are compared by the test. proven: the outcome of the proof."""
    new = NewDrafter(drafter_digest(folder), folder, algorithm, block_size)
    for done in swapped([url], new, Prover(Proof(proven, "compared here."))):
        print(f"{algorithm}: a pause of {done.pause_s:.3f} s")


def test_its_drafter_is_swapped_forth_and_back(served: Served, tmp_path: Path) -> None:
    """To weights so different that one fused copy of the old ones would show."""
    first = served.bench.drafters["it"]
    other = write_other_weights(first, tmp_path / "other", noise=0.3)
    drafters = {"other": load_drafter(other, served.bench.target), "it": first}
    now = replace(served, bench=served.bench.with_drafters(drafters))
    texts = now.bench.answered(SWAPPED)
    traces = Replayer(now.bench.target).traces(drafters, texts)
    assert [t.accepted.tolist() for t in traces["other"]] != [t.accepted.tolist() for t in traces["it"]]

    def write(folder: Path, *, proven: bool = True) -> None:
        swap(served.url, folder, speculative_algorithm(folder), first.block_size, proven=proven)

    with pytest.raises(RefusedError):
        write(other, proven=False)
    for name, folder in (("it", None), ("other", other), ("it", served.folder)):  # the first was written back
        if folder is not None:
            write(folder)
        answers = now.answers(SWAPPED, tmp_path, SamplingParams(0.0), GREEDY_TOKENS)
        assert [answer.trajectory() for answer in answers] == texts
        assert_steps_of(traces[name], answers)


def test_a_malformed_request_is_refused_and_changes_nothing(served: Served, tmp_path: Path) -> None:
    if served.kind != "dflash":
        pytest.skip("one kind is enough")
    drafter = drafter_digest(served.folder)
    wrong: list[dict[str, Any]] = [
        {},
        {"drafter": None, "folder": "/", "upload": "", "served": ""},
        {"drafter": "../..", "folder": "/", "upload": "", "served": ""},
        {"drafter": drafter, "folder": 3, "upload": "", "served": ""},
        {"drafter": drafter, "folder": "", "upload": "", "served": ""},
        {"drafter": drafter, "folder": "/", "upload": "http://127.0.0.1:9/drafter", "served": ""},
    ]
    # the server closes a connection on which it has answered with an error: none is kept
    kept = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=served.url, headers=key_header(KEY), timeout=300, limits=kept) as client:
        before = client.get("/weight_info").json()
        for fields in wrong:
            client.post("/start_draft_weight_update")
            assert client.post("/update_weights", json={"update_info": fields}).status_code >= 400, fields
            client.post("/finish_weight_update", json={})  # an error too, as nothing was updated
        assert client.get("/weight_info").json() == before
    answers = served.answers(SWAPPED, tmp_path, SamplingParams(0.0), GREEDY_TOKENS)
    texts = served.bench.answered(SWAPPED)
    assert [answer.trajectory() for answer in answers] == texts
    drafters = {"it": served.bench.drafters["it"]}
    assert_steps_of(Replayer(served.bench.target).traces(drafters, texts)["it"], answers)


def test_a_line_is_swapped_proven_watched_and_rolled_back(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server fetches the drafters from MLflow's."""
    if served.kind != "dflash":
        pytest.skip("one kind is enough")
    url = ["--url", served.url]
    with (
        mlflow_server(tmp_path, served.mlflow) as mlflow,
        line_of_two("tiny", tmp_path, served.made, served.bench, mlflow.url) as folders,
    ):
        swap(served.url, folders["1"], "DFLASH", 8)
        keep_from_servers("vllm", monkeypatch)
        assert main(["status", "tiny", *url]) == 0
        assert "version 1 (champion)" in capsys.readouterr().out
        assert main(["promote", "tiny@2"]) == 0
        assert main(["watch", "tiny", *url]) == 3, "it has the drafter before"
        assert main(["swap", "tiny", *url]) == 0
        assert "verify steps" in served_by(registry().version("tiny", 2))[0].proof
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(served.answers, PROMPTS, tmp_path / "load", SamplingParams(0.0), GREEDY_TOKENS)
            assert main(["watch", "tiny", *url, "--minutes", "0.5"]) == 3, "tau of 20 was promised"
            load.result()
        assert "measurably more than" in capsys.readouterr().err
        assert main(["rollback", "tiny", *url]) == 0
        assert served_by(registry().version("tiny", 1)) and not served_by(registry().version("tiny", 2))
        shutil.rmtree(folders["2"])
        with pytest.raises(DraftsmithError, match="refuses the drafter"):
            swap(served.url, folders["2"], "DFLASH", 8)


def roll_out(folder: Path, made: DrafterArtifacts, engine: dict[str, Any]) -> RecordingContext:
    inputs = {"target": made.target, "prompts": made.prompts, "drafter": made.drafter}
    fields = {"splits": ["heldout"], "prompts": 16, "sampling": {"max_new_tokens": 96}, "engine": engine}
    return RecordingContext.under(folder, inputs).run(ROLLOUT, **fields)


def mine(folder: Path, made: DrafterArtifacts, trajectories: Path) -> dict[str, Any]:
    inputs = {"target": made.target, "drafter": made.drafter, "trajectories": trajectories}
    parity: dict[str, Any] = RecordingContext.under(folder, inputs).run(MINING).json("summary.json")["parity"]
    return parity


def rows(ctx: RecordingContext, name: str, schema: TableSchema, *columns: str) -> list[list[Any]]:
    return [[row[column] for column in columns] for row in read_table(ctx.out / f"{name}.parquet", schema).to_pylist()]


def diagnosed(folder: Path, made: DrafterArtifacts, url: str) -> DiagnosisResult:
    ctx = RecordingContext.under(folder, {"target": made.target, "prompts": made.prompts})
    config = {"prompts": 8, "sampling": {"max_new_tokens": 48}, "max_parity_mismatch": 0.02}
    server = {"url": url, "api_key_env": KEY_VARIABLE, "drafter": str(made.drafter / DRAFTER_FOLDER)}
    return DiagnosisResult.read(ctx.run(DIAGNOSIS, **server, **config).out)


def test_a_launched_rollout_is_that_of_the_embedded_engine_and_passes_parity(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, python: Path
) -> None:
    ours = roll_out(tmp_path / "embedded", tiny_drafter, {"kind": "embedded"})
    theirs = roll_out(tmp_path / "vllm", tiny_drafter, launched(python))
    for name, schema, columns in (
        ("trajectories", TRAJECTORIES, ("trajectory_id", "response_ids", "finish_reason")),
        ("timings", TIMINGS, ("trajectory_id", "verify_steps")),
        ("trace", TRACE, ("trajectory_id", "step", "anchor", "accepted")),
    ):
        assert rows(theirs, name, schema, *columns) == rows(ours, name, schema, *columns)
    assert json.loads((theirs.out / "versions.json").read_text()).keys() == {"vllm"}
    assert not (theirs.work / "servers" / "drafter").exists(), "the exported drafter is removed"
    parity = mine(tmp_path / "mined", tiny_drafter, theirs.out)
    assert parity["served_steps"] > 100 and (parity["different_steps"], parity["tau_difference"]) == (0, 0)


def test_a_quantised_target_with_a_quantised_cache_is_measured(
    tiny_drafter: DrafterArtifacts, python: Path, tmp_path: Path
) -> None:
    """Each moves the log-probs of this target by 0.15 nats in the mean."""
    model = model_path(tiny_drafter.target)
    bfloat16 = TargetConfig(source=str(model), dtype="bfloat16")
    write_target_info(describe(model, bfloat16, kind="folder", location=str(model), revision=None), tmp_path)
    fields = launched(python)
    fields["launch"] |= {"options": {**OPTIONS, "quantization": "fp8_per_channel", "kv-cache-dtype": "fp8"}}
    config = VLLMEngineConfig.model_validate(fields)
    required = server_requirements(config, tmp_path, None, DraftingConfig(), LONGEST)
    with open_servers(config, required, tmp_path, print) as engine:
        found = engine.target_difference
    assert found is not None and found.settings == ["quantization fp8_per_channel", "kv_cache_dtype fp8"]
    assert found.mean is not None and 0.1 < found.mean < QUANTISED_TOLERANCE


def one_layer_higher(drafter: Path) -> None:
    """Export it with the 1 that the layout adds to a layer id added twice."""
    config = json.loads((drafter / "config.json").read_text())
    config["aux_hidden_state_layer_ids"] = [layer + 1 for layer in config["aux_hidden_state_layer_ids"]]
    (drafter / "config.json").write_text(json.dumps(config))


def test_a_drafter_exported_with_layer_ids_off_by_one_is_named_and_refused(
    tmp_path: Path, python: Path, tiny_drafter: DrafterArtifacts
) -> None:
    made, drafter = tiny_drafter, tiny_drafter.drafter / DRAFTER_FOLDER
    (tmp_path / "wrong").mkdir()
    with running_server(python, made.target, drafter, tmp_path / "wrong", one_layer_higher) as url:
        wrong = diagnosed(tmp_path / "diagnosed", made, url)
        answers = roll_out(tmp_path / "rollout", made, {"kind": "vllm", "urls": [url], "api_key_env": KEY_VARIABLE})
    assert not wrong.agrees and [(each.cause, each.mismatch) for each in wrong.causes] == [("other layer ids", 0.0)]
    assert "each one layer higher" in wrong.sentence
    with pytest.raises(DraftsmithError, match=r"mining: .* verify steps served by the engine differ from replay"):
        mine(tmp_path / "mined", made, answers.out)


def test_the_diagnosis_of_a_right_server(served: Served, tmp_path: Path) -> None:
    if served.kind != "dflash":
        pytest.skip("only the server of the trained drafter")
    right = diagnosed(tmp_path, served.made, served.url)
    assert right.agrees and right.as_it_is is not None and right.as_it_is.mismatch == 0


def test_an_evaluation_times_servers_and_checks_their_steps(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, python: Path
) -> None:
    ctx = RecordingContext.under(tmp_path, tiny_drafter.to_evaluate()).run(
        EVALUATION, engine=launched(python), sampling={"max_new_tokens": 32}, concurrency=[1, 2], speed_prompts=4,
        parity_prompts=5, rounds=1,
    )  # fmt: skip
    timed = read_table(ctx.out / "requests.parquet", REQUESTS).to_pylist()
    assert len(timed) == 2 * 2 * 4  # arms, concurrencies, prompts
    for row in timed:
        assert (row["verify_steps"] > 0) == (row["arm"] == "sft")
        assert 0 < row["first_token_seconds"] <= row["latency_seconds"]
        assert row["engine"].startswith("vllm ")
    evaluation = ctx.json("evaluation.json")
    assert evaluation["exactness"]["identical_share"] == 1.0
    parity = evaluation["parity"]["sft"]
    assert parity["served_steps"] > 10 and (parity["different_steps"], parity["tau_difference"]) == (0, 0)
