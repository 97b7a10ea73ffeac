"""Command lines, environments and GPUs of servers by config, and errors before anything starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.host import Gpu
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import LaunchConfig, SGLangEngineConfig
from draftsmith.stages.engines.servers import drafting, process
from draftsmith.stages.engines.sglang import server
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig


def config(**launch: Any) -> SGLangEngineConfig:
    return SGLangEngineConfig.model_validate({"kind": "sglang", "python": sys.executable, "launch": launch})


def line(
    found: SGLangEngineConfig,
    drafter: Path | None = None,
    block_size: int | None = None,
    adapters: dict[str, Path] | None = None,
) -> list[str]:
    algorithm = drafting.speculative_algorithm(drafter) if drafter else None
    return server.server_command(
        found,
        model_folder=Path("/models/target"),
        dtype="bfloat16",
        drafter_folder=drafter,
        algorithm=algorithm,
        block_size=block_size,
        adapters=adapters or {},
    )


def drafter(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def after(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_a_server_without_a_drafter_gets_the_targets_model_and_dtype() -> None:
    words = line(config())
    assert words[:3] == [sys.executable, "-m", "sglang.launch_server"]
    assert after(words, "--model-path") == "/models/target"
    assert after(words, "--dtype") == "bfloat16"
    assert after(words, "--host") == "127.0.0.1"
    assert not [word for word in words if "speculative" in word or "tp" in word or "mem" in word]


@pytest.mark.parametrize(
    ("launch", "most"),
    [({}, "64"), ({"data_parallel": 2}, "128"), ({"servers": 2}, "64"), ({"servers": 2, "router": "random"}, "128")],
)
def test_every_server_computes_as_many_requests_at_a_time_as_it_may_get(
    launch: dict[str, Any], most: str, tmp_path: Path
) -> None:
    found = config(**launch).model_copy(update={"concurrency": 64})
    folder = drafter(tmp_path / "d", architectures=["DFlashDraftModel"], block_size=16)
    for words in (line(found), line(found, folder, 16)):
        assert after(words, "--max-running-requests") == most


def test_parallelism_memory_and_further_options_pass_through() -> None:
    options = {"attention-backend": "fa3", "disable_cuda_graph": True, "enable-x": False, "cuda-graph-bs": [1, 2, 4]}
    words = line(config(tensor_parallel=2, memory_fraction=0.8, options=options))
    assert after(words, "--tp-size") == "2"
    assert after(words, "--mem-fraction-static") == "0.8"
    assert after(words, "--attention-backend") == "fa3"
    assert "--disable-cuda-graph" in words
    assert "--enable-x" not in words
    assert words[words.index("--cuda-graph-bs") + 1 :][:3] == ["1", "2", "4"]


def test_dflash_drafts_blocks_of_the_trained_size_unless_told_otherwise(tmp_path: Path) -> None:
    folder = drafter(tmp_path / "d", architectures=["DFlashDraftModel"], block_size=16)
    assert drafting.served_block_size(folder, DraftingConfig(), "DFLASH") == 16
    assert drafting.served_block_size(folder, DraftingConfig(block_size=8), "DFLASH") == 8
    words = line(config(), folder, 8)
    assert after(words, "--speculative-algorithm") == "DFLASH"
    assert after(words, "--speculative-draft-model-path") == str(folder)
    assert after(words, "--speculative-num-draft-tokens") == "8"
    assert "--speculative-num-steps" not in words
    with pytest.raises(DraftsmithError, match=r"drafting\.block_size: 17 is larger than the trained 16"):
        drafting.served_block_size(folder, DraftingConfig(block_size=17), "DFLASH")


def test_eagle3_drafts_a_chain_as_long_as_the_block(tmp_path: Path) -> None:
    folder = drafter(tmp_path / "d", architectures=["LlamaForCausalLMEagle3"])
    assert drafting.speculative_algorithm(folder) == "EAGLE3"
    words = line(config(), folder, drafting.served_block_size(folder, DraftingConfig(block_size=5), "EAGLE3"))
    names = ("algorithm", "num-steps", "eagle-topk", "num-draft-tokens")
    assert [after(words, f"--speculative-{name}") for name in names] == ["EAGLE3", "4", "1", "5"]
    with pytest.raises(DraftsmithError, match="does not state how far it drafts"):
        drafting.served_block_size(folder, DraftingConfig(), "EAGLE3")


def test_dspark_counts_proposals_without_the_anchor(tmp_path: Path) -> None:
    folder = drafter(tmp_path, architectures=["Qwen3DSparkModel"], block_size=7)
    assert drafting.speculative_algorithm(folder) == "DSPARK"
    assert drafting.served_block_size(folder, DraftingConfig(), "DSPARK") == 8
    words = line(config(), folder, drafting.served_block_size(folder, DraftingConfig(block_size=5), "DSPARK"))
    names = ("algorithm", "dspark-block-size", "num-draft-tokens")
    assert [after(words, f"--speculative-{name}") for name in names] == ["DSPARK", "4", "5"]
    with pytest.raises(DraftsmithError, match="9 is larger than the trained 8"):
        drafting.served_block_size(folder, DraftingConfig(block_size=9), "DSPARK")


def test_a_rollout_on_sglang_drafts_from_the_whole_vocabulary() -> None:
    with pytest.raises(ValidationError, match=r"drafting\.head_tokens: only the embedded engine"):
        RolloutConfig.model_validate({"engine": config().model_dump(), "drafting": {"head_tokens": 4096}})
    assert RolloutConfig.model_validate({"drafting": {"head_tokens": 4096}}).drafting.head_tokens == 4096


def test_an_address_needs_its_scheme() -> None:
    with pytest.raises(ValidationError, match="'gpu1:30000' is no address"):
        SGLangEngineConfig.model_validate({"kind": "sglang", "urls": ["gpu1:30000"]})
    for mistyped in ("http://gpu1:3000o", "http://gpu1:300000", "http://", "http://[::1:30000", "http://gpu1:30000 "):
        with pytest.raises(ValidationError, match="is no address of a server"):
            SGLangEngineConfig.model_validate({"kind": "sglang", "urls": [mistyped]})
    for well in ("http://gpu1", "https://gpu1:443/sglang/", "http://[::1]:30000"):
        assert SGLangEngineConfig.model_validate({"kind": "sglang", "urls": [well]}).urls == (well,)


@pytest.mark.parametrize(
    "option",
    [
        *("model-path", "--port", "speculative_num_draft_tokens", "dtype", "tp", "speculative-accept-threshold-single"),
        *("preferred-sampling-params", "json_model_override_args", "pp-size", "pipeline-parallel-size", "nnodes"),
        *("speculative-use-rejection-sampling", "speculative_use_block_verification", "dp-size"),
    ],
)
def test_an_option_that_has_a_field_of_its_own_is_refused(option: str) -> None:
    with pytest.raises(ValidationError, match=rf"{option}: is set by"):
        config(options={option: "1"})


@pytest.mark.parametrize(
    "options",
    [
        {"hos": "0.0.0.0"},  # argparse completes beginnings
        {"host=0.0.0.0": True},
        {"attention-backend": ["triton", "--host", "0.0.0.0"]},
        {"config": "more.yaml"},
        {"": "0.0.0.0"},
        {"tokenizer-worker-num": 4},
        {"speculative-algo": "NGRAM"},
    ],
)
def test_options_cannot_override_what_the_stage_sets(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"Remove it here|would read|no name of an option"):
        config(options=options)


@pytest.mark.parametrize("option", ["load-format", "--speculative_draft_load_format"])
def test_random_weights_are_not_launched(option: str) -> None:
    with pytest.raises(ValidationError, match=rf"{option}: dummy serves random weights"):
        config(options={option: "dummy"})
    assert config(options={option: "safetensors"}).launch is not None


@pytest.mark.parametrize("url", ["http://u:pw@gpu1:30000", "http://gpu1:30000?token=abc", "http://tok@gpu1"])
def test_an_address_holds_no_credentials(url: str) -> None:
    with pytest.raises(ValidationError, match="api_key_env") as caught:
        SGLangEngineConfig.model_validate({"kind": "sglang", "urls": [url]})
    assert "pw@" not in str(caught.value) and "tok@" not in str(caught.value)


def test_the_key_of_given_servers_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"kind": "sglang", "urls": ["http://gpu1:30000"], "api_key_env": "MY_KEY"}
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(DraftsmithError, match=r"engine\.api_key_env: the variable MY_KEY is not set"):
        SGLangEngineConfig.model_validate(given).api_key()
    monkeypatch.setenv("MY_KEY", " abc\n")
    assert SGLangEngineConfig.model_validate(given).api_key() == "abc"
    with pytest.raises(ValidationError, match="not the key itself"):
        SGLangEngineConfig.model_validate({**given, "api_key_env": "sk 123-456"})
    with pytest.raises(ValidationError, match="is for urls"):
        SGLangEngineConfig.model_validate({**config().model_dump(), "api_key_env": "MY_KEY"})


def test_every_server_gets_its_own_gpus() -> None:
    two = LaunchConfig.model_validate({"servers": 2, "tensor_parallel": 2})
    assert process.assign_gpus(two, ["4", "5", "6", "7"]) == ["4,5", "6,7"]
    with pytest.raises(DraftsmithError, match="2 servers of tensor_parallel 2 need 4 GPUs, 3 are visible"):
        process.assign_gpus(two, ["0", "1", "2"])
    assert process.assign_gpus(two, []) == [None, None]
    on_cpu = LaunchConfig.model_validate({"servers": 2, "options": {"device": "cpu"}})
    assert process.assign_gpus(on_cpu, ["0"]) == [None, None]
    replicas = config(servers=2, data_parallel=2)
    assert replicas.launch is not None
    assert process.assign_gpus(replicas.launch, ["0", "1", "2", "3"]) == ["0,1", "2,3"]
    assert after(line(replicas), "--dp-size") == "2"


def test_gpus_are_those_that_the_stage_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "all_gpus", lambda: (Gpu("GPU-1a2b", 80e9, "H100"), Gpu("GPU-3c4d", 80e9, "H100")))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert process.usable_gpus() == ["GPU-1a2b", "GPU-3c4d"]
    for named, names in (("3, GPU-1a2b", ["3", "GPU-1a2b"]), ("", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert process.usable_gpus() == names


@pytest.mark.parametrize("launch", [{"environment": {"HF_TOKEN": "x"}}, {"options": {"api-key": "x"}}])
def test_secrets_do_not_belong_into_a_config(launch: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="looks like a secret"):
        config(**launch)
    assert config(environment={"TOKENIZERS_PARALLELISM": "false"}, options={"kv-cache-dtype": "auto"})


def test_how_servers_are_launched_decides_a_speed_and_not_an_answer() -> None:
    one, two = (config(tensor_parallel=n, start_timeout_s=10.0 * n) for n in (1, 2))
    assert RolloutConfig(engine=one).key_material() == RolloutConfig(engine=two).key_material()
    assert EvaluationConfig(engine=one).key_material() != EvaluationConfig(engine=two).key_material()
    later = config(start_timeout_s=99.0)
    assert EvaluationConfig(engine=one).key_material() == EvaluationConfig(engine=later).key_material()
