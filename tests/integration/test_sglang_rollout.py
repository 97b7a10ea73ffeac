"""The stage `rollout` on real SGLang servers: the same answers and verify steps as the embedded engine, float32.

Mining replays what was served, and a diagnosis finds which drafter it was. The CPU stand-in stays away from GPUs.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Awaitable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.evaluation import DiagnosisResult
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import TIMINGS, TRACE, TRAJECTORIES, TableSchema
from draftsmith.stages.data.stored_prompts import load_prompts
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.registry import open_servers
from draftsmith.stages.engines.servers.identity import ServedTarget, check_weights
from draftsmith.stages.engines.servers.requirements import server_requirements
from draftsmith.stages.engines.sglang.handshake import served_logprobs, verifies_greedily
from draftsmith.stages.engines.stage import STAGE
from draftsmith.stages.evaluation.diagnosis.stage import STAGE as DIAGNOSIS
from draftsmith.stages.replay.stage import STAGE as MINING
from draftsmith.stages.targets.info import read_target_info
from tests.sglang_cpu.fixtures import ServingTarget
from tests.stages.bench import step_rows
from tests.stages.drafters.edits import with_another_mask
from tests.stages.engines.stand_ins import with_client, write_other_revision
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

LOGPROB_TOLERANCE = 1e-4  # nats, float32


def roll_out(folder: Path, made: DrafterArtifacts, engine: dict[str, Any], *, drafter: bool) -> RecordingContext:
    inputs = {"target": made.target, "prompts": made.prompts, **({"drafter": made.drafter} if drafter else {})}
    fields = {"splits": ["heldout"], "prompts": 30, "sampling": {"max_new_tokens": 128}, "engine": engine}
    return RecordingContext.under(folder, inputs).run(STAGE, **fields)


def rows(ctx: RecordingContext, name: str, schema: TableSchema, *without: str) -> list[dict[str, Any]]:
    rows = read_table(ctx.out / f"{name}.parquet", schema).to_pylist()
    return [{column: value for column, value in row.items() if column not in without} for row in rows]


def served(url: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "sglang", "urls": [url], "concurrency": 4, **fields}


def test_plain_answers_are_the_embedded_engines(tmp_path: Path, tiny_drafter: DrafterArtifacts, plain_url: str) -> None:
    ours = roll_out(tmp_path / "embedded", tiny_drafter, {"kind": "embedded"}, drafter=False)
    theirs = roll_out(tmp_path / "sglang", tiny_drafter, served(plain_url), drafter=False)
    answers = rows(theirs, "trajectories", TRAJECTORIES, "engine")
    assert answers == rows(ours, "trajectories", TRAJECTORIES, "engine")
    assert len(answers) == 30
    assert {row["engine"].split()[0] for row in rows(theirs, "trajectories", TRAJECTORIES)} == {"sglang"}
    assert {row["verify_steps"] for row in rows(theirs, "timings", TIMINGS)} == {0}
    assert not (theirs.out / "trace.parquet").exists()


def test_assisted_answers_and_verify_steps_are_the_embedded_engines(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, dflash_url: str
) -> None:
    ours = roll_out(tmp_path / "embedded", tiny_drafter, {"kind": "embedded"}, drafter=True)
    theirs = roll_out(tmp_path / "sglang", tiny_drafter, served(dflash_url), drafter=True)
    assert rows(theirs, "trajectories", TRAJECTORIES, "engine") == rows(ours, "trajectories", TRAJECTORIES, "engine")
    counted = [[row["verify_steps"] for row in rows(ctx, "timings", TIMINGS)] for ctx in (ours, theirs)]
    assert counted[0] == counted[1]
    recorded = rows(theirs, "trace", TRACE)
    assert rows(theirs, "trace", TRACE, "target_logprobs") == rows(ours, "trace", TRACE, "target_logprobs")
    assert len(recorded) == sum(counted[1]) > 200
    assert all(len(row["target_logprobs"]) == 7 and max(row["target_logprobs"]) <= 0 for row in recorded)
    assert theirs.summaries["tau"] == ours.summaries["tau"] > 3
    traced = theirs.json("trace.json")
    assert (traced["engine"].split()[0], traced["temperature"]) == ("sglang", 0)

    mining = RecordingContext.under(tmp_path / "mining", {**theirs.inputs, "trajectories": theirs.out}).run(MINING)
    parity = mining.json("summary.json")["parity"]
    assert (parity["served_steps"], parity["different_steps"], parity["tau_difference"]) == (len(recorded), 0, 0)
    assert parity["largest_logprob_difference"] < 1e-3


def open_with(
    url: str,
    made: DrafterArtifacts,
    work: Path,
    *,
    drafter: Path | None = None,
    block_size: int | None = None,
    longest: int = 300,
    target_folder: Path | None = None,
    measure_first_token: bool = False,
) -> Any:
    config, drafting = SGLangEngineConfig.model_validate(served(url)), DraftingConfig(block_size=block_size)
    required = server_requirements(
        config, target_folder or made.target, drafter, drafting, longest, measure_first_token=measure_first_token
    )
    return open_servers(config, required, work, print)


def requests(made: DrafterArtifacts, count: int, max_new_tokens: int = 40) -> list[Request]:
    prompts = load_prompts(made.prompts, ["heldout"])[:count]
    return [Request(p.prompt_id, p.token_ids, max_new_tokens) for p in prompts]


def test_the_first_tokens_time_is_measured_and_caches_are_flushed(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, dflash_url: str
) -> None:
    sent = requests(tiny_drafter, 8)
    drafter = tiny_drafter.drafter / DRAFTER_FOLDER
    with open_with(dflash_url, tiny_drafter, tmp_path, drafter=drafter, measure_first_token=True) as engine:
        engine.set_concurrency(1)
        streamed = {done.request.request_id: done for done in engine.generate(sent)}
        engine.flush_cache()
        engine.set_concurrency(None)
    with open_with(dflash_url, tiny_drafter, tmp_path, drafter=drafter) as engine:
        whole = {done.request.request_id: done for done in engine.generate(sent)}
    assert engine.records_trace
    for name, done in streamed.items():
        assert 0 < done.first_token_seconds < done.seconds
        assert math.isnan(whole[name].first_token_seconds)
        assert done.response_ids == whole[name].response_ids
        # The batches differ, and with them the last digits of float32.
        steps, expected = done.steps, whole[name].steps
        assert steps is not None and expected is not None
        assert step_rows(steps) == step_rows(expected)
        np.testing.assert_allclose(steps.logprobs, expected.logprobs, atol=LOGPROB_TOLERANCE)


def test_an_engine_that_is_left_early_aborts_what_is_in_flight(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, plain_url: str
) -> None:
    with open_with(plain_url, tiny_drafter, tmp_path) as engine:
        answers = engine.generate(requests(tiny_drafter, 40, max_new_tokens=700))
        assert next(answers).response_ids
        answers.close()
        engine.flush_cache()  # succeeds on an idle server only


def test_servers_of_something_else_are_refused(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, plain_artifact: Path, plain_url: str, dflash_url: str
) -> None:
    drafter = tiny_drafter.drafter / DRAFTER_FOLDER
    other = Path(shutil.copytree(drafter, tmp_path / "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)

    def refused(what: str, url: str, **options: Any) -> None:
        with pytest.raises(DraftsmithError, match=what) as caught, open_with(url, tiny_drafter, tmp_path, **options):
            pass
        assert "\n" not in str(caught.value)
        assert url in str(caught.value)

    refused("serves the target without a drafter", plain_url, drafter=drafter)
    refused(f"drafts with [0-9a-f]{{12}}, not {other}", dflash_url, drafter=other)
    refused(r"drafts blocks of 8, drafting\.block_size means 5", dflash_url, drafter=drafter, block_size=5)
    refused("takes 1022 positions per request, the longest needs 1023", plain_url, longest=1023)
    refused("the target is|whose tokenizer|other weights", plain_url, target_folder=plain_artifact)


def test_greedy_verification_is_found_by_its_tokens_alone(
    tiny_drafter: DrafterArtifacts, dflash_url: str, plain_url: str
) -> None:
    """The probe for devices other than a CPU: with a drafter this server verifies greedily."""
    target = read_target_info(tiny_drafter.target)

    def greedily(url: str) -> bool:
        return with_client(lambda client: verifies_greedily(client, url, target, [5, 6, 7]))

    assert greedily(dflash_url) and not greedily(plain_url)


def test_a_server_is_known_by_the_log_probs_of_fixed_tokens(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, plain_url: str
) -> None:
    """It was started by somebody else, without a commit of the hub."""
    config = SGLangEngineConfig.model_validate(served(plain_url))
    required = server_requirements(config, tiny_drafter.target, None, DraftingConfig(), 200)

    def check(target_folder: Path) -> list[str]:
        other, served = replace(required, target_folder=target_folder), ServedTarget(plain_url, "m", "float32")

        def compare(client: httpx.AsyncClient) -> Awaitable[tuple[list[str], object]]:
            scored = partial(served_logprobs, client, plain_url, required.scored_ids)
            return check_weights(served, scored, other, print)

        return with_client(compare)[0]

    (message,) = check(tiny_drafter.target)
    assert float(message.split(" nats")[0].split()[-1]) < 1e-5
    with pytest.raises(DraftsmithError, match="other weights"):
        check(write_other_revision(tiny_drafter, tmp_path))


def test_the_standin_is_not_imported_where_there_is_a_gpu(sglang_env: Path) -> None:
    script = "import torch; torch.cuda.is_available = lambda: True; import sgl_kernel"
    done = subprocess.run([str(sglang_env), "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "uninstall draftsmith-sglang-cpu" in done.stderr


def test_the_diagnosis_of_a_server(
    dflash_url: str, serving_target: ServingTarget, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """As the server of its drafter it agrees with replay; asked about another checkpoint, it reports the difference."""
    other = tmp_path / "other"
    with_another_mask(Path(shutil.copytree(serving_target.drafter, other)))
    results = {}
    for folder in (serving_target.drafter, other):
        inputs = {"target": tiny_drafter.target, "prompts": tiny_drafter.prompts}
        config = {"prompts": 6, "sampling": {"max_new_tokens": 32}, "max_parity_mismatch": 0.02}
        ctx = RecordingContext.under(tmp_path / f"of-{folder.name}", inputs)
        ctx.run(DIAGNOSIS, url=dflash_url, drafter=str(folder), **config)
        results[folder] = DiagnosisResult.read(ctx.out).to_json()
    assert results[serving_target.drafter]["agrees"], results
    assert results[serving_target.drafter]["as_it_is"]["mismatch"] <= 0.02
    assert not results[other]["agrees"] and results[other]["causes"] == [{"cause": "reported by the server"}]
    assert str(other) in results[other]["sentence"]
