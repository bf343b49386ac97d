# SPDX-License-Identifier: Apache-2.0
"""Frames from a ROS 2 bag (mcap or sqlite3): no ROS installation, no clock, no lost frames."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.ros.bag_files import BagError, BagReader, Connection
from adatoken3d_ros.ros.conversions import ConversionError, stamp_to_ns
from adatoken3d_ros.ros.pairing import DEPTH, DEPTH_INFO, POINTS, RGB, RGB_INFO, RGBD, STREAMS, Assembler
from adatoken3d_ros.ros.poses import BufferedPose, PoseError, PoseSource, TransformTree
from adatoken3d_ros.scene.frames import FrameError, PosedFrame

logger = logging.getLogger(__name__)

IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
CAMERA_INFO = ("sensor_msgs/msg/CameraInfo",)
CLOUDS = ("sensor_msgs/msg/PointCloud2",)
POSES = {
    "pose_topic": ("geometry_msgs/msg/PoseStamped",),
    "odometry": ("nav_msgs/msg/Odometry",),
    "tf": ("tf2_msgs/msg/TFMessage",),
}
STATIC_TF = "/tf_static"
_WORDS = {RGB: "colour", DEPTH: "depth", POINTS: "cloud"}


@dataclass(frozen=True)
class Topics:
    """Which topics to read; an empty name is chosen by type and name, if only one fits.

    Attributes:
        rgb, rgb_info, depth, depth_info: image and calibration topics; depth_info may stay without a topic.
        points: topic of the clouds.
        pose: topic of the pose source (not for TF).
    """

    rgb: str = ""
    rgb_info: str = ""
    depth: str = ""
    depth_info: str = ""
    points: str = ""
    pose: str = ""


def read_bag(
    path: str | Path,
    *,
    topics: Topics | None = None,
    source: str = RGBD,
    pose_source: str = "auto",
    scene_frame: str = "",
    T_base_camera: NDArray[np.float64] | None = None,
    T_camera_depth: NDArray[np.float64] | None = None,
    slop: float = 0.01,
    pose_tolerance: float = 0.02,
    rectified: bool = False,
    on_drop: Callable[[str, str], None] | None = None,
) -> Iterator[PosedFrame]:
    """Every frame of a bag in order, matched and posed exactly as the node does it.

    Args:
        path: an .mcap or .db3 file, or a bag's folder.
        topics: names where the automatic choice is ambiguous.
        source: what frames are made of, see pairing.STREAMS.
        pose_source: `pose_topic`, `odometry`, `tf`, or `auto` for the first of these that the bag holds.
        scene_frame: frame of the poses; for TF its target frame, else what the pose messages say if empty.
        T_base_camera: (4, 4) camera optical frame in the frame whose pose the source gives; identity if None.
        T_camera_depth: (4, 4) from the frame of depth images or clouds to the colour camera's; see pairing.Assembler.
        slop: largest difference between the stamps of colour and depth, seconds.
        pose_tolerance: see poses.PoseBuffer, seconds.
        rectified: the images are rectified already (P of CameraInfo counts).
        on_drop: told (reason, text) of every pair that gives no frame; the log is, if None.

    Raises:
        BagError: for a bag that cannot be read or is damaged, for topics that are missing or ambiguous (they are
            listed), and for a bag that gives no frame at all (with the reasons).
    """
    path = Path(path)
    dropped: list[tuple[str, str]] = []

    def drop(reason: str, text: str) -> None:
        dropped.append((reason, text))
        if on_drop is not None:
            on_drop(reason, text)
        else:
            logger.warning("%s: %s: %s", path, reason, text)

    with closing(BagReader(path)) as reader:
        chosen = choose_topics(reader.connections, topics or Topics(), source)
        poses = _read_poses(reader, pose_source, chosen.pose, scene_frame, T_base_camera, round(pose_tolerance * 1e9))
        assembler = Assembler(
            poses,
            source=source,
            slop_ns=round(slop * 1e9),
            timeout_ns=0,
            rectified=rectified,
            T_camera_depth=T_camera_depth,
            on_drop=drop,
        )
        streams = {chosen.rgb_info: RGB_INFO, chosen.depth_info: DEPTH_INFO, chosen.rgb: RGB, chosen.depth: DEPTH}
        streams[chosen.points] = POINTS
        wanted = [connection for connection in reader.connections if connection.topic in streams]
        # A calibration counts for the whole bag, also where the recording began with an image.
        for stream, message in _first_infos(reader, wanted, streams).items():
            assembler.add_info(stream, message)
        count = 0
        for connection, message in reader.messages(wanted):
            stream = streams[connection.topic]
            if stream in (RGB_INFO, DEPTH_INFO):
                assembler.add_info(stream, message)
                continue
            for frame in assembler.add(stream, stamp_to_ns(message.header.stamp), message):
                try:
                    posed = frame.frames()
                except (ConversionError, FrameError) as error:
                    drop("error", str(error))
                else:
                    count += len(posed)
                    yield from posed
        if count == 0:
            why = "; ".join(dict.fromkeys(f"{reason}: {text}" for reason, text in dropped[:3]))
            received = " and ".join(
                f"{counts.received} {_WORDS[stream]}" for stream, counts in assembler.pairer.counts.items()
            )
            raise BagError(
                f"{path} gives no frame: {received} messages, {assembler.matched} "
                f"pairs within {slop} s{'; ' + why if why else ''}"
            )


def choose_topics(connections: list[Connection], topics: Topics, source: str = RGBD) -> Topics:
    """Fills in the names that were not given, those that frames from `source` need.

    Raises:
        BagError: where the choice is ambiguous, or a topic is not there; it lists the topics.
    """
    images = _by_type(connections, IMAGES)
    infos = _by_type(connections, CAMERA_INFO)
    clouds = _by_type(connections, CLOUDS)
    for name in (topics.rgb, topics.depth, topics.rgb_info, topics.depth_info, topics.points):
        if name and name not in images + infos + clouds:
            raise BagError(f"the bag has no image, CameraInfo or cloud topic {name!r}; {_listing(connections)}")
    depth = rgb = points = rgb_info = depth_info = ""
    if DEPTH in STREAMS[source]:
        depth = topics.depth or _only("depth image", [name for name in images if _is_depth(name)], connections)
        depth_info = topics.depth_info or _beside(depth, infos)
    if POINTS in STREAMS[source]:
        points = topics.points or _only("point cloud", clouds, connections)
        rgb_info = topics.rgb_info
    if RGB in STREAMS[source]:
        colours = [name for name in images if not _is_depth(name) and name != depth]
        rgb = topics.rgb or _only("colour image", colours, connections)
        rgb_info = topics.rgb_info or _beside(rgb, infos)
        if not rgb_info:
            rgb_info = _only("colour CameraInfo", [name for name in infos if not _is_depth(name)], connections)
    return Topics(rgb, rgb_info, depth, depth_info if depth_info != rgb_info else "", points, topics.pose)


def _first_infos(reader: BagReader, connections: list[Connection], streams: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    infos = [connection for connection in connections if streams[connection.topic] in (RGB_INFO, DEPTH_INFO)]
    for connection, message in reader.messages(infos):
        found.setdefault(streams[connection.topic], message)
        if len(found) == len({item.topic for item in infos}):
            break
    return found


def _read_poses(
    reader: BagReader,
    source: str,
    topic: str,
    scene_frame: str,
    T_base_camera: NDArray[np.float64] | None,
    tolerance_ns: int,
) -> PoseSource:
    """All poses of the bag, before the first image: then none is late."""
    connections = reader.connections
    if source == "auto":
        if topic:
            source = next((name for name, types in POSES.items() if topic in _by_type(connections, types)), "auto")
        else:
            source = next((name for name, types in POSES.items() if _by_type(connections, types)), "auto")
    if source not in POSES:
        raise BagError(f"no poses for the source {source!r} (known are {', '.join(POSES)}); {_listing(connections)}")
    names = _by_type(connections, POSES[source])
    if source == "tf":
        wanted = [connection for connection in connections if connection.topic in names]
        tree = TransformTree(scene_frame or "map", tolerance_ns=tolerance_ns)
        for connection, message in reader.messages(wanted):
            try:
                tree.add(message, static=connection.topic.endswith(STATIC_TF))
            except (ConversionError, PoseError) as error:
                raise BagError(f"{connection.topic}: {error}") from error
        if tree.scene_frame not in tree.frames():
            raise BagError(f"the bag's TF has no frame {tree.scene_frame!r}, only {', '.join(tree.frames())}")
        return _Whole(tree, T_base_camera)
    if topic and topic not in names:
        raise BagError(f"the bag has no pose topic {topic!r} for {source}; {_listing(connections)}")
    topic = topic or _only(f"topic for {source}", names, connections)
    poses: BufferedPose | None = None
    for _, message in reader.messages([connection for connection in connections if connection.topic == topic]):
        if poses is None:
            frame = scene_frame or message.header.frame_id
            poses = BufferedPose(frame, tolerance_ns=tolerance_ns, capacity=None)
        try:
            poses.add(message)
        except (ConversionError, PoseError) as error:
            raise BagError(f"{topic} at {stamp_to_ns(message.header.stamp) / 1e9:.6f} s: {error}") from error
    if poses is None:
        raise BagError(f"the bag has no message on the pose topic {topic!r}")
    return _Whole(poses, T_base_camera)


class _Whole:
    """All poses of a bag, whatever the order of its stamps, with one more transform at the camera's end."""

    def __init__(self, source: PoseSource, T_base_camera: NDArray[np.float64] | None) -> None:
        self._source = source
        self._T = np.eye(4) if T_base_camera is None else T_base_camera
        self.scene_frame = source.scene_frame
        self.by_frame = source.by_frame

    def lookup(self, stamp_ns: int, camera_frame: str, *, final: bool = False) -> NDArray[np.float64]:
        return self._source.lookup(stamp_ns, camera_frame, final=final) @ self._T

    def reset(self, stamp_ns: int) -> None:
        """The whole bag has been read: nothing is forgotten."""


def _by_type(connections: list[Connection], types: tuple[str, ...]) -> list[str]:
    return sorted({connection.topic for connection in connections if connection.msgtype in types})


def _is_depth(topic: str) -> bool:
    return "depth" in topic.lower()


def _only(what: str, names: list[str], connections: list[Connection]) -> str:
    if len(names) == 1:
        return names[0]
    found = f"{len(names)} topics could be the {what}: {', '.join(names)}" if names else f"the bag has no {what}"
    raise BagError(f"{found}; name the one to use; {_listing(connections)}")


def _beside(image: str, infos: list[str]) -> str:
    """The camera_info next to an image topic, also above a transport's suffix; empty if there is none."""
    base = image.rsplit("/", 1)[0]
    for folder in (base, base.rsplit("/", 1)[0]):
        if f"{folder}/camera_info" in infos:
            return f"{folder}/camera_info"
    return ""


def _listing(connections: list[Connection]) -> str:
    pairs = sorted({(connection.topic, connection.msgtype) for connection in connections})
    return "the topics are " + (", ".join(f"{topic} ({kind})" for topic, kind in pairs) or "none")
