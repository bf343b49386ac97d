# SPDX-License-Identifier: Apache-2.0
"""Services on the map that a scene lies in: places with names, and views that were taken from elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from adatoken3d.msg import Mark as MarkMsg
from adatoken3d.srv import AddMark, ListMarks, RemoveMark, UpdatePoses
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node

from adatoken3d_ros.ros.awaiting import completed
from adatoken3d_ros.ros.engine_owner import EngineOwner
from adatoken3d_ros.ros.inputs.corrections import corrected_poses
from adatoken3d_ros.ros.inputs.topics import Inputs
from adatoken3d_ros.ros.outputs.fill import ns_to_stamp
from adatoken3d_ros.ros.outputs.messages import header
from adatoken3d_ros.ros.parameters import Parameters
from adatoken3d_ros.ros.scene_services import carried_out
from adatoken3d_ros.scene.marks import Mark
from adatoken3d_ros.text import quoted


def mark_message(mark: Mark) -> MarkMsg:
    """A mark as its message."""
    message = MarkMsg(name=mark.name)
    message.place.x, message.place.y, message.place.z = mark.place
    message.extent.x, message.extent.y, message.extent.z = mark.extent
    ns_to_stamp(message.added, mark.added_ns)
    return message


class MapServices:
    """`~/add_mark`, `~/remove_mark`, `~/list_marks` and `~/update_poses`. What fails changes nothing and says why.

    Args:
        node: carries the services.
        group: reentrant, since a service is a coroutine that awaits the worker.
        parameters: the node's.
        engine: whose worker owns the scene.
        inputs: know the ways between frames.
    """

    def __init__(
        self, node: Node, group: CallbackGroup, parameters: Parameters, engine: EngineOwner, inputs: Inputs
    ) -> None:
        self._node = node
        self._parameters = parameters
        self._engine = engine
        self._inputs = inputs
        for kind, name, handle in (
            (AddMark, "add_mark", self._on_add),
            (RemoveMark, "remove_mark", self._on_remove),
            (ListMarks, "list_marks", self._on_list),
            (UpdatePoses, "update_poses", self._on_update),
        ):
            node.create_service(kind, f"~/{name}", handle, callback_group=group)

    async def _on_add(self, request: AddMark.Request, response: AddMark.Response) -> AddMark.Response:
        frame, now_ns = request.frame_id, self._node.get_clock().now().nanoseconds

        def add(scene: Any) -> str:
            place, extent = request.mark.place, request.mark.extent
            point = np.array([place.x, place.y, place.z])
            if frame not in ("", self._parameters["scene.frame_id"]):
                if self._inputs.poses is None:
                    raise ValueError(f"the mark is in frame {quoted(frame)}: activate the node, so that it hears TF")
                point = self._inputs.in_scene(point, frame)
            x, y, z = point.tolist()
            mark = Mark(request.mark.name, (x, y, z), (extent.x, extent.y, extent.z), now_ns)
            scene.memory.marks.add(mark)
            self._engine.show(scene)
            return f"{quoted(mark.name)} is at [{x:.3f}, {y:.3f}, {z:.3f}] m"

        return await carried_out(self._node, self._engine.queue, response, add)

    async def _on_remove(self, request: RemoveMark.Request, response: RemoveMark.Response) -> RemoveMark.Response:
        def remove(scene: Any) -> str:
            mark = scene.memory.marks.remove(request.name)
            self._engine.show(scene)
            return f"{quoted(mark.name)} is a mark no more"

        return await carried_out(self._node, self._engine.queue, response, remove)

    async def _on_list(self, request: ListMarks.Request, response: ListMarks.Response) -> ListMarks.Response:
        if self._engine.queue is not None:
            memory = (await completed(self._node, self._engine.queue.call(lambda scene: scene))).memory
            response.header = header(memory.stamp_ns, self._parameters["scene.frame_id"])
            response.map_id = memory.map_id
            response.marks = [mark_message(mark) for mark in memory.marks.all()]
        return response

    async def _on_update(self, request: UpdatePoses.Request, response: UpdatePoses.Response) -> UpdatePoses.Response:
        def update(scene: Any) -> str:
            way = self._inputs.way_to_camera(request.child_frame_id)
            before = scene.memory.all_poses()
            poses = corrected_poses(request.poses, before, self._parameters["scene.frame_id"], way)
            response.moved = scene.move(poses)
            self._engine.show(scene)
            rest = len(before) - len(poses)
            return f"{response.moved} views were moved" + (f"; {rest} have no pose near their time" if rest else "")

        return await carried_out(self._node, self._engine.queue, response, update)
