# SPDX-License-Identifier: Apache-2.0
"""Questions about places that no view shows, whose right answer is that one does not know."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom
from adatoken3d_ros.lab.synthetic.views import Sight
from adatoken3d_ros.lab.synthetic.wordings import QA, UNKNOWN, WORDINGS, worded

ASKED = ("class", "colour", "box")  # families that ask about a point
_FAR = 0.75  # metres: nearer to what was seen, somebody might guess


def unseen(
    room: FurnishedRoom,
    visible: Mapping[int, Sight],
    shown: NDArray[np.float32],
    rng: np.random.Generator,
    count: int = 2,
) -> list[QA]:
    """Up to `count` questions about points in things that no view shows, far from everything that one does.

    Args:
        visible: from `views.sights`. shown: (P, 3) what the views have measured, metres, world frame.
    """
    hidden = [i for i in room.items if i.instance not in visible]
    found: list[QA] = []
    for item in (hidden[int(k)] for k in rng.permutation(len(hidden))):
        if len(found) == count:
            break
        point = np.round(np.array(item.low) + rng.random(3) * item.size, 2)
        if len(shown) and float(np.linalg.norm(shown - point, axis=1).min()) < _FAR:
            continue
        family = ASKED[int(rng.integers(len(ASKED)))]
        template = WORDINGS[family][int(rng.integers(len(WORDINGS[family])))]
        found.append(worded(family, template.replace("{x}", "the object at {p}"), {"p": point}, UNKNOWN, ()))
    return found
