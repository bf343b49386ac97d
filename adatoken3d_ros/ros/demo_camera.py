# SPDX-License-Identifier: Apache-2.0
"""A moving RGB-D camera in a furnished room, so that everything can be tried with no robot.

Publishes `rgb/image`, `depth/image` and their `camera_info` (equal stamps, registered), and the pose of the camera's
optical frame three ways: `pose`, `odom` and TF. While somebody takes the images, questions
about what they have shown, with their exact answers, appear on `~/questions`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, in which a signal may come
    from adatoken3d_ros.ros.signals import leave_at_once

    leave_at_once()

import contextlib
import importlib
import threading
from typing import Any

import numpy as np
from geometry_msgs.msg import Pose, PoseStamped, TransformStamped, Vector3
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from rclpy.exceptions import InvalidParameterValueException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.task import Future
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import Header, String
from tf2_msgs.msg import TFMessage

from adatoken3d_ros.ros.inputs.subscriptions import RELIABILITY
from adatoken3d_ros.ros.outputs.fill import fill_camera_info, fill_image, fill_pose
from adatoken3d_ros.ros.parameters import descriptor
from adatoken3d_ros.ros.signals import leave
from adatoken3d_ros.ros.spinning import run
from adatoken3d_ros.ros.suggestions import LATCHED, to_message
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import START, Setting

PARAMETERS = (
    Setting("rate", 10.0, START, "Views a second, hertz.", 0.1, 60.0),
    Setting("width", 320, START, "Width of both images, pixels.", 32, 1920),
    Setting("height", 240, START, "Height of both images, pixels.", 32, 1080),
    Setting("field_of_view", 69.0, START, "Horizontal field of view, degrees.", 20.0, 120.0),
    Setting("seed", 0, START, "Seed of the room: the same seed furnishes the same room.", 0, 2**31 - 1),
    Setting("depth_encoding", "16UC1", START, "Encoding of depth: millimetres with 0 for invalid, or metres with NaN.",
            choices=("16UC1", "32FC1")),
    Setting("reliability", "reliable", START, "Reliability of the image topics.", choices=tuple(RELIABILITY)),
    Setting("world_frame", "map", START, "Frame in which the poses are given."),
    Setting("camera_frame", "camera_optical_frame", START, "Optical frame of both images: x right, y down, z front."),
)  # fmt: skip
_ASK_PERIOD = 1.0  # seconds between two lists of questions


class DemoCamera(Node):
    """Renders a view on a timer and publishes it; every parameter is read once, at the start."""

    def __init__(self) -> None:
        super().__init__("demo_camera")
        self.declare_parameters("", [(one.name, one.default, descriptor(one)) for one in PARAMETERS])
        value = {one.name: self.get_parameter(one.name).value for one in PARAMETERS}
        for one in PARAMETERS:
            if problem := one.problem(value[one.name]):
                raise InvalidParameterValueException(one.name, value[one.name], problem)
        self._width, self._height, seed = value["width"], value["height"], value["seed"]
        self._depth_encoding, rate = value["depth_encoding"], value["rate"]
        self._world_frame, self._camera_frame = value["world_frame"], value["camera_frame"]

        # Open3D takes a second or two to import: by now a signal is answered.
        furnished = importlib.import_module("adatoken3d_ros.lab.synthetic.furnished")
        facts = importlib.import_module("adatoken3d_ros.lab.synthetic.facts")
        renderer = importlib.import_module("adatoken3d_ros.lab.synthetic.render")
        self._views: Any = importlib.import_module("adatoken3d_ros.lab.synthetic.views")
        # A room that no model was trained in; there are fewer of them than seeds.
        self._room = furnished.make_room(seed % furnished.SEEDS_PER_SPLIT, "test")
        self._renderer = renderer.Renderer(self._room)
        self._guide: Any = importlib.import_module("adatoken3d_ros.lab.synthetic.guide").Guide(self._room, seed)
        # How common each class is takes a second to count, once; until then nothing is asked.
        self._counting = threading.Thread(target=facts.presence, args=(False,), daemon=True)
        self._counting.start()
        camera = importlib.import_module("adatoken3d_ros.lab.synthetic.camera")
        self._K = camera.intrinsics(self._width, self._height, value["field_of_view"])

        images = QoSProfile(depth=2, reliability=RELIABILITY[value["reliability"]])
        self._rgb = self.create_publisher(Image, "rgb/image", images)
        self._depth = self.create_publisher(Image, "depth/image", images)
        self._rgb_info = self.create_publisher(CameraInfo, "rgb/camera_info", images)
        self._depth_info = self.create_publisher(CameraInfo, "depth/camera_info", images)
        self._pose = self.create_publisher(PoseStamped, "pose", 10)
        self._odometry = self.create_publisher(Odometry, "odom", 10)
        self._tf = self.create_publisher(TFMessage, "/tf", 100)
        self._questions = self.create_publisher(String, "~/questions", LATCHED)

        self._start = self._asked = self.get_clock().now()
        self._timer = self.create_timer(1.0 / rate, self._publish)
        self.get_logger().info(
            f"a furnished room (seed {seed}), {self._width}x{self._height} at {rate:g} Hz, "
            "pose on 'pose', 'odom' and TF"
        )

    def _publish(self) -> None:
        now = self.get_clock().now()
        T_world_camera = self._views.orbit(self._room, (now - self._start).nanoseconds * 1e-9)
        rgb, depth, ids = self._renderer.render(self._K, self._width, self._height, T_world_camera)
        pose = fill_pose(Pose(), T_world_camera)
        stamp = now.to_msg()
        optical = Header(stamp=stamp, frame_id=self._camera_frame)
        world = Header(stamp=stamp, frame_id=self._world_frame)

        # The pose first: whoever looks it up at the image's stamp should find it there.
        transform = TransformStamped(header=world, child_frame_id=self._camera_frame)
        p = pose.position
        transform.transform.translation = Vector3(x=p.x, y=p.y, z=p.z)
        transform.transform.rotation = pose.orientation
        self._tf.publish(TFMessage(transforms=[transform]))
        self._pose.publish(PoseStamped(header=world, pose=pose))
        odometry = Odometry(header=world, child_frame_id=self._camera_frame)
        odometry.pose.pose = pose
        self._odometry.publish(odometry)
        info = fill_camera_info(CameraInfo(header=optical), self._K, self._width, self._height)
        self._rgb_info.publish(info)
        self._depth_info.publish(info)
        self._rgb.publish(fill_image(Image(header=optical), rgb, "rgb8"))
        stored = encode_depth(depth, self._depth_encoding)
        self._depth.publish(fill_image(Image(header=optical), stored, self._depth_encoding))
        if not self._rgb.get_subscription_count():
            self._guide.forget()
        elif (now - self._asked).nanoseconds * 1e-9 >= _ASK_PERIOD:
            self._asked = now
            self._guide.show(self._views.View(PosedFrame(rgb, depth, self._K, T_world_camera, now.nanoseconds), ids))
            if not self._counting.is_alive():
                self._questions.publish(to_message(self._guide.questions()))


def encode_depth(depth: NDArray[np.float32], encoding: str) -> NDArray[np.uint16] | NDArray[np.float32]:
    """Depth (H, W) float32 metres, NaN where nothing was measured, as REP 118 wants it.

    16UC1: millimetres, 0 for no measurement and for what does not fit (beyond 65.535 m). 32FC1: as it is.
    """
    if encoding == "32FC1":
        return depth
    millimetres = np.rint(depth * 1000.0)
    return np.where(np.isfinite(millimetres) & (millimetres <= 65535), millimetres, 0).astype(np.uint16)


def _serve(node: DemoCamera, executor: SingleThreadedExecutor, stopped: Future) -> None:
    with contextlib.suppress(ExternalShutdownException):
        executor.spin_until_future_complete(stopped)
    node.destroy_node()


def main(args: list[str] | None = None) -> int:
    """Runs the camera until SIGINT or SIGTERM; 0 then, 2 for a parameter that cannot be used."""
    return run("demo_camera", DemoCamera, _serve, refused=2, args=args)


if __name__ == "__main__":
    leave(main())
