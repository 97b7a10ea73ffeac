"""The plug-in without SGLang: log-probs of a chain, records, refused releases."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.artifacts.store.code_digest import code_digest
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.engines.sglang import plugin, plugin_hooks, server
from draftsmith.stages.engines.sglang.environment import PLUGIN_GROUP
from draftsmith.stages.engines.sglang.plugin_hooks import (
    BatchTrace,
    chain_logprobs,
    pack_steps,
    unpack_steps,
)
from draftsmith.stages.engines.sglang.protocol import KEY


@dataclass
class Sampling:
    custom_params: dict[str, Any] | None = None


@dataclass
class ServerRequest:
    """The fields of SGLang's request that the hooks use."""

    sampling_params: Sampling = field(default_factory=Sampling)
    customized_info: dict[str, list[Any]] | None = None


@dataclass
class Batch:
    reqs: list[ServerRequest]


@dataclass
class Commit:
    output_index: int
    token_ids: tuple[int, ...]


B, V = 4, 50


@pytest.fixture
def batch_tensors() -> dict[str, torch.Tensor]:
    """Return the tensors of a verification of three blocks of four."""
    draw = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(3 * B, V, generator=draw) * 3,
        "candidates": torch.randint(0, V, (3, B), generator=draw),
        "anchors": torch.tensor([10, 200_000, 30]),
        "accepted": torch.tensor([0, 3, 1], dtype=torch.int32),
        "bonus": torch.tensor([7, 151_668, 9]),
    }


def packed(rows: list[int], tensors: dict[str, torch.Tensor], logprobs: torch.Tensor | None = None) -> torch.Tensor:
    t = tensors
    if logprobs is None:
        logprobs = chain_logprobs(t["logits"], t["candidates"], rows)
    return pack_steps(rows, t["anchors"], t["candidates"], t["accepted"], t["bonus"], logprobs)


@pytest.mark.parametrize("rows", [[0, 1, 2], [2], [2, 0]])
def test_the_logprobs_are_those_of_each_proposal_after_its_predecessors(
    batch_tensors: dict[str, torch.Tensor], rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin_hooks, "CHUNK", 2)  # rows end inside a chunk
    logits, candidates = batch_tensors["logits"], batch_tensors["candidates"]
    found = chain_logprobs(logits, candidates, rows)
    for i, row in enumerate(rows):
        for j in range(B - 1):
            exact = logits[row * B + j].double().log_softmax(-1)[candidates[row, j + 1]]
            assert found[i, j].item() == pytest.approx(exact.item(), abs=1e-5)


def test_a_step_survives_packing(batch_tensors: dict[str, torch.Tensor]) -> None:
    rows = [1, 2]
    logprobs = chain_logprobs(batch_tensors["logits"], batch_tensors["candidates"], rows)
    logprobs[1, 2] = -torch.inf  # a token that a grammar forbids
    steps = unpack_steps(packed(rows, batch_tensors, logprobs))
    assert [step["anchor"] for step in steps] == [200_000, 30]
    assert [step["accepted"] for step in steps] == [3, 1]
    assert [step["bonus"] for step in steps] == [151_668, 9]
    assert [step["block"] for step in steps] == batch_tensors["candidates"][rows, 1:].tolist()
    for step, exact in zip(steps, logprobs.clamp(min=plugin_hooks.LOWEST).tolist(), strict=True):
        assert step["logprobs"] == pytest.approx(exact, abs=1e-6)
    assert "Infinity" not in json.dumps(steps)


def test_a_tree_has_a_refusal_in_place_of_a_record() -> None:
    batch = Batch([ServerRequest(customized_info={KEY: [{}]})])
    BatchTrace("digest", [0], "a tree").consume(batch, [Commit(1, (5, 6))])
    assert batch.reqs[0].customized_info == {KEY: [{}, {"v": "1", "drafter": "digest", "refused": "a tree"}, None]}


@pytest.fixture
def other_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a module that stands for another release."""
    (tmp_path / "changed_release.py").write_text("class Worker:\n    def verify(self, block): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugin, "installed_version", lambda: "0.9.1")
    yield "changed_release.Worker"


@pytest.mark.parametrize(
    ("required", "reason"),
    [
        ({".gone": ()}, r"changed_release.Worker.gone is missing"),
        ({".verify": ("block", "logits")}, r"changed_release.Worker.verify takes no argument logits"),
    ],
)
def test_a_release_without_a_hook_is_refused(
    other_release: str, required: dict[str, tuple[str, ...]], reason: str
) -> None:
    with pytest.raises(RuntimeError, match=rf"sglang 0\.9\.1: {reason}.*supports >=0\.5\.20,<0\.5\.24"):
        plugin.check_release({other_release + name: parameters for name, parameters in required.items()})


def test_an_untested_release_with_all_hooks_is_a_warning(other_release: str, caplog: pytest.LogCaptureFixture) -> None:
    plugin.check_release({f"{other_release}.verify": ("block",)})
    assert "0.9.1" in caplog.text and plugin.SUPPORTED in caplog.text


def test_the_plugin_is_in_the_code_digest_of_stages_that_use_servers(tmp_path: Path) -> None:
    """A correction of its records must generate new answers."""
    project = Path(__file__).parents[3]
    entry = tomllib.loads((project / "pyproject.toml").read_text())["project"]["entry-points"][PLUGIN_GROUP]
    assert entry == {"draftsmith": server.PLUGIN}
    for folder in ("artifacts", "stages"):
        shutil.copytree(project / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.md"))
    stages = {name: STAGES[name] for name in ("rollout", "evaluation", "diagnosis", "gate", "sft")}
    for module in ("plugin", "plugin_hooks", "plugin_swap"):
        before = {name: code_digest(stage, tmp_path) for name, stage in stages.items()}
        with (tmp_path / f"stages/engines/sglang/{module}.py").open("a") as source:
            source.write("\n\nREPAIRED = True\n")
        changed = {name for name, stage in stages.items() if code_digest(stage, tmp_path) != before[name]}
        assert changed == {"rollout", "evaluation", "diagnosis"}
