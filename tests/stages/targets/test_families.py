"""Targets of many families, random weights in float32: every forward against the family's own in transformers.

Texts are several windows long, so that what a window forgets, and what a state holds, is seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from transformers import AutoConfig

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context
from draftsmith.stages.drafters.checkpoint import create_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.step_tables import steps_table
from draftsmith.stages.targets import layers as capabilities
from draftsmith.stages.targets.attention import scored_attention
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.estimate import ModelSize, target_size
from draftsmith.stages.targets.info import LogitMap, TargetInfo, read_target_info, write_target_info
from draftsmith.stages.targets.kv_cache import KeyValueSlots, SlotCache
from draftsmith.stages.targets.layers import Layers
from draftsmith.stages.targets.model_parts import model_class
from draftsmith.stages.targets.sampling import SamplingParams
from draftsmith.stages.targets.self_check import check_agreement
from draftsmith.stages.training.config import OpdConfig, TrainingConfig
from draftsmith.stages.training.opd.body import MinedData, OpdTraining
from draftsmith.stages.training.response_loss import TargetSignal
from draftsmith.stages.training.softmax_heads import HeadSource, LossContext
from tests.stages.bench import step_rows
from tests.stages.training.case import mined_table
from tests.testbed.families import ALTERNATING, FAMILIES, RECURRENT, SHAPE, WINDOW, WORDS, write_family
from tests.testbed.random_target import VOCAB_SIZE, resolved, save

TOLERANCE = 2e-4  # of hidden states and nats, float32: attention and states are computed in other orders
CLEAR = 2e-3  # nats between the best two tokens: no order of computing turns it round
NEW_TOKENS, BLOCK, LAYERS = 24, 5, (0, 1)
PROMPT_LENGTHS = (3, 11)
# sliding windows, states, a latent with an indexer, and keys that layers share
ONE_OF_EACH_CACHE = ("gpt-oss", "Qwen3-Next", "GLM-5", "Gemma 4 E2B")


class Pairs(DFlashDrafter):
    """A drafter that mostly proposes the frequent successor of a token, so that accepted lengths vary."""

    following: torch.Tensor  # [V]

    @torch.no_grad()
    def propose(
        self,
        context: Context,
        anchor_tokens: torch.Tensor,
        anchors: torch.Tensor,
        block_size: int,
        head: Head,
    ) -> torch.Tensor:
        own = super().propose(context, anchor_tokens, anchors, block_size, head)
        chain = [anchor_tokens]
        for offset in range(1, block_size):
            by_weights = own[..., offset - 1]
            chain.append(torch.where((anchors + offset) % 5 == 0, by_weights, self.following[chain[-1]]))
        return torch.stack(chain[1:], -1)


@dataclass
class Case:
    """A family's model of transformers, and its target."""

    family: str
    folder: Path
    target: Target
    reference: Any

    @classmethod
    def made(cls, family: str, folder: Path) -> Case:
        write_family(folder, family)
        loader = model_class(AutoConfig.from_pretrained(folder))
        reference = loader.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        return cls(family, folder, Target.from_source(folder, dtype="float32", device="cpu"), reference)

    @cached_property
    def texts(self) -> list[tuple[list[int], list[int]]]:
        """Prompts and transformers' own greedy answers, each up to the first choice that is not clear; four long ones
        of two lengths of prompts."""
        generator, found = torch.Generator().manual_seed(1), []
        for length in PROMPT_LENGTHS:
            ids = torch.randint(0, 50, (8, length), generator=generator)
            out = self.reference.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
                pad_token_id=0, eos_token_id=sorted(self.target.eos_ids),
            )  # fmt: skip
            best = self.distribution(out.tolist())[:, length - 1 : -1].topk(2).values
            unclear = best[..., 0] - best[..., 1] < CLEAR
            ended = torch.isin(out[:, length:], torch.tensor(sorted(self.target.eos_ids)))
            answers = [
                row[
                    : min([int(i) for i in cut.nonzero()] + [int(i) + 1 for i in end.nonzero()] + [NEW_TOKENS])
                ].tolist()
                for row, cut, end in zip(out[:, length:], unclear, ended, strict=True)
            ]
            long = [(prompt, answer) for prompt, answer in zip(ids.tolist(), answers, strict=True) if len(answer) > 9]
            assert len(long) >= 2
            found += long[:2]
        return found

    def distribution(self, texts: list[list[int]]) -> torch.Tensor:
        """Log-probs [n, T, V] of one plain forward of transformers', padded on the right."""
        width = max(map(len, texts))
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in texts])
        with torch.no_grad():
            logits: torch.Tensor = self.reference(input_ids=ids, use_cache=False).logits
        return logits.log_softmax(-1)

    @cached_property
    def drafter(self) -> Pairs:
        shape = DFlashConfig(num_layers=1, block_size=BLOCK, target_layer_ids=LAYERS)
        drafter = create_drafter(shape, self.target, seed=0)
        assert isinstance(drafter, DFlashDrafter)
        counts = np.zeros((self.target.embedding.shape[0],) * 2)
        for prompt, answer in self.texts:
            np.add.at(counts, ((prompt[-1:] + answer)[:-1], answer), 1)
        drafter.__class__ = Pairs
        assert isinstance(drafter, Pairs)
        drafter.following = torch.from_numpy(counts.argmax(1))
        return drafter.eval()

    @cached_property
    def decoded(self) -> dict[str, Completion]:
        """Speculatively, in batches of rows that finish and begin at different times."""
        requests = [Request(str(i), prompt, len(answer)) for i, (prompt, answer) in enumerate(self.texts)]
        engine = EmbeddedEngine(self.target, self.drafter, slots=3, capacity=64)
        return {completion.request.request_id: completion for completion in engine.generate(requests)}

    @cached_property
    def mined(self) -> pa.Table:
        """In groups of two texts."""
        replayer = Replayer(self.target, ReplayOptions(tokens_per_group=80))
        return steps_table(VERIFY_STEPS, chain.from_iterable(replayer.mine(self.drafter, self.trajectories)))

    @cached_property
    def trajectories(self) -> list[Trajectory]:
        return [Trajectory(str(i), prompt + answer, len(prompt)) for i, (prompt, answer) in enumerate(self.texts)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return cache(lambda family: Case.made(family, tmp_path_factory.mktemp("family")))


@pytest.fixture(params=list(FAMILIES))
def case(request: pytest.FixtureRequest, made: Callable[[str], Case]) -> Case:
    return made(request.param)


@pytest.fixture(params=ONE_OF_EACH_CACHE)
def of_each_cache(request: pytest.FixtureRequest, made: Callable[[str], Case]) -> Case:
    return made(request.param)


def test_capabilities_are_known_without_weights(case: Case) -> None:
    info = case.target.info
    recurrent = case.family in RECURRENT
    assert (info.rewindable, info.tree_forward) == (not recurrent, not recurrent)
    scaled, capped = LogitMap(0.25), LogitMap(1.0, 3.0)
    maps = dict.fromkeys(("Gemma 2", "Gemma 4", "Gemma 4 E2B"), capped)
    maps |= dict.fromkeys(("Command R7B", "Granite", "Granite 4 hybrid", "Falcon-H1", "MiniCPM3"), scaled)
    assert info.logit_map == maps.get(case.family, LogitMap())
    size = target_size(case.folder)
    cache = case.target.new_cache(1, 2)
    case.target.step(torch.tensor([[1, 2]]), torch.tensor([[0, 1]]), cache, slice(0, 1))
    of_layers = [entries_of(cache.slots[layer]) + entries_of(cache.indexers.get(layer)) for layer in range(3)]
    assert 2 * size.entry in of_layers
    assert case.target.embedding_scale == pytest.approx(32**0.5 if "Gemma" in case.family else 1.0)


def test_a_latent_is_counted_as_it_is_cached() -> None:
    """The bytes of DeepSeek-V3 are those of arXiv 2505.09343; its tokens go through one shared expert too."""
    from transformers import DeepseekV3Config

    size = ModelSize.from_config(DeepseekV3Config(), 0)
    assert size.kv_bytes_per_token(2) == 70_272
    assert size.active == (8 + 1) * 2048


def test_kimi_k2_is_a_deepseek_v3(tmp_path: Path) -> None:
    """Its config.json names code of the repository, which is not run."""
    write_family(tmp_path, "DeepSeek-V3")
    named = Target.from_source(tmp_path, dtype="float32", device="cpu")
    path = tmp_path / "config.json"
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "kimi_k2", "auto_map": code}))
    target = Target.from_source(tmp_path, dtype="float32", device="cpu")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(target.read(ids).hidden, named.read(ids).hidden)


def entries_of(slots: KeyValueSlots | None) -> int:
    """Return how many numbers are cached."""
    return 0 if slots is None else sum(x.numel() for x in (slots.keys, slots.values) if x is not None)


def test_features_and_logprobs_are_those_of_a_plain_forward(case: Case) -> None:
    tokens = max((t.tokens for t in case.trajectories), key=len)
    assert len(tokens) > 3 * WINDOW
    with torch.no_grad():
        states = case.reference(
            input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True
        ).hidden_states
    layers = LAYERS[::-1]
    expected = torch.cat([states[layer + 1] for layer in layers], -1)
    padded = torch.tensor([[*tokens, 1, 2], tokens[:5] + [0] * (len(tokens) - 3)])  # padding behind, of another row
    read = case.target.read(padded, layers)
    assert read.features is not None
    close(read.features[:1, : len(tokens)], expected)
    close(case.target.features(padded, layers)[:1, : len(tokens)], expected)
    close(case.target.logits(read.hidden[0, : len(tokens)]).log_softmax(-1), case.distribution([tokens])[0])


def test_greedy_decoding_equals_transformers(case: Case) -> None:
    expected = {str(i): answer for i, (_, answer) in enumerate(case.texts)}
    plain = EmbeddedEngine(case.target, slots=3, capacity=64)
    requests = [completion.request for completion in case.decoded.values()]
    for answers in (case.decoded.values(), list(plain.generate(requests))):
        assert {c.request.request_id: c.response_ids for c in answers} == expected
    accepted = {accepted for completion in case.decoded.values() for _, accepted, _ in step_rows(completion.steps)}
    assert 0 in accepted and len(accepted) > 2


def test_sampled_decoding_is_the_same_with_a_drafter(of_each_cache: Case) -> None:
    case = of_each_cache
    requests = [
        Request(str(i), prompt, NEW_TOKENS, SamplingParams(1.0, 0.9, 30), seed=i)
        for i, (prompt, _) in enumerate(case.texts)
    ]
    engines = (EmbeddedEngine(case.target, drafter, slots=3, capacity=64) for drafter in (None, case.drafter))
    plain, assisted = ({c.request.request_id: c.response_ids for c in engine.generate(requests)} for engine in engines)
    assert assisted == plain


def test_replay_finds_the_steps_of_speculative_decoding(case: Case) -> None:
    traces = Replayer(case.target).traces({"drafter": case.drafter}, case.trajectories)["drafter"]
    for trajectory, trace in zip(case.trajectories, traces, strict=True):
        steps = case.decoded[trajectory.trajectory_id].steps
        assert step_rows(steps) == step_rows(trace)


def test_proposals_are_scored_after_their_own_prefix(case: Case) -> None:
    behind_rejections = 0
    rows = case.mined.to_pylist()
    for trajectory in case.trajectories:
        steps = [row for row in rows if row["trajectory_id"] == trajectory.trajectory_id]
        distributions = case.distribution(
            [trajectory.tokens[: step["anchor"] + 1] + step["proposed_ids"] for step in steps]
        )
        for step, distribution in zip(steps, distributions, strict=True):
            anchor = step["anchor"]
            judged = min(BLOCK - 1, len(trajectory.tokens) - 1 - anchor)
            expected = distribution[range(anchor, anchor + judged), step["proposed_ids"][:judged]].tolist()
            assert step["target_logprobs"][:judged] == pytest.approx(expected, abs=TOLERANCE)
            behind_rejections += max(0, judged - (step["rejected_offset"] or judged))
    assert behind_rejections > 4


def test_losses_and_proposals_read_the_familys_own_distribution(case: Case) -> None:
    tokens = case.trajectories[0].tokens
    distribution, hidden = case.distribution([tokens])[0], case.target.read(torch.tensor([tokens])).hidden[0]
    heads = HeadSource(case.drafter, case.target.head_weight, TrainingConfig()).sample(np.random.default_rng(0), [])
    following = torch.tensor(tokens[1:])
    context = LossContext(heads, case.target.head_weight, positions_per_chunk=512)
    signal = TargetSignal(following, following, hidden[:-1], context, temperature=1.0)
    close(signal.at(slice(None), distribution=True).log_probs(), distribution[:-1])
    close(signal.with_token_logprobs().token_logprob, distribution[:-1].gather(1, following[:, None])[:, 0])
    close(heads.drafter.logits(hidden).log_softmax(-1), distribution)


def test_opd_takes_a_step_with_the_rejected_stream(of_each_cache: Case) -> None:
    case = of_each_cache
    config = OpdConfig.model_validate({"sequences_per_step": 3, "loss": "paper"})
    data = MinedData(trajectories=case.trajectories, mined=mined_table([], BLOCK - 1))
    training = OpdTraining(case.drafter, case.target, data, config)
    (report,) = training.micro_batches(0, None)
    report.loss.backward()
    assert report.positions > 0 and torch.isfinite(report.loss)
    gradient = case.drafter.fc.weight.grad
    assert gradient is not None and float(gradient.norm()) > 0
    case.drafter.zero_grad()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)


# ---- what is seen of a target that is computed wrongly


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a target artifact of Gemma 2."""
    folder = tmp_path_factory.mktemp("capped")
    write_family(folder / "model", "Gemma 2")
    return resolved(folder)


def test_logits_that_differ_from_the_models_are_one_clear_error(capped: Path, tmp_path: Path) -> None:
    info: TargetInfo = read_target_info(capped)
    assert info.layer_kinds == ["full_attention", "sliding_attention"] and info.logit_softcap == 3.0
    write_target_info(info.model_copy(update={"logit_softcap": None}), tmp_path)
    with pytest.raises(DraftsmithError, match="Gemma2ForCausalLM"):
        Target.load(tmp_path, device="cpu")


def test_layers_with_several_vectors_per_token_are_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before weights are read if the config tells it, otherwise when the target is loaded."""
    from transformers import Gemma2Config, Gemma3nForCausalLM, Gemma3nTextConfig

    shape = SHAPE | {"tie_word_embeddings": True, "sliding_window": WINDOW}
    config = Gemma3nTextConfig(
        **shape, layer_types=ALTERNATING, activation_sparsity_pattern=[0.0] * 3, num_kv_shared_layers=1, laurel_rank=4,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB_SIZE,
    )  # fmt: skip
    save(Gemma3nForCausalLM(config), tmp_path, WORDS)
    with pytest.raises(DraftsmithError, match="gemma3n_text"):
        Target.from_source(tmp_path, dtype="float32", device="cpu")
    unknown = Layers.from_config(Gemma2Config(**shape, layer_types=ALTERNATING))
    monkeypatch.setattr(Layers, "from_config", lambda _config: unknown)
    with pytest.raises(DraftsmithError, match="Gemma3nForCausalLM"):
        Target.from_source(tmp_path, dtype="float32", device="cpu")


until_5_24 = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 25),
    reason="since transformers 5.25 no layer updates a cache's states in place",
)


@pytest.mark.parametrize(
    ("family", "broken", "said"),
    [
        ("gpt-oss", "masks", "cached forwards differ"),
        ("GLM-5", "indexer", "cached forwards differ"),
        ("LFM2", "commit", "cached forwards differ"),
        pytest.param("Granite 4 hybrid", "write_back", "cached forwards of one token differ", marks=until_5_24),
        pytest.param("Granite 4 hybrid", "copy", "cached forwards of one token differ", marks=until_5_24),
        pytest.param("Kimi Linear", "copy", "cached forwards of one token differ", marks=until_5_24),
    ],
)
def test_forwards_that_differ_from_the_models_are_one_clear_error(
    family: str, broken: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(tmp_path / "model", family)
    target = Target.from_source(tmp_path / "model", dtype="float32", device="cpu")
    check_agreement(target, "it")
    if broken == "masks":
        monkeypatch.setattr(
            capabilities.Layers,
            "masks",
            lambda _self, _visible, positions, entries, _dtype: torch.zeros(*positions.shape, entries.shape[1])[
                :, None
            ],
        )
    elif broken == "indexer":  # whose keys are forgotten
        monkeypatch.setattr(
            SlotCache,
            "update_indexer",
            lambda self, keys, _layer: keys.new_zeros(len(keys), self._at.length, keys.shape[-1]),
        )
    elif broken == "commit":
        monkeypatch.setattr(Target, "commit", lambda *_: None)
    elif broken == "write_back":
        monkeypatch.setattr(SlotCache, "write_back", lambda _self: None)
    else:  # the state itself, which a step of one token overwrites
        monkeypatch.setattr(torch.Tensor, "clone", lambda self: self)
    with pytest.raises(DraftsmithError, match=said):
        check_agreement(target, "it")


# ---- attention that no fused kernel computes


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(1.5, False), (None, True), (1.5, True)])
def test_capped_scores_and_sinks_in_chunks(
    softcap: float | None, with_sinks: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, heads, kv_heads, T, D = 2, 6, 2, 7, 8
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n, heads, T, D, generator=generator)
    keys, values = (torch.randn(n, kv_heads, T, D, generator=generator) for _ in range(2))
    seen = (torch.rand(n, 1, T, T, generator=generator) < 0.6) if masked else torch.ones(T, T).tril().bool()[None, None]
    seen[..., 0] = True
    sinks = torch.randn(heads, generator=generator) if with_sinks else None
    scores = query @ keys.repeat_interleave(3, 1).transpose(2, 3) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores) * seen
    total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[None, :, None, None])
    expected = (weights / total @ values.repeat_interleave(3, 1)).transpose(1, 2)
    for at_once in (2**24, 3 * n * heads * T):
        monkeypatch.setattr("draftsmith.stages.targets.attention._SCORES", at_once)
        for mask in (seen, torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)) if masked else (None,):
            out = scored_attention(query, keys, values, mask, 0.3, softcap, sinks)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
