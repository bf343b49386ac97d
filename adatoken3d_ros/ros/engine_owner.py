# SPDX-License-Identifier: Apache-2.0
"""The thread with the model, from the load to the end, and what the rest of the node may know of it. No ROS import."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adatoken3d_ros.engine.events import (
    FrameTaken,
    KeyFramesShown,
    Listeners,
    SceneReplaced,
    SceneView,
    StageBegan,
    TextSoFar,
)
from adatoken3d_ros.engine.loading import load_engine, open_scene, strategy_names, strategy_of
from adatoken3d_ros.engine.out_of_memory import free_cached, trim_heap
from adatoken3d_ros.requirements import advice, missing
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.text import quoted, shown

if TYPE_CHECKING:  # the engine brings torch with it, seconds of importing
    import numpy as np
    from numpy.typing import NDArray

    from adatoken3d_ros.engine.answer import Question
    from adatoken3d_ros.engine.autosave import Versions
    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.pictures import Picture, Pictures
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.engine.scene_queue import SceneQueue
    from adatoken3d_ros.engine.tickets import Ticket
    from adatoken3d_ros.engine.worker import Worker
    from adatoken3d_ros.scene.frames import PosedFrame


@dataclass(frozen=True)
class Loading:
    """A model on its way: seconds since the load began, share of it that is done, what is being done."""

    seconds: float
    share: float = 0.0
    step: str = ""


def _gone_from(scene: Scene) -> object:
    """Changes with what has gone from a scene, and with where it is said to have moved to."""
    memory = scene.memory
    return memory.carved, tuple((thing.gone_ns, thing.moved_to) for thing in memory.past.tombstones.gone)


class EngineOwner:
    """Loads a model into a worker's thread, hands it frames and questions, and frees it.

    Args:
        events: told what the worker tells, and what is in the scene whenever it has changed.
        load: makes an engine of settings, in the worker's thread; told (share, step) while it does.
        open: makes the scene, there too.

    Attributes:
        worker: owns the engine; None before `start` and after `drop`.
        queue: what waits for the scene; None without a worker.
        scene: with the engine behind it, the worker's thread's; others read its counters. None until it is loaded.
        problem: why the last load failed; empty if it did not.
        strategy: name of that in use; empty without a model.
        versions: of the scene, from which it is restored; None: it never is.
        restored: what came of that, in words; empty if it was not to be.
    """

    def __init__(
        self,
        events: Listeners,
        load: Callable[..., Engine] = load_engine,
        open: Callable[[Engine, Settings], Scene] = open_scene,
    ) -> None:
        self._events = events.add(FrameTaken, self._look_again)
        self._load = load
        self._open = open
        self.worker: Worker | None = None
        self.queue: SceneQueue | None = None
        self.scene: Scene | None = None
        self.problem = ""
        self.strategy = ""
        self.versions: Versions | None = None
        self.restored = ""
        self._frame_id = ""
        self._pictures: Pictures | None = None  # of the scene, in the worker's thread
        self._pictured: tuple[Picture, ...] = ()  # that were told last
        self._told: object = (0, ())  # what had gone from the scene that was told last
        self._drawn: PosedFrame | None = None  # whose fate comes next
        self._loading: Loading | None = None
        self._began = 0.0

    # --- from the load to the end -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Imports the engine and torch, for seconds: not in the executor's thread. Raises ImportError."""
        importlib.import_module("adatoken3d_ros.engine.worker")

    def start(self, settings: Settings) -> Future[Scene]:
        """Begins to load what the settings say, unless that was done; the future is done when the model is there."""
        if self.queue is None:
            from adatoken3d_ros.engine.worker import Worker

            self.problem = self.restored = ""
            self._frame_id = settings["scene.frame_id"]
            self._began = time.monotonic()
            self._loading = Loading(0.0)
            self.worker = Worker(partial(self._make_engine, settings), ahead=settings["budget.background"])
            self.queue = self.worker.open(
                partial(self._make_scene, settings),
                events=self._events,
                refuse_late=settings["budget.infeasible"] == "refuse",
            )
            self.worker.start()
        return self.queue.ready

    def failed(self, error: Exception) -> None:
        """What was loaded is of no use; `problem` says why."""
        self.problem = advice(missing()) or shown(error)
        self.drop()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the thread, which may be in a decode step or a load, and answers what waits."""
        if self.worker is not None:
            self.worker.stop(timeout)

    def drop(self) -> None:
        """Ends the thread and frees model and scene. Does nothing if there is none."""
        worker, self.worker, self.queue = self.worker, None, None
        if worker is None:
            return
        worker.stop()
        on_gpu, self.scene, self._pictures, self._pictured = self.on_gpu, None, None, ()
        self._events.tell(SceneReplaced(self._frame_id))
        self._events.tell(SceneView(self._frame_id))
        self._events.tell(KeyFramesShown(self._frame_id))
        free_cached(gpu=on_gpu)

    @property
    def loading(self) -> Loading | None:
        """The model on its way; None when nothing is being loaded."""
        loading = self._loading
        return None if loading is None else replace(loading, seconds=time.monotonic() - self._began)

    @property
    def model_id(self) -> str:
        """Of the model that is loaded; empty without one."""
        return "" if self.scene is None else self.scene.runtime.model_id

    @property
    def on_gpu(self) -> bool:
        """Whether a model is on one."""
        return self.scene is not None and self.scene.runtime.model.device.type == "cuda"

    def drift(self) -> Mapping[str, float]:
        """By stage, time that it takes now over time that it took when it was measured; empty where it was not."""
        latency = None if self.scene is None else self.scene.controller.latency
        return {} if latency is None else latency.drift

    def _make_engine(self, settings: Settings) -> Engine:
        """Runs in the worker's thread."""

        def progress(share: float, step: str) -> None:
            self._loading = Loading(0.0, share, step)

        try:
            return self._load(settings, progress)
        finally:
            self._loading = None

    def _make_scene(self, settings: Settings, engine: Engine) -> Scene:
        """Runs in the worker's thread."""
        from adatoken3d_ros.engine.pictures import Pictures

        scene = self._open(engine, settings)
        self._pictures = Pictures()
        self.strategy = settings["strategy"]
        self.scene = scene
        if settings["scene.restore"] and self.versions is not None:
            self.restored = self.versions.restore(lambda path: scene.load(path, self._frame_id))
            self.show(scene)
        return scene

    # --- frames and questions -----------------------------------------------------------------------------------------

    def take_frame(
        self, draw: Callable[[], PosedFrame], view: Callable[[], tuple[int, NDArray[np.float64]]] | None = None
    ) -> None:
        """As `SceneQueue.submit_frame`; without a worker the frame is `stopped`."""
        if self.queue is None:
            self._events.tell(FrameTaken("stopped"))
        else:
            self.queue.submit_frame(partial(self._draw, draw), view)

    def _draw(self, draw: Callable[[], PosedFrame]) -> PosedFrame:
        """Runs in the worker's thread."""
        self._drawn = draw()
        return self._drawn

    def ask(
        self,
        question: Question,
        values: Mapping[str, Any] | Any,
        number: int,
        listener: Callable[[StageBegan | TextSoFar], object] | None = None,
        strategy: str = "",
    ) -> Ticket:
        """As `SceneQueue.submit`, by the policy that the parameters name now, and the strategy, where none is given.

        There must be a worker.
        """
        assert self.queue is not None
        strategy = strategy or values["strategy"]

        def use_strategy(scene: Scene) -> None:
            # Travels with the question, whose time runs and whose policy holds from now on, also behind others.
            if strategy != self.strategy:
                scene.set_strategy(strategy_of(scene.runtime, strategy))
                self.strategy = strategy

        self.queue.policy = type(self.queue.policy)(values["question_policy"])
        self.queue.queue_limit = values["queue_limit"]
        return self.queue.submit(question, before=use_strategy, number=number, listener=listener)

    def check_strategy(self, name: str) -> None:
        """Raises ValueError for a strategy that the loaded model cannot use; without a model all may be set."""
        if self.scene is not None:
            strategy_of(self.scene.runtime, name)

    def check_named(self, name: str) -> None:
        """Raises ValueError for what names no strategy of the loaded model: files are for who starts the node."""
        if self.scene is not None and name not in (known := strategy_names(self.scene.runtime)):
            raise ValueError(f"strategy {quoted(name)} is none of {', '.join(known)}")

    # --- the scene ----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Has `show` run when the worker has nothing better to do."""
        queue = self.queue  # the node's thread may drop it
        if queue is not None:
            queue.call(self.show, chore=True)

    def show(self, scene: Scene) -> None:
        """Runs in the worker's thread: tells what the scene is now."""
        from adatoken3d_ros.engine.knowing import view_of  # with torch, as there is a scene

        self._told = _gone_from(scene)
        self._events.tell(view_of(scene, self._frame_id))
        self._show_pictures(scene)

    def _show_pictures(self, scene: Scene) -> None:
        from adatoken3d_ros.engine.pictures import MOST_SHOWN, voxels_of

        pictures = () if self._pictures is None else self._pictures.of(scene)[-MOST_SHOWN:]
        if pictures != self._pictured:  # a picture equals itself alone
            self._pictured = pictures
            self._events.tell(KeyFramesShown(self._frame_id, scene.stamp_ns, pictures, voxels_of(scene)))

    def show_another(self, scene: Scene) -> None:
        """As `show`, of a scene that is not that of the answers until now."""
        self._events.tell(SceneReplaced(self._frame_id))
        self.show(scene)

    def clear(self, scene: Scene) -> None:
        """Runs in the worker's thread: forgets the scene."""
        scene.clear()
        trim_heap()
        self.show_another(scene)

    def follow(self, moved: NDArray[np.float64]) -> None:
        """Has the views of this run moved by a transform (4, 4), scene frame, before what waits."""

        def move(scene: Scene) -> None:
            scene.move(scene.memory.followed(moved))
            self.show(scene)

        if self.queue is not None:
            self.queue.call(move)

    def forget(self) -> None:
        """Has `clear` run before what waits."""
        if self.queue is not None:
            self.queue.call(self.clear)

    def _look_again(self, event: FrameTaken) -> None:
        if event.fate in ("superseded", "stopped"):  # which is told in any thread
            return
        if event.fate != "key_frame" and self.scene is not None and _gone_from(self.scene) != self._told:
            self.look()  # a frame that is no view takes out, too
        frame, self._drawn = self._drawn, None
        if event.fate.startswith("error") and frame and self._pictures and self.scene:
            waiting = {one.stamp_ns for one in self.scene.memory.pending}
            if frame.stamp_ns in waiting:  # memory ran out: it may be encoded yet
                self._pictures.add(frame, self.scene)
        if event.fate == "key_frame":
            self.look()
            if frame is not None and self._pictures is not None and self.scene is not None:
                self._pictures.add(frame, self.scene)
