# SPDX-License-Identifier: Apache-2.0
"""The scenes that an engine holds for its robots: made of bodies that come in, the least recently used goes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from adatoken3d_ros.engine.answer import Answer
from adatoken3d_ros.engine.config import session_config
from adatoken3d_ros.engine.knowing import Recalled
from adatoken3d_ros.engine.runtime import Runtime
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.scene_queue import SceneQueue
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.fleet.bodies import (
    Body,
    BodyError,
    Whose,
    built,
    digest,
    kind_of,
    left,
    picture_of,
    unpacked,
    unpacked_things,
)
from adatoken3d_ros.fleet.wire import Manifest, ViewEntry
from adatoken3d_ros.scene.contributions import Contribution
from adatoken3d_ros.scene.tombstones import Thing
from adatoken3d_ros.scene.view_blocks import Block
from adatoken3d_ros.settings import Settings

# What a scene here does not decide: its robot has decided it already.
_HERE = {"memory.limit_mb": 0.0, "memory.tombstones": 1000, "scene.max_views": 1000, "scene.max_voxels": 10**7}


class NoRoom(Exception):
    """No further scene can be held now; the message says why."""


class Shelf:
    """The bodies of one scene, by their digests. Any thread.

    Args:
        whose: of which model they must be. most: bytes that they may take together.
    """

    def __init__(self, whose: Whose, most: float) -> None:
        self.whose, self.most = whose, most
        self._lock = threading.Lock()
        self._bodies: dict[str, tuple[Body | list[Thing], int]] = {}
        self._wanted: list[Manifest] = []  # the newest two: a question may be on its way while the scene grows

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(size for _, size in self._bodies.values())

    def put(self, data: bytes) -> str:
        """Takes a body, and returns its digest; raises BodyError."""
        name = digest(data)
        with self._lock:
            if name in self._bodies:
                return name
            held = sum(size for _, size in self._bodies.values())
        if held + len(data) > self.most:
            raise BodyError(f"a scene of more than {self.most / 1e6:g} MB")
        what = unpacked_things if kind_of(data) == "gone" else unpacked
        body = what(data, self.whose)
        # It came packed, and features of what has gone are of 16 bits on the way alone.
        size = max(len(data), body.nbytes if isinstance(body, Body) else sum(thing.nbytes for thing in body))
        with self._lock:
            self._bodies[name] = body, size
        return name

    def want(self, manifest: Manifest) -> list[str]:
        """The bodies that a scene needs and that are not here; what only older scenes needed goes."""
        with self._lock:
            if manifest not in self._wanted:
                self._wanted = [*self._wanted[-1:], manifest]
            wanted = {name for one in self._wanted for name in one.bodies}
            for name in self._bodies.keys() - wanted:
                del self._bodies[name]
            return [name for name in manifest.bodies if name not in self._bodies]

    def made_of(self) -> set[tuple[str, tuple[float, float, float]]]:
        """Bodies of the views that are wanted, with the origin of the scene that each is made for."""
        with self._lock:
            return {(view.body, one.origin) for one in self._wanted for view in one.views}

    def view(self, name: str) -> Body:
        """The body of a view; raises BodyError if it has gone, or is none."""
        found: Body = self._get(name, Body)
        return found

    def things(self, name: str) -> list[Thing]:
        """The body of what has gone; raises as `view`."""
        found: list[Thing] = self._get(name, list)
        return found

    def _get(self, name: str, kind: type) -> Any:
        with self._lock:
            body = self._bodies.get(name, (None, 0))[0]
        if not isinstance(body, kind):
            raise BodyError(f"the body {name} is {'of something else' if body is not None else 'not here any more'}")
        return body


class HeldScene(Scene):
    """A robot's scene on the engine's side: what its manifest says, made of bodies.

    Args:
        runtime: the engine. settings: the engine's, with the robot's rules. shelf: the bodies.

    Attributes:
        manifest: what it holds.
        recalled: what the last question drew on as if nothing had gone; the rest of what is known its robot finds out.
    """

    def __init__(self, runtime: Runtime, settings: Settings, shelf: Shelf) -> None:
        super().__init__(runtime, session_config(settings | _HERE))
        self.shelf = shelf
        self.manifest = Manifest()
        self.recalled: Recalled | None = None
        self.find_out = self._note
        self._made: dict[tuple[str, tuple[float, float, float]], tuple[Contribution, Block | None]] = {}

    def _note(self, memory: Any, config: Any, answer: Answer, clicks: Any, recalled: Recalled | None) -> dict[str, Any]:
        self.recalled = recalled
        return {}

    def unmade(self, manifest: Manifest) -> tuple[ViewEntry, ...]:
        """Views of it that are to be made of their bodies; those of one body once. Any thread."""
        found = {view.body: view for view in manifest.views if (view.body, manifest.origin) not in self._made}
        return tuple(found.values())

    @torch.inference_mode(False)
    @torch.no_grad()
    def make(self, manifest: Manifest, most: int | None = None) -> int:
        """Makes views of bodies, pictures are encoded, at most so many at once; how many of it are to be made still.
        Those of a scene that nobody wants any more go.

        Raises:
            BodyError, TokenMapError: for bodies of which no view can be made.
        """
        own = {(view.body, manifest.origin) for view in manifest.views}
        kept = own | self.shelf.made_of()  # what another question waits for, too
        self._made = {key: made for key, made in self._made.items() if key in kept}
        unmade, origin = self.unmade(manifest), torch.tensor(manifest.origin, dtype=torch.float64)
        for view in unmade[:most]:
            self._made[view.body, manifest.origin] = self._make(view, origin)
        return len(unmade[most:]) if most is not None else 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def become(self, manifest: Manifest) -> None:
        """Holds what a manifest says; views that `make` has not made yet are made first.

        Raises:
            BodyError, TokenMapError: for bodies that do not go together; the scene is as it was.
        """
        if manifest == self.manifest:
            return
        self.make(manifest)
        views: dict[int, Contribution] = {}
        blocks: dict[int, Block] = {}
        for order, entry in enumerate(manifest.views):
            whole, block = self._made[entry.body, manifest.origin]
            views[entry.stamp] = replace(left(whole, entry.gone), order=order)
            if block is not None:
                blocks[entry.stamp] = block
        self.memory.put(
            views,
            {entry.stamp: entry.T for entry in manifest.views},
            origin=manifest.origin,
            shift=torch.tensor(manifest.shift, dtype=torch.int64),
            blocks=blocks,
            things=self.shelf.things(manifest.things) if manifest.things else (),
        )
        self.manifest = manifest
        self.prepared.forget()

    def _make(self, entry: ViewEntry, origin: Tensor) -> tuple[Contribution, Block | None]:
        body, model = self.shelf.view(entry.body), self.runtime.model
        encoded = model.encode_views([picture_of(body.picture)])[0] if body.picture else None
        return built(body, origin, self.shelf.whose, model.device, encoded)

    @property
    def nbytes(self) -> int:
        made = sum(view.nbytes + (0 if block is None else block.features.nbytes) for view, block in self._made.values())
        return super().nbytes + made - self.memory.past.tombstones.nbytes  # which are the shelf's


@dataclass(eq=False)
class Held:
    """One scene of the engine's: its bodies, and the queue of the worker that owns it.

    Attributes:
        name: of the scene. robot: whose. rules: by which its questions are answered.
        questions: that are about it at the moment. made: bytes of what was made of its bodies, when last looked at.
    """

    name: str
    robot: str
    rules: Mapping[str, Any]
    shelf: Shelf
    queue: SceneQueue
    questions: int = 0
    made: int = 0
    told: Manifest = field(default_factory=Manifest)

    @property
    def nbytes(self) -> int:
        """That it holds: bodies count as soon as they are here, whether a scene is ever made of them or not."""
        return self.made + self.shelf.nbytes

    def unmade(self, manifest: Manifest) -> int:
        """Views that are to be made before the scene is what a manifest says. Any thread."""
        ready = self.queue.ready
        if ready.done() and ready.exception() is None:
            scene = ready.result()
            assert isinstance(scene, HeldScene)
            return len(scene.unmade(manifest))
        return len({view.body for view in manifest.views})

    def make_one(self, manifest: Manifest, scene: Scene) -> int:
        """Runs in the worker's thread: makes a view; how many are to be made still."""
        assert isinstance(scene, HeldScene)
        left = scene.make(manifest, 1)
        self.look(scene)
        return left

    def catch_up(self, scene: Scene) -> bool:
        """Runs in the worker's thread: a view is made of what its robot last said, if all of that is here, so that no
        question waits for more than one; with the last one the scene becomes that. Whether more are to be made."""
        assert isinstance(scene, HeldScene)
        manifest = self.told
        if self.shelf.want(manifest):
            return False
        if self.make_one(manifest, scene):
            return True
        scene.become(manifest)
        self.look(scene)
        return False

    def look(self, scene: Scene) -> None:
        """Runs in the worker's thread: notes how large the scene is."""
        self.made = scene.nbytes


class Scenes:
    """The scenes of one engine. Not thread safe: one thread asks for them, the worker's makes and uses them.

    Args:
        worker: owns the engine. whose: its model. settings: the engine's.
        most: scenes that may be held. most_bytes: of all together.
        gone: told of a scene that was given up.
    """

    def __init__(
        self,
        worker: Worker,
        whose: Whose,
        settings: Settings,
        *,
        most: int,
        most_bytes: float,
        gone: Callable[[Held], object] = lambda held: None,
    ) -> None:
        if most < 1 or most_bytes <= 0:
            raise ValueError(f"an engine holds at least one scene, got {most} of {most_bytes:g} bytes")
        self._worker, self._whose, self._settings = worker, whose, settings
        self.most, self.most_bytes = most, most_bytes
        self._gone = gone
        self._held: OrderedDict[str, Held] = OrderedDict()  # the least recently used first

    def __len__(self) -> int:
        return len(self._held)

    @property
    def nbytes(self) -> int:
        """Of all scenes."""
        return sum(held.nbytes for held in self._held.values())

    def all(self) -> Sequence[Held]:
        """Those that are held, the least recently used first."""
        return tuple(self._held.values())

    def of(self, name: str, robot: str, rules: Mapping[str, Any]) -> Held:
        """The scene of that name, an empty one if it is not here.

        Raises:
            NoRoom: where all that are held are being asked about, or this one is by other rules.
            ValueError: for rules that cannot be, and a name that is another robot's.
        """
        held = self._held.get(name)
        if held is not None and held.robot != robot:
            raise ValueError(f"the scene {name} is another robot's")
        if held is not None and held.rules != rules:
            if held.questions:
                raise NoRoom(f"the scene {name} is being asked about by other rules")
            self._give_up(held)
            held = None
        if held is None:
            settings = self._settings | rules
            self._make_room()
            shelf = Shelf(self._whose, self.most_bytes)
            queue = self._worker.open(lambda engine: HeldScene(engine, settings, shelf), queue_limit=1000)
            held = self._held[name] = Held(name, robot, dict(rules), shelf, queue)
        self._held.move_to_end(name)
        return held

    def tidy(self) -> None:
        """Gives up what is too much, the least recently used first, but none that is being asked about."""
        for held in tuple(self._held.values())[:-1]:
            if self.nbytes <= self.most_bytes:
                return
            if not held.questions:
                self._give_up(held)

    def _make_room(self) -> None:
        while len(self._held) >= self.most:
            idle = next((held for held in self._held.values() if not held.questions), None)
            if idle is None:
                raise NoRoom(f"{len(self._held)} scenes are being asked about, and no more are held at a time")
            self._give_up(idle)

    def _give_up(self, held: Held) -> None:
        del self._held[held.name]
        self._worker.close(held.queue)
        self._gone(held)
