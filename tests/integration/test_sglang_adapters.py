"""A launched SGLang server of a target with LoRA adapters: answers and verify steps are the embedded engine's, float32.

Stock SGLang pins memory for its adapters, which torch refuses without a GPU; the plug-in of these tests leaves that out
(tests/sglang_cpu/src/draftsmith_sglang_cpu.py).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import OptionValue, SGLangEngineConfig
from draftsmith.stages.engines.servers.requirements import ServerRequirements, server_requirements
from draftsmith.stages.engines.sglang.handshake import check_server
from draftsmith.stages.targets.info import model_path
from tests.sglang_cpu.options import CPU_ENVIRONMENT, CPU_OPTIONS
from tests.sglang_cpu.server import running_server
from tests.stages.engines.stand_ins import with_client
from tests.testbed.adapters import rolled_out_alike, served_inputs
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.integration, pytest.mark.sglang, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def inputs(
    tiny_target: Path, tiny_prompts: Path, tiny_drafter: DrafterArtifacts, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    return served_inputs(tmp_path_factory.mktemp("adapted"), tiny_target, tiny_prompts, tiny_drafter.drafter)


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafting"])
def test_a_server_answers_under_each_adapter(
    drafts: bool, tmp_path: Path, inputs: dict[str, Path], sglang_env: Path
) -> None:
    launch = {"options": CPU_OPTIONS | {"lora-backend": "torch_native"}, "environment": CPU_ENVIRONMENT}
    engine = {"kind": "sglang", "python": str(sglang_env), "launch": launch, "concurrency": 4}
    rolled_out_alike(tmp_path, inputs if drafts else {n: inputs[n] for n in ("target", "prompts")}, engine)


def test_a_running_server_is_known_by_its_log_probs_under_an_adapter(
    tmp_path: Path, inputs: dict[str, Path], sglang_env: Path
) -> None:
    engine = SGLangEngineConfig.model_validate({"kind": "sglang", "urls": ["http://x"]})
    both = server_requirements(engine, inputs["target"], None, DraftingConfig(), 200)

    def check(url: str, required: ServerRequirements) -> list[str]:
        return with_client(lambda client: check_server(client, url, required, print, ours=False)).remarks

    options: dict[str, OptionValue] = {
        "lora-backend": "torch_native",
        "lora-paths": f"a={both.adapters['a']}",
        "log-requests": True,
        "log-requests-level": 3,
        "log-requests-format": "json",
        "log-requests-target": str(tmp_path / "requests"),
    }
    model = model_path(inputs["target"])
    with running_server(sglang_env, model, options=options, log=tmp_path / "server.log") as url:
        one = replace(both, adapters={"a": both.adapters["a"]})
        (remark,) = [each for each in check(url, one) if "adapter a on" in each]
        assert float(remark.split(" nats")[0].split()[-1]) < 1e-5
        with pytest.raises(DraftsmithError, match="serves no adapter b"):
            check(url, both)
    lines = [line for path in (tmp_path / "requests").iterdir() for line in path.read_text().splitlines()]
    logged = [json.loads(line[line.index("{") :]) for line in lines if "request.finished" in line]
    assert {each["obj"]["lora_path"] for each in logged} == {None, "a"}  # as configs/own-logs.md reads it
