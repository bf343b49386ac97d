# SPDX-License-Identifier: Apache-2.0
"""Bootstrap over scenes, the same draws for everything that is compared: questions about one scene are not independent,
and neither are two answers to one question."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
INTERVAL = (0.025, 0.975)


def draws(scenes: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """(resamples, scenes) how often each scene is in each draw."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.multinomial(scenes, np.full(scenes, 1 / scenes), resamples))


class Resampled:
    """Questions, each about a scene, and draws of their scenes.

    Args:
        scenes: (Q,) the scene of each question.
        resamples: draws. seed: of the draws.
    """

    def __init__(self, scenes: Sequence[Hashable], resamples: int = 2000, seed: int = 0) -> None:
        names = {scene: index for index, scene in enumerate(dict.fromkeys(scenes))}
        self._place = np.array([names[scene] for scene in scenes], np.int64)
        self._drawn = draws(len(names), resamples, seed)
        self.scenes = len(names)

    def sums(self, values: FloatArray) -> FloatArray:
        """(resamples, ...) of values (Q, ...): their sum in each draw."""
        by_scene = np.zeros((self.scenes, *values.shape[1:]))
        np.add.at(by_scene, self._place, values)
        return np.asarray(np.tensordot(self._drawn, by_scene, axes=1))

    def means(self, values: FloatArray) -> FloatArray:
        """(resamples, ...) of values (Q, ...): their mean over the questions in each draw."""
        counted = self.sums(np.ones(len(values)))
        return np.asarray(self.sums(values) / counted.reshape(-1, *[1] * (values.ndim - 1)))


def interval(drawn: NDArray[Any]) -> list[float]:
    """Where 95 % of the draws are: low and high."""
    return [float(value) for value in np.nanquantile(drawn, INTERVAL)]
