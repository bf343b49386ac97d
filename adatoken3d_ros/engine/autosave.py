# SPDX-License-Identifier: Apache-2.0
"""A scene that is written again and again, some versions of it kept, and the newest of them that can be used."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adatoken3d_ros.text import shown

if TYPE_CHECKING:  # brings torch with it, seconds of importing
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.scene.storage import Packed

logger = logging.getLogger(__name__)

CONFIRMED = 600.0  # a robot that stands still does not write its scene again and again
_DRAFT_SECONDS = 3600.0  # what is not finished so long after it was begun never will be


class Versions:
    """Files `NAME.autosave.NUMBER.scene` of one scene in a directory.

    No file is changed once it is there: a version is written beside the others under a name of its own and appears
    complete, whatever ends the process; the oldest go afterwards. Who has written one is the only writer until its end:
    two nodes of one name (of two domains, or on two machines with one home) would take each other's scene for theirs.
    What could not be restored since it is of another map, frame or model does not go.

    Args:
        directory: of the files; made when the first one is written.
        name: of the scene: scenes of other names may be kept beside it.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = re.sub(r"[^\w-]+", ".", name).strip(".") or "scene"
        self._locked = False
        self._others: set[Path] = set()

    def files(self) -> list[Path]:
        """Those that are there, the newest first. Raises OSError for a directory that cannot be read."""
        pattern = re.compile(re.escape(self._name) + r"\.autosave\.(\d{1,18})\.scene")
        found = []
        try:
            for path in self._directory.iterdir():
                if match := pattern.fullmatch(path.name):
                    found.append((int(match[1]), path))
        except FileNotFoundError:
            return []
        return [path for _, path in sorted(found, reverse=True)]

    def write(self, packed: Packed, kept: int) -> Path:
        """Adds a version, of which `kept` stay, and returns its file. Raises OSError."""
        self._directory.mkdir(parents=True, exist_ok=True)
        if not self._locked:
            weakref.finalize(self, os.close, _locked(self._directory / f".{self._name}.autosave.lock"))
            self._locked = True
        before = self.files()
        number = 1 + (int(before[0].name.split(".")[-2]) if before else 0)
        path = self._directory / f"{self._name}.autosave.{number:06d}.scene"
        packed.write(path)
        _sync(self._directory)
        for old in [version for version in before if version not in self._others][max(0, kept - 1) :]:
            old.unlink(missing_ok=True)
        for draft in self._directory.glob(f".{self._name}.autosave.*.part"):  # of processes that were killed
            if time.time() - draft.stat().st_mtime > _DRAFT_SECONDS:
                draft.unlink(missing_ok=True)
        return path

    def restore(self, load: Callable[[Path], int]) -> str:
        """Has `load` try the versions, the newest first; tells in words what was restored, or why nothing was."""
        from adatoken3d_ros.scene.sealed_file import AnotherSceneError  # brings torch with it

        problems = []
        try:
            files = self.files()
        except OSError as error:
            return f"nothing was restored: {shown(error, 300)}"
        for path in files:
            try:
                views = load(path)
            except (ValueError, OSError) as error:
                problems.append(shown(error, 300))
                if isinstance(error, AnotherSceneError):
                    self._others.add(path)
                logger.warning("not restored: %s", problems[-1])
            else:
                return f"{views} views were restored from {path}"
        return f"nothing was restored: {'; '.join(problems[:3]) or f'there is no file in {self._directory}'}"


@dataclass(frozen=True)
class State:
    """What there is to save in a scene, and when it was last seen to be so, nanoseconds."""

    what: object
    confirmed_ns: int

    def is_new(self, saved: State | None, *, ending: bool = False) -> bool:
        """Whether it is to be saved after another: where nothing has changed but that it was seen to be so, once in
        `CONFIRMED` seconds, or when it may be the last time."""
        if saved is None or self.what != saved.what:
            return True
        since = abs(self.confirmed_ns - saved.confirmed_ns)
        return since > 0 if ending else since >= CONFIRMED * 1e9


def state_of(scene: Scene) -> State:
    """What there is to save in a scene."""
    memory, tombstones = scene.memory, scene.memory.past.tombstones
    poses = tuple((stamp, pose.tobytes()) for stamp, pose in memory.poses.items())
    # Of the same views less may be left, and what has come or gone is also noted by frames that are no views.
    gone = tuple((thing.gone_ns, thing.moved_to) for thing in tombstones.gone)
    appeared = tuple(thing.first_ns for thing in tombstones.appeared)
    what = poses, memory.marks.all(), memory.map_id, memory.carved, gone, appeared
    return State(what, memory.confirmed_ns)


def _locked(path: Path) -> int:
    """The open file, locked until it is closed or the process ends. Raises OSError where another process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OSError(error.errno, "another node of this name saves its scene here", str(path)) from error
    except OSError as error:  # a file system without locks
        logger.warning("%s cannot be locked: %s", path, error)
    return handle


def _sync(directory: Path) -> None:
    """A name that was given to a file outlives a loss of power, too."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
