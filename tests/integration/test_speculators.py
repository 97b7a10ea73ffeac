"""Drafters in speculators' layout, read by the library itself in its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.drafters.export import export_speculators
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import model_path
from tests.stages.drafters.test_speculators import FORMS

PYTHON = Path(__file__).parents[2] / ".venv-speculators" / "bin" / "python"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no speculators here: `make speculators` builds its environment"),
]
# It loads the models of the named folders, and compares each with its file.
_READ = """
import json, sys, torch
from safetensors.torch import load_file
from speculators import SpeculatorModel
results = {}
for folder in sys.argv[2:]:
    model = SpeculatorModel.from_pretrained(folder)
    loaded, stored, config = model.state_dict(), load_file(folder + "/model.safetensors"), model.config
    layers = config.transformer_layer_config
    results[folder] = {
        "class": type(model).__name__,
        "others": [n for n, t in stored.items() if n not in loaded or not torch.equal(loaded[n].to(t.dtype), t)],
        "not_stored": sorted(loaded.keys() - stored.keys()),
        "mask_token_id": config.mask_token_id,
        "layer_ids": config.aux_hidden_state_layer_ids,
        "proposals": config.speculators_config.proposal_methods[0].speculative_tokens,
        "windows": [layers.sliding_window if t == "sliding_attention" else None for t in layers.layer_types],
        "both_ways": config.sliding_window_non_causal,
    }
with open(sys.argv[1], "w") as file:
    json.dump(results, file)
"""


def test_the_library_reads_every_form(plain_target: Target, plain_artifact: Path, tmp_path: Path) -> None:
    drafters = {str(tmp_path / str(i)): make(plain_target) for i, make in enumerate(FORMS.values())}
    model = model_path(plain_artifact)
    for folder, drafter in drafters.items():
        save_drafter(drafter, Path(folder) / "own", torch.float32)
        export_speculators(Path(folder) / "own", model, str(model), Path(folder))
    command = [str(PYTHON), "-c", _READ, str(tmp_path / "results.json"), *drafters]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for folder, drafter in drafters.items():
        read = results[folder]
        assert (
            read["class"] == {"dflash": "DFlash", "dflash2": "DFlash2", "dspark": "DSpark"}[drafter.kind] + "DraftModel"
        )
        assert read["others"] == []
        assert read["not_stored"] == ["verifier_lm_head.weight", "verifier_norm.weight"], "the target's, for training"
        assert len(load_file(Path(folder) / "model.safetensors")) == len(drafter.state_dict()) + 2
        assert read["layer_ids"] == [layer + 1 for layer in drafter.target_layer_ids]
        assert (read["mask_token_id"], read["proposals"]) == (drafter.mask_token_id, drafter.block_size - 1)
        assert read["windows"] == [sight.window for sight in drafter.spans]
        assert read["both_ways"] is not drafter.spans[0].causal
