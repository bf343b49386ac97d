# SPDX-License-Identifier: Apache-2.0
"""What comes after a prefill: further rows over a cache whose layers hold different numbers of tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from adatoken3d_ros.decoder.adapter import CosSin, Decoder, causal_chunk
from adatoken3d_ros.decoder.cache import RaggedCache
from adatoken3d_ros.decoder.fixed import buffers, eager
from adatoken3d_ros.decoder.prefill import Cancelled, Prefill, ShouldStop, check_context

BeforeLayer = Callable[[int, Tensor, CosSin], None]
AfterLayer = Callable[[int, Tensor], None]

MOST_STEPS = 256  # that buffers are made for at a time


def generate(
    decoder: Decoder,
    prefilled: Prefill,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    should_stop: ShouldStop | None = None,
) -> Iterator[int]:
    """Greedy token ids as they are found, without the one of `eos_ids` that ends them.

    Ends within one step once should_stop() is true. Uses up `prefilled`: its cache grows.

    Raises:
        GateError: at once, not at the first token: more tokens than the context holds.
    """
    check_context(decoder, prefilled.next_position, max_new_tokens)
    return _stream(decoder, prefilled, max_new_tokens, eos_ids, should_stop)


def _stream(
    decoder: Decoder, prefilled: Prefill, n: int, eos_ids: Collection[int], should_stop: ShouldStop | None
) -> Iterator[int]:
    token, steps = int(prefilled.logits.argmax()), None
    try:
        for i in range(n):
            if (should_stop is not None and should_stop()) or token in eos_ids:
                return
            yield token
            if i + 1 < n:
                if steps is None or not steps.left:
                    if steps is not None:
                        steps.note()
                    steps = Steps(decoder, prefilled, token, min(n - i - 1, MOST_STEPS))
                token = steps.next()
    finally:
        if steps is not None:
            steps.note()


class Steps:
    """Greedy decoding after a prefill, in buffers of fixed size; the cache knows of it once `note` is called.

    Args:
        token: the first of the answer, which is read by the first step.
        room: most steps.
    """

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, prefilled: Prefill, token: int, room: int) -> None:
        self._prefilled, self.left, self._done = prefilled, room, 0
        self._state = buffers(decoder, prefilled.cache, token, prefilled.next_position, room)
        begin = decoder.stepping or eager
        self._step = begin(decoder, self._state)

    @torch.inference_mode()
    def next(self) -> int:
        """The token that follows the last one."""
        self._step()
        self.left, self._done = self.left - 1, self._done + 1
        return int(self._state.token)

    @torch.inference_mode()
    def note(self) -> None:
        """Tells the cache what was written to its buffers, and the prefill at which position it goes on."""
        for layer in self._prefilled.cache.layers:
            layer.filled_to(layer.get_seq_length() + self._done)
        self._prefilled.next_position += self._done
        self._done = 0


def surest(logits: Tensor) -> float:
    """The probability of the token that follows greedily, of logits (V,)."""
    return float(logits.float().softmax(dim=-1).max())


@torch.inference_mode()
def decode(decoder: Decoder, prefilled: Prefill, token: int) -> Tensor:
    """One step: appends `token` to every layer of the cache; float32 logits (V,) of what follows."""
    return follow(decoder, prefilled, [token])[-1]


@torch.inference_mode()
def follow(decoder: Decoder, prefilled: Prefill, tokens: Collection[int]) -> Tensor:
    """Appends T tokens that are known already, all at once; float32 logits (T, V) of what follows each."""
    ids = torch.tensor([list(tokens)], device=prefilled.logits.device)
    positions = prefilled.next_position + torch.arange(ids.shape[1], device=ids.device)
    hidden = read_chunk(decoder, prefilled.cache, decoder.embed(ids), positions)
    prefilled.next_position += ids.shape[1]
    return decoder.logits(hidden[0])


@torch.inference_mode()
def chance(decoder: Decoder, prefilled: Prefill, tokens: Sequence[int], eos_ids: Collection[int]) -> float:
    """The probability that exactly these tokens follow a prompt that was read, and then one of those that end it.

    `prefilled` is as before afterwards.

    Raises:
        GateError: more tokens than the context holds.
    """
    check_context(decoder, prefilled.next_position, len(tokens))
    mark, position = prefilled.cache.lengths, prefilled.next_position
    rows = [prefilled.logits[None]]
    try:
        if tokens:
            rows.append(follow(decoder, prefilled, tokens))
    finally:
        prefilled.cache.roll_back(mark)
        prefilled.next_position = position
    logits = torch.cat(rows).double().log_softmax(dim=-1)
    each = logits[torch.arange(len(tokens)), list(tokens)].sum()
    return float((each + logits[-1, sorted(eos_ids)].logsumexp(dim=0)).exp())


@torch.inference_mode()
def read_chunk(
    decoder: Decoder,
    cache: RaggedCache,
    hidden: Tensor,
    positions: Tensor,
    *,
    before_layer: BeforeLayer | None = None,
    after_layer: AfterLayer | None = None,
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """Appends rows (1, q, D) at original `positions` (q,) to what each layer has cached; the last layer's output.

    `before_layer(i, hidden, cos_sin)` is called before layer i, which then sees what its cache holds after the call,
    `after_layer(i, hidden)` with what leaves it, to be changed in place.

    Raises:
        Cancelled: should_stop() was true before a layer.
    """
    q = hidden.shape[1]
    rotary: dict[int, CosSin] = {}  # by position shift, one where positions are original
    masks: dict[int, Tensor | None] = {}  # by length
    for i, (layer, cached, shift) in enumerate(zip(decoder.layers, cache.layers, cache.shifts, strict=True)):
        if should_stop is not None and should_stop():
            raise Cancelled(f"stopped before layer {i} of {len(decoder)}")
        if shift not in rotary:
            rotary[shift] = decoder.rotary(hidden, positions - shift)
        if before_layer is not None:
            before_layer(i, hidden, rotary[shift])
        n = cached.get_seq_length() + q
        if n not in masks:
            masks[n] = causal_chunk(n, q, hidden.device)
        hidden = layer.run(hidden, rotary[shift], masks[n], cache)
        if after_layer is not None:
            after_layer(i, hidden)
    return hidden
