# SPDX-License-Identifier: Apache-2.0
"""Accuracies of several ways to answer the same questions, and their paired differences.

Intervals are 95 % bootstrap intervals over rooms, the same draws for every way: questions about one room are not
independent, and neither are two answers to one question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.metrics.resampling import INTERVAL, draws, interval
from adatoken3d_ros.lab.synthetic.questions import FAMILIES

FloatArray = NDArray[np.float64]
EXACT = tuple(family for family in FAMILIES if family != "box")
BOXES = {"box@0.25": 0.25, "box@0.50": 0.50}
COLUMNS = (*EXACT, *BOXES)


class Tally:
    """Scores (C, Q) of C ways on Q questions; a box's score is its overlap, any other's is 1 or 0.

    Attributes:
        accuracy: (C, F) by column of COLUMNS, NaN where nothing was asked.
        macro: (C,) mean over the families that are right to the letter; boxes are apart.
    """

    def __init__(
        self,
        rooms: Sequence[int],
        families: Sequence[str],
        scores: FloatArray,
        *,
        resamples: int = 2000,
        seed: int = 0,
    ) -> None:
        if scores.ndim != 2 or not len(rooms) == len(families) == scores.shape[1] > 0:
            raise ValueError(f"scores {scores.shape} for {len(rooms)} rooms and {len(families)} families of questions")
        names, place = np.unique(np.asarray(rooms), return_inverse=True)
        right = np.zeros((len(scores), len(names), len(COLUMNS)))
        count = np.zeros((len(names), len(COLUMNS)))
        for question, family in enumerate(families):
            columns = (
                {EXACT.index(family): None} if family != "box" else {COLUMNS.index(b): t for b, t in BOXES.items()}
            )
            for column, threshold in columns.items():
                score = scores[:, question]
                right[:, place[question], column] += score if threshold is None else score >= threshold
                count[place[question], column] += 1
        self.rooms, self.asked = len(names), count.sum(axis=0).astype(int)
        self.accuracy = _share(right.sum(axis=1), count.sum(axis=0))
        self.macro = _macro(self.accuracy)
        drawn = draws(len(names), resamples, seed)
        sums = np.einsum("br,crf->bcf", drawn, right, optimize=True)
        self._drawn = _share(sums, (drawn @ count)[:, None])  # (B, C, F)
        self._macros = _macro(self._drawn)  # (B, C)

    def interval(self, way: int) -> list[float]:
        """Of the macro."""
        return interval(self._macros[:, way])

    def column_intervals(self, way: int) -> dict[str, list[float]]:
        """Of each column that was asked for."""
        asked = np.flatnonzero(self.asked)
        return {COLUMNS[k]: interval(self._drawn[:, way, k]) for k in asked}

    def difference(self, way: int, to: int) -> float:
        """Of the macros."""
        return float(self.macro[way] - self.macro[to])

    def difference_interval(self, way: int, to: int) -> list[float]:
        """Of the paired difference of the macros; of one room alone, whose draws are all alike, any."""
        return [-1.0, 1.0] if self.rooms == 1 else interval(self._macros[:, way] - self._macros[:, to])

    def column_differences(self, way: int, to: int) -> dict[str, dict[str, Any]]:
        """Of each column that was asked for: the difference and its paired interval."""
        drawn, found = self._drawn[:, way] - self._drawn[:, to], self.accuracy[way] - self.accuracy[to]
        asked = np.flatnonzero(self.asked)
        return {COLUMNS[k]: {"difference": float(found[k]), "interval": interval(drawn[:, k])} for k in asked}

    def ratio_interval(self, way: int, to: int) -> list[float] | None:
        """Of the ratio of the macros; None where `to` has none right in some draw, and of one room alone."""
        return None if self.rooms == 1 else _ratios(self._macros[:, way], self._macros[:, to])

    def families(self, way: int, to: int) -> dict[str, dict[str, Any]]:
        """Accuracy by column, its ratio to that of the way `to` and the ratio's interval (None where that has none
        right)."""
        return {
            name: {
                "accuracy": float(own),
                "ratio": float(own / other) if other > 0 else None,
                "interval": _ratios(self._drawn[:, way, k], self._drawn[:, to, k]),
            }
            for k, (name, own, other) in enumerate(zip(COLUMNS, self.accuracy[way], self.accuracy[to], strict=True))
            if not np.isnan(own)
        }


def scene_interval(rooms: Sequence[int], values: FloatArray, resamples: int = 2000, seed: int = 0) -> FloatArray:
    """(3, ...) mean of `values` (Q, ...), first within rooms, and its interval over rooms: mean, low, high."""
    names, place = np.unique(np.asarray(rooms), return_inverse=True)
    means = np.stack([values[place == k].mean(axis=0) for k in range(len(names))])
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    low, high = np.quantile(np.stack([means[rows].mean(axis=0) for rows in drawn]), INTERVAL, axis=0)
    return np.stack([means.mean(axis=0), low, high])


def _share(right: FloatArray, count: FloatArray) -> FloatArray:
    with np.errstate(invalid="ignore"):
        return right / np.where(count > 0, count, np.nan)


def _macro(accuracy: FloatArray) -> FloatArray:
    exact = accuracy[..., : len(EXACT)]
    asked = ~np.isnan(exact)
    return np.where(asked, exact, 0.0).sum(axis=-1) / np.maximum(asked.sum(axis=-1), 1)


def _ratios(own: FloatArray, other: FloatArray) -> list[float] | None:
    asked = ~np.isnan(other)
    return interval(own[asked] / other[asked]) if bool((other[asked] > 0).all()) else None
