# SPDX-License-Identifier: Apache-2.0
"""What the layers before the first gate that looks at a question make of [system | spatial tokens].

Attention is causal and the scene comes before the question, so these rows are the same for every question about a scene
until a gate chooses by what is asked. They are read once; a question then begins with its own rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder, causal_chunk
from adatoken3d_ros.decoder.cache import RaggedCache
from adatoken3d_ros.decoder.rows import Rows
from adatoken3d_ros.pruning.view import BlindAtStart, Policy


@dataclass(frozen=True, eq=False)
class Stem:
    """Of the E rows before a question, S' of which are left.

    Attributes:
        embeds: (1, E, D) what was read. key: by what it was read.
        hidden: (1, S', D) what enters the layer with the gate. rows: which they are.
        layers: keys and values (1, H_kv, S', head_dim) of each layer before it.
        choices: what a trace has to be told of the gate before the first layer, if there is one.
    """

    embeds: Tensor
    key: tuple[Any, ...]
    hidden: Tensor
    rows: Rows
    layers: tuple[tuple[Tensor, Tensor], ...]
    choices: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Of what was read, and what became of it."""
        kept = (self.embeds, self.hidden, *(tensor for layer in self.layers for tensor in layer))
        return sum(tensor.nbytes for tensor in kept)


class Asking(NamedTuple):
    """A question's rows: `states` (Q, D) that enter a layer, `queries` (Q, H * head_dim) that its projection makes of
    them (`Layer.asked`), where that was noted."""

    states: Tensor
    queries: Tensor | None


class Stems:
    """The last stem that was read of a scene."""

    def __init__(self) -> None:
        self._last: Stem | None = None
        self.used = 0  # times that one was there already

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return 0 if self._last is None else self._last.nbytes

    def forget(self) -> None:
        """Gives its memory back."""
        self._last = None

    def get(self, embeds: Tensor, key: tuple[Any, ...], read: Callable[[], Stem]) -> Stem:
        """The stem of these rows (1, E, D), read if it is not there."""
        last = self._last
        if last is not None and last.key == key and torch.equal(last.embeds, embeds):
            self.used += 1
            return last
        self._last = None  # its memory first
        self._last = read()
        return self._last


def first_asking_gate(counts: Sequence[int], n_spatial: int, policy: Policy) -> int:
    """The layer with the first gate that may look at the question; 0 where none is left of which a stem is of use."""
    if not n_spatial or not counts[0]:
        return 0
    if counts[0] != n_spatial and not (isinstance(policy, BlindAtStart) and policy.blind_at_start):
        return 0
    return next((g for g in range(1, len(counts)) if counts[g] != counts[g - 1]), 0)


def rows_before(rows: Rows, end: int) -> Rows:
    """Those of the prompt's rows that are before row `end`, the question's first."""
    fixed = None if rows.fixed is None else rows.fixed[rows.fixed < end]
    return replace(rows, positions=rows.positions[..., :end], fixed=fixed)


def read_question(
    decoder: Decoder, stem: Stem, cache: RaggedCache, question: Tensor, positions: Tensor, check: Callable[[int], None]
) -> tuple[Tensor, Rows, Asking]:
    """Reads a question's rows (1, Q, D) at their positions through the layers of a stem, into `cache`.

    Args:
        check: called before each layer, to end it by an exception.

    Returns:
        hidden states (1, S' + Q, D) that enter the layer with the gate, their rows, and what the layer before it was
        asked, which is all that the gate looks at.
    """
    q, cos_sin = question.shape[1], decoder.rotary(question, positions)
    n, last = stem.hidden.shape[1], len(stem.layers) - 1
    hidden, asking = question, Asking(question[0], None)
    mask = causal_chunk(n + q, q, hidden.device)
    for i, (keys, values) in enumerate(stem.layers):
        check(i)
        cache.update(keys, values, i)
        with decoder.layers[i].asked(q if i == last else 0) as noted:
            after = decoder.layers[i].run(hidden, cos_sin, mask, cache)
        if i == last:
            asking = Asking(hidden[0], noted[0] if noted else None)
        hidden = after
    rows = replace(stem.rows, positions=torch.cat([stem.rows.positions, positions], dim=-1))
    if rows.fixed is not None:
        rows = replace(rows, fixed=torch.cat([rows.fixed, n + torch.arange(q, device=hidden.device)]))
    return torch.cat([stem.hidden, hidden], dim=1), rows, asking
