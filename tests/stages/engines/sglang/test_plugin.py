"""The plug-in without SGLang: log-probs of a chain, records, sums of a share of the requests, refused releases."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from draftsmith.artifacts.store.code_digest import code_modules
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.engines.environment import PLUGIN_GROUPS
from draftsmith.stages.engines.sglang import plugin, plugin_hooks, plugin_swap, server
from draftsmith.stages.engines.sglang.plugin_hooks import (
    LAST,
    BatchTrace,
    Recorder,
    RequestLog,
    chain_logprobs,
    pack_steps,
    unpack_steps,
)
from draftsmith.stages.engines.sglang.protocol import ENVIRONMENT, KEY, REQUESTS_STATE


@dataclass
class Sampling:
    custom_params: dict[str, Any] | None = None


@dataclass
class ServerRequest:
    """The fields of SGLang's request that the hooks use."""

    sampling_params: Sampling = field(default_factory=Sampling)
    customized_info: dict[str, list[Any]] | None = None
    rid: str = ""
    origin_input_ids: list[int] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    finished_len: int | None = None

    def finished(self) -> bool:
        return self.finished_len is not None


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


class Summed:
    """A process that sums up the steps of a share of its requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share: str) -> None:
        monkeypatch.setenv(ENVIRONMENT, share)
        self.recorder = Recorder()
        self.recorder.active, self.recorder.drafter = True, "a"
        self.log = RequestLog(self.recorder)

    def decode(self, *steps: tuple[ServerRequest, int, int | None]) -> None:
        """Process a batch's verification. steps: each request, its new tokens, and the length at which it ends."""

        def original(_processor: None, _batch: Batch, _result: None) -> str:
            for request, tokens, end in steps:
                if not request.finished():  # as SGLang treats those that ended while this step ran
                    request.output_ids += [0] * tokens
                    request.finished_len = end
            return "returned"

        batch = Batch([request for request, _, _ in steps])
        assert self.log.around_decode(original, None, batch, None) == "returned"

    @property
    def kept(self) -> dict[str, list[dict[str, list[int]]]]:
        """The sums of the requests that ended, by drafter."""
        result = SimpleNamespace(internal_state={})
        self.log.after_internal_state(result)
        return {drafter: [sums for _, sums in each] for drafter, each in result.internal_state[REQUESTS_STATE].items()}


def answered(tokens: int, rid: str = "", **asking: Any) -> ServerRequest:
    """Return a request with a prompt of this many tokens, after its prefill."""
    return ServerRequest(Sampling(**asking), rid=rid, origin_input_ids=[0] * tokens, output_ids=[0])


def test_steps_are_summed_by_the_depth_of_their_anchor_until_a_request_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    server, first, second = Summed(monkeypatch, "1"), answered(1020), answered(5)
    for number in (3, 1, 4):  # anchors 1020, 1023, 1024
        server.decode((first, number, None), (second, 2, None))
    assert server.kept == {}
    server.decode((second, 0, None))  # retracted meanwhile
    second.output_ids += [0]  # by the prefill that follows, which is no step
    server.decode((second, 4, 9), (first, 2, 11))  # its answer ends after one of the four
    server.decode((second, 3, None), (first, 2, None))  # with overlap this step had begun
    assert server.kept == {
        "a": [{"depth:below-1k": [7, 4]}, {"depth:below-1k": [4, 2], "depth:1k-4k": [6, 2]}],
    }


def test_a_swap_within_an_answer_leaves_each_drafter_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    server, request = Summed(monkeypatch, "1"), answered(5)
    server.decode((request, 5, None))
    server.recorder.drafter = "b"
    server.decode((request, 2, 8))
    assert server.kept == {"b": [{"depth:below-1k": [2, 1]}]}


def test_a_share_is_chosen_by_the_id_whatever_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Summed(monkeypatch, "0.01")
    ids = [f"run7/prompt-{place}/sample-{sample}" for place in range(2500) for sample in range(8)]
    chosen = {name for name in ids if server.log._is_chosen(answered(1, name))}
    assert abs(len(chosen) - 200) < 3 * 14, "a binomial count's three standard deviations"
    assert chosen == {name for name in ids if Summed(monkeypatch, "0.01").log._is_chosen(answered(1, name))}
    assert not any(server.log._is_chosen(answered(1, name, custom_params={KEY: True})) for name in chosen)
    assert server.recorder.traced_rows(Batch([answered(1, name) for name in chosen])) == [], "no records in answers"


def test_the_last_requests_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Summed(monkeypatch, "1")
    for number in range(LAST + 3):
        server.decode((answered(1), number, number + 1))  # the first commits nothing, and so has no step
    assert [sums["depth:below-1k"][0] for sums in server.kept["a"]] == list(range(3, LAST + 3))


@pytest.mark.parametrize("setting", ["0,01", "1.5", "-1", "nan", "all"])
def test_what_is_no_share_ends_the_server(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    with pytest.raises(SystemExit, match=f"{ENVIRONMENT} is '{setting}'"):
        Summed(monkeypatch, setting)


@pytest.mark.parametrize("drafter", [None, "/target"])
def test_a_server_that_drafts_with_its_targets_own_head_starts_and_names_no_drafter(drafter: str | None) -> None:
    """SGLang's NEXTN and EAGLE need no `--speculative-draft-model-path` there, and set it for some targets."""
    arguments = {"speculative_draft_model_path": drafter, "speculative_draft_model_revision": None, "pp_size": 1}
    arguments["model_path"] = "/target"
    recorder = Recorder()
    recorder.after_load(None, SimpleNamespace(server_args=SimpleNamespace(**arguments)))
    assert recorder.active and recorder.drafter == ""


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


def test_the_plugin_is_in_the_code_digest_of_stages_that_use_servers() -> None:
    """A correction of its records must generate new answers."""
    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][PLUGIN_GROUPS["sglang"]] == {"draftsmith": server.ENTRY_POINT}
    modules = {module.__name__ for module in (plugin, plugin_hooks, plugin_swap)}
    with_it = {name for name, stage in STAGES.items() if modules & set(code_modules(stage))}
    assert with_it == {"rollout", "evaluation", "diagnosis"}
    assert all(modules <= set(code_modules(STAGES[name])) for name in with_it)
