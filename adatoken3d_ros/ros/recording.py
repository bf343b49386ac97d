# SPDX-License-Identifier: Apache-2.0
"""A question with all that it needs as an MCAP file: key frames with their poses, and every topic of the answer.

It is an ordinary ROS 2 bag: `ros2 bag play`, RViz, Foxglove and Lichtblick show it, `adatoken3d ask --bag` and
`adatoken3d replay` ask it again. Definitions of the messages are in the file, made of the messages' own description.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from geometry_msgs.msg import TransformStamped
from rclpy.serialization import serialize_message
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import String
from tf2_msgs.msg import TFMessage

from adatoken3d_ros.engine.answer import Answer
from adatoken3d_ros.engine.events import KeyFramesShown, SceneView
from adatoken3d_ros.ros.outputs.fill import fill_camera_info, fill_image, rotation_to_quaternion
from adatoken3d_ros.ros.outputs.markers import markers
from adatoken3d_ros.ros.outputs.messages import (
    answer_message,
    header,
    key_frames_message,
    report_message,
    retained_cloud,
    scene_cloud,
)
from adatoken3d_ros.scene.frames import PosedFrame

CAMERA = "camera_optical_frame"
NODE = "/adatoken3d"
_FOREVER = QosTime(9223372036, 854775807)


def _qos(depth: int, durability: QosDurability) -> Qos:
    ends = (_FOREVER, _FOREVER, QosLiveliness.AUTOMATIC, _FOREVER, False)
    return Qos(QosHistory.KEEP_LAST, depth, QosReliability.RELIABLE, durability, *ends)


ORDINARY = _qos(10, QosDurability.VOLATILE)
LATCHED = _qos(1, QosDurability.TRANSIENT_LOCAL)
_WORDS = {"boolean": "bool", "octet": "byte", "float": "float32", "double": "float64"}
_AFTER = 1_000_000  # nanoseconds from the newest frame to the question, and from there to its answer


def write_recording(
    path: Path,
    frames: Iterable[PosedFrame],
    view: SceneView,
    asked: Sequence[tuple[int, Answer]],
    pictures: KeyFramesShown | None = None,
) -> None:
    """Writes the file, or nothing.

    Args:
        path: an .mcap file. frames: the key frames. view: the scene that the answers are about.
        asked: answers, each with the time at which it was asked, nanoseconds.
        pictures: of the scene.

    Raises:
        ValueError: for a path that is no .mcap.
        OSError: if it cannot be written.
    """
    if path.suffix != ".mcap":
        raise ValueError(f"{path} must be an .mcap file")
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.resolve().parent) as folder:
        bag = Path(folder) / "bag"
        writer = Writer(bag, version=9, storage_plugin=StoragePlugin.MCAP)
        writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        with writer:
            recording = _Recording(writer)
            for frame in frames:
                recording.frame(frame, view.frame_id)
            if pictures is not None:
                recording.pictures(pictures)
            for at_ns, answer in asked:
                recording.answer(answer, view, at_ns)
        os.replace(bag / f"{bag.name}.mcap", path)


def asked_at(scene_stamp_ns: int) -> int:
    """When a question is said to come that was asked about all frames of a bag or a folder."""
    return scene_stamp_ns + _AFTER


class _Recording:
    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._store = get_typestore(Stores.ROS2_KILTED)
        self._topics: dict[str, Any] = {}

    def frame(self, frame: PosedFrame, scene_frame: str) -> None:
        """Images, their calibration and the camera's pose."""
        stamp = max(1, frame.stamp_ns)  # of a folder without times the first has 0, which says "not set" in a message
        head = header(stamp, CAMERA)
        transform = TransformStamped(header=header(stamp, scene_frame), child_frame_id=CAMERA)
        shift, turn = transform.transform.translation, transform.transform.rotation
        shift.x, shift.y, shift.z = (float(value) for value in frame.T_world_camera[:3, 3])
        turn.x, turn.y, turn.z, turn.w = rotation_to_quaternion(frame.T_world_camera[:3, :3])
        self._write("/tf", TFMessage(transforms=[transform]), stamp)
        size = frame.rgb.shape[1], frame.rgb.shape[0]
        for camera in ("rgb", "depth"):
            info = fill_camera_info(CameraInfo(header=head), frame.K, *size)
            self._write(f"/{camera}/camera_info", info, stamp)
        self._write("/rgb/image", fill_image(Image(header=head), frame.rgb, "rgb8"), stamp)
        # A float carries all that was measured; RViz, Foxglove and the node read it as metres.
        depth = np.nan_to_num(frame.depth, nan=0.0, posinf=0.0, neginf=0.0)
        self._write("/depth/image", fill_image(Image(header=head), depth, "32FC1"), stamp)

    def answer(self, answer: Answer, view: SceneView, at_ns: int) -> None:
        """The question and what the node would publish."""
        self._write("/question", String(data=answer.question.text), at_ns)
        message = answer_message(answer, view.frame_id, at_ns)
        then = at_ns + _AFTER
        self._write(f"{NODE}/answer", message, then)
        self._write(f"{NODE}/scene_tokens", scene_cloud(view), then)
        self._write(f"{NODE}/markers", markers(message, view), then)
        if (report := answer.report) is not None:
            self._write(f"{NODE}/retained_tokens", retained_cloud(report, answer.stamp_ns, view.frame_id), then)
            self._write(f"{NODE}/token_report", report_message(answer, report, view.frame_id), then)
        if message.goal_near.header.frame_id:
            self._write(f"{NODE}/goal", message.goal_near, then)

    def pictures(self, shown: KeyFramesShown) -> None:
        """Once, not with each answer: up to a megabyte that is the same for all."""
        self._write(f"{NODE}/key_frames", key_frames_message(shown), asked_at(shown.stamp_ns))

    def _write(self, topic: str, message: Any, stamp_ns: int) -> None:
        if topic not in self._topics:
            kind = _define(type(message), self._store)
            # Latched, as the node offers them: who plays the file offers them so to RViz, which asks for that.
            qos = LATCHED if topic.startswith(f"{NODE}/") and topic != f"{NODE}/goal" else ORDINARY
            self._topics[topic] = self._writer.add_connection(
                topic, kind, typestore=self._store, offered_qos_profiles=[qos]
            )
        self._writer.write(self._topics[topic], stamp_ns, serialize_message(message))


def _define(kind: Any, store: Any) -> str:
    """The name of a message type (package/msg/Name), which the store knows then, and all that it is made of."""
    package, _, _ = kind.__module__.partition(".msg.")
    full = f"{package}/msg/{kind.__name__}"
    if full in store.fielddefs:
        return full
    fields: Mapping[str, str] = kind.get_fields_and_field_types()
    for text in fields.values():
        for inner_package, inner in re.findall(r"([a-z]\w*)/([A-Z]\w*)", text):
            module = __import__(f"{inner_package}.msg", fromlist=[inner])
            _define(getattr(module, inner), store)
    definition = "".join(f"{_plain(text)} {field}\n" for field, text in fields.items())
    store.register(get_types_from_msg(definition, full))
    return full


def _plain(text: str) -> str:
    """A field's type as .msg files write it, of how messages describe it (as IDL does)."""
    if match := re.fullmatch(r"sequence<(.+?)(?:, (\d+))?>", text):
        return f"{_plain(match[1])}[{f'<={match[2]}' if match[2] else ''}]"
    if match := re.fullmatch(r"(.+)\[(\d+)\]", text):
        return f"{_plain(match[1])}[{match[2]}]"
    return _WORDS.get(text, text)
