"""Command lines, environments and GPUs of servers by config, and errors before anything starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from draftsmith.artifacts import host
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.host import Gpu
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import SGLangEngineConfig, SGLangLaunchConfig
from draftsmith.stages.engines.servers import process, requirements
from draftsmith.stages.engines.sglang import server
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.targets.info import TargetInfo
from tests.flows.processes import wait_until


def config(**launch: Any) -> SGLangEngineConfig:
    return SGLangEngineConfig.model_validate({"kind": "sglang", "python": sys.executable, "launch": launch})


def line(
    found: SGLangEngineConfig,
    drafter: Path | None = None,
    block_size: int | None = None,
) -> list[str]:
    required = requirements.ServerRequirements(
        target=TargetInfo.model_construct(dtype="bfloat16"),
        target_folder=Path("/target"),
        model_folder=Path("/models/target"),
        probe_ids=[],
        scored_ids=[],
        longest=100,
        concurrency=4,
        drafter_folder=drafter,
        algorithm=requirements.speculative_algorithm(drafter) if drafter else None,
        block_size=block_size,
    )
    return server.server_command(found, required)


def drafter(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def after(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize("servers", [1, 2])
def test_every_server_computes_as_many_requests_at_a_time_as_it_may_get(servers: int, tmp_path: Path) -> None:
    found = config(servers=servers).model_copy(update={"concurrency": 64})
    folder = drafter(tmp_path / "d", architectures=["DFlashDraftModel"], block_size=16)
    for words in (line(found), line(found, folder, 16)):
        assert after(words, "--max-running-requests") == "64"


def test_model_dtype_parallelism_memory_and_further_options_pass_through() -> None:
    words = line(config())
    assert words[:3] == [sys.executable, "-m", "sglang.launch_server"]
    given = {name: after(words, name) for name in ("--model-path", "--dtype", "--host")}
    assert given == {"--model-path": "/models/target", "--dtype": "bfloat16", "--host": "127.0.0.1"}
    assert not [word for word in words if "speculative" in word or "tp" in word or "mem" in word]
    options = {"attention-backend": "fa3", "disable_cuda_graph": True, "enable-x": False, "cuda-graph-bs": [1, 2, 4]}
    words = line(config(tensor_parallel=2, memory_fraction=0.8, options=options))
    given = {name: after(words, name) for name in ("--tp-size", "--mem-fraction-static", "--attention-backend")}
    assert given == {"--tp-size": "2", "--mem-fraction-static": "0.8", "--attention-backend": "fa3"}
    assert "--disable-cuda-graph" in words
    assert "--enable-x" not in words
    assert words[words.index("--cuda-graph-bs") + 1 :][:3] == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("fields", "algorithm", "trained", "told", "options"),
    [
        ({"architectures": ["DFlashDraftModel"], "block_size": 16}, "DFLASH", 16, 8, {"num-draft-tokens": "8"}),
        (
            {"architectures": ["Qwen3DSparkModel"], "block_size": 7}, "DSPARK", 8, 5,  # without the anchor
            {"dspark-block-size": "4", "num-draft-tokens": "5"},
        ),
        (
            {"architectures": ["LlamaForCausalLMEagle3"]}, "EAGLE3", None, 5,
            {"num-steps": "4", "eagle-topk": "1", "num-draft-tokens": "5"},
        ),
        (  # a native head
            {"architectures": ["Glm4MoeForCausalLM"]}, "NEXTN", 4, 3,
            {"num-steps": "2", "eagle-topk": "1", "num-draft-tokens": "3"},
        ),
    ],
)  # fmt: skip
def test_blocks_have_the_trained_size_unless_told_otherwise(
    fields: dict[str, Any], algorithm: str, trained: int | None, told: int, options: dict[str, str], tmp_path: Path
) -> None:
    folder = drafter(tmp_path / "d", **fields)
    assert requirements.speculative_algorithm(folder) == algorithm
    if trained is None:
        with pytest.raises(DraftsmithError, match="does not state how far it drafts"):
            requirements.served_block_size(folder, DraftingConfig(), algorithm)
    else:
        assert requirements.served_block_size(folder, DraftingConfig(), algorithm) == trained
        larger = DraftingConfig(block_size=trained + 1)
        with pytest.raises(DraftsmithError, match=f"{trained + 1} is larger than the trained {trained}"):
            requirements.served_block_size(folder, larger, algorithm)
    words = line(config(), folder, requirements.served_block_size(folder, DraftingConfig(block_size=told), algorithm))
    given = {name.removeprefix("--speculative-"): after(words, name) for name in words if "--speculative" in name}
    assert given == {"algorithm": algorithm, "draft-model-path": str(folder), **options}


def test_a_rollout_on_sglang_drafts_from_the_whole_vocabulary() -> None:
    with pytest.raises(ValidationError, match=r"drafting\.head_tokens: only the embedded engine"):
        RolloutConfig.model_validate({"engine": config().model_dump(), "drafting": {"head_tokens": 4096}})
    assert RolloutConfig.model_validate({"drafting": {"head_tokens": 4096}}).drafting.head_tokens == 4096


def test_an_address_has_a_scheme_and_no_credentials() -> None:
    mistyped = ("http://gpu1:3000o", "http://gpu1:300000", "http://", "http://[::1:30000", "http://gpu1:30000 ")
    secret = ("http://u:pw@gpu1:30000", "http://gpu1:30000?token=abc", "http://tok@gpu1")
    for said, urls in (
        ("'gpu1:30000' is not a server address", ["gpu1:30000"]),
        ("is not a server address", mistyped),
        ("api_key_env", secret),
    ):
        for url in urls:
            with pytest.raises(ValidationError, match=said) as caught:
                SGLangEngineConfig.model_validate({"kind": "sglang", "urls": [url]})
            assert "pw@" not in str(caught.value) and "tok@" not in str(caught.value)
    for well in ("http://gpu1", "https://gpu1:443/sglang/", "http://[::1]:30000"):
        assert SGLangEngineConfig.model_validate({"kind": "sglang", "urls": [well]}).urls == (well,)


@pytest.mark.parametrize(
    ("said", "refused"),
    [
        (
            "{name}: is set by",
            [
                *("model-path", "--port", "speculative_num_draft_tokens", "dtype", "tp", "pp-size", "nnodes"),
                *("speculative-accept-threshold-single", "preferred-sampling-params", "json_model_override_args"),
                *("pipeline-parallel-size", "speculative-use-rejection-sampling", "dp-size"),
                "speculative_use_block_verification",
            ],
        ),
        ("would read", ["hos", "speculative-algo"]),  # argparse completes beginnings
        (r"Remove it here|not an option's name|would read", ["host=0.0.0.0", "config", "", "tokenizer-worker-num"]),
        ("looks like a secret", ["api-key"]),
    ],
)
def test_an_option_that_the_stage_sets_or_that_is_a_secret_is_refused(said: str, refused: list[str]) -> None:
    for name in refused:
        with pytest.raises(ValidationError, match=said.format(name=name)):
            config(options={name: "1"})


@pytest.mark.parametrize(
    ("launch", "said"),
    [
        ({"options": {"attention-backend": ["triton", "--host", "0.0.0.0"]}}, "would read its value '--host'"),
        ({"options": {"load-format": "dummy"}}, "load-format: dummy would serve random weights"),
        ({"options": {"--speculative_draft_load_format": "dummy"}}, "dummy would serve random weights"),
        ({"environment": {"HF_TOKEN": "x"}}, "looks like a secret"),
    ],
)
def test_values_that_would_change_what_is_served_or_are_secret_are_refused(launch: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        config(**launch)
    options = {"kv-cache-dtype": "auto", "load-format": "safetensors"}
    assert config(environment={"TOKENIZERS_PARALLELISM": "false"}, options=options).launch is not None


def test_the_key_of_given_servers_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"kind": "sglang", "urls": ["http://gpu1:30000"], "api_key_env": "MY_KEY"}
    monkeypatch.setenv("MY_KEY", " abc\n")
    assert SGLangEngineConfig.model_validate(given).api_key() == "abc"
    with pytest.raises(ValidationError, match="not the key"):
        SGLangEngineConfig.model_validate({**given, "api_key_env": "sk 123-456"})
    with pytest.raises(ValidationError, match="is for urls"):
        SGLangEngineConfig.model_validate({**config().model_dump(), "api_key_env": "MY_KEY"})


def test_every_server_gets_its_own_gpus() -> None:
    two = SGLangLaunchConfig.model_validate({"servers": 2, "tensor_parallel": 2})
    assert process.assign_gpus(two, ["4", "5", "6", "7"]) == ["4,5", "6,7"]
    with pytest.raises(DraftsmithError, match="2 servers of tensor_parallel 2 need 4 GPUs, 3 are visible"):
        process.assign_gpus(two, ["0", "1", "2"])
    assert process.assign_gpus(two, []) == [None, None]
    on_cpu = SGLangLaunchConfig.model_validate({"servers": 2, "options": {"device": "cpu"}})
    assert process.assign_gpus(on_cpu, ["0"]) == [None, None]


def test_gpus_are_those_that_the_stage_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA reads CUDA_VISIBLE_DEVICES: names after one that does not exist do not count."""
    gpus: tuple[Gpu, ...] = (Gpu("GPU-1a2b", 80e9, "H100"), Gpu("GPU-3c4d", 80e9, "H100"))
    for module in (host, process):
        monkeypatch.setattr(module, "all_gpus", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert process.usable_gpus() == ["0", "1"]
    slices = ["MIG-5e6f", "MIG-7a8b"]
    for named, names in (("1, GPU-1a2b", ["1", "0"]), ("0, 3, 1", ["0"]), ("", []), (",".join(slices), slices)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert process.usable_gpus() == names
    gpus = ()  # of another maker
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert process.usable_gpus() == ["3", "5"]


def test_a_server_has_its_gpus_by_their_numbers_in_nvidias_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With names in place of numbers SGLang falls back to slower collectives."""
    gpus = tuple(Gpu(f"GPU-{number}", 80e9, "H100") for number in range(4))
    for module in (host, process):
        monkeypatch.setattr(module, "all_gpus", lambda: gpus)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-3")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    launch = SGLangLaunchConfig.model_validate({"tensor_parallel": 2})
    shown = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['CUDA_DEVICE_ORDER'])"
    (started,) = process.server_processes(launch, [sys.executable, "-c", shown], {}, tmp_path / "sglang.log")
    started.start()
    wait_until(lambda: started.ended() is not None, "it ends")
    started.stop(grace_s=0)
    assert started.tail().splitlines()[-1] == "1,3 PCI_BUS_ID"


def test_how_servers_are_launched_decides_a_speed_and_not_an_answer() -> None:
    one, two = (config(tensor_parallel=n, start_timeout_s=10.0 * n) for n in (1, 2))
    assert RolloutConfig(engine=one).key_material() == RolloutConfig(engine=two).key_material()
    assert EvaluationConfig(engine=one).key_material() != EvaluationConfig(engine=two).key_material()
    later = config(start_timeout_s=99.0)
    assert EvaluationConfig(engine=one).key_material() == EvaluationConfig(engine=later).key_material()
