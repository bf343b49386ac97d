# SPDX-License-Identifier: Apache-2.0
"""Services on the scene as a whole: clear it, save it to a file, take it up from one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from std_srvs.srv import Trigger

from adatoken3d_ros.engine.scene_queue import SceneQueue
from adatoken3d_ros.ros.awaiting import completed
from adatoken3d_ros.ros.engine_owner import EngineOwner
from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.ros.parameters import Parameters
from adatoken3d_ros.text import described, quoted, shown

FILE, DIRECTORY = "scene.file", "scene.directory"


def scene_directory(value: str) -> Path:
    """The directory that `value` names; where it is empty, adatoken3d in ROS's own folder."""
    return Path(value) if value else Path(os.environ.get("ROS_HOME") or Path.home() / ".ros") / "adatoken3d"


def inside(directory: str, value: str) -> Path:
    """The file that `value` names, links followed.

    Raises:
        ValueError: unless it lies in the scene's directory.
    """
    base = Path(os.path.realpath(scene_directory(directory)))
    path = Path(os.path.realpath(value))
    if base not in path.parents:
        raise ValueError(f"must lie in {DIRECTORY}, {base}, got {quoted(value)}")
    return path


def check_file(path: str, directory: str) -> None:
    """Raises ValueError for the path of a scene file that is not in the scene's directory; an empty one is none."""
    if path:
        inside(directory, path)


async def carried_out(node: Node, queue: SceneQueue | None, response: Any, work: Callable[[Any], str]) -> Any:
    """The response with what `work`, which the worker does with the scene, says; or why it could not be done."""
    if queue is None:
        response.success, response.message = False, "there is no model yet: configure the node first"
        return response
    try:
        response.message = shown(await completed(node, queue.call(work)))
        response.success = True
        return response
    except (RuntimeError, ValueError, OSError) as error:
        why = shown(error)
    except Exception as error:  # a library's own, or no memory: the caller is told all the same
        why = described(error)
    response.success, response.message = False, why
    node.get_logger().warning(why, throttle_duration_sec=WARN_SECONDS)
    return response


class SceneServices:
    """`~/clear_scene`, `~/save_scene` and `~/load_scene`. What fails changes nothing and says why in the response.

    Args:
        node: carries the services.
        group: reentrant, since a service is a coroutine that awaits the worker.
        parameters: the node's.
        engine: whose worker owns the scene.
    """

    def __init__(self, node: Node, group: CallbackGroup, parameters: Parameters, engine: EngineOwner) -> None:
        self._node = node
        self._parameters = parameters
        self._engine = engine
        for name, handle in (
            ("clear_scene", self._on_clear),
            ("save_scene", self._on_save),
            ("load_scene", self._on_load),
        ):
            node.create_service(Trigger, f"~/{name}", handle, callback_group=group)

    async def _on_clear(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._engine.queue is None:
            response.success, response.message = True, "there is no scene: the node is not configured"
            return response

        def clear(scene: Any) -> str:
            self._engine.clear(scene)
            return "the scene is empty"

        return await carried_out(self._node, self._engine.queue, response, clear)

    async def _on_save(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        path, frame_id = self._parameters[FILE], self._parameters["scene.frame_id"]

        def save(scene: Any) -> str:
            file = self._file(path)
            scene_directory(self._parameters[DIRECTORY]).mkdir(parents=True, exist_ok=True)
            scene.save(file, frame_id)
            self._engine.show(scene)
            return f"{len(scene.poses)} views are in {path}"

        return await self._with_file(path, response, save)

    async def _on_load(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        path, frame_id = self._parameters[FILE], self._parameters["scene.frame_id"]
        merge = self._parameters["scene.on_load"] == "merge"

        def load(scene: Any) -> str:
            before = len(scene.poses)
            views = scene.load(self._file(path), frame_id, merge=merge)
            self._engine.show_another(scene)
            if merge and before:
                return f"{views} views are there with those from {path}; there were {before} before"
            return f"{views} views came from {path}"

        return await self._with_file(path, response, load)

    def _file(self, path: str) -> Path:
        """Looked at anew each time: since it was set, a link may have come to lead elsewhere."""
        return inside(self._parameters[DIRECTORY], path)

    async def _with_file(self, path: str, response: Trigger.Response, work: Callable[[Any], str]) -> Trigger.Response:
        if not path:
            response.success, response.message = False, f"{FILE} is empty: set it to the path of a file"
        else:
            return await carried_out(self._node, self._engine.queue, response, work)
        return response
