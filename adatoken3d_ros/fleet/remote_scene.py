# SPDX-License-Identifier: Apache-2.0
"""A robot's scene whose questions are answered elsewhere: all that is geometry stays here, what is new is sent."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from adatoken3d_ros.engine import loading
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.prepared import Prepared
from adatoken3d_ros.engine.runtime import Runtime
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.scene_memory import SceneMemory, ViewError
from adatoken3d_ros.fleet.bodies import Whose, body_of, digest, jpeg, packed, packed_things
from adatoken3d_ros.fleet.wire import Manifest, ViewEntry
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.scene.contributions import Contribution
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import Verdict
from adatoken3d_ros.scene.sealed_file import SceneFileError
from adatoken3d_ros.scene.storage import Packed
from adatoken3d_ros.scene.tombstones import Thing
from adatoken3d_ros.scene.view_blocks import Block
from adatoken3d_ros.settings import DEFAULTS

if TYPE_CHECKING:
    from adatoken3d_ros.fleet.far_model import FarModel

logger = logging.getLogger(__name__)

_NO_FEATURES = "the features of this scene are at the shared engine (engine.encode is picture): it is in no file"


class _PictureMemory(SceneMemory):
    """Of a robot that sends pictures: there are no features to be saved, and none that a file has would be of use."""

    def packed(self, frame_id: str) -> Packed:
        raise SceneFileError(_NO_FEATURES)

    def load(self, path: str | Path, frame_id: str, *, merge: bool = False) -> int:
        raise SceneFileError(f"{path}: {_NO_FEATURES}")


@dataclass(frozen=True, eq=False)
class Sent:
    """What was, or will be, sent of a view: how it was when its body was made, and how that is called."""

    view: Contribution
    block: Block | None
    picture: bytes
    name: str

    def packed(self, whose: Whose) -> bytes:
        """The body, the same whenever it is made."""
        return packed(body_of(self.view, self.block, self.picture), whose)


@dataclass(frozen=True, eq=False)
class SentThings:
    """As `Sent`, of what has gone from the scene."""

    things: tuple[Thing, ...]
    name: str

    def packed(self, whose: Whose) -> bytes:
        """The body."""
        return packed_things(list(self.things), whose)


Bodies = Mapping[str, Sent | SentThings]


class RemoteScene(Scene):
    """See the module.

    Args:
        runtime: whose model is a `FarModel`. config, strategy: as of any scene.
        fallback: a scene of another engine, in this process, that sees the same frames.

    Attributes:
        name: by which the shared engine knows it.
        offer: told what the scene is and where its bodies are, when it has changed and nobody asks.
    """

    def __init__(
        self,
        runtime: Runtime,
        config: SessionConfig,
        strategy: Strategy | None,
        fallback: Scene | None = None,
        offer: Callable[[Manifest, Bodies, Whose], object] = lambda manifest, bodies, whose: None,
    ) -> None:
        super().__init__(runtime, config, strategy=strategy)
        self.name = secrets.token_hex(16)
        self.offer = offer
        self.fallback = fallback
        self._far: FarModel = runtime.model  # type: ignore[assignment]
        self.whose = Whose(self._far.identity, self._far.whole_sizes)
        if self._far.pictures:
            self.memory = _PictureMemory(runtime.model, config)
            self.prepared = Prepared(runtime.model, self.memory)
        self._pictures: dict[int, bytes] = {}
        self._sent: dict[int, Sent] = {}
        self._sent_things: SentThings | None = None
        self._told = Manifest()

    # --- frames -------------------------------------------------------------------------------------------------------

    def observe(self, frame: PosedFrame) -> Verdict:
        carved = self.memory.carved
        verdict = super().observe(frame)
        if self.memory.carved != carved:
            self._told = Manifest()  # of the same views less is left
        if self.fallback is not None and (verdict == Verdict.KEY_FRAME or self.confirmed_ns == frame.stamp_ns):
            self.fallback.observe(frame)
        return verdict

    def _encode(self, limit: int | None, should_stop: Callable[[], bool] | None = None) -> int:
        waiting = {frame.stamp_ns: frame.rgb for frame in self.memory.pending}
        try:
            return super()._encode(limit, should_stop)
        finally:
            if self._far.pictures:
                new = waiting.keys() & self.memory.poses.keys()
                self._pictures |= {stamp: jpeg(waiting[stamp]) for stamp in new - self._pictures.keys()}
                self._pictures = {stamp: self._pictures[stamp] for stamp in self.memory.poses}

    def clear(self) -> None:
        super().clear()
        self._pictures.clear()
        if self.fallback is not None:
            self.fallback.clear()

    def move(self, poses: Mapping[int, NDArray[np.float64]]) -> int:
        if self.fallback is not None:
            self.fallback.move(poses)
        self._told = Manifest()
        return super().move(poses)

    def load(self, path: str | Path, frame_id: str = DEFAULTS["scene.frame_id"], *, merge: bool = False) -> int:
        views = super().load(path, frame_id, merge=merge)
        self._told = Manifest()
        if self.fallback is not None and not merge:
            self.fallback.clear()  # the file's features are of another model
        return views

    # --- ahead of a question ------------------------------------------------------------------------------------------

    @property
    def work_ahead(self) -> bool:
        if self.memory.pending or (
            len(self.memory) and self.memory.poses.keys() != {v.stamp for v in self._told.views}
        ):
            return True
        return self.fallback is not None and self.fallback.work_ahead

    def prepare(self, should_stop: Callable[[], bool] | None = None) -> None:
        """Encodes what waits, and has what is new sent; then what the fallback can prepare."""
        while self.memory.pending:
            try:
                if not self.encode_pending(1, should_stop):
                    return
            except ViewError as error:
                logger.warning("%s", error)
        self.follow_model()
        if len(self.memory):
            if self.whose.model:
                self._told, bodies = self.described()
            else:  # nothing has a name yet
                nameless = tuple(ViewEntry(stamp, "", ()) for stamp in self.memory.poses)
                self._told, bodies = Manifest(nameless), {}
            self.offer(self._told, bodies, self.whose)
        if self.fallback is not None and not (should_stop is not None and should_stop()):
            self.fallback.prepare(should_stop)

    def forget_told(self) -> None:
        """Has what is here offered once more, although nothing has changed. Any thread."""
        self._told = Manifest()
        self.wake()

    def follow_model(self) -> None:
        """Bodies have other names, and strategies may be others, once it is known which model the engine has."""
        if self.whose.model == self._far.identity:
            return
        self.whose = Whose(self._far.identity, self._far.whole_sizes)
        self._sent, self._sent_things, self._told = {}, None, Manifest()
        if self.strategy.name in loading.strategy_names(self.runtime):
            self.set_strategy(loading.strategy_of(self.runtime, self.strategy.name))

    # --- what is sent -------------------------------------------------------------------------------------------------

    def described(self) -> tuple[Manifest, Bodies]:
        """The scene as it is, and what its bodies are made of."""
        views, blocks, origin, shift = self.memory.views()
        entries, sent = [], {}
        for stamp, view in views.items():
            block, known = blocks.get(stamp), self._sent.get(stamp)
            gone = None if known is None else lost(known, view, block)
            if known is None or gone is None:
                picture = self._pictures.get(stamp, b"")
                data = packed(body_of(view, block, picture), self.whose)
                known, gone = Sent(view, block, picture, digest(data)), ()
            sent[stamp] = known
            pose = tuple(np.asarray(self.memory.poses[stamp], np.float64).reshape(-1).tolist())
            entries.append(ViewEntry(stamp, known.name, pose, gone))
        self._sent = sent
        things = self._gone_things()
        where = tuple(map(float, origin)), tuple(map(int, shift))
        manifest = Manifest(tuple(entries), *where, "" if things is None else things.name)  # type: ignore[arg-type]
        bodies: dict[str, Sent | SentThings] = {one.name: one for one in sent.values()}
        return manifest, bodies | ({} if things is None else {things.name: things})

    def _gone_things(self) -> SentThings | None:
        """What has gone, with its features: of pictures there are none here."""
        gone = tuple(self.memory.past.tombstones.gone)
        if not gone or self._far.pictures:
            self._sent_things = None
        elif self._sent_things is None or self._sent_things.things != gone:  # things are equal where they are the same
            self._sent_things = SentThings(gone, digest(packed_things(list(gone), self.whose)))
        return self._sent_things


def lost(known: Sent, view: Contribution, block: Block | None) -> tuple[int, ...] | None:
    """Rows of what was sent that a view has no more; None where it is not a part of that, as after a move."""
    whole = known.view
    if (block is None) != (known.block is None) or (
        block is not None and known.block is not None and block.xyz is not known.block.xyz
    ):
        return None
    if view.points is whole.points and view.features is whole.features:
        return ()
    kept = torch.isin(whole.keys, view.keys)
    if int(kept.sum()) != len(view.keys):
        return None
    patches = torch.repeat_interleave(kept, whole.count)
    same = torch.equal(whole.points[patches], view.points) and torch.equal(
        whole.features[kept.to(whole.features.device)], view.features
    )
    return tuple((~kept).nonzero()[:, 0].tolist()) if same else None
