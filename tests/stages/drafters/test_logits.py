"""Drafters of targets whose logits are scaled or capped products of their head, as engines compute them; and upgrades
of plain ones to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import create_drafter, load_drafter, save_drafter, upgrade_drafter
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from draftsmith.stages.drafters.dspark import checkpoint as dspark
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.drafters.speculators import to_speculators
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import LogitMap
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.softmax_heads import HeadSource
from tests.testbed.families import write_family
from tests.testbed.random_target import MASK, random_drafter

DFLASH2 = DFlash2Config(kind="dflash2", target_layer_ids=(0,), num_layers=1)
DSPARK = DSparkConfig(kind="dspark", target_layer_ids=(0,), num_layers=1, mask_token=MASK)
FIELDS = {"Gemma 2": (1.0, 3.0), "Granite": (0.25, 0)}  # as SGLang reads them from a DFlash2's config


@pytest.fixture(scope="module", params=FIELDS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def target(family: str, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("family")
    write_family(folder, family)
    target = Target.from_source(folder, dtype="float32", device="cpu")
    assert not target.logit_map.is_identity
    return target


def states(target: Target, count: int = 5) -> torch.Tensor:
    """Return states [n, H] whose products with the head are not small compared with a cap of 3."""
    return 2 * torch.randn(count, target.embedding.shape[1], generator=torch.Generator().manual_seed(0))


def test_dspark_samples_from_products_and_bias_as_sglang_does(
    target: Target,
) -> None:
    drafter = create_drafter(DSPARK, target, 0)
    assert isinstance(drafter, DSparkDrafter)
    w2 = drafter.markov_head.markov_w2.weight
    w2.data.normal_(generator=torch.Generator().manual_seed(1))
    heads = HeadSource(drafter, target.head_weight, TrainingConfig()).sample(np.random.default_rng(0), [])
    hidden, before = states(target), torch.tensor([3, 9, 27, 1, 0])
    both = torch.cat([hidden, read := drafter.markov_head.read(before)], -1)
    expected = hidden @ target.head_weight.T + read @ w2.T
    for head in (heads.drafter, drafter.drafting_head(target.head_weight, None)):
        torch.testing.assert_close(head.logits(both), expected)
    torch.testing.assert_close(heads.target.logits(hidden), target.logits(hidden))


@pytest.mark.parametrize("new", [True, False])
def test_the_dflash2_selector_starts_at_the_logits_of_an_engine(
    new: bool, family: str, target: Target, tmp_path: Path
) -> None:
    drafter = create_drafter(DFLASH2, target, 0) if new else upgrade_drafter(random_drafter(target), DFLASH2, target, 0)
    assert isinstance(drafter, DFlash2Drafter)
    save_drafter(drafter, tmp_path, torch.float32)
    raw = json.loads((tmp_path / "config.json").read_text())
    found = tuple(raw["dflash_config"][name] for name in ("output_multiplier", "final_logit_softcapping"))
    assert found == FIELDS[family]
    loaded = load_drafter(tmp_path, target)
    assert isinstance(loaded, DFlash2Drafter)
    hidden, previous = states(target), torch.arange(5)
    for each in (drafter, loaded):
        head = each.head_over(target.head_weight, None)
        columns, unary = each.candidate_selector.candidates(hidden, head)
        logits = target.logits(hidden).gather(-1, columns)
        torch.testing.assert_close(unary, logits)
        torch.testing.assert_close(each.selector_logits(hidden, previous, columns, head), logits)
    with pytest.raises(DraftsmithError, match="speculators has no such field"):
        to_speculators(raw, "someone/target", [])


def test_without_scale_and_cap_in_the_config_logits_are_the_products(target: Target, tmp_path: Path) -> None:
    drafter = create_drafter(DFLASH2, target, 0)
    assert isinstance(drafter, DFlash2Drafter)
    for name in ("output_multiplier", "final_logit_softcapping"):
        del drafter.config.dflash_config[name]
    save_drafter(drafter, tmp_path, torch.float32)
    loaded = load_drafter(tmp_path, target)
    assert isinstance(loaded, DFlash2Drafter) and loaded.candidate_selector.unary_map == LogitMap()


def test_an_upgraded_dspark_starts_with_the_scaled_heads_distribution(family: str, target: Target) -> None:
    """With a cap the proposals are the same, but the distribution is that of the products."""
    plain = random_drafter(target)
    plain.logit_map, plain.embedding_scale = target.logit_map, target.embedding_scale
    upgrade = upgrade_drafter(plain, DSPARK, target, seed=0)
    tokens, anchors = torch.arange(1, 9)[None], torch.tensor([[4, 6]])
    at = tokens.gather(1, anchors)
    proposed, logits = [], []
    with torch.no_grad():
        for drafter in (plain, upgrade):
            context = drafter.encode(target.features(tokens, [2, 0]), tokens, torch.arange(8)[None])
            hidden = drafter.block_hidden(context, at[..., None].expand(-1, -1, 4), anchors)
            head = drafter.drafting_head(target.head_weight, None)
            logits.append(head.logits(hidden))
            proposed.append(drafter.propose(context, at, anchors, 5, head))
    assert torch.equal(*proposed)
    if family == "Granite":
        torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [DFLASH2, DSPARK])
def test_an_upgrade_has_the_dtypes_of_its_checkpoint(
    shape: DFlash2Config | DSparkConfig, plain_target: Target, tmp_path: Path
) -> None:
    save_drafter(random_drafter(plain_target), tmp_path / "plain", torch.bfloat16)
    upgrade = upgrade_drafter(
        load_drafter(tmp_path / "plain", plain_target, torch.bfloat16), shape, plain_target, seed=0
    )
    save_drafter(upgrade, tmp_path / "upgraded", torch.bfloat16)
    loaded = load_drafter(tmp_path / "upgraded", plain_target, torch.bfloat16)
    assert dtypes(upgrade) == dtypes(loaded)
    assert {torch.bfloat16} <= set(dtypes(upgrade).values())
    assert (
        not {"output_multiplier", "final_logit_softcapping"}
        & json.loads((tmp_path / "upgraded" / "config.json").read_text())["dflash_config"].keys()
    )


def dtypes(drafter: Drafter) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in drafter.named_parameters()}


def test_a_target_for_which_sglang_divides_the_states_of_a_dspark_is_refused(plain_target: Target) -> None:
    config = dspark.new_config(DSPARK, plain_target.model.config, lambda: plain_target.tokenizer)
    target_config = type(plain_target.model.config)(**plain_target.model.config.to_dict())
    dspark.check_fits(config, target_config, "here")
    target_config.logits_mup_width_multiplier = 24.0
    with pytest.raises(DraftsmithError, match=r"logits_mup_width_multiplier is 24\.0.*kind dflash or dflash2"):
        dspark.check_fits(config, target_config, "here")
