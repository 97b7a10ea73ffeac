"""Key/value memory with one row a request: written at any position, rewound by doing nothing.

A row holds the entries of positions 0 … capacity-1. Writing position p again replaces it, and readers mask out whatever
lies at or behind their own position, so a rejected proposal is forgotten simply by being overwritten later.
"""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

Rows = slice | torch.Tensor  # which rows a call addresses: a slice (no copy) or indices, shape [n]


class KeyValueSlots:
    """Keys and values of one layer, each of shape [rows, kv_heads, capacity, head_dim]: attention reads in order."""

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity = rows, capacity
        self.keys: torch.Tensor | None = None  # allocated at the first write, which tells heads, dtype and device
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
        """The first `length` entries of `rows`: two tensors [n, kv_heads, length, head_dim]."""
        assert self.keys is not None and self.values is not None, "read before the first write"
        return self.keys[rows, :, :length], self.values[rows, :, :length]

    def move_row(self, source: int, to: int) -> None:
        """Copy a row over another one."""
        if self.keys is not None and self.values is not None:
            self.keys[to] = self.keys[source]
            self.values[to] = self.values[source]


class SlotCache(Cache):
    """`KeyValueSlots` for every layer, behind the cache interface of transformers.

    Call `address` before each forward: which rows, where to write, how many entries to attend to.
    """

    def __init__(self, num_layers: int, rows: int, capacity: int):
        super().__init__(layers=[])
        self.slots = [KeyValueSlots(rows, capacity) for _ in range(num_layers)]
        self.capacity = capacity
        self._rows: Rows = slice(0, rows)
        self._row_index = torch.empty(0)
        self._write_at = torch.empty(0)
        self._length = 0

    def address(self, rows: Rows, write_at: torch.Tensor, length: int) -> None:
        """write_at: [n, T] positions that the next forward writes; `length`: entries that it may attend to."""
        if isinstance(rows, slice):
            row_index = torch.arange(rows.start, rows.stop, device=write_at.device)
        else:
            row_index = rows
        self._rows, self._row_index, self._write_at, self._length = rows, row_index[:, None], write_at, length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the model's attention: key_states, value_states [n, kv_heads, T, head_dim]."""
        slots = self.slots[layer_idx]
        slots.write(self._row_index, self._write_at, key_states.transpose(1, 2), value_states.transpose(1, 2))
        return slots.read(self._rows, self._length)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002  (the signature is transformers')
        return self._length

    def move_row(self, source: int, to: int) -> None:
        """Copy one request's entries into another row, in every layer."""
        for slots in self.slots:
            slots.move_row(source, to)
