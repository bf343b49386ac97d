# SPDX-License-Identifier: Apache-2.0
"""What RViz shows beside the clouds: the answer's text over the scene, its boxes, what it rests on and where to go to
look at it, where the key frames were, marks, what of the floor is free or was never seen, and what has gone.
"""

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
from adatoken3d_ros.scene.evidence import Evidence
from adatoken3d_ros.scene.marks import Mark
from adatoken3d_ros.scene.occupancy import VOXEL

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
    array.markers += _cells(head, "free", scene.free, (0.2, 0.8, 0.3, 0.25))
    array.markers += _cells(head, "unseen", scene.unseen, (0.5, 0.5, 0.5, 0.5))
    for i, thing in enumerate(scene.gone):
        array.markers += _tombstone(head, i, thing)
    if answer is None or not Status(answer.status).answered:
        return array
    here = [item for item in answer.evidence if not (item.gone.sec or item.gone.nanosec)]
    for i, item in enumerate(here):
        cube = _marker(answer.header, "evidence", i, Marker.CUBE, (0.1, 0.9, 0.9, 0.45 if i == 0 else 0.2))
        cube.pose.position, cube.scale = item.place, item.extent
        array.markers.append(cube)
    if answer.goal_near.header.frame_id:
        arrow = _marker(answer.header, "goal", 0, Marker.ARROW, (1.0, 0.2, 0.8, 0.9))
        arrow.pose = answer.goal_near.pose
        arrow.scale.x, arrow.scale.y, arrow.scale.z = 0.4, 0.08, 0.08
        array.markers.append(arrow)
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


def _cells(
    head: Header, namespace: str, centres: NDArray[np.float64], rgba: tuple[float, float, float, float]
) -> list[Marker]:
    """Cells of the floor as flat squares; none where there are none."""
    if not len(centres):
        return []
    cells = _marker(head, namespace, 0, Marker.CUBE_LIST, rgba)
    cells.scale.x = cells.scale.y = 0.9 * VOXEL
    cells.scale.z = 0.01
    cells.points = [Point(x=x, y=y, z=z) for x, y, z in centres.tolist()]
    return [cells]


def _tombstone(head: Header, number: int, thing: Evidence) -> list[Marker]:
    """A box where something was, and an arrow to where the like was found."""
    box = _marker(head, "gone", number, Marker.CUBE, (0.9, 0.2, 0.2, 0.3))
    (box.pose.position.x, box.pose.position.y, box.pose.position.z) = thing.place
    (box.scale.x, box.scale.y, box.scale.z) = thing.extent
    if thing.moved_to is None:
        return [box]
    arrow = _marker(head, "moved", number, Marker.ARROW, (0.9, 0.2, 0.2, 0.8))
    arrow.scale.x, arrow.scale.y = 0.02, 0.06
    arrow.points = [Point(x=x, y=y, z=z) for x, y, z in (thing.place, thing.moved_to)]
    return [box, arrow]


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
