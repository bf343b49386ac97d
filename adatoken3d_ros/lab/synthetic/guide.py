# SPDX-License-Identifier: Apache-2.0
"""Questions about what a camera has shown of a furnished room so far, with their exact answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom
from adatoken3d_ros.lab.synthetic.questions import FAMILIES, generate
from adatoken3d_ros.lab.synthetic.views import Sight, View, sights
from adatoken3d_ros.lab.synthetic.wordings import QA


class Guide:
    """Remembers what views showed, and asks about that.

    Args:
        room: what the views are of. seed: of the questions. keep: of the views, the newest; older ones are forgotten.
    """

    def __init__(self, room: FurnishedRoom, seed: int = 0, keep: int = 24) -> None:
        self._room = room
        self._rng = np.random.default_rng(seed)
        self._shown: deque[dict[int, Sight]] = deque(maxlen=keep)

    def __len__(self) -> int:
        """How many views are remembered."""
        return len(self._shown)

    def show(self, view: View) -> None:
        """One more view has been seen."""
        self._shown.append(dict(sights([view], self._rng)))

    def forget(self) -> None:
        """Forgets all views."""
        self._shown.clear()

    def questions(self, per_family: int = 1, families: Sequence[str] = FAMILIES) -> list[QA]:
        """Up to so many questions of each family, about things that the views show well; [] before the first view."""
        if not self._shown:
            return []
        seen = merge(self._shown)
        return generate(self._room, self._rng, seen, per_family=per_family, families=families)


def merge(shown: Iterable[dict[int, Sight]]) -> dict[int, Sight]:
    """What several views show of each item together, by instance."""
    found: dict[int, Sight] = {}
    for each in shown:
        for instance, sight in each.items():
            known = found.get(instance)
            if known is not None:
                sight = Sight(
                    max(known.pixels, sight.pixels),
                    np.minimum(known.low, sight.low),
                    np.maximum(known.high, sight.high),
                    np.concatenate([known.points, sight.points]),
                )
            found[instance] = sight
    return dict(sorted(found.items()))
