# SPDX-License-Identifier: Apache-2.0
"""A bag as a robot records it, of a furnished room whose geometry is known: `python -m examples.robot.robot_bag BAG`.

A base drives through the room and carries a RealSense on a mast: colour and aligned depth under the driver's default
names, 640x480 at 30 Hz; odometry of the base at 50 Hz in `odom`; TF from `odom` to `base_link`, the localisation's
from `map` to `odom`, which comes late, and static transforms from there to the optical frame. `/camera_pose` is what a
tracker would tell.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore
from scipy.spatial.transform import Rotation

from adatoken3d_ros.lab.synthetic.camera import intrinsics
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom, make_room
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.ros.outputs.fill import rotation_to_quaternion

RGB, RGB_INFO = "/camera/camera/color/image_raw", "/camera/camera/color/camera_info"
DEPTH = "/camera/camera/aligned_depth_to_color/image_raw"
DEPTH_INFO = "/camera/camera/aligned_depth_to_color/camera_info"
CAMERA_FRAME = "camera_color_optical_frame"
KINDS = {
    "/tf_static": "tf2_msgs/msg/TFMessage",
    "/tf": "tf2_msgs/msg/TFMessage",
    "/odom": "nav_msgs/msg/Odometry",
    "/camera_pose": "geometry_msgs/msg/PoseStamped",
    RGB_INFO: "sensor_msgs/msg/CameraInfo",
    DEPTH_INFO: "sensor_msgs/msg/CameraInfo",
    RGB: "sensor_msgs/msg/Image",
    DEPTH: "sensor_msgs/msg/Image",
}
START_NS = 1_700_000_000_000_000_000
WIDTH, HEIGHT, RATE = 640, 480, 30.0
ODOMETRY_RATE, LOCALISATION_RATE = 50.0, 10.0
DELAY = 0.15  # seconds until map -> odom of a stamp is known
LAP = 24.0  # seconds


def rigid(x: float, y: float, z: float, roll: float = 0.0, pitch: float = 0.0, yaw: float = 0.0) -> NDArray[np.float64]:
    """(4, 4): metres and radians, fixed axes."""
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler("xyz", [roll, pitch, yaw]).as_matrix()
    T[:3, 3] = x, y, z
    return T


# The base did not start at the map's origin; the camera looks down a little, from 1.2 m, turned to the left.
T_MAP_ODOM = rigid(0.8, -0.6, 0.0, yaw=0.5)
T_BASE_CAMERA_LINK = rigid(0.12, 0.03, 1.2, pitch=0.25, yaw=0.3)
T_CAMERA_LINK_OPTICAL = rigid(0.0, 0.015, 0.0, roll=-math.pi / 2, yaw=-math.pi / 2)
T_BASE_OPTICAL = T_BASE_CAMERA_LINK @ T_CAMERA_LINK_OPTICAL


def base_pose(room: FurnishedRoom, seconds: float) -> NDArray[np.float64]:
    """T_map_base (4, 4): a lap through the middle of the room, looking inwards."""
    phase = 2 * math.pi * seconds / LAP
    a, b = 0.22 * room.size[0], 0.22 * room.size[1]
    return rigid(a * math.cos(phase), b * math.sin(phase), 0.0, yaw=phase + 0.75 * math.pi)


def camera_pose(room: FurnishedRoom, stamp_ns: int) -> NDArray[np.float64]:
    """T_map_optical (4, 4) at a stamp: the truth."""
    return base_pose(room, (stamp_ns - START_NS) / 1e9) @ T_BASE_OPTICAL


class _Messages:
    """Messages of the bag's types."""

    def __init__(self) -> None:
        self.store = get_typestore(Stores.ROS2_KILTED)
        self._types = self.store.types

    def make(self, kind: str, *fields: Any) -> Any:
        package, name = kind.split("/")
        return self._types[f"{package}/msg/{name}"](*fields)

    def header(self, stamp_ns: int, frame: str) -> Any:
        return self.make("std_msgs/Header", self.make("builtin_interfaces/Time", *divmod(stamp_ns, 10**9)), frame)

    def pose(self, T: NDArray[np.float64], point: str = "Point") -> tuple[Any, Any]:
        position = self.make(f"geometry_msgs/{point}", *map(float, T[:3, 3]))
        return position, self.make("geometry_msgs/Quaternion", *rotation_to_quaternion(T[:3, :3]))

    def transform(self, stamp_ns: int, parent: str, child: str, T: NDArray[np.float64]) -> Any:
        parts = self.make("geometry_msgs/Transform", *self.pose(T, "Vector3"))
        return self.make("geometry_msgs/TransformStamped", self.header(stamp_ns, parent), child, parts)

    def tf(self, *transforms: Any) -> Any:
        return self.make("tf2_msgs/TFMessage", list(transforms))

    def odometry(self, stamp_ns: int, T: NDArray[np.float64]) -> Any:
        still = self.make("geometry_msgs/Twist", *(2 * [self.make("geometry_msgs/Vector3", 0.0, 0.0, 0.0)]))
        pose = self.make("geometry_msgs/PoseWithCovariance", self.make("geometry_msgs/Pose", *self.pose(T)), ZEROS)
        twist = self.make("geometry_msgs/TwistWithCovariance", still, ZEROS)
        return self.make("nav_msgs/Odometry", self.header(stamp_ns, "odom"), "base_link", pose, twist)

    def image(self, stamp_ns: int, pixels: NDArray[Any], encoding: str) -> Any:
        data = np.ascontiguousarray(pixels).view(np.uint8).reshape(-1)
        head, step = self.header(stamp_ns, CAMERA_FRAME), pixels.nbytes // pixels.shape[0]
        return self.make("sensor_msgs/Image", head, *pixels.shape[:2], encoding, 0, step, data)

    def info(self, stamp_ns: int, K: NDArray[np.float64], width: int, height: int) -> Any:
        P = np.hstack([K, np.zeros((3, 1))]).reshape(-1)
        roi = self.make("sensor_msgs/RegionOfInterest", 0, 0, 0, 0, False)
        head, shape = self.header(stamp_ns, CAMERA_FRAME), (height, width, "plumb_bob")
        return self.make(
            "sensor_msgs/CameraInfo", head, *shape, np.zeros(5), K.reshape(-1), np.eye(3).reshape(-1), P, 0, 0, roi
        )


ZEROS = np.zeros(36)


def messages(room: FurnishedRoom, seconds: float, rate: float = RATE) -> Iterator[tuple[int, str, Any]]:
    """(when it came in nanoseconds, topic, message), in the order of arrival."""
    make = _Messages()
    renderer, K = Renderer(room), intrinsics(WIDTH, HEIGHT)
    static = (("base_link", "camera_link", T_BASE_CAMERA_LINK), ("camera_link", CAMERA_FRAME, T_CAMERA_LINK_OPTICAL))
    yield START_NS, "/tf_static", make.tf(*(make.transform(START_NS, *edge) for edge in static))
    T_odom_map = np.linalg.inv(T_MAP_ODOM)
    events = [
        (round(1e9 * (i / frequency + delay)), what, round(1e9 * i / frequency))
        for what, frequency, delay in (("base", ODOMETRY_RATE, 0.0), ("map", LOCALISATION_RATE, DELAY),
                                       ("image", rate, 0.02))
        for i in range(math.ceil(seconds * frequency) + 1)
    ]  # fmt: skip
    for after_ns, what, of_ns in sorted(events):
        came, stamp = START_NS + after_ns, START_NS + of_ns
        if what == "map":
            yield came, "/tf", make.tf(make.transform(stamp, "map", "odom", T_MAP_ODOM))
        elif what == "base":
            T = T_odom_map @ base_pose(room, of_ns / 1e9)
            yield came, "/odom", make.odometry(stamp, T)
            yield came, "/tf", make.tf(make.transform(stamp, "odom", "base_link", T))
            pose = make.make("geometry_msgs/Pose", *make.pose(camera_pose(room, stamp)))
            yield came, "/camera_pose", make.make("geometry_msgs/PoseStamped", make.header(stamp, "map"), pose)
        else:
            rgb, depth, _ = renderer.render(K, WIDTH, HEIGHT, camera_pose(room, stamp))
            millimetres = np.where(np.isfinite(depth) & (depth < 10.0), np.rint(depth * 1000), 0).astype(np.uint16)
            info = make.info(stamp, K, WIDTH, HEIGHT)
            yield came, RGB_INFO, info
            yield came, DEPTH_INFO, info
            yield came, RGB, make.image(stamp, rgb, "rgb8")
            yield came, DEPTH, make.image(stamp, millimetres, "16UC1")


def write(path: Path, room: FurnishedRoom, seconds: float, rate: float = RATE) -> Path:
    """Writes the bag's folder (mcap); 46 MB a second at 30 Hz."""
    store = get_typestore(Stores.ROS2_KILTED)
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        topics = {topic: writer.add_connection(topic, kind, typestore=store) for topic, kind in KINDS.items()}
        for came, topic, message in messages(room, seconds, rate):
            writer.write(topics[topic], came, store.serialize_cdr(message, KINDS[topic]))
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bag", type=Path, help="folder to write, which must not exist")
    parser.add_argument("--seconds", type=float, default=10.0, help="length (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the room (%(default)s)")
    args = parser.parse_args()
    write(args.bag, make_room(args.seed, "test"), args.seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
