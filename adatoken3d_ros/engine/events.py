# SPDX-License-Identifier: Apache-2.0
"""Events as plain values that can be sent to another process, and a hub that passes them to listeners."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.engine.answer import Answer
from adatoken3d_ros.scene.evidence import Evidence
from adatoken3d_ros.scene.marks import Mark

if TYPE_CHECKING:
    from adatoken3d_ros.engine.pictures import Picture, Voxels

logger = logging.getLogger(__name__)
E = TypeVar("E")


@dataclass(frozen=True, eq=False)
class SceneView:
    """The scene as it is now.

    Attributes:
        frame_id: the scene frame.
        xyz: (M, 3) float32 token centroids, scene frame, metres. rgb: (M, 3) uint8. count: (M,) patches in each voxel.
        poses: {stamp_ns: (4, 4) camera-to-scene} of the key frames.
        stamp_ns: newest acquisition time, 0 for an empty scene.
        marks: named places, in the order of their names.
        free, unseen: (n, 3) float64 centres of cells at the level of the floor that are free, and that were never seen.
        gone: what has gone.
        nbytes: that the scene holds in memory. limit_bytes: that it may hold; 0: no limit.
    """

    frame_id: str = ""
    xyz: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    rgb: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 3), np.uint8))
    count: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    poses: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)
    stamp_ns: int = 0
    marks: tuple[Mark, ...] = ()
    free: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))
    unseen: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))
    gone: tuple[Evidence, ...] = ()
    nbytes: int = 0
    limit_bytes: float = 0.0


@dataclass(frozen=True, eq=False)
class KeyFramesShown:
    """The pictures of the scene's key frames, told when they are others.

    Attributes:
        frame_id: the scene frame. stamp_ns: newest acquisition time, 0 for an empty scene.
        pictures: oldest first. voxels: of the scene.
    """

    frame_id: str = ""
    stamp_ns: int = 0
    pictures: tuple[Picture, ...] = ()
    voxels: Voxels | None = None


@dataclass(frozen=True)
class SceneReplaced:
    """The scene that the answers until now were about is gone; a SceneView of what is there now follows."""

    frame_id: str


@dataclass(frozen=True)
class FrameTaken:
    """What became of a frame: a verdict's value, `superseded`, `stopped`, or `error: ...`."""

    fate: str


@dataclass(frozen=True)
class StageBegan:
    """A question, by the number that its asker gave it, has come to a stage, one of `stages.STAGES`."""

    number: int
    stage: str


@dataclass(frozen=True)
class TextSoFar:
    """A question's answer as far as it is written: whole words, and the tokens that were generated for them."""

    number: int
    text: str
    tokens: int


@dataclass(frozen=True, eq=False)
class Answered:
    """A question has its answer, whatever it is.

    Attributes:
        frame_id: the scene frame.
        now_ns: the asker's clock, nanoseconds; 0 if simulated time has not begun.
    """

    number: int
    answer: Answer
    frame_id: str
    now_ns: int


class Listeners:
    """Tells each event to those who listen for its kind, in the order in which they were added.

    Args:
        on_error: told what a listener raises, in the thread in which the event is told; None: it is logged.
    """

    def __init__(self, on_error: Callable[[Exception], object] | None = None) -> None:
        self._on_error = on_error or (lambda error: logger.error("a listener failed", exc_info=error))
        self._listeners: defaultdict[type, list[Callable[[Any], object]]] = defaultdict(list)

    def add(self, kind: type[E], listener: Callable[[E], object]) -> Listeners:
        """Has `listener` told of every event of this kind, in the thread in which it happens: it must not wait."""
        self._listeners[kind].append(listener)
        return self

    def wanted(self, kind: type) -> bool:
        """Whether there is a listener for this kind; without one, what an event needs is not computed."""
        return bool(self._listeners.get(kind))

    def tell(self, event: object, *also: Callable[[Any], object]) -> None:
        """Tells an event, first to `also`; what a listener raises costs neither the others nor who tells."""
        for listener in (*also, *self._listeners.get(type(event), ())):
            try:
                listener(event)
            except Exception as error:
                self._on_error(error)
