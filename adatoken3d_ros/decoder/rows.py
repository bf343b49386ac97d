# SPDX-License-Identifier: Apache-2.0
"""Which rows of a prompt are left while it is read: removing some, and taking back what was set aside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adatoken3d_ros.pruning.view import Selection


@dataclass(frozen=True, eq=False)
class Rows:
    """The S' rows that are left.

    Attributes:
        positions: (S',) or (axes, S') int64 rotary positions.
        alive: (n,) int64 original indices of the spatial tokens, rising.
        spatial: the rows of these. fixed: the others' rows, where the spatial tokens do not follow one another.
        closing: (n,) rows that go with the last of the tokens that name them; -1 for none.
        added: (n, D) vectors that the next layers add to them.
        shift: how far positions after the spatial tokens have moved down.
        changed: (n,) sum of what a watching policy said of the layers so far.
        parked: what was dropped and may come back at a later gate.
    """

    positions: Tensor
    alive: Tensor
    spatial: slice | Tensor
    fixed: Tensor | None
    added: tuple[Tensor, ...]
    shift: int = 0
    changed: Tensor | None = None
    parked: Parked | None = None
    closing: Tensor | None = None

    @classmethod
    def at_start(
        cls,
        n_tokens: int,
        spatial: slice | Tensor,
        positions: Tensor | None,
        added: tuple[Tensor, ...],
        closing: Tensor | None,
        device: Any,
    ) -> Rows:
        """All rows of a prompt: where its spatial tokens are, its positions (its rows' numbers without), what is added
        to them, what closes their lines."""
        every = torch.arange(n_tokens, device=device)
        positions = every if positions is None else positions.to(device)
        if isinstance(spatial, slice):
            return cls(positions, torch.arange(spatial.stop - spatial.start, device=device), spatial, None, added)
        spatial = spatial.to(device)
        closing = None if closing is None else closing.to(device)
        alive = torch.arange(len(spatial), device=device)
        return cls(positions, alive, spatial, fixed_rows(every, spatial), added, closing=closing)

    def add(self, hidden: Tensor) -> Rows:
        """Adds, in place, what is added to the rows (1, S', D) that leave a layer."""
        hidden[0, self.spatial] += self.added[0].to(hidden.device, hidden.dtype)
        return replace(self, added=self.added[1:], parked=self.parked and self.parked.add())

    def watched(self, change: Tensor) -> Rows:
        """With what was said of the rows (S',) that a layer was given."""
        change = change[self.spatial]
        return replace(self, changed=change if self.changed is None else self.changed + change)

    def park(self, chosen: Selection, hidden: Tensor) -> Rows:
        """Sets aside what was not chosen of all there is; `hidden` (1, S', D)."""
        gone = torch.ones_like(self.alive, dtype=torch.bool).index_fill(0, chosen.keep, False)
        every = torch.arange(hidden.shape[1], device=hidden.device)[self.spatial]
        rows, added = every[gone], tuple(vectors[gone] for vectors in self.added)
        parked = Parked(self.alive[gone], rows, hidden[0, rows], self.positions[..., rows], added, hidden.shape[1])
        return replace(self, parked=parked)

    def rejoined(self, hidden: Tensor) -> tuple[Tensor, Rows]:
        """With what was set aside where it had been: hidden states (1, S, D) and their rows."""
        assert self.parked is not None
        back, device = self.parked, hidden.device
        stayed = (
            torch.ones(back.n_rows, dtype=torch.bool, device=device).index_fill(0, back.rows, False).nonzero()[:, 0]
        )
        order = torch.cat([stayed, back.rows]).argsort()
        alive, tokens = torch.cat([self.alive, back.alive]).sort()
        every = torch.arange(len(stayed), device=device)
        spatial: slice | Tensor = torch.cat([stayed[every[self.spatial]], back.rows]).sort().values
        fixed = None if self.fixed is None else stayed[self.fixed]
        if isinstance(self.spatial, slice):
            spatial = slice(self.spatial.start, self.spatial.start + len(alive))
        added = tuple(torch.cat(both)[tokens] for both in zip(self.added, back.added, strict=True))
        positions = torch.cat([self.positions, back.positions], dim=-1)[..., order]
        states = torch.cat([hidden[0], back.hidden])[order]
        return states[None], Rows(positions, alive, spatial, fixed, added, self.shift)

    def drop(self, chosen: Selection, hidden: Tensor, renumbered_until: int | None) -> tuple[Tensor, Rows, Tensor]:
        """Removes what was not chosen: hidden states (1, S'', D), their rows, and which of the present ones (S'',).

        renumbered_until: position after the prompt, if positions are counted anew from 0; None: they are kept.
        """
        device = hidden.device
        if isinstance(self.spatial, slice):
            start, kept = self.spatial.start, len(chosen.keep)
            system = torch.arange(start, device=device)
            question = torch.arange(start + len(self.alive), hidden.shape[1], device=device)
            index = torch.cat([system, start + chosen.keep, question])
            spatial: slice | Tensor = slice(start, start + kept)
            fixed = None
        else:
            assert self.fixed is not None
            stay = self.fixed
            if self.closing is not None:
                named = torch.isin(stay, self.closing)
                stay = stay[~named | torch.isin(stay, self.closing[chosen.keep])]
            index = torch.cat([stay, self.spatial[chosen.keep]]).sort().values
            spatial = torch.searchsorted(index, self.spatial[chosen.keep])
            fixed = torch.searchsorted(index, stay)
        hidden = hidden.index_select(1, index)
        if chosen.merged is not None:
            hidden[0, spatial] = chosen.merged
        alive, added = self.alive.index_select(0, chosen.keep), tuple(chosen.of(vectors) for vectors in self.added)
        changed = None if self.changed is None else self.changed[chosen.keep]
        closing = None
        if self.closing is not None:
            closing = self.closing[chosen.keep]
            closing = torch.where(closing < 0, closing, torch.searchsorted(index, closing))
        positions, shift = self.positions.index_select(-1, index), self.shift
        if renumbered_until is not None:
            positions, shift = torch.arange(len(index), device=device), renumbered_until - len(index)
        return hidden, Rows(positions, alive, spatial, fixed, added, shift, changed, self.parked, closing), index


@dataclass(frozen=True, eq=False)
class Parked:
    """Tokens (m,) that were set aside at the last gate, of `n_rows` that there were: their original indices, rows,
    states (m, D), positions and what the next layers add to them."""

    alive: Tensor
    rows: Tensor
    hidden: Tensor
    positions: Tensor
    added: tuple[Tensor, ...]
    n_rows: int

    def add(self) -> Parked:
        """As `Rows.add`: a layer that a token goes around adds to it all the same."""
        states = self.hidden + self.added[0].to(self.hidden.device, self.hidden.dtype)
        return replace(self, hidden=states, added=self.added[1:])


def fixed_rows(every: Tensor, spatial: Tensor) -> Tensor:
    """Those of the rows (S,) from 0 on that are not `spatial` (N,), rising."""
    return every[torch.ones_like(every, dtype=torch.bool).index_fill(0, spatial, False)]
