# SPDX-License-Identifier: Apache-2.0
"""What a scene knows beside its tokens: where it has looked, and what has gone from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.scene.agreement import Sketch, thinned
from adatoken3d_ros.scene.contributions import Contribution, reduced
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import backproject
from adatoken3d_ros.scene.looked import Looked
from adatoken3d_ros.scene.looks import confirmed, in_one_grid, joined
from adatoken3d_ros.scene.occupancy import CELLS, ENOUGH, FARTHEST, MOST_BLOCKS, VOXEL, Occupancy, State
from adatoken3d_ros.scene.patches import PatchConfig, PatchPoints, patch_points
from adatoken3d_ros.scene.proposals import CLEARANCE, clusters
from adatoken3d_ros.scene.spatial_tokens import SpatialTokens
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.tombstones import Thing, Tombstones
from adatoken3d_ros.scene.verdict import MOSTLY
from adatoken3d_ros.scene.view_blocks import ViewTokenMap
from adatoken3d_ros.scene.voxels import near_any, voxel_indices, voxel_keys
from adatoken3d_ros.scene.window import floor_height, level_patches

if TYPE_CHECKING:
    from adatoken3d_ros.engine.config import SessionConfig

OCCUPANCY_SHARE, GONE_SHARE = 1 / 4, 1 / 8  # of the memory that a scene may have
RECALLED = 256  # tokens of what has gone that a question is asked again with
_OF_VOXELS = ("features", "xyz", "rgb", "count", "voxel", "position")
_BLOCK_BYTES = CELLS * 16


class Past:
    """Kept up by the scene memory as frames come and views go.

    Args:
        config: the scene's. patches: how its frames are sampled. token_map: its tokens.

    Attributes:
        occupancy: what was looked at. tombstones: what has gone.
    """

    def __init__(self, config: SessionConfig, patches: PatchConfig, token_map: TokenMap) -> None:
        self._config, self._patches, self._map = config, patches, token_map
        self._narrow: Callable[[TokenMap], Callable[[Tensor], Tensor]] | None = None
        self.limit = config.memory_limit_mb * 1e6
        blocks = min(MOST_BLOCKS, int(self.limit * OCCUPANCY_SHARE / _BLOCK_BYTES)) if self.limit else MOST_BLOCKS
        self.occupancy = Occupancy(config.origin, max(1, blocks))
        self.tombstones = Tombstones(
            config.tombstones, config.tombstone_age, config.moved_within, reach=1.5 * token_map.voxel_size
        )

    def clear(self) -> None:
        """Nothing has been seen."""
        self.occupancy.clear(self._config.origin)
        self.tombstones.clear()

    @property
    def nbytes(self) -> int:
        return self.occupancy.nbytes + self.tombstones.nbytes

    # --- kept up ------------------------------------------------------------------------------------------------------

    def look(self, frame: PosedFrame, *, key_frame: bool) -> bool:
        """A frame is a view from now on, or agrees with those that there are: of these not each is looked at.

        Returns:
            Whether this one was.
        """
        occupancy = self.occupancy
        if not occupancy.looks:
            # Voxels that begin on the floor hold it in one layer.
            points = patch_points(frame, self._patches)
            floor = floor_height(points.xyz[level_patches(points.xyz, self._patches.geometry.columns)])
            occupancy.clear((*self._config.origin[:2], self._config.origin[2] if floor is None else floor))
        since = frame.stamp_ns - occupancy.stamp_of(occupancy.looks)
        if looks := key_frame or not 0 <= since < self._config.key_frames.change_interval * 1e9:
            occupancy.look(frame, self._config.max_depth)
        return looks

    def came_up(self, frame: PosedFrame) -> int:
        """How many voxels of the occupancy the largest thing has that a frame shows where the scene was free."""
        voxels = np.rint((self.occupancy.filled(frame, self._config.max_depth) - self.occupancy.origin) / VOXEL)
        parts = clusters(voxels.astype(np.int64))
        return len(parts[-1]) if parts else 0

    def look_again(self, sketches: Mapping[int, Sketch], moved: Mapping[int, NDArray[np.float64]]) -> None:
        """Knows what the kept views looked through, from where they are now; {stamp: view}, oldest first.

        Views that went, and frames that are no views, are not there any more: of them only the times are left at which
        they saw what the kept views show, too.

        Args:
            moved: as of `follow`.
        """
        before = self.occupancy.looked()
        self._look_at(self.occupancy, sketches, self._corner)
        again = confirmed(self.occupancy.looked(), before, moved)
        self.occupancy.restore(again, self.occupancy.origin)  # no more blocks than there are

    def looked_before(
        self,
        looked: Looked | None,
        sketches: Mapping[int, Sketch],
        poses: Mapping[int, NDArray[np.float64]],
    ) -> None:
        """Knows, as older, where a scene that is loaded or joined to this one was looked at.

        Args:
            looked: None where the file does not say; then what its views looked through. sketches: of them, by their
                stamps, oldest first. poses: {stamp: T_world_camera} of all views, the newest last.
        """
        mine, camera = self.occupancy.looked() if self.occupancy.looks else None, [*poses.values()][-1][:3, 3]
        if looked is None or (mine is not None and not in_one_grid(looked, mine)):
            again = Occupancy(most_blocks=self.occupancy.most_blocks)
            self._look_at(again, sketches, self._corner if mine is None else mine.origin.tolist())
            looked = again.looked() if looked is None else confirmed(again.looked(), looked)
        self.occupancy.restore(looked if mine is None else joined(looked, mine), camera)

    @property
    def _corner(self) -> tuple[float, float, float]:
        """A point on the map's floor."""
        x, y = self._config.origin[:2]
        return x, y, float(self._map.origin[2])

    def _look_at(self, occupancy: Occupancy, sketches: Mapping[int, Sketch], origin: Sequence[float]) -> None:
        occupancy.clear(origin)
        for stamp, sketch in sketches.items():
            occupancy.look_at(sketch.near, sketch.K, sketch.pose, stamp, self._config.max_depth)

    def follow(self, moved: Mapping[int, NDArray[np.float64]]) -> None:
        """What has gone, or come, moves as the view next to it in time has.

        Args:
            moved: of each view, by its stamp, what (4, 4) takes its points to where they are now, scene frame.
        """
        if moved:
            stamps = np.array(list(moved))
            self.tombstones.move(lambda ns: moved[int(stamps[np.abs(stamps - ns).argmin()])], self._map.keys_at)

    def join(self, things: Sequence[Thing]) -> None:
        """Remembers, as older, what had gone from a scene that was joined to this one, unless it stands there now, and
        what had appeared."""
        known, occupancy = self.tombstones, self.occupancy
        mine = [
            replace(thing, keys=self._map.keys_at(thing.xyz.double().numpy()))
            for thing in things
            if not thing.gone_ns or (occupancy.states(thing.xyz.double().numpy()) == State.OCCUPIED).mean() < MOSTLY
        ]
        known.restore([*mine, *known.gone, *known.appeared])
        self._bound()

    def went(self, voxels: Tensor, before: int, gone_ns: int) -> None:
        """Voxels (n,) are about to be taken out of the views of an order below `before`."""
        if self.tombstones.most:
            self.tombstones.bury(held(self._map, voxels, before), gone_ns, self._last_seen)
            self._link()
            self._bound()

    def came(self, frame: PosedFrame, points: PatchPoints | None = None, features: Tensor | None = None) -> None:
        """A view has been added, or a frame that is none was looked at: what it shows where the scene was free before
        is noted.

        Each measurement counts, since a small thing lies between the points of a view's patches; it looks like the
        patch that it is in, or like the mean of the scene where no features are known.

        Args:
            points: of the patches (P,). features: (P, C), on any device. None: of no view.
        """
        now_ns = frame.stamp_ns
        if not self.tombstones.most:
            return
        depth, K = thinned(frame)
        v, u = np.nonzero(depth <= min(self._config.max_depth, FARTHEST))
        T = frame.T_world_camera
        xyz = backproject(depth[v, u], u, v, K, T)
        inner = np.flatnonzero(self.occupancy.well_within(xyz))
        free, first = self.occupancy.look_numbers(xyz[inner], "free", "first")
        new = inner[(free > 0) & (first > free)]
        if len(new):
            floor = floor_height(self._map.level_points())
            new = new[xyz[new, 2] > (-np.inf if floor is None else floor + CLEARANCE)]
        if len(new):
            step = round(frame.K[0, 0] / K[0, 0])
            row, column = v[new] * step + step // 2, u[new] * step + step // 2
            if points is None or features is None:
                look = _mean_feature(self._map).expand(len(new), -1)
            else:
                patch = _patch_at(frame, points, column, row)
                look = features[patch.to(features.device)].float().cpu()
            seen = torch.from_numpy(xyz[new])
            colour = torch.from_numpy(frame.rgb[row, column].copy())
            view = reduced(look, seen, colour, None, None, self._map.origin, self._map.voxel_size)
            view = replace(view, position=look.new_zeros(len(view.keys), 0))
            enough = view.count >= ENOUGH
            if bool(enough.any()):
                view = view.rows(enough)
                beside = view.keys[self._beside(view.keys, now_ns)]
                self.tombstones.greet({now_ns: view}, now_ns, beside, self._first_seen)
        self.tombstones.forget(now_ns)
        self._link()
        self._bound()

    def _beside(self, keys: Tensor, now_ns: int) -> Tensor:
        """(n,) whether voxels are beside what other views than that of now show and has not appeared itself: it may
        be the edge of that which the scene was free beside."""
        views = self._map.contributions()
        known = torch.unique(torch.cat([keys[:0], *(view.keys for stamp, view in views.items() if stamp != now_ns)]))
        fresh = torch.cat([keys[:0], *(thing.keys for thing in self.tombstones.appeared)])
        return near_any(known[~torch.isin(known, fresh)], keys, level=True)

    def _link(self) -> None:
        """What has gone may stand elsewhere already when it is found gone, or come up there later."""
        if self.tombstones.gone and self.tombstones.appeared:
            self.tombstones.link(_mean_feature(self._map))

    def _last_seen(self, points: NDArray[np.float64]) -> int:
        occupancy = self.occupancy
        return occupancy.stamp_of(int(occupancy.look_numbers(points, "hit").max(initial=0)))

    def _first_seen(self, points: NDArray[np.float64]) -> int:
        """What came up before is seen again and again: it has been there since then, not since now."""
        first = np.sort(self.occupancy.look_numbers(points, "first"))
        first = first[first > 0]
        return self.occupancy.stamp_of(int(first[len(first) // 2])) if len(first) else 0

    def _bound(self) -> None:
        while self.limit and self.tombstones.nbytes > self.limit * GONE_SHARE and self.tombstones.shrink():
            pass

    def holders(self, points: NDArray[np.floating]) -> list[int]:
        """Stamps of the views that show something in the voxels of points (n, 3), scene frame, metres."""
        keys = self._map.keys_at(points)
        return [stamp for stamp, view in self._map.contributions().items() if bool(torch.isin(keys, view.keys).any())]

    # --- for a question -----------------------------------------------------------------------------------------------

    def narrow(self, narrow: Callable[[TokenMap], Callable[[Tensor], Tensor]] | None) -> None:
        """What makes of the map the test of which voxels (n,) a question is about, from now on; None: about all."""
        self._narrow = narrow

    @property
    def asked(self) -> Tombstones:
        """What has gone and what has appeared, as far as a question is about its places; to be read alone."""
        if self._narrow is None:
            return self.tombstones
        is_left, part = self._narrow(self._map), copy(self.tombstones)
        part.gone, part.appeared = ([t for t in of if bool(is_left(t.keys).any())] for of in (part.gone, part.appeared))
        return part

    def with_the_gone(
        self, tokens: SpatialTokens, token_map: TokenMap, most: int, lift: Callable[[Tensor], Tensor]
    ) -> tuple[SpatialTokens, NDArray[np.int64]] | None:
        """The tokens of a question as if nothing had gone, at most `most`, and of each the number of its tombstone, -1
        for what is there; None where there is no tombstone, or none whose tokens could be added.

        Args:
            lift: makes (P, H) of points (P, 3), seen from the model's origin, metres.

        Where tokens are those of views, only those can be that were carved out of views that are still there.
        """
        gone = self.tombstones.gone
        if not gone:
            return None
        is_left = None if self._narrow is None else self._narrow(self._map)
        rows = [range(len(t.keys)) if is_left is None else is_left(t.keys).nonzero()[:, 0].tolist() for t in gone]
        if isinstance(token_map, ViewTokenMap):
            return _views_with_the_gone(token_map, [thing.keys[rows[i]] for i, thing in enumerate(gone)], most)
        room = min(most - len(tokens), RECALLED)
        parts = [(i, row) for i in reversed(range(len(gone))) for row in rows[i]][:room]
        if not parts:
            return None
        owner = np.array([i for i, _ in parts])
        xyz = torch.stack([gone[i].xyz[row] for i, row in parts])
        device = tokens.features.device
        more = SpatialTokens(
            features=torch.stack([gone[i].features[row] for i, row in parts]).to(device),
            xyz=xyz.to(device),
            rgb=torch.stack([gone[i].rgb[row] for i, row in parts]).to(device),
            count=torch.stack([gone[i].count[row] for i, row in parts]).to(device),
            voxel=voxel_indices(torch.stack([gone[i].keys[row] for i, row in parts])).to(device),
            position=lift((xyz - torch.from_numpy(token_map.model_origin)).float()),
        )
        both = {n: torch.cat([getattr(tokens, n), getattr(more, n)]) for n in _OF_VOXELS}
        # In the order of voxels, as the model has learned to read them.
        order = torch.sort(voxel_keys(both["voxel"].cpu().double(), 1.0), stable=True).indices
        in_order: dict[str, Any] = {n: values[order.to(device)] for n, values in both.items()}
        return SpatialTokens(**in_order), np.concatenate([np.full(len(tokens), -1), owner])[order.numpy()]


def _patch_at(frame: PosedFrame, points: PatchPoints, u: NDArray[np.int64], v: NDArray[np.int64]) -> Tensor:
    """(n,) int64 number of the valid patch whose middle is nearest to each pixel (u, v) of a frame."""
    rows = np.flatnonzero(points.valid)
    T = frame.T_world_camera
    local = (points.xyz[rows].astype(np.float64) - T[:3, 3]) @ T[:3, :3]
    corner = local[:, :2] / local[:, 2:] * frame.K[[0, 1], [0, 1]] + frame.K[:2, 2]
    # A patch stands for what is right of and below its point.
    middle = corner + math.sqrt(frame.depth.size / len(points.valid)) / 2
    away = np.abs(middle[:, 0] - u[:, None]) + np.abs(middle[:, 1] - v[:, None])
    return torch.from_numpy(rows[away.argmin(axis=1)])


def held(token_map: TokenMap, voxels: Tensor, before: int) -> dict[int, Contribution]:
    """{stamp of a view: its rows in some voxels (n,)}, with the features of its tokens there.

    Args:
        before: only of views of an order below.
    """
    found = {}
    blocks = token_map.blocks() if isinstance(token_map, ViewTokenMap) else {}
    for stamp, view in token_map.contributions().items():
        if view.order >= before:
            continue
        inside = torch.isin(view.keys, voxels)
        if not bool(inside.any()):
            continue
        rows = view.rows(inside)
        if stamp in blocks:
            block = blocks[stamp]
            mine = torch.isin(block.keys, rows.keys)
            at = torch.searchsorted(rows.keys, block.keys[mine])
            features = block.features[mine.to(block.features.device)].cpu()
            sums = torch.zeros(len(rows.keys), features.shape[1]).index_add_(0, at, features)
            rows = Contribution(**{**vars(rows), "features": sums})
        found[stamp] = rows
    return found


def _views_with_the_gone(
    token_map: ViewTokenMap, gone: list[Tensor], most: int
) -> tuple[SpatialTokens, NDArray[np.int64]] | None:
    """As `Past.with_the_gone`, of the voxels' keys of each tombstone."""
    keys = torch.cat(gone)
    owners = torch.repeat_interleave(torch.arange(len(gone)), torch.tensor([len(one) for one in gone]))
    left, found, owner = token_map.contributions(), {}, []
    for stamp, block in token_map.whole_blocks().items():
        mine = torch.full((len(block.keys),), -1)
        for key, number in zip(keys.tolist(), owners.tolist(), strict=True):
            mine[block.keys == key] = number
        there = torch.isin(block.keys, left[stamp].keys)
        mine[there] = -1
        rows = (there | (mine >= 0)).nonzero()[:, 0]  # what is neither was taken out for good, or is not asked about
        found[stamp] = block.at(rows)
        owner.append(mine[rows])
    numbers = torch.cat(owner).numpy()
    if len(numbers) > most or not (numbers >= 0).any():
        return None
    return token_map.tokens_of(found), numbers


def _mean_feature(token_map: TokenMap) -> Tensor:
    """(C,) of all patches; zeros where all have gone, for what is kept is finite."""
    if isinstance(token_map, ViewTokenMap):
        features = torch.cat([block.features for block in token_map.blocks().values()]).float()
        return (features.sum(dim=0) / max(1, len(features))).cpu()
    views = token_map.contributions().values()
    total = torch.stack([view.features.sum(dim=0).cpu() for view in views]).sum(dim=0)
    return total / max(1, sum(int(view.count.sum()) for view in views))
