# SPDX-License-Identifier: Apache-2.0
"""What a scene has seen: frames go in, each is encoded once, the spatial tokens of the scene come out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.decoder.prefill import Cancelled
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.kept_scene import KeptScene
from adatoken3d_ros.engine.out_of_memory import describe, is_out_of_memory
from adatoken3d_ros.lmm.interface import SeenViews, SpatialLMM
from adatoken3d_ros.scene.carving import carve_free_space
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import Verdict
from adatoken3d_ros.scene.patches import PatchPoints
from adatoken3d_ros.scene.spatial_tokens import SpatialTokens
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.view_blocks import ViewTokenMap
from adatoken3d_ros.scene.window import OriginMode, floor_height, level_patches

logger = logging.getLogger(__name__)

_BELIEVED = (Verdict.KEY_FRAME, Verdict.TOO_SIMILAR, Verdict.NOTHING_NEW)  # of these frames the poses are
VIEWS_SHARE = 3 / 4  # of the memory that a scene may have; the rest is for what is prepared for questions


class ViewError(ValueError):
    """Views that could not be encoded and were given up; the message has the first one's stamp and what was wrong."""


class SceneMemory(KeptScene):
    """Views, their tokens, and the point from which the model sees them. Not thread safe.

    With `OriginMode.AUTO` the model's origin follows the floor and the middle of what has been seen (`scene.window`).
    Position embeddings are linear in the mean of their hidden layer, so the map keeps that mean beside the features'
    and a moved origin costs one small layer on every patch and one linear layer on every token, no vision pass.

    Args:
        model: encodes the frames. config: the scene's.

    Attributes:
        given_up: how many views could not be encoded. carved: how many patches were taken out since they had gone.
    """

    def __init__(self, model: SpatialLMM, config: SessionConfig) -> None:
        super().__init__(model, config)
        self._narrow: Callable[[TokenMap], TokenMap] | None = None
        self.given_up = self.carved = 0

    @property
    def origin(self) -> NDArray[np.float64]:
        """(3,) the point of the scene frame that the model sees as its origin, metres."""
        return self._map.model_origin

    @property
    def stamp_ns(self) -> int:
        """Acquisition time of the newest view, the last to arrive, 0 while there is none."""
        return self._map.keys()[-1] if len(self._map) else 0

    @property
    def contradiction(self) -> str:
        """Why what has been seen cannot be believed, see `scene.agreement`; empty where it can."""
        return self._selector.contradiction

    @property
    def confirmed_ns(self) -> int:
        """Acquisition time of the newest frame that is a view or in which nothing had changed; 0 without a view."""
        return (self._selector.confirmed or self.stamp_ns) if len(self._map) else 0

    @property
    def camera(self) -> NDArray[np.float64]:
        """(3,) where the camera is: of the newest frame whose pose is believed, a view or not; there is a view."""
        return (self.poses[self.stamp_ns] if self._last is None else self._last[1])[:3, 3]

    def patches(self, frame: PosedFrame) -> PatchPoints:
        """Where the patches of a frame are, as they would be taken in."""
        return self._model.place_tokens(frame, self._patches)

    def voxels(self, points: NDArray[np.floating]) -> NDArray[np.int64]:
        """(n,) keys of the voxels in which points (n, 3) lie, scene frame, metres; raises as `voxel_keys`."""
        keys: NDArray[np.int64] = self._map.keys_at(points).numpy()
        return keys

    @property
    def voxel_origin(self) -> NDArray[np.float64]:
        """(3,) centre of the voxel (0, 0, 0), scene frame, metres."""
        origin: NDArray[np.float64] = self._map.origin.numpy()
        return origin

    @property
    def voxel_size(self) -> float:
        """Edge of a voxel, metres."""
        return self._map.voxel_size

    @property
    def patches_per_view(self) -> int:
        """How many patches a view has."""
        return self._patches.geometry.patches

    # --- frames in ---

    def announce(self, stamp_ns: int, T_world_camera: NDArray[np.float64]) -> Verdict | None:
        """What `observe` would say of a frame as far as its stamp and pose (4, 4) tell; None: it has to be seen."""
        verdict = self._selector.announce(stamp_ns, T_world_camera)
        if verdict == Verdict.TOO_SIMILAR:
            self._last = stamp_ns, T_world_camera
        return verdict

    def observe(self, frame: PosedFrame) -> Verdict:
        """Decides whether `frame` becomes a view of the scene; if so it waits for `encode`."""
        verdict = self._selector.decide(frame)
        if verdict in _BELIEVED:
            self._last = frame.stamp_ns, frame.T_world_camera
        if verdict == Verdict.KEY_FRAME or self._selector.confirmed == frame.stamp_ns:
            looked = self.past.look(frame, key_frame=verdict == Verdict.KEY_FRAME)
            if looked and verdict != Verdict.KEY_FRAME and not self.pending and len(self._map):
                self._carve(frame, self._selector.arrived)
                self.past.came(frame)
        if verdict == Verdict.KEY_FRAME:
            self._selector.accepted(frame)
            self.pending.append(frame)
            if len(self.pending) > self._config.key_frames.max_views:  # encoding fails: what waits is bounded, too
                self._selector.forget(self.pending.pop(0).stamp_ns)
            while len(self.pending) > 1 and self._is_full():
                self._selector.forget(self.pending.pop(0).stamp_ns)
        return verdict

    def encode(self, limit: int | None = None, should_stop: Callable[[], bool] | None = None) -> int:
        """Encodes the newest `limit` of the frames that wait (None: all), one vision pass each; returns how many.

        Where should_stop() is true before a layer of the vision tower, none is encoded and all still wait; so they do
        where memory runs out, which is raised at once. A frame with which anything else goes wrong waits no more.

        Raises:
            ViewError: for frames that were given up, after all others were encoded.
        """
        first = 0 if limit is None else max(0, len(self.pending) - limit)
        frames = self.pending[first:]
        if not frames:
            return 0
        problems: list[str] = []
        try:
            encoded = self._encoded(frames, problems, should_stop)
        except Cancelled:
            return 0
        self._asked = None
        for frame, points, features in encoded:
            try:
                self._add(frame, points, features)
            except Exception as error:
                self._give_up(frame, error, problems)
            else:
                self.pending.remove(frame)
        self._evict()
        self._forget_later()
        self._recentre()
        if problems:
            more = f" (and {len(problems) - 1} more views)" if len(problems) > 1 else ""
            raise ViewError(problems[0] + more)
        return len(frames)

    @torch.inference_mode()
    def _encoded(
        self, frames: list[PosedFrame], problems: list[str], should_stop: Callable[[], bool] | None
    ) -> list[tuple[PosedFrame, PatchPoints, Tensor]]:
        """The frames' points and features, without those that fail; together where that goes, else one by one."""
        try:
            points = [self._model.place_tokens(frame, self._patches) for frame in frames]
            features = self._model.encode_views([frame.rgb for frame in frames], should_stop=should_stop)
            return list(zip(frames, points, features, strict=True))
        except Exception as error:
            if len(frames) == 1:
                self._give_up(frames[0], error, problems)
                return []
            if isinstance(error, Cancelled) or is_out_of_memory(error):
                raise
        return [found for frame in frames for found in self._encoded([frame], problems, should_stop)]

    def _give_up(self, frame: PosedFrame, error: Exception, problems: list[str]) -> None:
        """To be called for what is raised of one frame; what is not the frame's fault is raised again."""
        if isinstance(error, Cancelled) or is_out_of_memory(error):
            raise error
        self.pending.remove(frame)
        self._later = {order: later for order, later in self._later.items() if later is not frame}
        self._selector.forget(frame.stamp_ns)
        self.given_up += 1
        self.problem = f"the view at {frame.stamp_ns / 1e9:.6f} s could not be encoded: {describe(error)}"
        problems.append(self.problem)

    def _add(self, frame: PosedFrame, points: PatchPoints, features: Tensor) -> None:
        first = not len(self._map)
        level = level_patches(points.xyz, self._model.grid(*frame.depth.shape)[1])
        floor = floor_height(points.xyz[level]) if first and self._config.origin_mode is OriginMode.AUTO else None
        if floor is not None:
            # Voxels that begin on the floor hold it in one layer.
            self._map.clear((*self._config.origin[:2], floor))
        order = self._selector.order(frame.stamp_ns)
        if frame.stamp_ns not in self.poses:  # else it has been added, and carving ran out of memory
            try:
                self._add_to_map(frame, points, features, level, order)
            except BaseException:
                if first:  # the floor of a view that is none is none
                    self._map.clear(self._config.origin)
                raise
            self.past.came(frame, points, features)
        self.poses[frame.stamp_ns] = frame.T_world_camera
        if self._config.key_frames.carving is not None:
            # What a later frame saw through has gone, although this one is encoded after it.
            self._later[order] = frame
            for place in sorted(self._later):
                if place >= order:
                    self._carve(self._later[place], place)

    def _carve(self, frame: PosedFrame, before: int) -> None:
        """Takes out of the map what views of an order below `before` hold where a frame looks through."""
        carving = self._config.key_frames.carving
        if carving is None or not len(self._map):
            return
        tell = partial(self.past.went, before=before, gone_ns=frame.stamp_ns)
        if taken := carve_free_space(self._map, frame, carving, before, tell, self._doubted):
            self.carved += taken
            self._asked = None

    def _add_to_map(
        self,
        frame: PosedFrame,
        points: PatchPoints,
        features: Tensor,
        level: NDArray[np.bool_],
        order: int,
    ) -> None:
        stamp, xyz, rgb, valid = frame.stamp_ns, points.xyz, points.rgb, points.valid
        if isinstance(self._map, ViewTokenMap):
            grid = self._model.grid(*frame.depth.shape)
            parts = points.parts
            self._map.add_block(stamp, features, xyz, rgb, valid, grid, level=level, order=order, parts=parts)
        else:
            self._map.add_view(stamp, features, xyz, rgb, valid, level, order)

    def _forget_later(self) -> None:
        """Keeps the encoded frames that have something to say of one that waits, no more of them than views."""
        first = min((self._selector.order(frame.stamp_ns) for frame in self.pending), default=math.inf)
        useful = sorted(order for order in self._later if order > first)
        self._later = {order: self._later[order] for order in useful[-self._config.key_frames.max_views :]}

    def _evict(self) -> None:
        """Drops what is too much, and what an error has left in the map before."""
        evicted = True
        while evicted:
            kept = set(self._selector.stamps())
            self.pending = [frame for frame in self.pending if frame.stamp_ns in kept]
            for stamp in self.poses.keys() - kept:
                self._map.remove_view(stamp)
                del self.poses[stamp]
            evicted = self._selector.evict() is not None
            if not evicted and self._is_full():
                evicted = self._selector.evict(full=True) is not None

    def _is_full(self) -> bool:
        """Whether views hold more memory than they may, also when their sums take no more than they need."""
        limit = self._config.memory_limit_mb * 1e6 * VIEWS_SHARE
        if limit and self.nbytes > limit:
            self._map.compact()
        return bool(limit) and self.nbytes > limit

    @property
    def nbytes(self) -> int:
        """Of views, those that wait included, of what new ones are compared with, and of the past."""
        waiting = {id(frame): frame.rgb.nbytes + frame.depth.nbytes for frame in (*self.pending, *self._later.values())}
        chosen = 0 if self._asked is None else self._asked.nbytes
        return self._map.nbytes + chosen + self.past.nbytes + self._selector.nbytes + sum(waiting.values())

    # --- tokens out ---

    def tokens(self) -> SpatialTokens | None:
        """The whole token map as others may see it, without positions in the features; None while it is empty."""
        return self._map.tokens() if len(self._map) else None

    @property
    def floor(self) -> float | None:
        """Height of the floor, scene frame, metres; None where not enough of one was seen."""
        return floor_height(self._map.level_points())

    def distance(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """How far points (n, 3), scene frame, are from the box around all that has been seen, metres; there is some."""
        centres = self._map.centres()
        outside = np.maximum(centres.min(axis=0) - points, points - centres.max(axis=0))
        distances: NDArray[np.float64] = np.linalg.norm(np.maximum(outside, 0.0), axis=1)
        return distances

    @property
    def asked(self) -> TokenMap:
        """What a question is about: all views, or as many as it may have, chosen by the voxels that they hold.

        The newest view is always among them.
        """
        limit = self._question_views
        enough = len(self._map) <= limit
        if enough and self._narrow is None:
            return self._map
        if self._asked is None:
            chosen = self._map if enough else self._map.subset(self._map.cover(limit, first=self._map.keys()[-1:]))
            self._asked = chosen if self._narrow is None else self._narrow(chosen)
        return self._asked

    def narrow(self, narrow: Callable[[TokenMap], TokenMap] | None) -> None:
        """What makes `asked` of the views that a question is about, from now on; None: nothing is made of them."""
        self._asked, self._narrow = None, narrow

    @property
    def _question_views(self) -> int:
        return self._config.question_views or self._model.sizes.num_views

    def asked_poses(self, *, pending: bool = False) -> list[NDArray[np.float64]]:
        """T_world_camera (4, 4) of each view of `asked`, in their order; with `pending` as many as they will become."""
        stamps = self.asked.keys()
        poses = [self.poses[stamp] for stamp in stamps]
        coming = [frame.T_world_camera for frame in self.pending] if pending else []
        return [*poses, *coming][: self._question_views]

    @torch.inference_mode()
    def question_tokens(self, max_tokens: int) -> SpatialTokens:
        """At most `max_tokens` of the tokens of `asked`; see `TokenMap.tokens`.

        Raises:
            TokenMapError: if nothing has been seen.
        """
        return self.asked.tokens(max_tokens)

    def clearness(self, tokens: SpatialTokens) -> Tensor:
        """(M,) how well tokens of `asked` were seen: more patches in a voxel, or a camera that was less far away."""
        if tokens.view is None:
            return tokens.count
        cameras = torch.tensor([pose[:3, 3].tolist() for pose in self.asked_poses()])
        return -(tokens.xyz - cameras[tokens.view].to(tokens.xyz)).norm(dim=1)

    def seen(self) -> SeenViews | None:
        """What the views of `asked` show; None where tokens are not those of views, or there is no view."""
        asked = self.asked
        if not isinstance(asked, ViewTokenMap) or not len(asked):
            return None
        blocks = asked.blocks()
        return SeenViews(
            np.concatenate([block.xyz.double().numpy() for block in blocks.values()]),
            np.repeat(np.arange(len(blocks)), [len(block.cell) for block in blocks.values()]),
            np.concatenate([block.cell.numpy() for block in blocks.values()]),
            tuple(block.grid for block in blocks.values()),
            tuple(self.poses[stamp] for stamp in blocks),
        )
