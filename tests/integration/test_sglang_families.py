"""The targets that SGLang drafts for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from draftsmith.stages.engines.sglang.families import (
    BLOCKS,
    CHAINS,
    FIRST,
    LATER,
    LATER_BLOCKS,
    LATER_CHAINS,
    undrafted,
)
from tests.sglang_cpu.options import CPU_ENVIRONMENT

_ASKED = """
import json, sglang
from sglang.srt.models.registry import ModelRegistry
hooks = {"blocks": "set_dflash_layers_to_capture", "chains": "set_eagle3_layers_to_capture"}
models = ModelRegistry.models.items()
found = {what: [name for name, model in models if hasattr(model, hook)] for what, hook in hooks.items()}
print(json.dumps(found | {"known": list(ModelRegistry.models), "release": sglang.__version__}))
"""
_NOT_TARGETS = ("NextN", "MTP", "Eagle", "Eagle3", "Model")  # drafters, and models without a head


@pytest.mark.parametrize(
    ("architecture", "kind", "why"),
    [
        ("Qwen3ForCausalLM", "dspark", None),
        ("Lfm2ForCausalLM", "dflash", None),
        ("Lfm2ForCausalLM", "eagle3", "SGLang 0.5.20 and 0.5.23 have no eagle3 for Lfm2ForCausalLM"),
        ("Gemma3ForCausalLM", "dflash2", "SGLang 0.5.20 and 0.5.23 have no dflash2 for Gemma3ForCausalLM, but eagle3"),
        ("GraniteForCausalLM", "dflash", "SGLang 0.5.20 and 0.5.23 have no dflash for GraniteForCausalLM"),
        (
            "Lfm2VlForConditionalGeneration",
            "dspark",
            "SGLang 0.5.20 has no dspark for Lfm2VlForConditionalGeneration, 0.5.23 has",
        ),
    ],
)
def test_it_is_said_where_a_drafter_could_not_be_served(architecture: str, kind: str, why: str | None) -> None:
    assert undrafted(architecture, kind) == why


@pytest.mark.sglang
@pytest.mark.integration
def test_the_lists_are_those_of_the_registry(sglang_env: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | CPU_ENVIRONMENT
    command = [str(sglang_env), "-I", "-c", _ASKED]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    asked = json.loads(ended.stdout.splitlines()[-1])
    if (release := asked["release"]) not in (FIRST, LATER):
        pytest.skip(f"the lists are of {FIRST} and {LATER}, here is {release}")
    for what, ours, later in (("blocks", BLOCKS, LATER_BLOCKS), ("chains", CHAINS, LATER_CHAINS)):
        expected = ours | later if release == LATER else ours
        theirs = {name for name in asked[what] if not name.endswith(_NOT_TARGETS) and "Assistant" not in name}
        assert theirs == expected & set(asked["known"]), what  # some classes need a GPU's packages to be imported
