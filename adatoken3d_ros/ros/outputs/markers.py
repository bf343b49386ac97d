# SPDX-License-Identifier: Apache-2.0
"""What RViz shows beside the clouds: the answer's text over the scene, its boxes, marks, where key frames were."""

from __future__ import annotations

import numpy as np
from adatoken3d.msg import Answer as AnswerMsg
from geometry_msgs.msg import Point
from numpy.typing import NDArray
from std_msgs.msg import Header
from visualization_msgs.msg import Marker, MarkerArray

from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.engine.events import SceneView
from adatoken3d_ros.ros.outputs.messages import header
from adatoken3d_ros.scene.marks import Mark

FRUSTUM_DEPTH = 0.15  # metres; the frusta show where key frames were, not the lens
FRUSTUM_TAN = (0.62, 0.46)  # half width and half height over depth: a common 4:3 camera
TEXT_HEIGHT = 0.12  # metres
BALL, THIN = 0.15, 0.02  # metres: a mark that is a point, and the least edge of one that is a box


def markers(answer: AnswerMsg | None, scene: SceneView) -> MarkerArray:
    """Everything that RViz should show: the answer's text over the scene, its boxes, and where the key frames were."""
    head = header(scene.stamp_ns, scene.frame_id)
    array = MarkerArray(markers=[Marker(header=head, action=Marker.DELETEALL)])
    if scene.poses:
        views = _marker(head, "views", 0, Marker.LINE_LIST, (0.2, 0.6, 1.0, 0.8))
        views.scale.x = 0.005
        corners = np.concatenate([_frustum(T) for T in scene.poses.values()])
        views.points = [Point(x=x, y=y, z=z) for x, y, z in corners.tolist()]
        array.markers.append(views)
    for i, mark in enumerate(scene.marks):
        array.markers += _named(head, i, mark)
    if answer is None or not Status(answer.status).answered:
        return array
    for i, box in enumerate(answer.boxes):
        cube = _marker(answer.header, "boxes", i, Marker.CUBE, (1.0, 0.6, 0.1, 0.35))
        cube.pose, cube.scale = box.center, box.size
        array.markers.append(cube)
    if len(scene.xyz):
        text = _marker(answer.header, "answer", 0, Marker.TEXT_VIEW_FACING, (1.0, 1.0, 1.0, 1.0))
        middle = (scene.xyz.min(axis=0) + scene.xyz.max(axis=0)) / 2.0
        text.pose.position.x, text.pose.position.y = float(middle[0]), float(middle[1])
        text.pose.position.z = float(scene.xyz[:, 2].max()) + 2 * TEXT_HEIGHT
        text.scale.z = TEXT_HEIGHT
        text.text = answer.text + (" (unsure)" if answer.status == Status.UNSURE else "")
        array.markers.append(text)
    return array


def _named(head: Header, number: int, mark: Mark) -> list[Marker]:
    """A mark's box, or a ball where it is a point, and its name above that."""
    boxed = any(mark.extent)
    body = _marker(head, "marks", number, Marker.CUBE if boxed else Marker.SPHERE, (0.9, 0.2, 0.8, 0.4))
    x, y, z = mark.place
    body.pose.position.x, body.pose.position.y, body.pose.position.z = x, y, z
    size = [max(edge, THIN) for edge in mark.extent] if boxed else [BALL] * 3
    body.scale.x, body.scale.y, body.scale.z = size
    name = _marker(head, "mark_names", number, Marker.TEXT_VIEW_FACING, (1.0, 0.7, 1.0, 1.0))
    name.pose.position.x, name.pose.position.y, name.pose.position.z = x, y, z + size[2] / 2 + TEXT_HEIGHT
    name.scale.z, name.text = TEXT_HEIGHT, mark.name
    return [body, name]


def _marker(head: Header, namespace: str, number: int, kind: int, rgba: tuple[float, float, float, float]) -> Marker:
    marker = Marker(header=head, ns=namespace, id=number, type=kind, action=Marker.ADD)
    marker.pose.orientation.w = 1.0
    marker.color.r, marker.color.g, marker.color.b, marker.color.a = rgba
    return marker


def _frustum(T: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 8 edges of a camera's pyramid as (16, 3) line ends in the scene frame."""
    x, y = FRUSTUM_TAN
    apex = np.zeros(3)
    corners = FRUSTUM_DEPTH * np.array([[-x, -y, 1.0], [x, -y, 1.0], [x, y, 1.0], [-x, y, 1.0]])
    ends = [end for i in range(4) for end in (apex, corners[i], corners[i], corners[(i + 1) % 4])]
    return np.stack(ends) @ T[:3, :3].T + T[:3, 3]
