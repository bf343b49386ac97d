# SPDX-License-Identifier: Apache-2.0
"""What a node publishes of its scene and its answers, as arrays, for who has no ROS of their own."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from adatoken3d.msg import KeyFrame, KeyFrames
from adatoken3d.msg import TokenReport as TokenReportMsg
from numpy.typing import NDArray
from sensor_msgs.msg import PointCloud2

from adatoken3d_ros.engine.answer import TokenReport
from adatoken3d_ros.engine.pictures import MOST_SHOWN, Picture, PictureError, Voxels, received
from adatoken3d_ros.ros.client import SceneClient
from adatoken3d_ros.ros.inputs.conversions import ConversionError, pose_to_matrix, stamp_to_ns
from adatoken3d_ros.ros.outputs.publishers import LATCHED

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Seen:
    """The scene as the node published it last.

    Attributes:
        xyz: (M, 3) float32 scene frame, metres. rgb: (M, 3) uint8. count: (M,) float32 patches.
        stamp_ns: of the newest view.
        pictures: of the key frames, oldest first. voxels: of the scene; None before it is known.
    """

    xyz: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    rgb: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 3), np.uint8))
    count: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    stamp_ns: int = 0
    pictures: tuple[Picture, ...] = ()
    voxels: Voxels | None = None


class SceneWatcher:
    """Listens to a node by a client, whose thread runs what is here.

    Args:
        client: of the node.

    Attributes:
        seen: the newest scene; another object where it has changed.
    """

    def __init__(self, client: SceneClient) -> None:
        self.seen = Seen()
        self._retained: PointCloud2 | None = None
        self._report: TokenReportMsg | None = None
        self._changed = threading.Condition()
        subscribe: Any = client.node.create_subscription
        subscribe(PointCloud2, f"{client.name}/scene_tokens", self._on_scene, LATCHED)
        subscribe(KeyFrames, f"{client.name}/key_frames", self._on_key_frames, LATCHED)
        subscribe(PointCloud2, f"{client.name}/retained_tokens", self._on_retained, LATCHED)
        subscribe(TokenReportMsg, f"{client.name}/token_report", self._on_report, LATCHED)

    def report_of(self, answer: Any, timeout: float = 3.0) -> TokenReport | None:
        """What became of the tokens of an adatoken3d/msg/Answer, once it is there; None if it does not come."""

        def there() -> bool:
            cloud, report = self._retained, self._report
            if cloud is None or report is None:
                return False
            same = cloud.header.stamp == report.header.stamp == answer.header.stamp
            counts = (cloud.width, report.spatial_tokens, report.retained_tokens)
            asked = (answer.spatial_tokens, answer.spatial_tokens, answer.retained_tokens)
            names = (report.question, report.strategy) == (answer.question, answer.strategy)
            return same and counts == asked and names

        if not answer.spatial_tokens or not answer.prefill_flops:
            return None
        with self._changed:
            if not self._changed.wait_for(there, timeout):
                return None
            cloud, report = self._retained, self._report
        assert cloud is not None and report is not None
        columns = _columns(cloud)
        return TokenReport(
            _xyz(columns),
            _rgb(columns),
            columns["contribution"],
            columns["last_layer"].astype(np.int64),
            columns["retained"] > 0.5,
            tuple(layer.spatial_tokens for layer in report.layers),
            tuple(layer.flops for layer in report.layers),
            report.lorenz_share_60,
        )

    def forget_report(self) -> None:
        """What comes from now on is of the next answer: another question may have had the same text and counts."""
        with self._changed:
            self._report = self._retained = None

    # In the client's thread:

    def _on_scene(self, message: PointCloud2) -> None:
        columns, stamp = _columns(message), stamp_to_ns(message.header.stamp)
        self.seen = replace(self.seen, xyz=_xyz(columns), rgb=_rgb(columns), count=columns["count"], stamp_ns=stamp)

    def _on_key_frames(self, message: KeyFrames) -> None:
        try:
            voxels, pictures = read_key_frames(message, self.seen.pictures)
        except (PictureError, ConversionError) as error:
            logger.warning("key frames are not shown: %s", error)
            return
        self.seen = replace(self.seen, pictures=pictures, voxels=voxels)

    def _on_retained(self, message: PointCloud2) -> None:
        with self._changed:
            self._retained = message
            self._changed.notify_all()

    def _on_report(self, message: TokenReportMsg) -> None:
        with self._changed:
            self._report = message
            self._changed.notify_all()


def read_key_frames(message: KeyFrames, known: tuple[Picture, ...] = ()) -> tuple[Voxels | None, tuple[Picture, ...]]:
    """The scene's voxels, None for an empty scene, and its pictures; one that has not changed is that of `known`.

    Raises:
        PictureError, ConversionError: if it cannot be shown.
    """
    before = {one.stamp_ns: one for one in known}
    origin, size = message.voxel_origin, message.voxel_size
    pictures = []
    for frame in message.frames[-MOST_SHOWN:]:
        new = _picture(frame)
        old = before.get(new.stamp_ns)
        same = old is not None and old.jpeg == new.jpeg and np.array_equal(old.pose, new.pose)
        pictures.append(old if same and old is not None else new)
    if not np.isfinite([origin.x, origin.y, origin.z, size]).all() or size < 0:
        raise PictureError(f"voxels of {size} m at ({origin.x}, {origin.y}, {origin.z}) m are none")
    return Voxels((origin.x, origin.y, origin.z), size) if size else None, tuple(pictures)


def _picture(frame: KeyFrame) -> Picture:
    pose, grid, area = pose_to_matrix(frame.pose), (frame.rows, frame.columns), frame.area.tolist()
    places = np.array(frame.places, dtype=np.float32)
    return received(stamp_to_ns(frame.stamp), frame.jpeg.tobytes(), pose, frame.fov, grid, area, places)


def _columns(cloud: PointCloud2) -> dict[str, NDArray[np.float32]]:
    """The fields of a cloud that `outputs.messages.cloud` made, by their names."""
    raw = np.frombuffer(cloud.data, np.uint8).reshape(cloud.width, cloud.point_step)
    return {one.name: raw[:, one.offset : one.offset + 4].copy().view("<f4")[:, 0] for one in cloud.fields}


def _xyz(columns: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.stack([columns[axis] for axis in "xyz"], axis=1)


def _rgb(columns: dict[str, NDArray[np.float32]]) -> NDArray[np.uint8]:
    packed = columns["rgb"].view(np.uint32)
    return np.stack([packed >> 16, packed >> 8, packed], axis=1).astype(np.uint8)
