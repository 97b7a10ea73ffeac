"""Tests of every architecture: mask, drafting, replay, decoding and checkpoint, on random weights.

Training is in `tests/stages/training/`.
"""

from __future__ import annotations

import ast
import copy
from functools import partial
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters import base
from draftsmith.stages.drafters.base import Drafter, PreparedDrafter
from draftsmith.stages.drafters.checkpoint import UPGRADES, check_complete, create_drafter, load_drafter, save_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dspark import model as dspark
from draftsmith.stages.drafters.eagle3.config import Eagle3Config
from draftsmith.stages.drafters.registry import KINDS, DrafterConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.chains import replay_chains, replay_sequentially
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.bench import step_rows
from tests.stages.drafters.edits import edit_tensors, save
from tests.stages.drafters.texts import Texts, logits_of
from tests.testbed import random_target, ties
from tests.testbed.architectures import RANDOM
from tests.testbed.dspark import random_dspark

ROOT = Path(__file__).parents[3]
MAY_NAME_KINDS = {
    "flows/config/load.py",  # what a section means that leaves its kind out
    "stages/drafters/checkpoint.py",  # and a checkpoint that names the class of its authors' code
    "stages/drafters/registry.py",  # the list of them
    "stages/drafters/speculators.py",  # the form that each has in another layout
    "stages/training/estimate.py",  # what a training of each keeps
    "stages/engines/servers/requirements.py",  # what an engine's own configuration calls each
    "stages/engines/vllm/server.py",  # what vLLM calls a native head
    "stages/engines/vllm/swap.py",
}
ANCHORS = torch.tensor([[4, 6, 7], [5, 4, 9], [8, 5, 6]])
TOLERANCE = 3e-5  # float32, the same sums in another order, on values of order one to ten


@pytest.fixture(params=RANDOM)
def drafter(request: pytest.FixtureRequest, plain_target: Target) -> Drafter:
    return RANDOM[request.param](plain_target)


@pytest.fixture
def texts(plain_target: Target, drafter: Drafter) -> Texts:
    return Texts(plain_target, drafter)


# ---- mask


def test_packed_blocks_equal_one_at_a_time(texts: Texts) -> None:
    """In any order, no block sees another one, or what is at or after its anchor."""
    anchors = torch.tensor([[t.first_anchor + i for i in (9, 0, 4, 5)] + [t.last_anchor] for t in texts.trajectories])
    context, chains = texts.context(), texts.chains(anchors)
    with torch.no_grad():
        hidden = texts.drafter.block_hidden(context, chains, anchors)
        proposals = texts.drafter.propose(context, chains[..., 0], anchors, texts.block, texts.head)
    for row, index in product(range(len(anchors)), range(anchors.shape[1])):
        expected, tokens = texts.alone(row, int(anchors[row, index]))
        torch.testing.assert_close(hidden[row, index], expected, atol=TOLERANCE, rtol=TOLERANCE)
        assert proposals[row, index].tolist() == tokens


# ---- drafting


def test_drafting_from_slots_equals_drafting_from_a_full_context(texts: Texts) -> None:
    """Follow an engine: read padded prompts, then blocks from the anchor on, of which some tokens are accepted."""
    rows, block, drafter = len(texts.trajectories), texts.block, texts.drafter
    slots = drafter.new_context(rows + 1, texts.tokens.shape[1] + 2 * block)
    anchors = torch.tensor([9, 4, 6])
    generator, every = torch.Generator().manual_seed(0), slice(0, rows)
    width = int(anchors.max())
    padding = torch.arange(width) >= anchors[:, None]
    features, tokens = texts.features[:, :width].clone(), texts.tokens[:, :width].clone()
    features[padding], tokens[padding] = 50.0, 0
    with torch.no_grad():
        drafter.extend(slots, every, features, tokens, texts.positions[:, :width], anchors)
    for step in range(5):
        context = drafter.select(slots, every, int(anchors.max()))  # shorter rows hold rejected entries
        chains = texts.chains(anchors[:, None])
        with torch.no_grad():
            hidden = drafter.block_hidden(context, chains, anchors[:, None])
            proposals = drafter.propose(context, chains[..., 0], anchors[:, None], block, texts.head)
        for row in range(rows):
            expected, proposed = texts.alone(row, int(anchors[row]))
            torch.testing.assert_close(hidden[row, 0], expected, atol=TOLERANCE, rtol=TOLERANCE)
            assert proposals[row, 0].tolist() == proposed
        at = anchors[:, None] + torch.arange(block)
        tokens = F.pad(texts.tokens, (0, block)).gather(1, at)
        features = torch.stack([F.pad(f, (0, 0, 0, block))[i] for f, i in zip(texts.features, at, strict=True)])
        accepted = 1 + (step + torch.arange(rows)) % block  # the anchor at least, the whole block at most
        rejected = torch.arange(block) >= accepted[:, None]
        features[rejected] = 30 * torch.randn(features[rejected].shape, generator=generator)
        tokens[rejected] = torch.randint(0, 50, tokens[rejected].shape, generator=generator)
        with torch.no_grad():
            drafter.extend(slots, every, features, tokens, at)
        anchors = anchors + accepted


@torch.no_grad()
def test_proposals_are_the_best_token_of_every_offset_also_in_chunks(
    texts: Texts, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = (texts.context(), texts.tokens.gather(1, ANCHORS), ANCHORS, texts.block, texts.head)
    proposed, drafting = texts.drafter.propose(*blocks), texts.drafter.block_sampler(*blocks)
    tokens = blocks[1]
    for k in range(texts.block - 1):
        tokens = texts.head.to_tokens(drafting.logits(tokens).argmax(-1))
        assert torch.equal(tokens, proposed[..., k])
    for numbers in (1, 3000):
        for module in (base, dspark):
            monkeypatch.setattr(module, "LOGITS_PER_CHUNK", numbers)
        assert torch.equal(texts.drafter.propose(*blocks), proposed)


@torch.no_grad()
def test_sampler_probabilities_equal_those_of_training(texts: Texts) -> None:
    drafter, context, at = texts.drafter, texts.context(), texts.tokens.gather(1, ANCHORS)
    given = torch.randint(0, 50, (3, 3, texts.block - 1), generator=torch.Generator().manual_seed(0))
    given[..., 0] = at
    trained = logits_of(drafter, drafter.block_hidden(context, given, ANCHORS), given, texts.head)
    drafting = drafter.block_sampler(context, at, ANCHORS, texts.block, texts.head)
    for k in range(texts.block - 1):
        other = copy.copy(drafting)  # goes its own way, and changes nothing here
        other.logits(given[..., k] + 1)
        torch.testing.assert_close(drafting.logits(given[..., k]), trained[..., k, :], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "shape",
    [
        DFlashConfig(num_layers=1, block_size=4, target_layer_ids=(1,)),
        Eagle3Config(kind="eagle3", block_size=4, target_layer_ids=(0, 1, 3)),
    ],
)
def test_a_fresh_drafter_is_seeded_and_starts_at_logits_of_unit_spread(
    shape: DFlashConfig | Eagle3Config, plain_target: Target
) -> None:
    first, same, other = (create_drafter(shape, plain_target, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    texts, anchors = Texts(plain_target, first), torch.arange(1, 9).expand(3, -1)
    with torch.no_grad():
        logits = texts.head.logits(first.block_hidden(texts.context(), texts.chains(anchors), anchors))
    assert 0.3 < float(logits.std()) < 3


# ---- replay and decoding


@pytest.mark.parametrize("block_size", [5, 3])
def test_replay_is_sequential_speculative_decoding(texts: Texts, block_size: int) -> None:
    traces = [
        replay_chains(
            PreparedDrafter(texts.drafter, texts.head, block_size), texts.context(), texts.trajectories, chains
        )
        for chains in (1, 6, None)
    ]
    for row, trajectory in enumerate(texts.trajectories):
        alone = texts.context(slice(row, row + 1))
        expected = replay_sequentially(texts.drafter, alone, trajectory, block_size, texts.head)
        for found in traces:
            np.testing.assert_array_equal(found[row].anchors, expected.anchors)
            np.testing.assert_array_equal(found[row].proposed, expected.proposed)
            np.testing.assert_array_equal(found[row].accepted, expected.accepted)


def test_decoding_is_lossless_and_its_steps_are_those_of_replay(texts: Texts, plain_target: Target) -> None:
    """Greedy and sampled requests share one batch, and later requests reuse the rows.

    If proposals are sampled, answers are the same in distribution only, which other tests check.
    """
    sampled = 0.0 if texts.drafter.samples_proposals else 1.0
    requests = [
        Request(str(i), t.tokens[: 4 + 3 * i], 14 + i, SamplingParams(sampled * (i % 2)), i)
        for i, t in enumerate(random_target.trajectories(4, seed=9))
    ]
    plain = {c.request.request_id: c for c in EmbeddedEngine(plain_target, slots=4, capacity=64).generate(requests)}
    checked = 0
    for answer in EmbeddedEngine(plain_target, texts.drafter, slots=2, capacity=64).generate(requests):
        assert answer.response_ids == plain[answer.request.request_id].response_ids
        prompt = answer.request.prompt_ids
        trajectory = Trajectory("", prompt + answer.response_ids, len(prompt))
        if ties.draft_margin(plain_target, texts.drafter, trajectory) < ties.DRAFT_TIE:
            continue
        tokens = torch.tensor([trajectory.tokens])
        features = plain_target.read(tokens, texts.drafter.target_layer_ids).features
        assert features is not None
        with torch.no_grad():
            context = texts.drafter.encode(features, tokens, torch.arange(tokens.shape[1])[None])
        trace = replay_sequentially(texts.drafter, context, trajectory, texts.block, texts.head)
        assert step_rows(answer.steps) == step_rows(trace)
        checked += 1
    assert checked


# ---- checkpoint


FORMS = RANDOM | {
    "dspark, confidence": random_dspark,
    "dspark, confidence of states": partial(random_dspark, confidence_reads_token=False, from_anchor=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_round_trip_gives_the_same_drafter_and_the_same_bytes(
    form: str, plain_target: Target, tmp_path: Path
) -> None:
    texts = Texts(plain_target, FORMS[form](plain_target))
    save(texts.drafter, plain_target, tmp_path / "first")
    loaded = load_drafter(tmp_path / "first", plain_target)
    assert type(loaded) is type(texts.drafter) and not loaded.training
    assert loaded.info == texts.drafter.info
    assert loaded.frequent_tokens is not None and texts.drafter.frequent_tokens is not None
    assert loaded.frequent_tokens.tolist() == texts.drafter.frequent_tokens.tolist()
    state = texts.drafter.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert (loaded.block_size, list(loaded.target_layer_ids)) == (texts.block, list(texts.drafter.target_layer_ids))
    assert Texts(plain_target, loaded).alone(0, 12)[1] == texts.alone(0, 12)[1]
    assert torch.equal(Texts(plain_target, loaded).alone(0, 12)[0], texts.alone(0, 12)[0])
    save_drafter(loaded, tmp_path / "again", torch.float32)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


# ---- where it is known


def test_every_kind_is_accepted_in_a_config_and_checked(plain_target: Target) -> None:
    """A kind that is missing from the union of configs, or from the test bed, would go unnoticed."""
    shapes = get_args(get_args(DrafterConfig)[0])
    assert {get_args(shape.__origin__.model_fields["kind"].annotation)[0] for shape in shapes} == KINDS.keys()
    trained = {kind for kind, traits in KINDS.items() if not traits.native}  # a native head is its target's
    assert {make(plain_target).kind for make in RANDOM.values()} == trained
    assert {kind for pair in UPGRADES for kind in pair} <= KINDS.keys()


def test_no_module_outside_names_a_kind() -> None:
    """Outside their folders, code uses the interface instead of the kind."""
    modules = [path for folder in ("artifacts", "flows", "stages") for path in sorted((ROOT / folder).rglob("*.py"))]
    outside = [path for path in modules if path.parent.name not in KINDS]
    assert 100 < len(outside) < len(modules)
    assert {str(path.relative_to(ROOT)) for path in outside if names(path) & KINDS.keys()} == MAY_NAME_KINDS


def names(module: Path) -> set[str]:
    """Return the string literals of a module, without comments and docstrings of more than one word."""
    nodes = ast.walk(ast.parse(module.read_text(encoding="utf-8")))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_weights_that_do_not_match_the_config_are_found_without_loading(drafter: Drafter, tmp_path: Path) -> None:
    """A training loads its first drafter only after hours of rollouts."""
    save_drafter(drafter, tmp_path, torch.float32)
    check_complete(tmp_path)
    name = max(name for name, _ in drafter.named_parameters())
    edit_tensors(lambda tensors: tensors.update({"layers.0.other": torch.zeros(3)}))(tmp_path)
    with pytest.raises(DraftsmithError, match=r"has the unknown tensor layers\.0\.other"):
        check_complete(tmp_path)
    edit_tensors(lambda tensors: tensors.pop("layers.0.other"))(tmp_path)
    for edit, problem in (
        (lambda tensors: tensors.update({name: torch.zeros(3)}), "has the wrong shape for"),
        (lambda tensors: tensors.pop(name), "lacks tensor"),
    ):
        edit_tensors(edit)(tmp_path)
        with pytest.raises(DraftsmithError, match=f"{problem} {name}"):
            check_complete(tmp_path)
