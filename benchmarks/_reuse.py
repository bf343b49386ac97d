# SPDX-License-Identifier: Apache-2.0
"""Many prompts on one scene at the cost of their differences.

Attention is causal: rows at the beginning of a prompt that enter a layer as they did before leave it as they did
before. Within `remembering`, a decoder layer that reads a prompt compares its rows with those of the last one and
computes only what comes after the first that differs. `decoder.prefill` runs on such layers as on any others; where a
policy keeps the same tokens for every question, or before the first gate, only the question's own rows are left to do.

Answers differ little too: `decode_along` reads a guess of the whole answer at once, keeps it up to the first token that
greedy decoding would not have given, and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.cache import RaggedCache
from adatoken3d_ros.decoder.decode import follow
from adatoken3d_ros.decoder.prefill import Prefill

# Less than this share of rows in common is not worth another way through the layer.
_LEAST = 0.25


class _Remembering:
    def __init__(self, index: int, forward: Callable[..., Tensor]) -> None:
        self._index, self._forward = index, forward
        self._rows: tuple[Tensor, ...] | None = None  # (S, ...) hidden, cos, sin
        self._found: tuple[Tensor, ...] = ()  # (1, S, D) output, (1, H, S, d) keys and values

    def __call__(
        self,
        hidden: Tensor,
        *,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: RaggedCache,
    ) -> Tensor:
        cached = past_key_values.layers[self._index]
        # Chunks over what is already cached go the usual way.
        if attention_mask is not None or cached.get_seq_length() > 0:
            return self._forward(
                hidden,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
            )
        cos, sin = position_embeddings
        rows = hidden[0], cos[0], sin[0]
        n = self._common(rows)
        if n < _LEAST * len(rows[0]):
            out = self._forward(
                hidden, attention_mask=None, position_embeddings=position_embeddings, past_key_values=past_key_values
            )
        else:
            before, keys, values = self._found
            cached.update(keys[:, :, :n], values[:, :, :n])
            total = hidden.shape[1]
            mask = torch.ones(total - n, total, dtype=torch.bool, device=hidden.device).tril_(n)
            rest = self._forward(
                hidden[:, n:],
                attention_mask=mask[None, None],
                position_embeddings=(cos[:, n:], sin[:, n:]),
                past_key_values=past_key_values,
            )
            out = torch.cat([before[:, :n], rest], dim=1)
        self._rows, self._found = rows, (out, cached.keys, cached.values)
        return out

    def _common(self, rows: tuple[Tensor, ...]) -> int:
        """How many rows at the start are those of the last prompt; the last row always has to be computed."""
        if self._rows is None:
            return 0
        most = min(len(rows[0]) - 1, len(self._rows[0]))
        same = torch.ones(most, dtype=torch.bool, device=rows[0].device)
        for new, old in zip(rows, self._rows, strict=True):
            same &= (new[:most] == old[:most]).all(dim=1)
        return most if bool(same.all()) else int(same.long().argmin())


@contextmanager
def remembering(decoder: Decoder) -> Iterator[None]:
    """Within it, each layer of `decoder` remembers the last prompt that it read."""
    layers = [layer.module for layer in decoder.layers]
    for index, layer in enumerate(layers):
        layer.forward = _Remembering(index, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


@torch.inference_mode()
def decode_along(
    decoder: Decoder,
    filled: Prefill,
    guess: Sequence[int],
    *,
    max_new_tokens: int,
    eos: int,
    worth: Callable[[list[int]], bool] = lambda ids: True,
) -> list[int]:
    """What `generate` gives, greedily; the fewer tokens of `guess` are wrong, the sooner. Uses up `filled`.

    `worth(ids)`: whether to go on after these tokens; the answer ends there where it is not.
    """
    ids: list[int] = []
    token = int(filled.logits.argmax())
    while token != eos and len(ids) < max_new_tokens:
        ids.append(token)
        if not worth(ids):
            break
        chunk = torch.tensor([token, *guess[len(ids) : max_new_tokens]])
        before = filled.cache.lengths
        best = follow(decoder, filled, chunk.tolist()).argmax(dim=1)
        wrong = (best[:-1] != chunk[1:]).nonzero()
        n = int(wrong[0]) if len(wrong) else len(chunk) - 1
        ids += chunk[1 : n + 1].tolist()
        if eos in ids:  # a guess may go on after the end
            return ids[: ids.index(eos)]
        token = int(best[n])
        filled.cache.roll_back([length + n + 1 for length in before])
        filled.next_position += n + 1 - len(chunk)
    return ids
