# SPDX-License-Identifier: Apache-2.0
"""A key/value cache whose layers hold different numbers of tokens, grow cheaply and roll back to a mark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

MIN_HEADROOM = 128


class RaggedLayer(DynamicLayer):
    """Keys and values (B, H_kv, n, head_dim) of one layer, views of the first n slots of larger buffers.

    The first chunk is held as it comes. When a later one does not fit, the buffers grow by half (at least by
    MIN_HEADROOM slots), so a decode step copies one token, not the cache.
    """

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends (B, H_kv, q, head_dim) keys and values; returns all of them."""
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if not self._fits(end):
            self._buffers = (_grown(self.keys, end), _grown(self.values, end))
        assert self._buffers is not None
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _fits(self, end: int) -> bool:
        # Whoever replaced `keys` (reordering, repeating a batch) made the buffers stale.
        buffers = self._buffers
        return buffers is not None and buffers[0].shape[-2] >= end and buffers[0].data_ptr() == self.keys.data_ptr()

    def with_room(self, more: int, multiple: int) -> tuple[Tensor, Tensor]:
        """The buffers (B, H_kv, slots, head_dim) with room for so many tokens more; slots are a multiple of that."""
        end = self.keys.shape[-2] + more
        if not self._fits(end) or self._buffers is None or self._buffers[0].shape[-2] % multiple:
            slots = -(-end // multiple) * multiple
            self._buffers = (_with_slots(self.keys, slots), _with_slots(self.values, slots))
            n = self.keys.shape[-2]
            self.keys, self.values = (buffer[:, :, :n] for buffer in self._buffers)
        return self._buffers

    def filled_to(self, length: int) -> None:
        """Notes that slots of the buffers were written from outside, or forgets those from `length` on."""
        assert self._buffers is not None
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """What lies in memory: the buffers, or keys and values that still are as they came."""
        return self._buffers if self._fits(0) and self._buffers is not None else (self.keys, self.values)

    def crop_to(self, length: int) -> None:
        """Forgets every token from slot `length` on; the buffers stay."""
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


def _grown(states: Tensor, end: int) -> Tensor:
    """A buffer of `end` slots and headroom, in which `states` (B, H, n, head_dim) fills the first n."""
    return _with_slots(states, max(end + MIN_HEADROOM, end * 3 // 2))


def _with_slots(states: Tensor, slots: int) -> Tensor:
    batch, heads, n, dim = states.shape
    # Zeros: a slot that is not seen counts nothing only if what it holds is finite.
    buffer = states.new_zeros(batch, heads, slots, dim)
    buffer[:, :, :n] = states
    return buffer


class RaggedCache(Cache):
    """One RaggedLayer per decoder layer; `shifts[i]` is how far the prefill moved positions down in layer i."""

    layers: list[RaggedLayer]  # type: ignore[assignment]
    shifts: list[int]

    def __init__(self, n_layers: int) -> None:
        super().__init__(layers=[RaggedLayer() for _ in range(n_layers)])
        self.shifts = [0] * n_layers

    @property
    def lengths(self) -> tuple[int, ...]:
        """Slots used in each layer."""
        return tuple(layer.get_seq_length() for layer in self.layers)

    def with_room(self, more: int, multiple: int) -> list[tuple[Tensor, Tensor]]:
        """The buffers of every layer, for so many tokens more; see `RaggedLayer.with_room`."""
        return [layer.with_room(more, multiple) for layer in self.layers]

    def roll_back(self, lengths: Sequence[int]) -> None:
        """Forgets what came after `lengths` was read; O(1), no copy.

        Raises:
            ValueError: a layer holds fewer tokens than its mark, or the mark is for another number of layers.
        """
        if len(lengths) != len(self.layers):
            raise ValueError(f"a mark of {len(lengths)} layers for a cache of {len(self.layers)}")
        for i, (layer, length, held) in enumerate(zip(self.layers, lengths, self.lengths, strict=True)):
            if not 0 <= length <= held:
                raise ValueError(f"cannot roll layer {i} back to {length} tokens: it holds {held}")
            layer.crop_to(length)

    def nbytes(self) -> int:
        """Bytes of the keys and values in use."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in (layer.keys, layer.values))

    @property
    def held(self) -> int:
        """Bytes in memory: keys and values with the room that their buffers have for more."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.held)
