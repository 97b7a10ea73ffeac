"""The test bed's target with a native head, which was trained with it: the same model under the name of a GLM.

A GLM whose layers before the head are dense, with rotary angles of the whole width, computes what the target's Qwen3
does, so that the shipped weights and answers are its own. Only the head is shipped beside them (`make.py`).
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.testbed import target
from tests.testbed.context import RecordingContext
from tests.testbed.mtp import add_tensors

if TYPE_CHECKING:
    from tests.testbed.drafter import DrafterArtifacts

HEAD_NAME = "native-head.safetensors"
BLOCK, STEPS, SEQUENCES, ANCHORS = 4, 200, 4, 32
_EXPERTS: dict[str, Any] = {  # all are chosen: a near-tie between experts would depend on the processor
    "n_routed_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}


def write_glm(source: Path, folder: Path, head: Path | None = None) -> Path:
    """Write a model of the test bed as a GLM. head: file with the tensors of its native head; None: it has none."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    rope = {**raw["rope_parameters"], "partial_rotary_factor": 1.0}
    glm = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "rope_parameters": rope}
    dense = {"use_qk_norm": True, "first_k_dense_replace": raw["num_hidden_layers"]}
    del raw["layer_types"], raw["max_window_layers"], raw["sliding_window"], raw["use_sliding_window"]
    path.write_text(json.dumps({**raw, **glm, **dense, **_EXPERTS}, indent=2))
    if head is not None:
        from safetensors.torch import load_file

        add_tensors(folder, load_file(head))
    return folder


def head_file() -> Path:
    """Return the shipped head."""
    return target.shipped() / HEAD_NAME


def artifact_of(model: Path, folder: Path) -> Path:
    """Run stage `target` on a model, float32; return the artifact, `folder/out`."""
    from draftsmith.stages.targets.stage import STAGE

    return RecordingContext.under(folder).run(STAGE, source=str(model), dtype="float32").out


def target_with_head(folder: Path) -> Path:
    """Write the target with its head under `folder`; return the artifact."""
    return artifact_of(write_glm(target.target_folder(), folder / "model", head_file()), folder)


def taken_head(made: DrafterArtifacts, of: Path, folder: Path) -> Path:
    """Return the artifact of stage `sft` that took a target's head as it is. of: the target's artifact."""
    from draftsmith.stages.training.sft.stage import STAGE

    inputs = {"target": of, "trajectories": made.rollout}
    return RecordingContext.under(folder, inputs).run(STAGE, drafter={"kind": "mtp"}, steps=0).out


def adopted_dflash(made: DrafterArtifacts, of: Path, folder: Path) -> Path:
    """Return the shipped DFlash, adopted for a target of the same weights. of: the target's artifact."""
    from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
    from draftsmith.stages.training.sft.stage import STAGE

    inputs = {"target": of, "trajectories": made.rollout}
    source = str(made.drafter / DRAFTER_FOLDER)
    return RecordingContext.under(folder, inputs).run(STAGE, init_from=source, steps=0, adopt=True).out


def train_head(made: DrafterArtifacts, model: Path, file: Path, work: Path, seed: int) -> None:
    """Train a head on the target's answers, unrolled as it drafts, and write its tensors in bfloat16.

    made: has the answers of the training prompts. model: the target. file: is written. work: an empty folder.
    """
    import torch
    from safetensors.torch import save_file
    from torch.nn.functional import cross_entropy

    from draftsmith.stages.data.trajectories import load_trajectories
    from draftsmith.stages.drafters.checkpoint import create_drafter
    from draftsmith.stages.drafters.mtp.checkpoint import file_tensors
    from draftsmith.stages.drafters.mtp.config import MtpConfig
    from draftsmith.stages.drafters.mtp.model import MtpDrafter
    from draftsmith.stages.targets.causal_lm import Target
    from tests.testbed.mtp import head_tensors

    glm = write_glm(model, work / "model")
    beginning = head_tensors(glm, seed)  # its norms are around 1
    add_tensors(glm, {name: tensor if tensor.dim() == 1 else 0.1 * tensor for name, tensor in beginning.items()})
    loaded = Target.load(artifact_of(glm, work / "target"), device="cpu")
    head = create_drafter(MtpConfig(kind="mtp", block_size=BLOCK), loaded, seed)
    assert isinstance(head, MtpDrafter)
    answers = [each for each in load_trajectories(made.rollout).trajectories if each.answer_length > BLOCK]
    optimiser = torch.optim.AdamW(head.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS)
    order = random.Random(seed)
    for _ in range(STEPS):
        loss = torch.zeros(())
        for answer in order.sample(answers, SEQUENCES):
            tokens = torch.tensor([answer.tokens])
            features = loaded.read(tokens, head.target_layer_ids).features
            assert features is not None
            context = head.encode(features, tokens, torch.arange(tokens.shape[1])[None])
            places = range(answer.first_anchor, tokens.shape[1] - BLOCK)
            anchors = torch.tensor([order.choices(places, k=ANCHORS)])
            blocks = tokens[0][anchors[..., None] + torch.arange(BLOCK)]
            hidden = head.block_hidden(context, blocks[..., :-1], anchors)
            logits = hidden @ loaded.head_weight.T
            loss = loss + cross_entropy(logits.flatten(0, -2), blocks[..., 1:].flatten()) / SEQUENCES
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    tensors = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in file_tensors(head).items()}
    save_file(tensors, file, metadata={"format": "pt"})
