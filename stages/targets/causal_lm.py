"""A frozen causal language model: hidden states, features for the drafter, cached forwards."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoTokenizer

from draftsmith.artifacts.errors import DraftsmithError, find_disk_error, is_full_disk, one_line
from draftsmith.stages.runtime.facts import Facts
from draftsmith.stages.runtime.memory import out_of_memory, to_device
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.targets.attention import register
from draftsmith.stages.targets.body import resolve_target
from draftsmith.stages.targets.config import Dtype, TargetConfig
from draftsmith.stages.targets.describe import embedding_scale
from draftsmith.stages.targets.fast_decoder import FastDecoder
from draftsmith.stages.targets.info import TargetInfo, model_path, read_target_info
from draftsmith.stages.targets.kv_cache import Address, Rows, SlotCache
from draftsmith.stages.targets.layers import CHOOSING, Layers, stable_positions
from draftsmith.stages.targets.loading import load_slice, load_weights
from draftsmith.stages.targets.model_parts import causal_lm_of, decoder_of, model_class
from draftsmith.stages.targets.packed_linear import PackedLinear, can_pack, pack
from draftsmith.stages.targets.self_check import check_agreement


@dataclass(frozen=True)
class TargetOutput:
    """Hidden states [n, T, H] after the final norm, for `Target.logits`; features [n, T, K*H] or None."""

    hidden: torch.Tensor
    features: torch.Tensor | None


class _StopForwardError(Exception):
    """Ends a forward after the last layer whose features are needed. Decoders have no other way to stop at a layer."""


class Target(Facts):
    """The target `p`. Everything is computed without gradient; parameters are frozen."""

    def __init__(self, model: Any, tokenizer: Any, info: TargetInfo, sharing: int = 1):
        """Take over a loaded model. sharing: ranks that share it; each has the complete embedding and head."""
        self.sharing = sharing
        self.folder: Path | None = None  # of the model; `load` sets it
        self.model, self.tokenizer, self.info = model.eval().requires_grad_(False), tokenizer, info
        self.decoder = decoder_of(model)
        self.config = model.config.get_text_config()
        self.layers = Layers.from_config(self.config)
        self._stable = stable_positions(self.config)
        self.logit_map = info.logit_map
        self.head_weight: torch.Tensor = model.get_output_embeddings().weight  # [V, H]
        self.embedding: torch.Tensor = model.get_input_embeddings().weight  # [V, H]
        self.embedding_scale = embedding_scale(model.get_input_embeddings())  # of the first layer's input
        parameters = inspect.signature(type(self.decoder).forward).parameters
        # renamed in transformers 5.24; 5.40 removes the old name
        self._cache_argument = "cache" if "cache" in parameters else "past_key_values"
        self._captured: dict[int, torch.Tensor] = {}  # outputs of the requested layers
        self._deepest: int | None = None  # the layer after which the forward stops
        if CHOOSING in self.layers.kinds:  # only transformers' attention masks the entries that are not chosen
            model.set_attn_implementation("sdpa")
        for module in self.decoder.modules():  # a scale by the cache's length, which is 1 within stable positions
            if getattr(module, "attn_temperature_tuning", False):
                module.attn_temperature_tuning = False
        for index, layer in enumerate(self.decoder.layers):
            layer.register_forward_hook(self._hook(index))

    @classmethod
    def load(cls, folder: Path, dtype: str | None = None, device: str | None = None, ranks: Ranks = ALONE) -> Target:
        """Load the target of an artifact of stage `target`.

        dtype: used in place of the serving dtype, e.g. float32 for exactness checks. ranks: those that share the
        target; each must call everything that computes hidden states, with the same tokens. Raises DraftsmithError if
        weights are missing or cannot be loaded, or if forwards here fail or differ from the model's own.
        """
        info, path = read_target_info(folder), model_path(folder)
        try:
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            target = cls._read(info, path, dtype or info.dtype, device, ranks)
            target.folder = path
            check_agreement(target, str(path), ranks)
        except DraftsmithError:
            raise
        except Exception as error:  # model classes raise errors of any kind
            if isinstance(error, torch.OutOfMemoryError):
                raise DraftsmithError(
                    f"target {path}: does not fit into the GPU's free memory ({one_line(error, 200)}). Stop other "
                    "programs on it, or choose a device with CUDA_VISIBLE_DEVICES (empty: the CPU)."
                ) from error
            if (
                ranks.target_parallel > 1
                or find_disk_error(error)
                or out_of_memory(error)
                or "CUDA error" in str(error)
            ):
                raise
            raise DraftsmithError(
                f"target {path}: forwards of {info.architecture} with Draftsmith's cache fail "
                f"({type(error).__name__}: {one_line(error, 200)}). Choose another target."
            ) from error
        return target

    @classmethod
    def _read(cls, info: TargetInfo, path: Path, dtype: str, device: str, ranks: Ranks) -> Target:
        """Load the target without comparing it with the model's own forwards."""
        if dtype == "float32":
            torch.backends.cudnn.allow_tf32 = False  # else convolutions of recurrent layers are not float32
        try:
            loaded: dict[str, Any] = {"dtype": getattr(torch, dtype), "attn_implementation": register()}
            if ranks.target_parallel > 1:
                model = load_slice(path, ranks, device, **loaded)
            else:
                kind = model_class(AutoConfig.from_pretrained(path, local_files_only=True))
                if device == "cuda":  # tensor by tensor, so that ranks do not each hold all weights in host memory
                    loaded["device_map"] = {"": torch.device(device, torch.cuda.current_device())}
                model = load_weights(kind, path, **loaded).to(device)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except (OSError, ValueError, ImportError) as error:
            if is_full_disk(error):  # raised by the loader's progress bar in the stage's log
                raise
            raise DraftsmithError(
                f"target {path}: cannot be loaded ({error}). Run stage target again with --force."
            ) from error
        model = causal_lm_of(model)
        if ranks.target_parallel == 1:
            pack(decoder_of(model))
        return cls(model, tokenizer, info, ranks.target_parallel)

    @classmethod
    def from_source(
        cls,
        source: str | Path,
        dtype: Dtype = "bfloat16",
        device: str | None = None,
        revision: str | None = None,
    ) -> Target:
        """Load a model from any `target.source`: a folder, a hub id, a GGUF file, or `package:NAME`.

        revision: as in section `target`. Raises DraftsmithError like stage `target`.
        """
        with tempfile.TemporaryDirectory(prefix="draftsmith-target-") as artifact:
            config = TargetConfig(source=str(source), revision=revision, dtype=dtype)
            resolve_target(config, Path(artifact), lambda _line: None)
            return cls.load(Path(artifact), device=device)

    def _facts(self) -> Mapping[str, object]:
        info, parameters = self.info, sum(parameter.numel() for parameter in self.model.parameters())
        return {
            "source": info.source,
            **({"revision": info.revision} if info.revision else {}),
            "architecture": info.architecture,
            "parameters": f"{parameters / 1e6:,.1f}M",
            "layers": info.num_layers,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
            "digest": info.digest[:12],
        }

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset(self.info.eos_ids)

    def _hook(self, index: int) -> Any:
        def keep(_module: object, _args: object, output: Any) -> None:
            if index in self._captured:
                self._captured[index] = output[0] if isinstance(output, tuple) else output
                if index == self._deepest:
                    raise _StopForwardError

        return keep

    def _forward(self, layer_ids: Sequence[int], *, stop: bool = False, **arguments: Any) -> TargetOutput:
        """Run the decoder. stop: end after the last of `layer_ids`, without hidden states."""
        self._captured, self._deepest = {layer: torch.empty(0) for layer in layer_ids}, max(layer_ids) if stop else None
        hidden = torch.empty(0)
        try:
            with suppress(_StopForwardError):
                hidden = self.decoder(**arguments).last_hidden_state
            features = torch.cat([self._captured[layer] for layer in layer_ids], -1) if layer_ids else None
        finally:
            self._captured = {}
        return TargetOutput(hidden, features)

    def _rotary_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the positions to rotate by, clamped where angles depend on the furthest one.

        Padding and proposals beyond the context are rotated like its last token, so that others keep their angles.
        """
        return positions if self._stable is None else positions.clamp(max=self._stable - 1)

    def _uncached_arguments(self, ids: torch.Tensor) -> dict[str, Any]:
        """Return the arguments of a forward over whole sequences."""
        if self._stable is None or ids.shape[1] <= self._stable:
            return {"input_ids": ids, "use_cache": False}
        positions = self._rotary_positions(torch.arange(ids.shape[1], device=ids.device)[None])
        return {"input_ids": ids, "use_cache": False, "position_ids": positions}

    @torch.no_grad()
    def read(self, ids: torch.Tensor, layer_ids: Sequence[int] = ()) -> TargetOutput:
        """Read whole sequences: ids [B, T], padded on the right. Causal attention hides padding from real positions.

        layer_ids: layer k means the hidden state AFTER decoder layer k, concatenated in this order into `features`.
        """
        return self._forward(layer_ids, **self._uncached_arguments(ids))

    @torch.no_grad()
    def features(self, ids: torch.Tensor, layer_ids: Sequence[int]) -> torch.Tensor:
        """Return only features [B, T, K*H] of whole sequences; layers after the last of `layer_ids` are not run."""
        features = self._forward(layer_ids, stop=True, **self._uncached_arguments(ids)).features
        assert features is not None
        return features

    @torch.no_grad()
    def step(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        cache: SlotCache,
        rows: Rows,
        *,
        length: int | None = None,
        layer_ids: Sequence[int] = (),
        write_at: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
        advance: bool = True,
    ) -> TargetOutput:
        """Read new tokens on top of a cache. ids, positions: [n, T].

        By default a token is written at its position and attends to every entry up to itself. A tree passes `write_at`
        [n, T] (free entries) and `visible` bool [n, T, L] (the entries that each token attends to) instead.
        length: positions of the longest row, including these tokens. The host must know it, since asking the device
        would wait for everything queued there. By default these are the rows' first tokens.

        A recurrent target starts from its states after the rows' earlier tokens; rows that begin at position 0 have
        none. With `advance` the states are updated to the last token, padding included. Without it they stay unchanged,
        and `commit` follows.
        """
        assert visible is None or not self.layers.recurrent, "a recurrent target has no forward over a tree"
        if visible is not None:
            length = visible.shape[-1]
        length = ids.shape[1] if length is None else length
        write_at = positions if write_at is None else write_at
        fresh = self.layers.recurrent and length == ids.shape[1]
        cache.address(Address(rows, write_at, length, fresh, advance))
        entry_positions = torch.arange(length, device=ids.device).expand(len(ids), -1)
        if write_at is not positions:
            entry_positions = entry_positions.scatter(1, write_at, positions)
        masks = self.layers.masks(visible, positions, entry_positions, self.dtype)
        if self._fast is not None and not torch.is_autocast_enabled(ids.device.type):
            return TargetOutput(*self._fast(ids, self._rotary_positions(positions), masks, cache, layer_ids))
        arguments: dict[str, Any] = {
            self._cache_argument: cache,
            "position_ids": self._rotary_positions(positions),
            "attention_mask": masks,
        }
        out = self._forward(layer_ids, input_ids=ids, use_cache=True, **arguments)
        cache.write_back()
        return out

    def commit(
        self, ids: torch.Tensor, anchors: Sequence[int], cache: SlotCache, first_row: int, committed: Sequence[int]
    ) -> None:
        """Update states over the first committed[i] tokens of row i, after a `step` without `advance`.

        ids: [n, T] of consecutive rows. anchors: [n] positions of their first tokens. Rows with the same number of
        tokens are read together. Does nothing for a target without recurrent layers.
        """
        if not self.layers.recurrent:
            return
        for count in sorted(set(committed) - {0}):
            rows = [row for row, other in enumerate(committed) if other == count]
            starts = [anchors[row] for row in rows]
            at, first = to_device([rows, starts], ids.device)
            positions = first[:, None] + torch.arange(count, device=ids.device)
            self.step(ids[at, :count], positions, cache, at + first_row, length=max(starts) + count)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 logits [..., V] of hidden states [..., H]."""
        return self.logit_map(self.head(hidden).float())

    @cached_property
    def _fast(self) -> FastDecoder | None:
        # maps of a shared model return slices, which hooks of its modules combine
        return FastDecoder.for_decoder(self.decoder, self.layers.kinds) if self.sharing == 1 else None

    @cached_property
    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the map from hidden states [..., H] to products [..., V] for decoding.

        The weight itself is not changed, since it may embed tokens, and losses read it.
        """
        if can_pack(self.head_weight):
            return PackedLinear(self.head_weight)
        return lambda hidden: F.linear(hidden, self.head_weight)

    def new_cache(self, rows: int, capacity: int) -> SlotCache:
        """Return a cache for `rows` requests of up to `capacity` positions each."""
        return SlotCache(len(self.decoder.layers), rows, capacity)
