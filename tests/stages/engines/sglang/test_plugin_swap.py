"""The part of the plug-in that writes a drafter, in stand-ins for SGLang's scheduler and models."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.servers.drafter_files import WantedDrafter, read_drafter
from draftsmith.stages.engines.servers.state import STATE_VERSION, read_report
from draftsmith.stages.engines.sglang import plugin_swap
from draftsmith.stages.engines.sglang.plugin_hooks import Recorder
from draftsmith.stages.engines.sglang.plugin_swap import DrafterSwap, RefusedSwapError
from draftsmith.stages.engines.sglang.protocol import SWAP_ACTION, SWAP_STATE, Json
from tests.sglang_cpu.fixtures import sglang_env

__all__ = ["sglang_env"]

HEADS, DIM, HIDDEN, LAYERS = 2, 4, 6, 3


class Layer(nn.Module):
    """A layer with the attributes that SGLang's fused helper reads."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        attn: Any = nn.Module()
        self.self_attn = attn
        attn.qkv_proj, attn.k_norm = nn.Linear(HIDDEN, 4 * HEADS * DIM, bias=False), nn.RMSNorm(DIM)
        attn.q_size, attn.kv_size = 2 * HEADS * DIM, HEADS * DIM
        attn.num_kv_heads, attn.head_dim, attn.rotary_emb = HEADS, DIM, rotary
        attn.k_norm.variance_epsilon = 1e-6


class Draft(nn.Module):
    """A draft model with the target's embedding, and a loader that takes what it is given, as SGLang's do."""

    def __init__(self, embedding: torch.Tensor) -> None:
        super().__init__()
        rotary = SimpleNamespace(rotary_dim=DIM, is_neox_style=True, cos_sin_cache=torch.zeros(8, DIM))
        self.layers = nn.ModuleList([Layer(rotary) for _ in range(LAYERS)])
        self.embed = nn.Module()
        self.embed.weight = embedding

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, values in weights:
            if name in parameters:
                assert values.shape == parameters[name].shape
                parameters[name].data.copy_(values)


@dataclass
class Scheduler:
    """What the hooks use of SGLang's scheduler."""

    folder: Path
    idle: bool = True
    calls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server_args = SimpleNamespace(
            speculative_algorithm="DFLASH",
            speculative_draft_model_path=str(self.folder),
            speculative_draft_model_revision=None,
            pp_size=1,
        )
        target = nn.Embedding(9, HIDDEN)
        model = Draft(target.weight)
        model.load_weights(load_file(self.folder / "model.safetensors").items())
        runner = SimpleNamespace(model=model)
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(model=target))
        self.draft_worker = SimpleNamespace(draft_model=model, draft_model_runner=runner)

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        named = self.draft_worker.draft_model.named_parameters()
        return {name: parameter.detach().clone() for name, parameter in named}

    def pause_generation(self, request: Any) -> None:
        self.calls.append(f"pause: {request.mode}")

    def flush_cache(self) -> bool:
        self.calls.append("flush")
        return self.idle

    def continue_generation(self, _request: Any) -> None:
        self.calls.append("continue")


@pytest.fixture(autouse=True)
def io_struct(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's module of requests, of which two are sent to the scheduler, and of one answer."""
    for name in ("sglang", "sglang.srt", "sglang.srt.managers", "sglang.srt.managers.io_struct"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    requests = sys.modules["sglang.srt.managers.io_struct"]
    for name in ("PauseGenerationReqInput", "ContinueGenerationReqInput", "CheckWeightsReqOutput"):
        monkeypatch.setattr(requests, name, SimpleNamespace, raising=False)


def write_drafter(folder: Path, seed: int, others: dict[str, torch.Tensor | None] | None = None) -> Path:
    """Write a checkpoint of random weights. others: in place of these; None: none."""
    folder.mkdir()
    torch.manual_seed(seed)
    tensors = {name: torch.randn_like(p) for name, p in Draft(nn.Embedding(9, HIDDEN).weight).named_parameters()}
    (folder / "config.json").write_text("{}")
    stored = {name: values.contiguous() for name, values in (tensors | (others or {})).items() if values is not None}
    save_file(stored, folder / "model.safetensors")
    return folder


@dataclass
class Server:
    """The hooks of one rank, after its start with drafter `a`."""

    folder: Path

    def __post_init__(self) -> None:
        self.a = write_drafter(self.folder / "a", 0)
        self.scheduler, self.recorder = Scheduler(self.a), Recorder()
        self.recorder.drafter = drafter_digest(self.a)
        self.swap = DrafterSwap(self.recorder)
        self.swap.after_start(None, self.scheduler)

    def serve(self, folder: Path, digest: str | None = None, others: tuple[str, ...] = ()) -> Json:
        """Ask until the files are read. others: states of other ranks."""
        wanted = WantedDrafter(digest or drafter_digest(folder), str(folder), "")
        while (answer := self.swap.serve(wanted, lambda state: [state, *others])) == {"state": "reading"}:
            if others:
                break
        return answer

    def ask(self, text: str) -> Any:
        """Send an action, as the handler of `/weights_checker` gets it."""

        def stock(_manager: Any, request: Any) -> str:
            return f"stock {request.action}"

        return self.swap.around_check_weights(stock, SimpleNamespace(), SimpleNamespace(action=text))

    def assert_serves(self, folder: Path) -> None:
        written = load_file(folder / "model.safetensors")
        for name, values in self.scheduler.parameters.items():
            if name != "embed.weight":
                assert torch.equal(values, written[name]), name
        assert self.recorder.drafter == drafter_digest(folder)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def test_weights_are_written_between_flush_and_continue_to_the_same_addresses(server: Server, tmp_path: Path) -> None:
    parameters = dict(server.scheduler.draft_worker.draft_model.named_parameters())
    addresses = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    embedding = server.scheduler.parameters["embed.weight"]  # the target's, which some checkpoints have too
    b = write_drafter(tmp_path / "b", 1)
    answer = server.serve(b)
    assert answer["state"] == "served" and answer["pause_s"] > 0
    server.assert_serves(b)
    assert torch.equal(server.scheduler.parameters["embed.weight"], embedding)
    assert server.scheduler.calls == ["pause: retract", "flush", "continue"]
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == addresses
    assert server.serve(b)["state"] == "served" and len(server.scheduler.calls) == 3  # nothing is left to do


def test_the_old_weights_return_without_their_files(server: Server, tmp_path: Path) -> None:
    written = load_file(server.a / "model.safetensors")
    digest = drafter_digest(server.a)
    server.serve(write_drafter(tmp_path / "b", 1))
    assert server.serve(tmp_path / "gone", digest)["state"] == "served"
    assert all(torch.equal(v, written[n]) for n, v in server.scheduler.parameters.items() if n != "embed.weight")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", '"text"', "{}", "[" * 100_000, "9" * 5000,
        *map(json.dumps, (
            {"drafter": None, "folder": "/"}, {"drafter": "../..", "folder": "/"}, {"drafter": 3 * ["a"]},
            {"drafter": "0" * 64}, {"drafter": "0" * 64, "folder": 3}, {"drafter": "0" * 64, "folder": "relative"},
            {"drafter": "0" * 64, "folder": "/a\ud800"}, {"drafter": "0" * 64, "folder": "/", "upload": {}},
            {"drafter": "0" * 64, "folder": "/", "upload": "http://host/drafter"},
        )),
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_and_changes_nothing(server: Server, text: str) -> None:
    """An error that leaves the hook would end the server."""
    answer = server.ask(SWAP_ACTION + text)
    assert answer.success is False and answer.message.isprintable() and len(answer.message) < 500
    assert not server.scheduler.calls and server.swap._reading is None
    server.assert_serves(server.a)


def test_an_action_that_is_not_ours_is_the_stock_servers(server: Server) -> None:
    assert server.ask("checksum") == "stock checksum"


def test_drafters_are_read_one_at_a_time(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches the server may ask for many, and each may be large."""
    begun, go_on = list[str](), threading.Event()

    def read(wanted: WantedDrafter) -> dict[str, bytes]:
        begun.append(wanted.drafter)
        assert go_on.wait(60)
        return read_drafter(wanted)

    monkeypatch.setattr(plugin_swap, "read_drafter", read)
    for digit in "123":
        wanted = WantedDrafter(digit * 64, str(tmp_path), "")
        assert server.swap.serve(wanted, lambda state: [state]) == {"state": "reading"}
    b = write_drafter(tmp_path / "b", 1)
    wanted = WantedDrafter(drafter_digest(b), str(b), "")
    assert server.swap.serve(wanted, lambda state: [state]) == {"state": "reading"}
    go_on.set()
    assert server.serve(b)["state"] == "served"
    assert begun == ["1" * 64, wanted.drafter], "those that nobody wants any more are not begun"


def test_the_state_has_a_version(server: Server) -> None:
    result = SimpleNamespace(internal_state={})
    server.swap.after_internal_state(result)
    assert result.internal_state[SWAP_STATE]["v"] == STATE_VERSION
    report = read_report("http://here", result.internal_state[SWAP_STATE])
    assert (report.drafter, report.before) == (drafter_digest(server.a), "")


@pytest.mark.parametrize(
    "norm",
    [None, torch.ones(DIM + 1), torch.full((DIM,), torch.nan)],
    ids=["lacks a layer", "another shape", "NaN"],
)
def test_a_drafter_that_does_not_fit_is_refused_before_anything_is_written(
    server: Server, tmp_path: Path, norm: torch.Tensor | None
) -> None:
    before = server.scheduler.parameters
    with pytest.raises(RefusedSwapError):
        server.serve(write_drafter(tmp_path / "b", 1, {"layers.1.self_attn.k_norm.weight": norm}))
    assert all(torch.equal(values, before[name]) for name, values in server.scheduler.parameters.items())
    assert not server.scheduler.calls and server.recorder.drafter == drafter_digest(server.a)


def test_a_head_with_latent_attention_is_refused_before_its_loader_runs(server: Server, tmp_path: Path) -> None:
    """SGLang's loader would replace the matrices that the served head computes with."""
    worker = server.scheduler.draft_worker
    attention: Any = plugin_swap.draft_runner(worker).model.layers[0].self_attn
    attention.w_kc = matrix = torch.ones(2)
    with pytest.raises(RefusedSwapError, match=r"latent attention \(MLA\).*Start the server with the new head"):
        server.serve(write_drafter(tmp_path / "b", 2))
    assert attention.w_kc is matrix and not server.scheduler.calls
    server.assert_serves(server.a)


def test_a_folder_with_another_drafter_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(RefusedSwapError, match="does not have the files"):
        server.serve(write_drafter(tmp_path / "b", 1), digest="0" * 64)
    server.assert_serves(server.a)


def test_a_cache_that_cannot_be_emptied_keeps_the_old_weights(server: Server, tmp_path: Path) -> None:
    server.scheduler.idle = False
    with pytest.raises(RefusedSwapError):
        server.serve(write_drafter(tmp_path / "b", 1))
    assert server.scheduler.calls[-1] == "continue"
    server.assert_serves(server.a)


def test_ranks_wait_for_each_other(server: Server, tmp_path: Path) -> None:
    b = write_drafter(tmp_path / "b", 1)
    for _ in range(200):
        assert server.serve(b, others=("reading",)) == {"state": "reading"}
        if server.swap._ready is not None:
            break
    server.assert_serves(server.a)
    with pytest.raises(RefusedSwapError, match="no such file"):
        server.serve(b, others=("refused: no such file",))
    server.assert_serves(server.a)
    assert server.serve(b)["state"] == "served"
    server.assert_serves(b)


@pytest.mark.sglang
def test_tensors_that_sglang_derives_on_a_gpu_follow(sglang_env: Path, server: Server, tmp_path: Path) -> None:
    """SGLang's own helper, which keeps the keys' and values' projections of all layers as one tensor."""
    helper_class = fused_helper(sglang_env)
    worker = server.scheduler.draft_worker

    def helper() -> Any:
        rotary = worker.draft_model.layers[0].self_attn.rotary_emb
        with torch.no_grad():
            return helper_class(worker.draft_model.layers, rotary, HEADS, DIM, torch.device("cpu"))

    held = worker._fused_kv_helper = helper()
    names = ("flat_kv_weight_t", "k_norm_weights")
    addresses = [getattr(held, name).data_ptr() for name in names]
    server.serve(write_drafter(tmp_path / "b", 1))
    for name in names:
        assert torch.equal(getattr(held, name), getattr(helper(), name)), name
    assert [getattr(held, name).data_ptr() for name in names] == addresses  # captured graphs have them


def fused_helper(python: Path) -> Any:
    """Return the class from SGLang's file, with a stub for Triton, of which its constructor needs nothing."""
    find = "import importlib.util; print(importlib.util.find_spec('sglang').submodule_search_locations[0])"
    package = subprocess.run([str(python), "-I", "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    source = next(Path(package).rglob("fused_kv_materialize.py")).read_text()
    source = source.replace("import triton\nimport triton.language as tl\n", "")
    triton = SimpleNamespace(jit=lambda function: function)
    module = {"triton": triton, "tl": SimpleNamespace(constexpr=int), "__name__": "fused_kv_materialize"}
    exec(compile(source, "fused_kv_materialize.py", "exec"), module)
    return module["FusedKVMaterializeHelper"]
