# SPDX-License-Identifier: Apache-2.0
"""Where the view's scene and answers come from: an engine in this process, or a node that runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.pictures import Picture
from adatoken3d_ros.view.report import Reported

Told = Callable[[str], object]


class SourceError(RuntimeError):
    """There is no answer, not even one that says why; the message does."""


@dataclass(frozen=True, eq=False)
class Shown:
    """The scene as it is now.

    Attributes:
        xyz: (M, 3) float32 places of its tokens, scene frame, metres. rgb: (M, 3) uint8.
        since_ns: (M,) int64, acquisition time of the newest view that changed the token.
        pictures: of the key frames, oldest first.
        stamp_ns: acquisition time of the newest view, 0 for an empty scene.
    """

    xyz: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    rgb: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 3), np.uint8))
    since_ns: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    pictures: tuple[Picture, ...] = ()
    stamp_ns: int = 0


class Source(Protocol):
    """Used from any thread; `ask` waits, and is called by one thread at a time.

    Attributes:
        strategies: names that a question may give; the first is what it gets without one.
        budget_ms: of a question that says nothing else, 0 for none.
        click_question: what is asked about a point, with {p} where it stands.
    """

    strategies: tuple[str, ...]
    budget_ms: float
    click_question: str

    def scene(self) -> Shown:
        """The newest; another object where anything has changed."""

    def ask(self, question: Question, strategy: str, on_text: Told, on_stage: Told) -> Reported:
        """The answer, with the text so far and each stage as they come. Raises SourceError."""

    def command(self, question: Question, strategy: str) -> str:
        """The line with which somebody asks it again, for reports."""

    def cancel(self) -> None:
        """Ends the question that runs: it is answered CANCELLED."""

    def close(self) -> None:
        """Frees what it holds."""


class Ages:
    """Since when tokens are as they are, told from one scene to the next by places and counts alone."""

    def __init__(self) -> None:
        self._since: dict[bytes, int] = {}

    def of(self, xyz: NDArray[np.float32], count: NDArray[np.number], stamp_ns: int) -> NDArray[np.int64]:
        """(M,) stamps: for a token that has changed `stamp_ns`, for another as before."""
        rows = np.concatenate([xyz.astype("<f4"), count.astype("<f4")[:, None]], axis=1)
        keys = [row.tobytes() for row in rows]
        self._since = {key: self._since.get(key, stamp_ns) for key in keys}
        return np.array([self._since[key] for key in keys], dtype=np.int64)
