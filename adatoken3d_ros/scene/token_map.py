# SPDX-License-Identifier: Apache-2.0
"""The scene memory: sums over the voxels, kept up to date as views come and go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.scene.contributions import Contribution, Sums, moved_views, reduced
from adatoken3d_ros.scene.coverage import Coverage
from adatoken3d_ros.scene.map_bytes import MapBytes
from adatoken3d_ros.scene.spatial_tokens import SpatialTokens
from adatoken3d_ros.scene.voxels import TokenMapError, corners_around, near_any, sum_groups, voxel_indices, voxel_keys


class TokenMap(MapBytes):
    """Voxel means over a changing set of views, equal to pooling the same views from scratch.

    Each view is reduced once to one row of sums per voxel. A voxel's sums are always its views' rows added in the order
    of the views: one newer than the others is simply added; any other change adds up the touched voxels anew.
    Nothing is ever subtracted, so no rounding stays behind and every history of the same views gives the same bits.
    Views may come from inference mode or not: the map's own tensors are ordinary ones without gradients. A change that
    an error ends half-way, as one out of memory may, has not been: the views are as they were, and the sums are added
    up anew when they are next needed.

    The model sees the scene from `model_origin`, which `move_origin` takes a whole number of voxels away from the
    map's own origin, so that every patch stays in its voxel. What depends on it, the `embed`ded points, is summed apart
    from the features and made anew from the points when it moves: equal to a map that was filled there.

    Args:
        voxel_size: metres.
        origin: scene-frame point, metres, that is the centre of voxel (0, 0, 0), and the model's origin at first.
        embed: makes (P, H) float32, on the device of the features, of (P, 3) float32 points seen from the model's
            origin, metres; None: H is 0.

    Attributes:
        shift: (3,) int64, voxels from the map's origin to the model's.
    """

    def __init__(
        self,
        voxel_size: float = 0.2,
        origin: Sequence[float] | NDArray[np.floating] = (0.0, 0.0, 0.0),
        *,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not 0 < voxel_size < float("inf"):
            raise TokenMapError(f"voxel size {voxel_size} m must be positive and finite")
        self.voxel_size = float(voxel_size)
        self._embed = embed
        self._set_origin(origin)
        self.clear()

    def _set_origin(self, origin: Sequence[float] | NDArray[np.floating]) -> None:
        wanted = torch.from_numpy(np.array(origin, dtype=np.float64))
        if wanted.shape != (3,) or not bool(torch.isfinite(wanted).all()):
            raise TokenMapError(f"origin must be three finite numbers, got {list(origin)}")
        self.origin = wanted
        self.shift = torch.zeros(3, dtype=torch.int64)

    @property
    def model_origin(self) -> NDArray[np.float64]:
        """(3,) the point of the scene frame that the model sees as its origin, metres."""
        origin: NDArray[np.float64] = (self.origin + self.shift * self.voxel_size).numpy()
        return origin

    def clear(self, origin: Sequence[float] | NDArray[np.floating] | None = None) -> None:
        """Forget every view; with an origin, voxels and model begin there from now on."""
        if origin is not None:
            self._set_origin(origin)
        self._views: dict[int, Contribution] = {}
        self._keys = torch.empty(0, dtype=torch.int64)  # occupied voxels, ascending, and the row of each in the sums
        self._slots = torch.empty(0, dtype=torch.int64)
        # Grows with the scene, made when the first view tells C and the device, or after an error.
        self._sums: Sums | None = None

    def __len__(self) -> int:
        """Number of views."""
        return len(self._views)

    @property
    def n_voxels(self) -> int:
        """Number of occupied voxels."""
        return len(self._keys)

    @property
    def n_tokens(self) -> int:
        """Number of tokens without a cap."""
        return self.n_voxels

    def keys(self) -> tuple[int, ...]:
        """Keys of the views, oldest first."""
        return tuple(sorted(self._views, key=lambda key: (self._views[key].order, key)))

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_view(
        self,
        key: int,
        features: Tensor,
        xyz: Tensor | NDArray[np.floating],
        rgb: Tensor | NDArray[np.uint8],
        valid: Tensor | NDArray[np.bool_] | None = None,
        level: Tensor | NDArray[np.bool_] | None = None,
        order: int | None = None,
    ) -> None:
        """Add one view's patches.

        Args:
            key: of the view, its stamp in nanoseconds.
            features: (P, C); its device is where the sums live.
            xyz: (P, 3) scene frame, metres. rgb: (P, 3) uint8.
            valid: (P,) bool; other rows are left out and may hold anything. None: all.
            level: (P,) bool, where the surface faces up, see `level_points`. None: nowhere.
            order: place among the views; a view is older than those of greater order. None: the key.

        Raises:
            TokenMapError: for a key that is there already, shapes that disagree, a point that is not finite, or a
                feature that is not (it would poison its voxel).
        """
        if key in self._views:
            raise TokenMapError(f"view {key} is already in the map")
        points, colours = torch.as_tensor(xyz).cpu(), torch.as_tensor(rgb).cpu()
        view = self._seen_from_here(reduced(features, points, colours, valid, level, self.origin, self.voxel_size))
        self._insert(key, replace(view, order=key if order is None else order))

    def _insert(self, key: int, view: Contribution) -> None:
        have, want = view.features, next(iter(self._views.values()), view).features
        if have.shape[1] != want.shape[1] or have.device != want.device:
            raise TokenMapError(
                f"features have {have.shape[1]} channels on {have.device}, the map {want.shape[1]} on {want.device}"
            )
        with self._whole_or_not_at_all():
            sums = self._added_up() if self._views else Sums(view)
            self._sums, self._views[key] = sums, view
            touched = torch.unique_consecutive(view.keys)
            self._allocate(touched)
            if key == self.keys()[-1]:
                sums.add(self._rows_of(view.keys), view)
            else:
                self._rebuild(touched)

    @contextmanager
    def _whole_or_not_at_all(self) -> Iterator[None]:
        """Undoes a change of the views that is not finished; the sums may be anything then and are given up."""
        views, keys, slots, shift = dict(self._views), self._keys, self._slots, self.shift
        try:
            yield
        except BaseException:
            self._views, self._keys, self._slots, self.shift, self._sums = views, keys, slots, shift, None
            raise

    def _added_up(self) -> Sums:
        """The sums of all views, of which there is at least one; to be called before each use of them."""
        if self._sums is None:
            sums = Sums(next(iter(self._views.values())))
            slots = sums.take(len(self._keys))
            for key in self.keys():
                sums.add(slots[torch.searchsorted(self._keys, self._views[key].keys)], self._views[key])
            self._sums, self._slots = sums, slots
        return self._sums

    @torch.inference_mode(False)
    @torch.no_grad()
    def remove_view(self, key: int) -> None:
        """Take one view's patches out.

        Raises:
            TokenMapError: if there is no such view.
        """
        if key not in self._views:
            raise TokenMapError(f"view {key} is not in the map")
        if len(self._views) == 1:
            self.clear()
            return
        with self._whole_or_not_at_all():
            self._added_up()
            touched = torch.unique_consecutive(self._views.pop(key).keys)
            self._rebuild(touched)
            self._release(touched)

    @torch.inference_mode(False)
    @torch.no_grad()
    def carve(self, voxels: Tensor, before: int) -> int:
        """Take out what views of an order below `before` hold of some voxels: what they show there has gone.

        Equal to adding those views without their patches there. A view may be left with no patch at all.

        Args:
            voxels: (n,) int64 keys of occupied voxels, see `voxel_keys` and `occupied_keys`.

        Returns:
            How many patches were taken out.
        """
        voxels = torch.sort(voxels.cpu()).values
        taken, touched, left = 0, [], {}
        for key, view in self._views.items():
            gone = torch.isin(view.keys, voxels) if view.order < before else torch.zeros(0, dtype=torch.bool)
            if not bool(gone.any()):
                continue
            taken += int(view.count[gone].sum())
            touched.append(view.keys[gone])
            left[key] = view.rows(~gone)
        if touched:
            changed = torch.unique(torch.cat(touched))
            with self._whole_or_not_at_all():
                self._added_up()
                self._views.update(left)
                self._rebuild(changed)
                self._release(changed)
        return taken

    @torch.inference_mode(False)
    @torch.no_grad()
    def move_origin(self, shift: Sequence[int] | NDArray[np.integer] | Tensor) -> None:
        """Let the model see the scene from `shift` (3,) voxels beside the map's origin from now on."""
        with self._whole_or_not_at_all():
            self.shift = torch.as_tensor(shift, dtype=torch.int64).clone()
            if not self._views:
                return
            position = self._added_up().position.zero_()
            for key in self.keys():
                view = self._views[key] = self._seen_from_here(self._views[key])
                position.index_add_(0, self._rows_of(view.keys).to(view.position.device), view.position)

    def move_views(self, moves: Mapping[int, NDArray[np.float64]]) -> None:
        """Views are elsewhere than was believed: all is added up anew from their patches; what was carved stays out.

        If anything is raised, the map is as it was.

        Args:
            moves: by view, the rigid transform (4, 4) that takes its points to where they are, scene frame, metres.

        Raises:
            TokenMapError: if there is no such view, or a point gets no voxel.
        """
        self.restore(moved_views(self._views, moves, self.origin, self.voxel_size))

    def _seen_from_here(self, view: Contribution) -> Contribution:
        """The view with its points embedded as they are seen from the model's origin."""
        device = view.features.device
        if self._embed is None:
            return replace(view, position=torch.zeros(len(view.keys), 0, device=device))
        seen = self._embed((view.points - torch.from_numpy(self.model_origin)).float())
        if len(seen):
            seen = sum_groups(seen, torch.arange(len(seen), device=device), view.count.to(device))
        return replace(view, position=seen)

    def level_points(self) -> NDArray[np.float32]:
        """(n, 3) points of the patches whose surface faces up, scene frame, metres, by view."""
        found = [self._views[key].points[self._views[key].level] for key in self.keys()]
        return np.asarray(torch.cat([torch.zeros(0, 3), *found]).numpy(), np.float32)

    @property
    def occupied_keys(self) -> Tensor:
        """(M,) int64, the keys of the occupied voxels in ascending order."""
        return self._keys

    def centres(self) -> NDArray[np.float64]:
        """(M, 3) centres of the occupied voxels, scene frame, metres, in the order of `occupied_keys`."""
        return np.asarray((voxel_indices(self._keys) * self.voxel_size + self.origin).numpy(), np.float64)

    def keys_at(self, xyz: Tensor | NDArray[np.floating]) -> Tensor:
        """(P,) int64 keys of the voxels of points (P, 3), scene frame, metres; raises as `voxel_keys`."""
        return voxel_keys((torch.as_tensor(xyz).double() - self.origin).float(), self.voxel_size)

    def near_occupied(self, xyz: Tensor | NDArray[np.floating]) -> Tensor:
        """(P,) bool: whether the voxel of each point (P, 3), scene frame, or one of its 26 neighbours is occupied."""
        return near_any(self._keys, self.keys_at(xyz))

    def holds(self, xyz: Tensor | NDArray[np.floating], within: float) -> Tensor:
        """(P,) bool: whether an occupied voxel is at most `within` (half a voxel) from each point along each axis."""
        return torch.isin(self.keys_at(corners_around(xyz, within)), self._keys).reshape(-1, 8).any(dim=1)

    def exclusive(self) -> dict[int, int]:
        """Of each view, how many voxels no other view holds: the coverage that is lost without it."""
        return self.coverage().exclusive()

    def coverage(self) -> Coverage:
        """Which views alone hold which voxels, to try out what would go with views; the map stays as it is."""
        return Coverage({key: view.keys for key, view in self._views.items()})

    def cover(self, limit: int, first: Sequence[int] = ()) -> tuple[int, ...]:
        """Keys of at most `limit` views that hold the most voxels: each adds the most new ones (ties: the newest).

        Those of `first` are chosen before all others. The greedy choice holds at least 1 - 1/e of the voxels that the
        best choice of so many views does. Oldest first.
        """
        return self.coverage().greedy(self.keys(), limit, first)

    @torch.inference_mode(False)
    @torch.no_grad()
    def subset(self, keys: Sequence[int]) -> TokenMap:
        """A map of some of the views, equal to one that was given only them.

        Raises:
            TokenMapError: if there is no such view.
        """
        part = self._like_this(self.origin)
        part.shift = self.shift.clone()
        for key in keys:
            if key not in self._views:
                raise TokenMapError(f"view {key} is not in the map")
        for key in (key for key in self.keys() if key in keys):
            part._insert(key, self._views[key])
        return part

    def _like_this(self, origin: Tensor) -> TokenMap:
        """An empty map of the kind of this one."""
        return TokenMap(self.voxel_size, origin.numpy(), embed=self._embed)

    def contributions(self) -> dict[int, Contribution]:
        """What each view adds, by its key: for storing."""
        return dict(self._views)

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(
        self, contributions: dict[int, Contribution], origin: Sequence[float] | None = None, shift: Tensor | None = None
    ) -> None:
        """Replace all views by stored ones (all on one device, of one width), and origin and shift where given.

        Their points are embedded anew, and all is added up at once. If anything is raised, the map is as it was.
        """
        made = self._like_this(self.origin if origin is None else torch.tensor(origin, dtype=torch.float64))
        made.shift = (self.shift if shift is None else shift).clone()
        made._views = {key: made._seen_from_here(view) for key, view in contributions.items()}
        if made._views:
            made._keys = torch.unique(torch.cat([view.keys for view in made._views.values()]))
            made._added_up()
        self.__dict__.update(made.__dict__)

    @torch.inference_mode(False)
    @torch.no_grad()
    def tokens(self, max_tokens: int | None = None) -> SpatialTokens:
        """The scene as tokens.

        Args:
            max_tokens: at most so many; the voxels with the most patches stay (ties: the first in order), in order.

        Raises:
            TokenMapError: if the map is empty or `max_tokens` is below 1.
        """
        if max_tokens is not None and max_tokens < 1:
            raise TokenMapError(f"max_tokens {max_tokens} must be at least 1")
        if not self._views:
            raise TokenMapError("the token map is empty: no view was added")
        sums = self._added_up()
        keys, slots = self._keys, self._slots
        if max_tokens is not None and len(keys) > max_tokens:
            by_count = torch.sort(sums.count[slots], descending=True, stable=True).indices
            kept = by_count[:max_tokens].sort().values
            keys, slots = keys[kept], slots[kept]
        count = sums.count[slots]
        device = sums.features.device
        features = sums.features.index_select(0, slots.to(device))
        features /= count.to(device)[:, None]
        return SpatialTokens(
            features=features,
            xyz=(sums.xyz[slots] / count[:, None]).float().to(device),
            rgb=(sums.rgb[slots] / count[:, None]).round().to(torch.uint8).to(device),
            count=count.to(device),
            voxel=voxel_indices(keys).to(device),
            position=sums.position.index_select(0, slots.to(device)) / count.to(device)[:, None],
        )

    def _rows_of(self, keys: Tensor) -> Tensor:
        """Rows of the sums of voxels that are all occupied."""
        return self._slots[torch.searchsorted(self._keys, keys)]

    def _allocate(self, touched: Tensor) -> None:
        """Give a row to each voxel of `touched` (ascending) that has none."""
        assert self._sums is not None
        new = touched[~torch.isin(touched, self._keys, assume_unique=True)]
        self._keys, order = torch.sort(torch.cat([self._keys, new]))
        self._slots = torch.cat([self._slots, self._sums.take(len(new))])[order]

    def _rebuild(self, touched: Tensor) -> None:
        """Add up some voxels (ascending) anew from the rows of their views, in the order of the views."""
        assert self._sums is not None
        self._sums.zero(self._rows_of(touched))
        views = [self._views[key] for key in self.keys()]
        hit = torch.isin(torch.cat([view.keys for view in views]), touched)
        for view, mask in zip(views, torch.split(hit, [len(view.keys) for view in views]), strict=True):
            rows = torch.nonzero(mask)[:, 0]
            if len(rows):
                self._sums.add(self._rows_of(view.keys[rows]), view, rows)

    def _release(self, touched: Tensor) -> None:
        """Give back the rows of voxels that no view holds any more."""
        assert self._sums is not None
        empty = (self._sums.count[self._slots] == 0) & torch.isin(self._keys, touched, assume_unique=True)
        self._sums.give_back(self._slots[empty])
        self._keys, self._slots = self._keys[~empty], self._slots[~empty]
