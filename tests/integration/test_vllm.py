"""Drafters in speculators' layout, served by vLLM on the CPU: its verify steps are those of replay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter, save_drafter, upgrade_drafter
from draftsmith.stages.drafters.dflash2.config import DFlash2Config
from draftsmith.stages.drafters.dspark.config import DSparkConfig
from draftsmith.stages.drafters.export import export_speculators
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.trace import tau
from draftsmith.stages.target.info import model_path
from draftsmith.stages.target.sampling import SamplingParams
from tests.stages.bench import GREEDY_TOKENS, Bench
from tests.testbed.drafter import DrafterArtifacts
from tests.vllm_cpu.engine import generate, vllm_python

PYTHON = vllm_python()
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.integration,
    pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON)),
]

PROMPTS, SAMPLED = 12, 24


@pytest.fixture
def python() -> Path:
    assert isinstance(PYTHON, Path)
    return PYTHON


def with_noise(drafter: Drafter, scales: dict[str, float]) -> Drafter:
    """By a part of a parameter's name, so that every part changes proposals and many are still kept."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            for part, scale in scales.items():
                if part in name:
                    parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return drafter


def dflash2(bench: Bench) -> Drafter:
    shape = DFlash2Config(kind="dflash2", conv_group_size=16, selector_rank=16, selector_top_k=8)
    return with_noise(
        upgrade_drafter(bench.drafters["trained"], shape, bench.target, seed=0), {"_conv.": 0.03, "codebook": 0.5}
    )


def dspark(bench: Bench) -> Drafter:
    shape = DSparkConfig(kind="dspark", markov_rank=8)
    return with_noise(upgrade_drafter(bench.drafters["trained"], shape, bench.target, seed=0), {"markov_w2": 0.7})


def dflash(bench: Bench) -> Drafter:
    return bench.drafters["trained"]


def windowed(bench: Bench) -> Drafter:
    """Its layer reads 20 positions back, and the block in both directions."""
    made: Any = dflash2(bench)
    layers = ["sliding_attention"] * made.config.num_hidden_layers
    window = {"layer_types": layers, "sliding_window": 20, "use_sliding_window": True, "is_causal": False}
    made.config.update(window)
    return cast("Drafter", made)


def exported(drafter: Drafter, made: DrafterArtifacts, bench: Bench, folder: Path) -> tuple[Path, Path, Drafter]:
    """The target's folder, the drafter's as `draftsmith export --format speculators` writes it, and what is read back
    from there."""
    target = model_path(made.target)
    save_drafter(drafter, folder / "own", torch.float32)
    export_speculators(folder / "own", target, str(target), folder / "speculators")
    return target, folder / "speculators", load_drafter(folder / "speculators", bench.target)


def trajectories(bench: Bench, answers: list[list[int]]) -> list[Trajectory]:
    return [
        Trajectory(p.prompt_id, p.token_ids + answer, len(p.token_ids))
        for p, answer in zip(bench.prompts, answers, strict=False)
    ]


@pytest.mark.parametrize("make", [dflash, dflash2, windowed, dspark])
def test_greedy_answers_and_verify_steps(
    make: Callable[[Bench], Drafter], python: Path, bench: Bench, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """Like `vllm serve FOLDER`, this engine gets only the drafter's folder."""
    _, folder, drafter = exported(make(bench), tiny_drafter, bench, tmp_path)
    bench = bench.with_drafters({"it": drafter, "trained": bench.drafters["trained"]})  # prompts without a near-tie
    greedy = {"temperature": 0.0, "max_tokens": GREEDY_TOKENS}
    prompts = [p.token_ids for p in bench.prompts[:PROMPTS]]
    answers = generate(python, tmp_path / "vllm", prompts, [greedy] * len(prompts), model=str(folder))
    plain = [bench.greedy[p.prompt_id] for p in bench.prompts[:PROMPTS]]
    assert [each.tokens for each in answers] == plain
    traces = Replayer(bench.target).traces(bench.drafters, trajectories(bench, plain))
    steps = {name: [len(trace.anchors) for trace in each] for name, each in traces.items()}
    assert [each.steps for each in answers] == steps["it"]
    for answer, trace in zip(answers, traces["it"], strict=True):  # it also counts what was accepted after a cut
        after_cut = answer.accepted - int(trace.accepted.sum())
        assert after_cut == 0 if len(answer.tokens) < GREEDY_TOKENS else 0 <= after_cut < drafter.block_size
    assert tau(traces["it"]) > 1.3
    assert make is dflash or steps["it"] != steps["trained"], "what it has more than DFlash shows"


@pytest.mark.parametrize(("make", "method", "other"), [(dflash2, "dflash", 4.0), (dspark, "dspark", 2.0)])
def test_sampled_verify_steps_follow_the_distribution_of_replay(
    make: Callable[[Bench], Drafter],
    method: str,
    other: float,
    python: Path,
    bench: Bench,
    tiny_drafter: DrafterArtifacts,
    tmp_path: Path,
) -> None:
    """Proposals sampled from the drafter's own distribution: on the given answers, as many steps as replay takes.
    other: a temperature at which it takes clearly others."""
    target, folder, drafter = exported(make(bench), tiny_drafter, bench, tmp_path)
    prompts = [p.token_ids for p in bench.prompts[:SAMPLED]]
    sampling = [{"temperature": 1.0, "max_tokens": 48, "seed": i} for i in range(len(prompts))]
    # without `method` vLLM guesses it from the folder's name, and runs a drafter of an unknown name as another model
    config = {"model": str(folder), "method": method, "draft_sample_method": "probabilistic"}
    engine: dict[str, Any] = {"model": str(target), "speculative_config": {**config, "num_speculative_tokens": 7}}
    answers = generate(python, tmp_path / "vllm", prompts, sampling, **engine)
    texts = trajectories(bench, [each.tokens for each in answers])
    steps = np.array([each.steps for each in answers])

    def distance(sampling: SamplingParams) -> float:
        """Mean difference of steps, in standard errors."""
        replayed = Replayer(bench.target, ReplayOptions(sampling=sampling)).traces({"it": drafter}, texts)["it"]
        difference = steps - np.array([len(trace.anchors) for trace in replayed])
        return float(difference.mean() / (difference.std(ddof=1) / np.sqrt(len(steps))))

    assert abs(distance(SamplingParams(1.0))) < 4
    assert abs(distance(SamplingParams(other))) > 5, "that of another temperature would be seen"
