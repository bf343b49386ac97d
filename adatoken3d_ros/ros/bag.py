# SPDX-License-Identifier: Apache-2.0
"""Frames from a ROS 2 bag (mcap or sqlite3): no ROS installation, no clock, no lost frames."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.ros.bag_files import BagError, BagReader, Connection
from adatoken3d_ros.ros.inputs.conversions import ConversionError, stamp_to_ns
from adatoken3d_ros.ros.inputs.pairing import Assembler
from adatoken3d_ros.ros.inputs.pictures import DEPTH, DEPTH_INFO, POINTS, RGB, RGB_INFO, RGBD, STREAMS
from adatoken3d_ros.ros.inputs.poses import BufferedPose, PoseError, PoseSource, TfPose, UncertainPose
from adatoken3d_ros.ros.inputs.transforms import TransformTree
from adatoken3d_ros.scene.frames import FrameError, PosedFrame
from adatoken3d_ros.settings import DEFAULTS

logger = logging.getLogger(__name__)

IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
CAMERA_INFO = ("sensor_msgs/msg/CameraInfo",)
CLOUDS = ("sensor_msgs/msg/PointCloud2",)
POSES = {
    "pose_topic": ("geometry_msgs/msg/PoseStamped",),
    "pose_with_covariance": ("geometry_msgs/msg/PoseWithCovarianceStamped",),
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
    slop: float = DEFAULTS["sync.slop"],
    pose_tolerance: float = DEFAULTS["pose.tolerance"],
    max_covariance: float = DEFAULTS["pose.max_covariance"],
    rectified: bool = False,
    on_drop: Callable[[str, str], None] | None = None,
) -> Iterator[PosedFrame]:
    """Every frame of a bag in order, matched and posed exactly as the node does it.

    Args:
        path: an .mcap or .db3 file, or a bag's folder.
        topics: names where the automatic choice is ambiguous.
        source: what frames are made of, see pairing.STREAMS.
        pose_source: one of POSES, or `auto`: TF where it leads from the camera to the scene's frame
            (and no T_base_camera is given), else odometry where the camera's place on its body is known, else a pose
            topic.
        scene_frame: frame of the poses; for TF its target frame (map if empty), else what the pose messages say if
            empty.
        T_base_camera: (4, 4) camera optical frame in the frame whose pose the source gives; None: as the bag's TF says
            for odometry, else identity.
        T_camera_depth: (4, 4) from the frame of depth images or clouds to the colour camera's; see pairing.Assembler.
        slop: largest difference between the stamps of colour and depth, seconds.
        pose_tolerance: see poses.PoseBuffer, seconds. max_covariance: see poses.BufferedPose.
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
        tolerance_ns = round(pose_tolerance * 1e9)
        poses = _Poses(reader, chosen, scene_frame, T_base_camera, tolerance_ns, max_covariance).read(pose_source)
        assembler = Assembler(
            poses,
            source=source,
            slop_ns=round(slop * 1e9),
            timeout_ns=0,
            rectified=rectified,
            T_camera_depth=T_camera_depth,
            on_drop=drop,
            on_refuse=drop,
            on_warn=lambda topic, text: logger.warning("%s: %s: %s", path, topic, text) if text else None,
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


def recorded_questions(path: str | Path) -> list[tuple[int, str]]:
    """(time in nanoseconds, text) of what was asked on a topic `question` (std_msgs/String) while a bag was recorded.

    Raises:
        BagError: for a bag that cannot be read.
    """
    with closing(BagReader(Path(path))) as reader:
        asked = [
            connection
            for connection in reader.connections
            if connection.msgtype == "std_msgs/msg/String" and connection.topic.rsplit("/", 1)[-1] == "question"
        ]
        return sorted((time, str(message.data)) for time, _, message in reader.timed(asked))


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


class _Poses:
    """All poses of the bag, before the first image: then none is late."""

    def __init__(
        self,
        reader: BagReader,
        topics: Topics,
        scene_frame: str,
        T_base_camera: NDArray[np.float64] | None,
        tolerance_ns: int,
        max_covariance: float,
    ) -> None:
        self._reader = reader
        self._topic = topics.pose
        self._scene_frame = scene_frame
        self._T_base_camera = T_base_camera
        self._limits: dict[str, Any] = {"tolerance_ns": tolerance_ns, "max_covariance": max_covariance}
        pictures = topics.depth or topics.points or topics.rgb
        self._camera = next((str(message.header.frame_id) for _, message in self._all([pictures])), "")

    def read(self, source: str) -> PoseSource:
        """Raises BagError, with the frames and topics that there are."""
        chosen = self._choose() if source == "auto" else source
        if chosen not in POSES:
            known = f"(known are {', '.join(POSES)})"
            raise BagError(f"no poses for the source {source!r} {known}; {_listing(self._reader.connections)}")
        poses = self._from_tf() if chosen == "tf" else self._from_messages(chosen)
        missing = poses.missing(self._camera) if isinstance(poses, BufferedPose) else self._missing_in_tf()
        if missing:
            raise BagError(missing)
        return poses

    def _choose(self) -> str:
        """TF if it leads to the camera's frame, else odometry, which must; last a PoseStamped: it names no body."""
        there = [
            name for name, types in POSES.items()
            if (names := _by_type(self._reader.connections, types)) and (not self._topic or self._topic in names)
        ]  # fmt: skip
        if "tf" in there and self._T_base_camera is None:
            missing = self._missing_in_tf()
            if not missing:
                return "tf"
            logger.info("poses are not taken from TF: %s", missing)
        return next((name for name in ("odometry", "pose_topic", "pose_with_covariance", "tf") if name in there), "")

    def _from_tf(self) -> TfPose:
        return TfPose(self._scene_frame or DEFAULTS["scene.frame_id"], self._T_base_camera, self._tree)

    def _missing_in_tf(self) -> str:
        """Why TF does not lead from the camera to the scene, with both names; empty if it does."""
        scene, frames = self._scene_frame or DEFAULTS["scene.frame_id"], self._tree.frames()
        if scene not in frames:
            return f"the bag's TF has no frame {scene!r}, only {', '.join(frames)}"
        if self._tree.connected(scene, self._camera):
            return ""
        return f"the bag's TF does not lead from {self._camera!r} to {scene!r}; its frames are {', '.join(frames)}"

    def _from_messages(self, source: str) -> BufferedPose:
        connections = self._reader.connections
        names, topic = _by_type(connections, POSES[source]), self._topic
        if topic and topic not in names:
            raise BagError(f"the bag has no pose topic {topic!r} for {source}; {_listing(connections)}")
        topic = topic or _only(f"topic for {source}", names, connections)
        tree = self._tree if source == "odometry" else None
        poses: BufferedPose | None = None
        unsure: list[str] = []
        for _, message in self._all([topic]):
            if poses is None:
                frame = self._scene_frame or message.header.frame_id
                poses = BufferedPose(frame, self._T_base_camera, tree=tree, capacity=None, **self._limits)
            try:
                poses.add(message)
            except UncertainPose as error:
                unsure.append(str(error))
            except (ConversionError, PoseError) as error:
                raise BagError(f"{topic} at {stamp_to_ns(message.header.stamp) / 1e9:.6f} s: {error}") from error
        if poses is None:
            raise BagError(f"the bag has no message on the pose topic {topic!r}")
        if unsure:
            logger.warning("%s: %d poses were refused, the first: %s", topic, len(unsure), unsure[0])
        return poses

    @cached_property
    def _tree(self) -> TransformTree:
        tree, refused = TransformTree(cache_ns=None), []
        for topic, message in self._all(_by_type(self._reader.connections, POSES["tf"])):
            for transform in message.transforms:
                try:
                    tree.add(transform, static=topic.endswith(STATIC_TF))
                except (ConversionError, PoseError) as error:
                    refused.append(str(error))
        if refused:
            logger.warning("%d transforms of the bag were refused, the first: %s", len(refused), refused[0])
        return tree

    def _all(self, topics: list[str]) -> Iterator[tuple[str, Any]]:
        wanted = [connection for connection in self._reader.connections if connection.topic in topics]
        return ((connection.topic, message) for connection, message in self._reader.messages(wanted))


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
