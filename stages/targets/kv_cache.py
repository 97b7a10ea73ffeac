"""The cache of requests in flight, one row each: keys and values of every position, and states of recurrent layers.

Models with multi-head latent attention (MLA) pass a latent, and a rotated key that all heads share, as key and value.

Entries need no rewinding: writing position p again replaces it, and readers mask out entries at or after their own
position, so a rejected proposal is simply overwritten. A state summarises all positions read so far and cannot be
rewound: a forward over tokens that may be rejected leaves it unchanged, and the committed tokens are read again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache

Rows = slice | torch.Tensor  # the rows of a call: a slice (no copy) or indices, shape [n]


class KeyValueSlots:
    """Keys and values of one layer, each [rows, kv_heads, capacity, head_dim], the axes as attention takes them.

    Keys and values may differ in width.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, capacity
        self.keys: torch.Tensor | None = None  # allocated at the first write, when heads, dtype and device are known
        self.values: torch.Tensor | None = None

    def write(self, row_index: torch.Tensor, write_at: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new entries.

        row_index: [n, 1]; write_at: [n, T] positions; keys, values: [n, T, kv_heads, head_dim].
        """
        if self.keys is None or self.values is None:
            self.keys = keys.new_zeros(self.rows, keys.shape[2], self.capacity, keys.shape[3])
            self.values = values.new_zeros(self.rows, values.shape[2], self.capacity, values.shape[3])
        self.keys.transpose(1, 2)[row_index, write_at] = keys
        self.values.transpose(1, 2)[row_index, write_at] = values

    def read(self, rows: Rows, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first `length` entries of `rows`: two tensors [n, kv_heads, length, head_dim]."""
        assert self.keys is not None and self.values is not None, "read before the first write"
        return self.keys[rows, :, :length], self.values[rows, :, :length]

    def move_row(self, source: int, to: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys[to] = self.keys[source]
            self.values[to] = self.values[source]


class StateSlots:
    """One state of one recurrent layer, [rows, …]; the first write decides the shape of a row."""

    def __init__(self, rows: int):
        self.rows = rows
        self.state: torch.Tensor | None = None

    def write(self, rows: Rows, state: torch.Tensor) -> None:
        """Store states [n, …]."""
        if self.state is None:
            self.state = state.new_zeros(self.rows, *state.shape[1:])
        self.state[rows] = state

    def read(self, rows: Rows) -> torch.Tensor:
        """Return states [n, …]."""
        assert self.state is not None, "read before the first write"
        return self.state[rows]

    def move_row(self, source: int, to: int) -> None:
        if self.state is not None:
            self.state[to] = self.state[source]


@dataclass(frozen=True)
class Address:
    """The rows and entries that the next forward reads and writes: n rows, T tokens each."""

    rows: Rows
    write_at: torch.Tensor  # [n, T] entries
    length: int  # entries that may be attended to
    fresh: bool = False  # the rows begin here, without a state
    advance: bool = True  # states are updated; entries are written in any case


class SlotCache(Cache):
    """`KeyValueSlots` and `StateSlots` for every layer, as a cache of transformers.

    Call `address` before each forward.
    """

    def __init__(self, num_layers: int, rows: int, capacity: int):
        super().__init__(layers=[])
        self.slots = [KeyValueSlots(rows, capacity) for _ in range(num_layers)]
        self.indexers: dict[int, KeyValueSlots] = {}  # of layers that choose their entries: an indexer's keys
        self.states: dict[tuple[str, int, int], StateSlots] = {}  # (kind, layer, index of the layer's state)
        self.rows, self.capacity = rows, capacity
        self._at = Address(slice(0, rows), torch.empty(0), 0)
        self._row_index = torch.empty(0)
        # copies of states that layers have read and may update in place
        self._read_states: dict[tuple[str, int, int], torch.Tensor] = {}

    def address(self, at: Address) -> None:
        """Set the rows and entries that the next forward reads and writes."""
        if isinstance(at.rows, slice):
            row_index = torch.arange(at.rows.start, at.rows.stop, device=at.write_at.device)
        else:
            row_index = at.rows
        self._at, self._row_index = at, row_index[:, None]
        self._read_states.clear()

    def write_back(self) -> None:
        """Store the states that layers updated in place. Call it after each forward."""
        for (which, layer, index), state in self._read_states.items():
            self._advance(which, layer, index, state)
        self._read_states.clear()

    # ---- called by the model's attention

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new entries; return all entries that are attended to, each [n, kv_heads, length, head_dim]."""
        return self.store(layer_idx, key_states.transpose(1, 2), value_states.transpose(1, 2))

    def store(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new entries [n, T, kv_heads, head_dim] of a layer; return all entries that are attended to."""
        slots = self.slots[layer]
        slots.write(self._row_index, self._at.write_at, keys, values)
        return slots.read(self._at.rows, self._at.length)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Store new keys [n, T, D] of a layer's indexer; return all keys that are scored, [n, length, D]."""
        slots = self.indexers.setdefault(layer_idx, KeyValueSlots(self.rows, self.capacity))
        keys = indexer_key_states[:, :, None]
        slots.write(self._row_index, self._at.write_at, keys, keys[..., :0])
        return slots.read(self._at.rows, self._at.length)[0][:, 0]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  (the signature is transformers')
        return self._at.length

    # ---- called by its recurrent layers

    def is_recording_past(self, layer_idx: int) -> bool:  # noqa: ARG002
        """Return True, so that layers pass all their inputs and do not overwrite a convolution's state in place."""
        return True

    def get_recurrent_states_to_keep(self, layer_idx: int | None = None) -> int:  # noqa: ARG002
        """Return 0: states are never rewound (transformers 5.25 and later ask)."""
        return 0

    def increase_count(self, layer_idx: int, state_idx: int) -> None:
        """Do nothing: `Address` has the number of entries (transformers 5.25 and later count)."""

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:  # noqa: ARG002
        return not self._at.fresh

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._read_state("conv", layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._read_state("recurrent", layer_idx, state_idx)

    def _read_state(self, which: str, layer: int, index: int) -> torch.Tensor | None:
        """Return a copy: until transformers 5.24, Mamba-2 and Kimi Linear's convolutions update states in place for one
        token, without calling an update of the cache."""
        state = self._state(which, layer, index)
        if state is None:
            return None
        if isinstance(self._at.rows, slice):
            state = state.clone()
        self._read_states[which, layer, index] = state
        return state

    def _state(self, which: str, layer: int, index: int) -> torch.Tensor | None:
        return None if self._at.fresh else self.states[which, layer, index].read(self._at.rows)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **_kwargs: object,
    ) -> torch.Tensor:
        """Append inputs [n, channels, T] of a causal convolution to the stored ones, and return all of them."""
        self._read_states.pop(("conv", layer_idx, state_idx), None)
        before = self._state("conv", layer_idx, state_idx)
        inputs = conv_states if before is None else torch.cat([before, conv_states], -1)
        width = conv_kernel_size or conv_states.shape[-1]
        latest = F.pad(inputs, (max(0, width - inputs.shape[-1]), 0))[..., -width:]
        self._advance("conv", layer_idx, state_idx, latest)
        return inputs

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_kwargs: object
    ) -> torch.Tensor:
        """Store states [n, …] after the tokens of this forward."""
        self._read_states.pop(("recurrent", layer_idx, state_idx), None)
        self._advance("recurrent", layer_idx, state_idx, recurrent_states)
        return recurrent_states

    def _advance(self, which: str, layer: int, index: int, state: torch.Tensor) -> None:
        slots = self.states.setdefault((which, layer, index), StateSlots(self.rows))
        if self._at.advance:
            slots.write(self._at.rows, state)

    # ----

    @property
    def entries(self) -> list[KeyValueSlots]:
        """Return all slots that have an entry for every position."""
        return [*self.slots, *self.indexers.values()]

    def move_row(self, source: int, to: int) -> None:
        """Copy one request's entries and states into another row, in every layer."""
        for slots in self.entries:
            slots.move_row(source, to)
        for states in self.states.values():
            states.move_row(source, to)
