"""The backend that writes a drafter in vLLM's workers, in stand-ins for vLLM's loader and for DFlash's model."""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from draftsmith.stages.drafters.digest import drafter_digest

HEADS, DIM, HIDDEN, LAYERS = 2, 4, 6, 3
Q, KV = 2 * HEADS * DIM, HEADS * DIM
PARTS = {
    "qkv_proj": {"q_proj": Q, "k_proj": KV, "v_proj": KV},
    "gate_up_proj": {"gate_proj": HIDDEN, "up_proj": HIDDEN},
}
COPIES = {"_fused_kv_weight", "_k_norm_weights"}


class Draft(nn.Module):
    """A draft model with vLLM's fused parameters, its copies for keys and values, and the target's embedding."""

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        inner = self.model = Inner()
        inner.embed_tokens = nn.Module()
        inner.embed_tokens.weight = embedding
        inner._build_fused_kv_buffers()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, values in weights:
            parameter, at = name, slice(None)
            for fused, parts in PARTS.items():
                start = 0
                for part, rows in parts.items():
                    if part in name:
                        parameter, at = name.replace(part, fused), slice(start, start + rows)
                    start += rows
            parameters[f"model.{parameter}"].data[at].copy_(values)
        self.model._build_fused_kv_buffers()


class Inner(nn.Module):
    """Layers, and the copies that keys and values of the context are computed with."""

    embed_tokens: Any

    def __init__(self) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList()
        for _ in range(LAYERS):
            layer: Any = nn.Module()
            layer.qkv_proj = nn.Linear(HIDDEN, Q + 2 * KV, bias=False)
            layer.k_norm = nn.RMSNorm(DIM)
            layer.gate_up_proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
            self.layers.append(layer)

    def _build_fused_kv_buffers(self) -> None:
        with torch.no_grad():
            self._fused_kv_weight = torch.cat([layer.qkv_proj.weight[Q:] for layer in self.layers])
            self._k_norm_weights = torch.stack([layer.k_norm.weight for layer in self.layers])


class Engine:
    """What vLLM's base class, which is generic, keeps for a backend."""

    def __class_getitem__(cls, _infos: object) -> type:
        return cls

    def __init__(self, model: nn.Module, target: nn.Module) -> None:
        self.model, self._default_model, self.model_config = model, target, None


def initialize(model: nn.Module) -> None:
    """Give every parameter other memory while weights are loaded."""
    for parameter in model.parameters():
        parameter.held = parameter.data  # type: ignore[attr-defined]
        parameter.data = parameter.data.clone()


def finalize(model: nn.Module, _config: None) -> None:
    """Copy what was loaded into the memory that every parameter had."""
    for parameter in model.parameters():
        parameter.held.copy_(parameter.data)  # type: ignore[attr-defined]
        parameter.data = parameter.held  # type: ignore[attr-defined]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plug-in's module, on a server of one rank."""
    stand_ins: dict[str, dict[str, Any]] = {
        "vllm.distributed.parallel_state": {"get_tp_group": lambda: SimpleNamespace(cpu_group=None)},
        "vllm.distributed.weight_transfer.base": {
            "WeightTransferEngine": Engine, "WeightTransferInitInfo": object, "WeightTransferUpdateInfo": object,
        },
        "vllm.model_executor.model_loader.reload": {
            "initialize_layerwise_reload": initialize, "finalize_layerwise_reload": finalize,
        },
    }  # fmt: skip
    for name, members in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    loaded = importlib.import_module("draftsmith.stages.engines.vllm.plugin_swap")
    monkeypatch.setattr(loaded, "gather", lambda state, _group: [state])
    return loaded


def write_drafter(folder: Path, seed: int, **shapes: tuple[int, ...]) -> Path:
    """Write a checkpoint of random weights. shapes: others than it has, by the part's name."""
    folder.mkdir()
    torch.manual_seed(seed)
    sizes = {part: (rows, HIDDEN) for parts in PARTS.values() for part, rows in parts.items()}
    tensors = {
        f"layers.{layer}.{part}.weight": torch.randn(shapes.get(part, size))
        for layer in range(LAYERS)
        for part, size in {**sizes, "k_norm": (DIM,)}.items()
    }
    save_file({**tensors, "embed_tokens.weight": torch.randn(9, HIDDEN)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


class Rank:
    """The backend of one worker, and what a captured graph of its drafter holds."""

    def __init__(self, plugin: Any) -> None:
        self._plugin = plugin
        target = nn.Embedding(9, HIDDEN)
        self.model = Draft(target.weight)
        self.backend = plugin.FolderBackend(self.model, target)
        self.held = self.tensors()

    def tensors(self) -> dict[str, torch.Tensor]:
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return parameters | {name: value for name, value in vars(self.model.model).items() if name in COPIES}

    def write(self, folder: Path, digest: str = "", served: str = "") -> None:
        """Write a checkpoint. digest: a wrong one, to be refused. served: digest that the client believes is served."""
        self.backend.receive_weights(self._plugin.Checkpoint(digest or drafter_digest(folder), str(folder), "", served))

    def stale(self, folder: Path) -> set[str]:
        """Return the tensors of a captured graph that are not those of a server that was started with a checkpoint."""
        fresh = Rank(self._plugin)
        fresh.model.load_weights(self._plugin.load((folder / "model.safetensors").read_bytes()).items())
        return {name for name, values in fresh.tensors().items() if not torch.equal(self.held[name], values)}


SHARED = {"model.embed_tokens.weight"}  # the target's


def test_fused_parameters_and_their_copies_are_written_where_a_captured_graph_has_them(
    plugin: Any, tmp_path: Path
) -> None:
    a, b, rank = write_drafter(tmp_path / "a", 0), write_drafter(tmp_path / "b", 1), Rank(plugin)
    embedding = rank.held["model.embed_tokens.weight"].clone()
    for folder in (a, b, a):
        rank.write(folder)
        assert rank.stale(folder) == SHARED
        now = rank.tensors()
        assert all(now[name].data_ptr() == values.data_ptr() for name, values in rank.held.items())
    assert torch.equal(rank.held["model.embed_tokens.weight"], embedding)


def test_the_weights_before_are_written_back_without_their_files(plugin: Any, tmp_path: Path) -> None:
    """By the digest, so that a write back does not take those before an update that never happened."""
    a, b, rank = write_drafter(tmp_path / "a", 0), write_drafter(tmp_path / "b", 1), Rank(plugin)
    rank.write(a)
    gone, digest = tmp_path / "gone", drafter_digest(a)
    rank.write(gone, digest)
    assert rank.stale(a) == SHARED, "they are served"
    rank.write(b)
    rank.write(gone, digest)
    assert rank.stale(a) == SHARED
    rank.write(gone, drafter_digest(b))
    assert rank.stale(b) == SHARED

    fresh, started_with = Rank(plugin), "f" * 64
    first = {name: values.clone() for name, values in fresh.held.items()}
    with pytest.raises(RuntimeError, match="does not have the files"):
        fresh.write(gone, started_with)
    fresh.write(b, served=started_with)
    fresh.write(gone, started_with)
    assert all(torch.equal(fresh.held[name], values) for name, values in first.items())


@pytest.mark.parametrize(
    "fields",
    [
        (None, "/", "", ""), ("../..", "/", "", ""), ("0" * 64, 3, "", ""), ("0" * 64, "", "", ""),
        ("0" * 64, "/", {}, ""), ("0" * 64, "/", "http://host/drafter", []),
    ],
)  # fmt: skip
def test_a_malformed_request_is_refused_and_changes_nothing(plugin: Any, tmp_path: Path, fields: tuple[Any]) -> None:
    a, rank = write_drafter(tmp_path / "a", 0), Rank(plugin)
    rank.write(write_drafter(tmp_path / "b", 1))
    rank.write(a)
    with pytest.raises(RuntimeError, match=r"drafter|folder|upload"):
        rank.backend.receive_weights(plugin.Checkpoint(*fields))
    assert rank.stale(a) == SHARED


def test_a_swap_that_leaves_a_fused_copy_is_found(plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parameters are new, so that only the copies show it."""
    rank = Rank(plugin)
    monkeypatch.setattr(plugin.FolderBackend, "_derive", lambda *_: None)
    rank.write(b := write_drafter(tmp_path / "b", 1))
    assert rank.stale(b) == SHARED | COPIES


@pytest.mark.parametrize("wrong", ["another shape", "other files"])
def test_a_drafter_that_does_not_fit_changes_nothing(plugin: Any, tmp_path: Path, wrong: str) -> None:
    a, rank = write_drafter(tmp_path / "a", 0), Rank(plugin)
    rank.write(a)
    with pytest.raises(RuntimeError, match=r"must match|does not have the files"):
        if wrong == "other files":
            rank.write(write_drafter(tmp_path / "b", 1), "0" * 64)
        else:
            rank.write(write_drafter(tmp_path / "b", 1, up_proj=(HIDDEN, 2)))
    assert rank.stale(a) == SHARED


def test_a_rank_that_refuses_keeps_all_ranks_as_they_were(
    plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, ranks = write_drafter(tmp_path / "a", 0), write_drafter(tmp_path / "b", 1), [Rank(plugin), Rank(plugin)]
    states, meet = dict[int, str](), threading.Barrier(2, timeout=60)

    def gather(state: str, _group: None) -> list[str]:
        states[threading.get_ident()] = state
        meet.wait()
        found = list(states.values())
        meet.wait()
        return found

    def write(folder: Path, digest: str = "") -> list[BaseException | None]:
        """Write on two ranks; return the error of each. digest: given to the second rank, whose files differ."""
        states.clear()
        with ThreadPoolExecutor(2) as pool:
            writing = [pool.submit(rank.write, folder, each) for rank, each in zip(ranks, ("", digest), strict=True)]
            return [each.exception() for each in writing]

    monkeypatch.setattr(plugin, "gather", gather)
    assert write(a) == [None, None]
    assert all("does not have the files" in str(error) for error in write(b, "0" * 64))
    assert [rank.stale(a) for rank in ranks] == [SHARED, SHARED]
    assert write(b) == [None, None]
    assert [rank.stale(b) for rank in ranks] == [SHARED, SHARED]
