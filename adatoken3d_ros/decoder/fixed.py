# SPDX-License-Identifier: Apache-2.0
"""One decode step of a whole model over buffers of fixed size, as a function that a compiler can take in one piece.

Every layer's keys and values have room for what is to be written, so nothing grows; which slots a layer has filled is
in a mask that is never built anew. The next token is chosen in the step, and no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.cache import RaggedCache

SLOTS = 64  # buffers are multiples of it: few different sizes, and what kernels can be fast with


@dataclass(eq=False)
class Buffers:
    """What a step reads and changes; L layers, T steps at most.

    Attributes:
        token: (1,) int64, the last token; a step replaces it by the one that follows greedily.
        turn: (1,) int64 steps done. slots: (L,) int64 the slot that each layer writes to next.
        keys, values: of each layer, (1, H_kv, slots, head_dim), as `RaggedCache.with_room` has made them.
        seen: of each layer, (1, slots): 0 for slots that are filled, else -inf.
        cos, sin: (L, T, head_dim) of the rotary positions to come.
    """

    token: Tensor
    turn: Tensor
    slots: Tensor
    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    seen: Sequence[Tensor]
    cos: Tensor
    sin: Tensor

    def varying(self) -> list[tuple[Tensor, int]]:
        """Tensors that are of another size for other prompts, and in which dimension."""
        found = [(tensor, 2) for tensor in (*self.keys, *self.values)]
        return found + [(tensor, 1) for tensor in (*self.seen, self.cos, self.sin)]


Begin = Callable[[Decoder, Buffers], Callable[[], None]]  # a way to run steps over some buffers; then one a call


def buffers(decoder: Decoder, cache: RaggedCache, token: int, position: int, steps: int) -> Buffers:
    """For at most so many steps after `cache`, whose buffers they share; the first reads `token` at `position`."""
    keys, values = zip(*cache.with_room(steps, SLOTS), strict=True)
    device, lengths = keys[0].device, cache.lengths
    seen = []
    for one, n in zip(keys, lengths, strict=True):
        seen.append(torch.full((1, one.shape[2]), -torch.inf, dtype=decoder.dtype, device=device))
        seen[-1][:, :n] = 0
    to_come = position + torch.arange(-(-steps // SLOTS) * SLOTS, device=device)
    row = torch.empty(1, 0, dtype=decoder.dtype, device=device)
    by_shift = {shift: decoder.rotary(row, to_come - shift) for shift in set(cache.shifts)}
    cos, sin = (torch.cat([by_shift[shift][part] for shift in cache.shifts]) for part in (0, 1))
    return Buffers(
        torch.tensor([token], device=device),
        torch.zeros(1, dtype=torch.long, device=device),
        torch.tensor(lengths, device=device),
        keys,
        values,
        seen,
        cos,
        sin,
    )


def step(decoder: Decoder, state: Buffers) -> None:
    """One decode step, in place."""
    hidden = decoder.embed(state.token)
    cos, sin = state.cos.index_select(1, state.turn), state.sin.index_select(1, state.turn)
    for i, layer in enumerate(decoder.layers):
        slot = state.slots[i : i + 1]
        state.seen[i].index_fill_(1, slot, 0)
        hidden = layer.step(hidden, (cos[i], sin[i]), state.keys[i], state.values[i], state.seen[i], slot)
    state.token.copy_(decoder.logits(hidden).argmax(dim=-1))
    state.turn += 1
    state.slots += 1


def eager(decoder: Decoder, state: Buffers) -> Callable[[], None]:
    """Steps as they are written here, operation by operation."""
    return partial(step, decoder, state)
