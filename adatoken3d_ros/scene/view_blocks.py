# SPDX-License-Identifier: Apache-2.0
"""The scene memory of a model whose tokens are those of its views: a block for each view instead of voxels' means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.scene.contributions import Contribution, moved_views, transformed
from adatoken3d_ros.scene.spatial_tokens import SpatialTokens
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.voxels import TokenMapError, voxel_indices, voxel_keys


@dataclass(frozen=True, eq=False)
class Block:
    """The n tokens of a view that have a place, row-major.

    Attributes:
        features: (n, C) float32, on the model's device; all others on the CPU.
        cell: (n,) int64 place in the view's grid, rising. grid: its rows and columns.
        xyz: (n, 3) float32, scene frame, metres. rgb: (n, 3) uint8. keys: (n,) int64 of their voxels.
        parts: (n, K, 3) float32, places of the smaller patches of each, NaN where there is none; K may be 0.
    """

    features: Tensor
    cell: Tensor
    grid: tuple[int, int]
    xyz: Tensor
    rgb: Tensor
    keys: Tensor
    parts: Tensor

    def at(self, rows: Tensor) -> Block:
        """Some of its tokens."""
        features = self.features.index_select(0, rows.to(self.features.device))
        cell, xyz, rgb, keys, parts = (of[rows] for of in (self.cell, self.xyz, self.rgb, self.keys, self.parts))
        return Block(features, cell, self.grid, xyz, rgb, keys, parts)


class ViewTokenMap(TokenMap):
    """Voxels say what has been seen, as in its parent: which views are worth their place, and what has gone.

    The tokens are the views' blocks, in the order of the views, without those in voxels that were carved out of a view.

    Args:
        voxel_size, origin, embed: as the parent's.
        parts: K, smaller patches of a token whose places are kept.
    """

    def __init__(
        self,
        voxel_size: float = 0.2,
        origin: Sequence[float] | NDArray[np.floating] = (0.0, 0.0, 0.0),
        *,
        embed: Callable[[Tensor], Tensor] | None = None,
        parts: int = 0,
    ) -> None:
        super().__init__(voxel_size, origin, embed=embed)
        self.parts = parts

    def clear(self, origin: Sequence[float] | NDArray[np.floating] | None = None) -> None:
        super().clear(origin)
        self._blocks: dict[int, Block] = {}
        self._counts: dict[int, tuple[Tensor, int]] = {}  # tokens of a view that has these voxels

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_block(
        self,
        key: int,
        features: Tensor,
        xyz: NDArray[np.float32],
        rgb: NDArray[np.uint8],
        valid: NDArray[np.bool_],
        grid: tuple[int, int],
        *,
        level: NDArray[np.bool_] | None = None,
        order: int | None = None,
        parts: NDArray[np.float32] | None = None,
    ) -> None:
        """Adds one view of rows x columns tokens; for the arguments see `TokenMap.add_view`.

        Args:
            parts: (P, K, 3) places of the smaller patches, see `PatchPoints`; None where K is 0.

        Raises:
            TokenMapError: as there, for another number of tokens than the grid has, or of parts than the map keeps.
        """
        places_of_parts = torch.zeros(len(features), 0, 3) if parts is None else torch.as_tensor(parts).float()
        if places_of_parts.shape != (len(features), self.parts, 3):
            raise TokenMapError(
                f"parts {tuple(places_of_parts.shape)} of {len(features)} tokens, each has {self.parts} here"
            )
        if grid[0] * grid[1] != len(features):
            raise TokenMapError(f"{len(features)} tokens for a grid of {grid[0]} x {grid[1]}")
        rows = torch.nonzero(torch.as_tensor(valid))[:, 0]
        kept = features.detach().index_select(0, rows.to(features.device)).float()
        if not bool((finite := torch.isfinite(kept).all(dim=1)).all()):
            raise TokenMapError(f"the feature of patch {int(rows[int(finite.long().argmin())])} is not finite")
        places = torch.as_tensor(xyz)[rows].float()
        keys = voxel_keys((places.double() - self.origin).float(), self.voxel_size)
        block = Block(kept, rows, grid, places, torch.as_tensor(rgb)[rows], keys, places_of_parts[rows])
        # The parent counts and carves; one column is enough for it.
        self.add_view(key, kept.new_zeros(len(features), 1), xyz, rgb, valid, level, order)
        self._blocks[key] = block

    def remove_view(self, key: int) -> None:
        super().remove_view(key)
        self._blocks.pop(key, None)

    def move_views(self, moves: Mapping[int, NDArray[np.float64]]) -> None:
        """As the parent's; tokens that were carved out are gone for good, since their voxels are no more."""
        views, blocks = moved_views(self._views, moves, self.origin, self.voxel_size), self.blocks()
        for key, T in moves.items():
            xyz, parts = (transformed(places, T) for places in (blocks[key].xyz, blocks[key].parts))
            keys = voxel_keys((xyz.double() - self.origin).float(), self.voxel_size)
            blocks[key] = replace(blocks[key], xyz=xyz, parts=parts, keys=keys)
        self.restore(views, blocks=blocks)

    def _seen_from_here(self, view: Contribution) -> Contribution:
        """Places are embedded token by token, when tokens are asked for."""
        return replace(view, position=torch.zeros(len(view.keys), 0, device=view.features.device))

    def _like_this(self, origin: Tensor) -> TokenMap:
        return ViewTokenMap(self.voxel_size, origin.numpy(), embed=self._embed, parts=self.parts)

    def subset(self, keys: Sequence[int]) -> TokenMap:
        part = super().subset(keys)
        assert isinstance(part, ViewTokenMap)
        part._blocks = {key: self._blocks[key] for key in keys}
        return part

    def restore(
        self,
        contributions: dict[int, Contribution],
        origin: Sequence[float] | None = None,
        shift: Tensor | None = None,
        blocks: dict[int, Block] | None = None,
    ) -> None:
        """As the parent's; `blocks` of these views, the present ones if None."""
        held = self._blocks if blocks is None else blocks
        super().restore(contributions, origin, shift)
        self._blocks = {key: held[key] for key in contributions}

    def blocks(self) -> dict[int, Block]:
        """What is left of each view's tokens, by its key, oldest first."""
        return dict(self._left())

    @property
    def nbytes(self) -> int:
        blocks = (value for block in self._blocks.values() for value in vars(block).values())
        return super().nbytes + sum(v.numel() * v.element_size() for v in blocks if isinstance(v, Tensor))

    def whole_blocks(self) -> dict[int, Block]:
        """All tokens of each view, also those that were carved out of it, by its key, oldest first."""
        return {key: self._blocks[key] for key in self.keys()}

    def _left(self) -> Iterator[tuple[int, Block]]:
        for key in self.keys():
            block, held = self._blocks[key], self._views[key].keys
            there = torch.isin(block.keys, held)
            yield key, block if bool(there.all()) else block.at(there.nonzero()[:, 0])

    @property
    def n_tokens(self) -> int:
        # Of what is left of each view, counted once until it loses or gains a voxel: asked for at every turn.
        for key, view in self._views.items():
            if (counted := self._counts.get(key)) is None or counted[0] is not view.keys:
                self._counts[key] = view.keys, int(torch.isin(self._blocks[key].keys, view.keys).sum())
        self._counts = {key: self._counts[key] for key in self._views}
        return sum(count for _, count in self._counts.values())

    @torch.inference_mode(False)
    @torch.no_grad()
    def tokens(self, max_tokens: int | None = None) -> SpatialTokens:
        """The views' tokens, view after view.

        Args:
            max_tokens: at most so many. Those stay that are the only ones of their voxels, or of the newest view there;
                then the next in each voxel, fuller voxels first.

        Raises:
            TokenMapError: if the map is empty or `max_tokens` is below 1.
        """
        if max_tokens is not None and max_tokens < 1:
            raise TokenMapError(f"max_tokens {max_tokens} must be at least 1")
        return self.tokens_of(self.blocks(), max_tokens)

    @torch.inference_mode(False)
    @torch.no_grad()
    def tokens_of(self, found: Mapping[int, Block], max_tokens: int | None = None) -> SpatialTokens:
        """As `tokens`, of these blocks."""
        blocks = list(found.values())
        if not sum(len(block.keys) for block in blocks):
            raise TokenMapError("the token map is empty: no view was added")
        view = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor([len(block.keys) for block in blocks]))
        keys = torch.cat([block.keys for block in blocks])
        if max_tokens is not None and len(keys) > max_tokens:
            kept = first_of_each(keys, max_tokens)
            parts = [kept[view[kept] == index] for index in range(len(blocks))]
            starts = torch.tensor([0, *[len(block.keys) for block in blocks[:-1]]]).cumsum(0)
            blocks = [block.at(rows - start) for block, rows, start in zip(blocks, parts, starts, strict=True)]
            keys, view = keys[kept], view[kept]
        features = torch.cat([block.features for block in blocks])
        xyz, device = torch.cat([block.xyz for block in blocks]), features.device
        position = torch.zeros(len(keys), 0, device=device)
        if self._embed is not None:
            position = self._embed((xyz - torch.from_numpy(self.model_origin)).float())
        return SpatialTokens(
            features=features,
            xyz=xyz.to(device),
            rgb=torch.cat([block.rgb for block in blocks]).to(device),
            count=torch.ones_like(keys).to(device),
            voxel=voxel_indices(keys).to(device),
            position=position,
            view=view,
            cell=torch.cat([block.cell for block in blocks]),
            grids=tuple(block.grid for block in blocks),
            parts=torch.cat([block.parts for block in blocks]),
        )


def first_of_each(keys: Tensor, n: int) -> Tensor:
    """(n,) int64 rising indices into voxels' keys (N,): of each voxel its last, then its last but one, and so on.

    Of what is equal in that, those of fuller voxels come first, and then the earlier ones.
    """
    newest = torch.arange(len(keys)).flip(0)
    order = keys[newest].argsort(stable=True)
    _, inverse, counts = torch.unique_consecutive(keys[newest][order], return_inverse=True, return_counts=True)
    rank, fullness = torch.empty_like(keys), torch.empty_like(keys)
    rank[newest[order]] = torch.arange(len(keys)) - (counts.cumsum(0) - counts)[inverse]
    fullness[newest[order]] = counts[inverse]
    return (rank * (len(keys) + 1) + len(keys) - fullness).argsort(stable=True)[:n].sort().values
