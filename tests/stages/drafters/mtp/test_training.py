"""Training of native heads: gradients against a plain reference, starts without a head, adapters, operations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.checkpoint import create_drafter
from draftsmith.stages.drafters.mtp.checkpoint import file_tensors
from draftsmith.stages.drafters.mtp.config import MtpConfig
from draftsmith.stages.drafters.mtp.model import MtpDrafter
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.batches import FeatureSource
from draftsmith.stages.training.config import TrainingConfig
from tests.stages.drafters.mtp.reference import RULES, Reference
from tests.stages.drafters.mtp.test_checkpoint import edited
from tests.stages.drafters.texts import Texts
from tests.stages.training.opd.test_chains import assert_as_if_drafted_first
from tests.stages.training.test_lora import (  # noqa: F401  the shared checks, on a native head
    test_a_killed_training_ends_with_the_same_bits,
    test_autocast_keeps_the_bits_of_the_base,
    test_steps_are_adamws_on_the_gradients_of_a_and_b,
    test_the_merged_drafter_proposes_as_the_live_adapter,
)
from tests.stages.training.test_operations import test_the_formula_is_what_torch_counts  # noqa: F401
from tests.testbed import random_target
from tests.testbed.mtp import MODELS, native_head, target_with_head

TOLERANCE = 1e-5  # float32 against float64, relative and absolute, on values of order one
ANCHORS = torch.tensor([[4, 7, 1, 11, 8]])


@pytest.fixture(params=["mimo", "qwen3_5_text", "deepseek_v3"])
def plain_target(request: pytest.FixtureRequest, targets: dict[str, Target]) -> Target:
    """Return a target for the shared checks: a plain layer, a gated one, and MLA with experts."""
    return targets[request.param]


@pytest.fixture
def base(plain_target: Target) -> MtpDrafter:
    return native_head(plain_target, block_size=5)


@pytest.fixture
def any_drafter(base: MtpDrafter) -> MtpDrafter:
    """Return the head for the count of operations; torch's counter does not know the product of all experts at once."""
    layer: Any = base.layer
    if hasattr(layer.mlp, "experts"):
        layer.mlp.experts.config._experts_implementation = "eager"
    return base


@pytest.mark.parametrize(("family", "engine"), RULES)
def test_losses_and_gradients_equal_those_of_the_plain_reference(
    family: str, engine: str, targets: dict[str, Target]
) -> None:
    """Of cross-entropy over whole chains, with the head's own states fed back, by autograd in float64."""
    target = targets[family]
    assert target.folder is not None
    drafter = native_head(target, 5, engine).train()
    texts, head = Texts(target, drafter, count=1, seed=3), target.head_weight.double()
    chains = texts.chains(ANCHORS)
    labels = texts.chains(ANCHORS + 1)

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy((hidden.double() @ head.T).flatten(0, -2), labels.flatten())

    context = drafter.encode(texts.features, texts.tokens, texts.positions)
    ours = loss(drafter.block_hidden(context, chains, ANCHORS))
    ours.backward()

    stored = load_file(target.folder / "model.safetensors")
    tensors = {name: tensor.double().requires_grad_() for name, tensor in stored.items()}
    plain = Reference(tensors, target.config, family, RULES[family, engine])
    unrolled = [
        plain.unroll(texts.features[0], texts.trajectories[0].tokens, anchor, chain)
        for anchor, chain in zip(ANCHORS[0].tolist(), chains[0].tolist(), strict=True)
    ]
    expected = loss(torch.stack(unrolled))
    expected.backward()
    assert float(ours.detach()) == pytest.approx(float(expected.detach()), abs=TOLERANCE)
    trained = {name for name, _ in drafter.named_parameters()}
    for parameter in drafter.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    found = {name: value for name, value in file_tensors(drafter).items() if not name.endswith("correction_bias")}
    assert len(found) >= len(trained)
    for name, gradient in found.items():
        other = tensors[name].grad
        other = torch.zeros_like(gradient) if other is None else other.float()  # of an expert that nobody chose
        torch.testing.assert_close(gradient, other, atol=TOLERANCE, rtol=1e-4, msg=name)
    assert not any(p.requires_grad for p in target.model.parameters()), "the target stays frozen"


def test_chains_of_anchors_train_it(plain_target: Target, base: MtpDrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    trajectories = random_target.trajectories(4, seed=8)
    batch = FeatureSource(plain_target, base.target_layer_ids, trajectories, TrainingConfig(), with_hidden=True)
    assert_as_if_drafted_first(base, plain_target, batch.batch(range(4)), {}, monkeypatch)


# ---- targets without a head


@pytest.mark.parametrize("family", MODELS)
def test_a_target_without_a_head_gives_its_last_layer(family: str, tmp_path: Path) -> None:
    target = without(tmp_path, family)
    drafter = create_drafter(MtpConfig(kind="mtp"), target, 0)
    assert isinstance(drafter, MtpDrafter)
    last, own = target.decoder.layers[-1].state_dict(), drafter.layer.state_dict()
    assert all(torch.equal(own[name], last[name]) for name in own)
    a, b = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)).chunk(2)
    unit = [x / x.square().mean().sqrt() for x in (a, b)]
    parts = torch.cat([drafter.embed_norm(a), drafter.hidden_norm(b)], -1)
    torch.testing.assert_close(drafter.join(parts), unit[0] + unit[1], atol=1e-4, rtol=0)
    raw: dict[str, Any] = dict(drafter.source)
    assert raw[drafter.family.fields[0]] == 1, "engines read how many layers the head has"


def without(folder: Path, family: str) -> Target:
    """Return a target whose checkpoint has no head, as transformers exports it."""
    target = target_with_head(folder, family)
    assert target.folder is not None
    prefix = native_head(target).family.prefix.format(layers=2)
    edited(lambda tensors: [tensors.pop(name) for name in [*tensors] if name.startswith(prefix)])(target.folder)
    return target


def test_a_target_whose_layers_have_other_shapes_is_refused(tmp_path: Path) -> None:
    target = without(tmp_path, "mimo")
    other = copy.deepcopy(target.decoder.layers[0].mlp)
    for layer in target.decoder.layers:
        layer.mlp = torch.nn.ModuleList([other])
    with pytest.raises(DraftsmithError, match="no MTP head, and no layer with a head's shapes"):
        create_drafter(MtpConfig(kind="mtp"), target, 0)
