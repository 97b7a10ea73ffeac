"""A stock SGLang server with a DFlash2 drafter whose layer has a window, float32: its proposals are replay's.

Convolutions, selector and window are SGLang's own code there.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter
from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from tests.integration.swapping import assert_drafts_with, dflash2
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.server import running_server
from tests.stages.bench import Bench, tau

pytestmark = [pytest.mark.sglang, pytest.mark.integration]

PROMPTS, WINDOW = 24, 20


def test_the_steps_are_those_of_replay_and_every_part_of_the_drafter_shows_in_them(
    sglang_env: Path, serving_target: ServingTarget, bench: Bench, sglang_logs: Path, tmp_path: Path
) -> None:
    made = dflash2(bench)
    assert isinstance(made, DFlash2Drafter)
    layers = ["sliding_attention"] * made.config.num_hidden_layers
    made.config.update({"layer_types": layers, "sliding_window": WINDOW, "use_sliding_window": True})
    save_drafter(made, tmp_path, torch.float32)
    drafter = load_drafter(tmp_path, bench.target)
    assert isinstance(drafter, DFlash2Drafter)
    bench = bench.with_drafters({"it": drafter})
    with running_server(sglang_env, serving_target.model, tmp_path, log=sglang_logs / "dflash2.log") as url:
        _, served = assert_drafts_with(url, bench, "it", PROMPTS)
    assert tau(served) > 1.3, "proposals are kept, too"
    for part in ("window", "convolutions", "selector"):  # without it, replay would propose something else
        other = copy.deepcopy(drafter)
        with torch.no_grad():
            if part == "window":
                other.spans = [type(sight)(None, sight.causal) for sight in other.spans]
            elif part == "selector":
                other.candidate_selector.successor_codebook.zero_()
            else:
                for layer in other.layers:
                    layer.attention_conv.initialise()  # type: ignore[union-attr,operator]
                    layer.mlp_conv.initialise()  # type: ignore[union-attr,operator]
        replayed = replace(bench, drafters={"it": other}).replay(bench.answered(PROMPTS), "it", None)
        proposed = zip(served, replayed, strict=True)
        assert any(not np.array_equal(a.proposed, b.proposed) for a, b in proposed), part
