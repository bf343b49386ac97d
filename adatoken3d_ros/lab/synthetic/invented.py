# SPDX-License-Identifier: Apache-2.0
"""Questions in the words of training about a scene of which nothing is known: its things may or may not be there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.furniture import KINDS
from adatoken3d_ros.lab.synthetic.wordings import STANDPOINTS, WORDINGS, article, plural, worded


def invented(rng: np.random.Generator, points: NDArray[np.floating], *, clicks: bool = True) -> list[str]:
    """One question of each of WORDINGS, in their order, without answers.

    Args:
        points: (n, 3) places that questions may be about, scene frame, metres; n >= 1.
        clicks: whether a question may have points in it; without them those about points are left out.
    """
    found = []
    for wording, templates in WORDINGS.items():
        template = templates[int(rng.integers(len(templates)))]
        kinds = [list(KINDS)[k] for k in rng.choice(len(KINDS), 3, replace=False)]
        words: dict[str, str | NDArray[np.float64]] = dict(zip("xab", (f"the {kind}" for kind in kinds), strict=True))
        words["p"] = np.asarray(points[int(rng.integers(len(points)))], np.float64)
        words["k"] = plural(kinds[1]) if wording == "count" else article(kinds[1])
        stands = STANDPOINTS["point" if clicks and rng.random() < 0.5 else "middle"]
        template = template.replace("{s}", stands[int(rng.integers(len(stands)))])
        if clicks or "{p}" not in template:
            found.append(worded(wording.split()[0], template, words, "", ()).question)
    return found
