"""A DSpark checkpoint that was written here, in SGLang's own class: the same states, logits, confidences and blocks.

No server: SGLang verifies DSPARK with Triton kernels that a CPU does not run (`chain_speculative_sampling_triton`, its
ragged layouts). What is compared are its model, its loading of the checkpoint and its greedy drafting of a block, whose
paths are torch.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.replay.trace import pad_tokens
from draftsmith.stages.targets.causal_lm import Target
from tests.sglang_cpu import dspark_model
from tests.sglang_cpu.options import CPU_ENVIRONMENT
from tests.testbed import random_target
from tests.testbed.dspark import random_dspark

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

TOLERANCE = 3e-5  # float32, on values of order one to ten


@pytest.mark.parametrize("from_anchor", [True, False])
def test_sglang_computes_what_is_computed_here(
    from_anchor: bool, sglang_env: Path, plain_target: Target, tmp_path: Path
) -> None:
    drafter = random_dspark(plain_target, from_anchor=from_anchor)
    save_drafter(drafter, tmp_path / "drafter", torch.float32)
    texts = random_target.trajectories(3, seed=4)
    tokens = pad_tokens(texts, plain_target.device)
    features = plain_target.read(tokens, drafter.target_layer_ids).features
    assert features is not None
    anchors = torch.tensor([[4, 7, 9]] * 3)
    case = {"tokens": tokens, "features": features, "anchors": anchors}
    shared = {"embedding": plain_target.embedding, "head": plain_target.head_weight}
    save_file(case | {name: tensor.detach().clone() for name, tensor in shared.items()}, tmp_path / "case")

    script = Path(str(dspark_model.__file__))
    command = [str(sglang_env), "-I", str(script), *(str(tmp_path / name) for name in ("case", "drafter", "out"))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | CPU_ENVIRONMENT
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = load_file(tmp_path / "out")

    head, at = drafter.head_over(plain_target.head_weight, None), tokens.gather(1, anchors)
    with torch.no_grad():
        context = drafter.encode(features, tokens, torch.arange(tokens.shape[1]).expand(3, -1))
        block = drafter.propose(context, at, anchors, drafter.block_size, head)
        given = torch.cat([at[..., None], block.tokens[..., :-1]], -1)
        hidden = drafter.block_hidden(context, given, anchors)
        expected = {
            "hidden": hidden[..., : head.weight.shape[1]],
            "logits": head.logits(hidden),
            "confidence": drafter.confidence(hidden),
        }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=TOLERANCE, rtol=TOLERANCE, msg=name)
    assert torch.equal(found["proposals"], block.tokens)
