# SPDX-License-Identifier: Apache-2.0
"""What has gone is remembered: where it was, how it looked, when it was seen, when it was found gone, and where to.

What a view looks through comes out of the map; of that, what hangs together is one thing that has gone. What comes to
stand where the scene was seen to be free is one that has appeared. A thing that went and one that appeared are linked
where they look alike, reach as high, and lie within `moved_within` of each other in time: it moved. Features of all
things of one scene are alike, so they are compared with their scene's mean taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.scene.contributions import Contribution
from adatoken3d_ros.scene.proposals import clusters
from adatoken3d_ros.scene.voxels import voxel_indices
from adatoken3d_ros.settings import DEFAULTS

FEWEST = 3  # patches of a thing that is worth telling of unasked
MOST_VOXELS = 32  # whose features are kept of one thing, those of most patches
TOGETHER = 10.0  # seconds within which neighbouring parts of one thing go or appear
SETTLED = 1.0  # seconds for which what is one voxel of fewer patches was not measured any more when it is found gone
EDGE, WHOLE = 0.67, 40  # of its voxels beside what is known, and fewer measurements: no thing, but the edge of one
NOISE = 3  # times as many measurements as what came up beside it before: that was of an edge
SAME_COLOUR = 30.0  # of mean colours, 0 to 255 each
# Of `likeness`: always, for looks, colours, heights (1 / m), measurements, widths (1 / m).
SURE = (0.3, 1.0, 16.0, 8.0, 1.1, 1.0)
ALIKE = 0.5  # confidence from which on a thing counts as one that moved
MOST_APPEARED = 64


@dataclass(frozen=True, eq=False)
class Thing:
    """Something that was seen, as voxels.

    Attributes:
        low, high: (3,) corners of the box around its patches, scene frame, metres.
        keys: (n,) int64 voxels of the token map. features: (n, C) float32 means, CPU. xyz: (n, 3) float32, metres.
            rgb: (n, 3) uint8. count: (n,) int64 patches, or measurements of what appeared.
        first_ns, last_ns: acquisition times between which it was seen. views: that showed it.
        gone_ns: acquisition time of the frame that looked through it; 0 while it is there.
        moved_to: middle of the box of what it was found again as, metres. confidence: of that, 0 to 1.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    keys: Tensor
    features: Tensor
    xyz: Tensor
    rgb: Tensor
    count: Tensor
    first_ns: int
    last_ns: int
    views: int
    gone_ns: int = 0
    moved_to: tuple[float, float, float] | None = None
    confidence: float = 0.0

    @property
    def place(self) -> NDArray[np.float64]:
        """(3,) middle of the box, scene frame, metres."""
        return np.asarray((self.low + self.high) / 2)

    @property
    def nbytes(self) -> int:
        tables = (self.keys, self.features, self.xyz, self.rgb, self.count)
        return sum(t.numel() * t.element_size() for t in tables) + 4 * (self.features.shape[-1] + 3)  # and its means

    @cached_property
    def _means(self) -> tuple[Tensor, Tensor]:
        weight = self.count.float() / self.count.sum()
        return weight @ self.features, weight @ self.rgb.float()

    def look(self) -> Tensor:
        """(C,) mean feature."""
        return self._means[0]

    def colour(self) -> Tensor:
        """(3,) mean colour, 0 to 255."""
        return self._means[1]

    def of_colour(self, other: Thing) -> bool:
        """Whether both have the same colour."""
        return float((self.colour() - other.colour()).norm()) <= SAME_COLOUR

    def moved(self, T: NDArray[np.float64], keys_at: Callable[[NDArray[np.float64]], Tensor]) -> Thing:
        """As it would be had it been seen from elsewhere, but for `moved_to`: T (4, 4) takes its points there.

        Args:
            keys_at: voxels (n,) of points (n, 3), scene frame, metres.
        """
        if np.array_equal(T, np.eye(4)):
            return self
        points = self.xyz.double().numpy()
        there = points @ T[:3, :3].T + T[:3, 3]
        # A box that is turned again and again would grow; what it has around the voxels' means stays.
        low = there.min(axis=0) + self.low - points.min(axis=0)
        high = there.max(axis=0) + self.high - points.max(axis=0)
        keys, order = torch.sort(keys_at(there), stable=True)
        rows = {name: getattr(self, name)[order] for name in ("features", "rgb", "count")}
        return replace(self, low=low, high=high, keys=keys, xyz=torch.from_numpy(there).float()[order], **rows)

    def near(self, other: Thing, reach: float) -> bool:
        """Whether the boxes come as close as `reach` metres along each axis."""
        return bool((self.low - reach <= other.high).all() and (other.low - reach <= self.high).all())


def things(held: Mapping[int, Contribution], gone_ns: int = 0) -> list[Thing]:
    """What hangs together in some voxels.

    Args:
        held: {stamp of a view: its rows there}.
        gone_ns: when they had gone, 0 for what is there.
    """
    if not held:
        return []
    stamps = torch.cat([torch.full((len(view.keys),), stamp) for stamp, view in held.items()])
    views = list(held.values())
    rows = {name: torch.cat([getattr(view, name).cpu() for view in views]) for name in ("keys", "count", "xyz", "rgb")}
    features = torch.cat([view.features.cpu() for view in views])
    patch_row = torch.repeat_interleave(torch.arange(len(rows["keys"])), rows["count"])
    points = torch.cat([view.points for view in views]).double().numpy()
    keys, at = torch.unique(rows["keys"], return_inverse=True)

    def total(values: Tensor) -> Tensor:
        return torch.zeros(len(keys), *values.shape[1:], dtype=values.dtype).index_add_(0, at, values)

    count = total(rows["count"])
    mean = total(features.float()) / count[:, None]
    xyz = (total(rows["xyz"]) / count[:, None]).float()
    rgb = (total(rows["rgb"]) / count[:, None]).round().to(torch.uint8)
    found = []
    for part in clusters(voxel_indices(keys).numpy()):
        inside = torch.zeros(len(keys), dtype=torch.bool)
        inside[torch.from_numpy(part)] = True
        mine = inside[at]
        own = points[mine[patch_row].numpy()]
        when = stamps[mine]
        kept = torch.nonzero(inside)[:, 0]
        kept = kept[torch.sort(count[kept], descending=True, stable=True).indices[:MOST_VOXELS]].sort().values
        found.append(
            Thing(
                own.min(axis=0),
                own.max(axis=0),
                keys[kept],
                mean[kept],
                xyz[kept],
                rgb[kept],
                count[kept],
                int(when.min()),
                int(when.max()),
                len(when.unique()),
                gone_ns,
            )
        )
    return found


def merged(a: Thing, b: Thing) -> Thing:
    """Two parts of one thing, with what the newer one says of its end."""
    features = torch.cat([a.features, b.features])
    keys, count = torch.cat([a.keys, b.keys]), torch.cat([a.count, b.count])
    # Of a voxel that both have, the part with more patches.
    best = torch.sort(count, descending=True, stable=True).indices
    order = best[torch.sort(keys[best], stable=True).indices]
    order = order[torch.cat([torch.ones(1, dtype=torch.bool), keys[order].diff() > 0])]
    kept = order[torch.sort(count[order], descending=True, stable=True).indices[:MOST_VOXELS]]
    kept = kept[torch.sort(keys[kept]).indices]
    return Thing(
        np.minimum(a.low, b.low),
        np.maximum(a.high, b.high),
        keys[kept],
        features[kept],
        torch.cat([a.xyz, b.xyz])[kept],
        torch.cat([a.rgb, b.rgb])[kept],
        count[kept],
        min(a.first_ns, b.first_ns),
        max(a.last_ns, b.last_ns),
        max(a.views, b.views),
        max(a.gone_ns, b.gone_ns),
        a.moved_to,
        a.confidence,
    )


def likeness(gone: Sequence[Thing], appeared: Sequence[Thing], mean: Tensor) -> NDArray[np.float64]:
    """(G, A) how sure it is that what has gone is what appeared, 0 to 1.

    A logistic function of the cosine of their looks with the scene's mean (C,) taken off, the distance of their colours
    without brightness, how much higher one's top is than the other's, how often what appeared was measured, and by how
    much it is wider than what went. Its numbers were fitted to rooms in which one thing was put elsewhere
    (docs/memory.md).
    """
    looks = [torch.stack([thing.look() - mean for thing in side]) for side in (gone, appeared)]
    unit = [(look / look.norm(dim=1, keepdim=True).clamp_min(1e-6)).double().numpy() for look in looks]
    colours = [torch.stack([thing.colour() for thing in side]).double().numpy() + 1 / 3 for side in (gone, appeared)]
    shares = [colour / colour.sum(axis=1, keepdims=True) for colour in colours]
    tops = [np.array([thing.high[2] for thing in side]) for side in (gone, appeared)]
    often = np.array([np.log10(max(1, int(thing.count.sum()))) for thing in appeared])
    colour = np.linalg.norm(shares[0][:, None] - shares[1], axis=2)
    score = SURE[0] + SURE[1] * (unit[0] @ unit[1].T) - SURE[2] * colour
    score = score - SURE[3] * np.abs(tops[0][:, None] - tops[1]) + SURE[4] * often
    edges = [np.array([np.sort((thing.high - thing.low)[:2]) for thing in side]) for side in (gone, appeared)]
    score = score - SURE[5] * np.maximum(edges[1] - edges[0][:, None], 0.0).max(axis=2)
    return np.asarray(1.0 / (1.0 + np.exp(-score)))


class Tombstones:
    """What has gone from one scene, and what has appeared in it, oldest first.

    Args:
        most: things that are remembered. max_age: seconds, by the newest frame, after which one is forgotten.
        moved_within: seconds between being found gone at one place and being first seen at another.
        reach: metres between the boxes of parts of one thing, one and a half voxels.

    Attributes:
        gone: the tombstones. appeared: what came to stand where the scene was free.
    """

    def __init__(
        self,
        most: int = DEFAULTS["memory.tombstones"],
        max_age: float = DEFAULTS["memory.tombstone_age"],
        moved_within: float = DEFAULTS["memory.moved_within"],
        *,
        reach: float = 0.3,
    ) -> None:
        self.most, self.max_age, self.moved_within, self.reach = most, max_age, moved_within, reach
        self.gone: list[Thing] = []
        self.appeared: list[Thing] = []

    def clear(self) -> None:
        """Nothing has gone."""
        self.gone, self.appeared = [], []

    def restore(self, things: Sequence[Thing]) -> None:
        """Remembers these things instead, in their order, as many as it may."""
        self.gone = [thing for thing in things if thing.gone_ns][-self.most :] if self.most else []
        self.appeared = [thing for thing in things if not thing.gone_ns][-MOST_APPEARED:]

    def move(self, way: Callable[[int], NDArray[np.float64]], keys_at: Callable[[NDArray[np.float64]], Tensor]) -> None:
        """What was seen lies elsewhere than was believed.

        Args:
            way: T (4, 4), scene frame, that takes what was seen at a time, nanoseconds, to where it is.
            keys_at: see `Thing.moved`.
        """
        places = {tuple(thing.place.tolist()): i for i, thing in enumerate(self.appeared)}
        self.appeared = [thing.moved(way(thing.last_ns), keys_at) for thing in self.appeared]

        def target(thing: Thing) -> tuple[float, float, float] | None:
            if thing.moved_to is None:
                return None
            at, T = places.get(thing.moved_to), way(thing.gone_ns)
            there = T[:3, :3] @ thing.moved_to + T[:3, 3] if at is None else self.appeared[at].place
            x, y, z = there.tolist()
            return x, y, z

        self.gone = [replace(thing.moved(way(thing.last_ns), keys_at), moved_to=target(thing)) for thing in self.gone]

    @property
    def nbytes(self) -> int:
        """Of what is remembered."""
        return sum(thing.nbytes for thing in (*self.gone, *self.appeared))

    def bury(
        self, held: Mapping[int, Contribution], gone_ns: int, last_seen: Callable[[NDArray[np.float64]], int]
    ) -> None:
        """What was taken out of the map, of each view, since a frame looked through it.

        Args:
            last_seen: of points (n, 3), scene frame, metres, when one of them was last measured, nanoseconds; 0: never.
        """
        for thing in things(held, gone_ns):
            last = max(thing.last_ns, last_seen(thing.xyz.double().numpy()))
            little = len(thing.keys) == 1 and int(thing.count.sum()) < FEWEST
            if little and gone_ns - last < SETTLED * 1e9:
                continue  # an edge, that one frame puts there and the next does not
            self.gone = self._with(self.gone, replace(thing, last_ns=min(last, gone_ns)), gone_ns)
        self.forget(gone_ns)

    def greet(
        self,
        held: Mapping[int, Contribution],
        now_ns: int,
        beside: Tensor | None = None,
        first_seen: Callable[[NDArray[np.float64]], int] | None = None,
    ) -> None:
        """What a view shows where the scene was free before.

        Args:
            beside: voxels of it that are beside what is known; a little that has most of its voxels there is an edge
                of that.
            first_seen: of points (n, 3), scene frame, metres, since when something has been measured where most of
                them are, nanoseconds; 0: never. None: since now.
        """
        for thing in things(held):
            edge = 0.0 if beside is None else float(torch.isin(thing.keys, beside).double().mean())
            if edge > EDGE and int(thing.count.sum()) < WHOLE:
                continue
            first = 0 if first_seen is None else first_seen(thing.xyz.double().numpy())
            thing = replace(thing, first_ns=first or thing.first_ns)
            self.appeared = self._with(self.appeared, thing, now_ns)
        self.appeared = self.appeared[-MOST_APPEARED:]

    def _with(self, known: list[Thing], thing: Thing, now_ns: int) -> list[Thing]:
        """The list with one thing more, or with one that has become larger."""
        others = []
        for other in known:
            apart = abs(now_ns - other.gone_ns if other.gone_ns else thing.first_ns - other.first_ns)
            same = apart <= TOGETHER * 1e9 or (apart <= self.moved_within * 1e9 and other.of_colour(thing))
            if other.near(thing, self.reach) and same:
                stray = not thing.gone_ns and NOISE * int(other.count.sum()) < int(thing.count.sum())
                whole = merged(other, thing)
                thing = replace(whole, first_ns=thing.first_ns) if stray else whole
            else:
                others.append(other)
        return [*others, thing]

    def forget(self, now_ns: int) -> None:
        """Forgets what is too old, and the oldest of what is too much."""
        young = [thing for thing in self.gone if now_ns - thing.gone_ns <= self.max_age * 1e9]
        self.gone = young[max(0, len(young) - self.most) :]

    def shrink(self) -> bool:
        """Forgets the oldest thing; False if there was none."""
        if self.gone:
            del self.gone[0]
        elif self.appeared:
            del self.appeared[0]
        else:
            return False
        return True

    def link(self, mean: Tensor) -> None:
        """Says of what has gone where it moved to: each to one of what appeared, the surest pairs first. What stands
        where it was has come back: it has not gone.

        Args:
            mean: (C,) of the scene's features.
        """
        known = [thing for thing in self.gone if len(thing.keys)]
        if not known or not self.appeared:
            return
        sure = likeness(known, self.appeared, mean)
        gone_ns, last_ns = (np.array([getattr(thing, name) for thing in known]) for name in ("gone_ns", "last_ns"))
        first_ns = np.array([self._really_first(thing) for thing in self.appeared])
        sure[np.abs(first_ns - gone_ns[:, None]) >= self.moved_within * 1e9] = 0.0
        sure[first_ns <= last_ns[:, None]] = 0.0
        places = [np.array([thing.place for thing in side]) for side in (known, self.appeared)]
        same = (np.abs(places[0][:, None] - places[1]) <= self.reach).all(axis=2)
        back = ((sure >= ALIKE) & same).any(axis=1)
        sure[back] = 0.0
        found: dict[int, Thing] = {}
        while sure.max() >= ALIKE:
            i, j = np.unravel_index(int(sure.argmax()), sure.shape)
            x, y, z = places[1][j].tolist()
            found[id(known[i])] = replace(known[i], moved_to=(x, y, z), confidence=float(sure[i, j]))
            sure[i], sure[:, j] = 0.0, 0.0
        returned = {id(thing) for thing, there in zip(known, back, strict=True) if there}
        self.gone = [found.get(id(t)) or self._unlinked(t) for t in self.gone if id(t) not in returned]

    def _really_first(self, thing: Thing) -> int:
        """When a thing that appeared was first seen, or so much in its place that it is that again."""
        there = (one for one in self.appeared if one.near(thing, 0.0))
        return min(one.first_ns for one in there if NOISE * int(one.count.sum()) >= int(thing.count.sum()))

    def _unlinked(self, thing: Thing) -> Thing:
        """A thing that was linked to nothing now, without what it was linked to before if that is still known."""
        place = thing.moved_to
        if place is None or not any(((one.low <= place) & (place <= one.high)).all() for one in self.appeared):
            return thing
        return replace(thing, moved_to=None, confidence=0.0)

    def within(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> Iterable[Thing]:
        """What has gone from a box, the newest first."""
        inside = [t for t in self.gone if bool((t.low <= high).all() and (low <= t.high).all())]
        return sorted(inside, key=lambda thing: -thing.gone_ns)
