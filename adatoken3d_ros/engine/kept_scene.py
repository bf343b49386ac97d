# SPDX-License-Identifier: Apache-2.0
"""The kept views of a scene as a whole: forgotten, saved, loaded, joined with others, moved to corrected poses."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.past import Past
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.scene.carving import carve_free_space
from adatoken3d_ros.scene.contributions import Contribution
from adatoken3d_ros.scene.frames import PosedFrame, check_position, check_rigid
from adatoken3d_ros.scene.keyframes import KeyFrameSelector
from adatoken3d_ros.scene.marks import MarkError, Marks
from adatoken3d_ros.scene.patches import PatchConfig
from adatoken3d_ros.scene.sealed_file import SceneFileError
from adatoken3d_ros.scene.storage import About, Packed, load_scene, pack_scene
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.tombstones import Thing
from adatoken3d_ros.scene.view_blocks import Block, ViewTokenMap
from adatoken3d_ros.scene.window import OriginMode, best_shift

logger = logging.getLogger(__name__)


class KeptScene:
    """Views, their poses, the user's marks and the map that they belong to. Not thread safe.

    Args:
        model: whose features the views have. config: the scene's.

    Attributes:
        poses: {stamp in nanoseconds: T_world_camera (4, 4)} of the encoded views.
        pending: key frames that wait to be encoded, oldest first.
        past: where it has looked, and what has gone.
        marks: named places of the map; they stay when what was seen is forgotten.
        map_id: of the map that the scene frame belongs to: as configured, else made up, else that of the loaded file.
        settled: stamps of views that came from files: an earlier run has placed them.
        problem: what was wrong with the last view that could not be encoded; empty before, and for a new scene.
    """

    def __init__(self, model: SpatialLMM, config: SessionConfig) -> None:
        self._model = model
        self._config = config
        sizes = model.sizes
        self._patches = PatchConfig(geometry=sizes.patches, max_depth=config.max_depth)
        self._map: TokenMap = TokenMap(sizes.voxel_size, config.origin, embed=model.lift_places)
        if sizes.tokens == "views":
            self._map = ViewTokenMap(sizes.voxel_size, config.origin, embed=model.lift_places, parts=sizes.parts)
        self.past = Past(config, self._patches, self._map)
        self._selector = KeyFrameSelector(config.key_frames, self._patches, self._map, self.past.came_up)
        self._asked: TokenMap | None = None
        self._last: tuple[int, NDArray[np.float64]] | None = None  # stamp and pose of the newest frame, a view or not
        self._later: dict[int, PosedFrame] = {}  # encoded before one that arrived earlier, by their order
        self._doubted: dict[int, int] = {}  # see `carving.emptied`
        self.pending: list[PosedFrame] = []
        self.poses: dict[int, NDArray[np.float64]] = {}
        self.marks = Marks()
        self.settled: set[int] = set()
        self.map_id = config.map_id or secrets.token_hex(8)
        self.problem = ""

    def __len__(self) -> int:
        """Number of encoded views."""
        return len(self._map)

    def all_poses(self) -> dict[int, NDArray[np.float64]]:
        """{stamp: T_world_camera (4, 4)} of the encoded views and of the frames that wait, in their order."""
        return self._selector.poses()

    def clear(self) -> None:
        """Forgets everything that was seen."""
        self.past.clear()
        self._selector.clear()
        self._map.clear(self._config.origin)
        self._begin({})

    def _begin(self, poses: dict[int, NDArray[np.float64]]) -> None:
        """The map holds other views, those of `poses`; none waits."""
        self._asked = self._last = None
        self._later.clear()
        self._doubted.clear()
        self.pending.clear()
        self.poses.clear()
        self.poses.update(poses)
        self.settled = set(poses)
        self.problem = ""

    def put(
        self,
        views: Mapping[int, Contribution],
        poses: Mapping[int, NDArray[np.float64]],
        *,
        origin: Sequence[float],
        shift: Tensor,
        blocks: Mapping[int, Block] | None = None,
        things: Sequence[Thing] = (),
    ) -> None:
        """Holds other views from now on, which were made elsewhere, oldest first; none waits.

        On an error it is as it was.

        Args:
            poses: of the views. origin, shift: of their map. blocks: of a map of views. things: what has gone.
        """
        if isinstance(self._map, ViewTokenMap):
            self._map.restore(dict(views), origin, shift, dict(blocks or {}))
        else:
            self._map.restore(dict(views), origin, shift)
        self._selector.restore(dict(poses), {})
        self._begin(dict(poses))
        self.past.tombstones.restore(things)

    def views(self) -> tuple[dict[int, Contribution], dict[int, Block], NDArray[np.float64], NDArray[np.int64]]:
        """What each view adds, oldest first, with its whole block where tokens are those of views; origin and shift of
        the map, see `TokenMap`."""
        views = self._map.contributions()
        blocks = self._map.whole_blocks() if isinstance(self._map, ViewTokenMap) else {}
        ordered = {key: views[key] for key in tuple(self._map.keys())}
        return ordered, blocks, self._map.origin.numpy(), self._map.shift.numpy()

    # --- in files ---

    def packed(self, frame_id: str) -> Packed:
        """The encoded views and what is known with them, to be written; raises as `scene.storage.pack_scene`."""
        gone = self.past.tombstones
        notes, things = {"marks": self.marks.plain()}, (*gone.gone, *gone.appeared)
        looked, confirmed_ns = self.past.occupancy.looked(), self._selector.confirmed or 0
        sketches = self._selector.sketches()
        about = About(self.map_id, sketches, notes, things, looked=looked, confirmed_ns=confirmed_ns)
        return pack_scene(self._map, self.poses, model_hash=self._model.identity, frame_id=frame_id, about=about)

    def load(self, path: str | Path, frame_id: str, *, merge: bool = False) -> int:
        """Replaces the scene by a saved one, or adds that to it, as much as may be kept; returns the number of views.

        Args:
            merge: what is there stays, and counts as newer. The file must be of the same map, unless nothing is there.

        Raises:
            OSError, SceneFileError: as `scene.storage.load_scene`; the scene is as it was.
        """
        merge = merge and bool(self._selector.stamps() or len(self.marks))
        # What is read first goes beside the scene: what then is wrong with it changes nothing.
        read = self._map.subset(())
        poses, about = load_scene(
            path,
            read,
            model_hash=self._model.identity,
            frame_id=frame_id,
            channels=self._model.sizes.feature_width,
            device=self._model.device,
            adopt_origin=merge or self._config.origin_mode is OriginMode.AUTO,
            map_id=self.map_id if merge else self._config.map_id,
        )
        try:
            marks = Marks.read(about.notes.get("marks", []))
        except MarkError as error:
            raise SceneFileError(f"{path}: {error}") from error
        if merge:
            self.marks.add_missing(marks.all())
            self._join(read, poses, about)
        else:
            self.marks = marks
            self.map_id = self._config.map_id or about.map_id or secrets.token_hex(8)
            _put(self._map, [read], read)
            self._selector.restore(poses, about.sketches, about.confirmed_ns or None)
            self._begin(poses)
            self.past.clear()
            self.past.looked_before(about.looked, self._selector.sketches(), poses)
            self.past.tombstones.restore(about.things)
        self._keep_within_bounds()
        return len(self.poses)

    def _join(self, other: TokenMap, poses: dict[int, NDArray[np.float64]], about: About) -> None:
        """Takes in other views, as older than those that are there; of two with one stamp the present one stays."""
        for stamp in self._selector.poses().keys() & poses.keys():
            other.remove_view(stamp)
            del poses[stamp]
        if len(self._map):  # their voxels become those of this map; else it has none yet, and takes over the others'
            other.restore(other.contributions(), self._map.origin.tolist())
            other.move_views(dict.fromkeys(other.keys(), np.eye(4)))
        frames = {self._selector.order(stamp): stamp for stamp in self._selector.stamps()}
        later = {frames[order]: frame for order, frame in self._later.items() if order in frames}
        sketches, mine = {**about.sketches, **self._selector.sketches()}, self._selector.poses()
        confirmed = self._selector.confirmed if mine else about.confirmed_ns or None
        self._selector.restore({**poses, **mine}, sketches, confirmed)
        self._later = {self._selector.order(stamp): frame for stamp, frame in later.items()}
        newer = self._map.keys()
        _put(self._map, [other, self._map], self._map if len(self._map) else other, self._selector)
        self._asked = None
        self.poses.update(poses)
        self.settled |= poses.keys()
        self.past.looked_before(about.looked, about.sketches, self._selector.poses())
        self.past.join(about.things)
        self._look_through(newer)

    def _look_through(self, newer: tuple[int, ...]) -> None:
        """What views that are older than these show, and these look through, has gone, as far as is known of them."""
        sketches, carving = self._selector.sketches(), self._config.key_frames.carving
        if carving is not None and newer:
            first = self._selector.order(newer[0])
            for stamp in newer:
                if stamp in sketches:
                    tell = partial(self.past.went, before=first, gone_ns=stamp)
                    carve_free_space(self._map, sketches[stamp].frame(stamp), carving, first, tell, self._doubted)

    def _keep_within_bounds(self) -> None:
        """What may not stay is decided before anything goes: view by view, each would cost a look at the whole map."""
        held, gone = self._map.coverage(), set()
        while (stamp := self._selector.evict(held)) is not None:
            held.remove(stamp)
            gone.add(stamp)
        if gone:
            self._map.restore({key: view for key, view in self._map.contributions().items() if key not in gone})
            for stamp in gone:
                del self.poses[stamp]

    # --- corrected poses ---

    def followed(self, T: NDArray[np.float64]) -> dict[int, NDArray[np.float64]]:
        """Poses for `move` when the odometry of this run lies elsewhere in the map than was believed, by T (4, 4).

        Views that came from files stay: it is not by this odometry that they were placed.
        """
        return {stamp: T @ pose for stamp, pose in self.all_poses().items() if stamp not in self.settled}

    def move(self, poses: Mapping[int, NDArray[np.float64]]) -> int:
        """Views, and frames that wait, were taken from elsewhere than was believed; returns how many have moved.

        The map is made anew of their patches, and what has gone moves with them. Marks stay where they are in the
        scene frame.

        Args:
            poses: {stamp: T_world_camera (4, 4)}; others stay where they are.

        Raises:
            FrameError, TokenMapError: for a pose that cannot be; nothing has moved then.
        """
        before = self._selector.poses()
        changed = {s: T for s, T in poses.items() if s in before and not np.array_equal(T, before[s])}
        for T in changed.values():
            check_rigid(T)
            check_position(T[:3, 3])
        if not changed:
            return 0
        ways = {s: T @ np.linalg.inv(before[s]) for s, T in changed.items()}
        self._doubted.clear()
        self._map.move_views({s: T for s, T in ways.items() if s in self.poses})
        self._selector.move(changed)
        self.poses.update({s: T for s, T in changed.items() if s in self.poses})
        self.pending = [_posed(frame, changed) for frame in self.pending]
        self._later = {order: _posed(frame, changed) for order, frame in self._later.items()}
        self._asked = None
        if self._last is not None:  # as the view next to it in time
            when, pose = self._last
            self._last = when, ways.get(min(before, key=lambda stamp: abs(stamp - when)), np.eye(4)) @ pose
        self._recentre()
        follow = {stamp: ways.get(stamp, np.eye(4)) for stamp in before}
        self.past.look_again(self._selector.sketches(), follow)
        self.past.follow(follow)
        return len(changed)

    def _recentre(self) -> None:
        if self._config.origin_mode is not OriginMode.AUTO:
            return
        shift = best_shift(self._map)
        if (shift != self._map.shift.numpy()).any():
            self._map.move_origin(shift)
            logger.info("the model sees its origin at %s m", np.round(self._map.model_origin, 3).tolist())


def _posed(frame: PosedFrame, poses: Mapping[int, NDArray[np.float64]]) -> PosedFrame:
    return replace(frame, T_world_camera=poses.get(frame.stamp_ns, frame.T_world_camera))


def _put(into: TokenMap, maps: list[TokenMap], like: TokenMap, orders: KeyFrameSelector | None = None) -> None:
    """Has a map hold the views of maps whose voxels are the same, with the origins of one of them."""
    views = {key: view for one in maps for key, view in one.contributions().items()}
    if orders is not None:
        views = {key: replace(view, order=orders.order(key)) for key, view in views.items()}
    where = like.origin.tolist(), like.shift
    if isinstance(into, ViewTokenMap):
        blocks = {key: block for one in maps if isinstance(one, ViewTokenMap) for key, block in one.blocks().items()}
        into.restore(views, *where, blocks)
    else:
        into.restore(views, *where)
