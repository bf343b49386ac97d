# SPDX-License-Identifier: Apache-2.0
"""How long an answer will be: as long as those to questions that were put alike."""

from __future__ import annotations

import math
import re
from collections import deque

import numpy as np


class AnswerLengths:
    """Remembers how long answers were, or would have been.

    Whether a question asks for one word or for six numbers is seen in its words. Those that share most words with it
    (Jaccard's index, newer ones first) tell; where too few share any, all questions do.
    """

    REMEMBERED = 256  # answers
    NEAREST = 12  # of them tell
    ALIKE = 1 / 3  # of the words of both, so much is common
    FEWEST = 4  # answers that say anything

    def __init__(self) -> None:
        self._known: deque[tuple[frozenset[str], int]] = deque(maxlen=self.REMEMBERED)
        self._told: tuple[str, list[int]] | None = None  # of the last question, which is planned for several times

    def add(self, question: str, n_tokens: int) -> None:
        """An answer had so many tokens."""
        self._known.append((_words(question), n_tokens))
        self._told = None

    def add_cut(self, question: str, n_tokens: int, limit: int) -> None:
        """An answer was cut for time after so many tokens, before its limit.

        It counts twice its tokens, or what was expected if that is more: were only whole answers remembered, those that
        are cut would be expected to be short for ever, and be cut again.
        """
        self.add(question, min(limit, max(2 * n_tokens, self.of(question, limit, 95))))

    def of(self, question: str, limit: int, percentile: float) -> int:
        """Tokens that so many percent of such answers stay within; at most `limit`, and that if little is known."""
        if self._told is None or self._told[0] != question:
            self._told = question, self._alike(_words(question))
        told = self._told[1]
        return min(limit, math.ceil(float(np.percentile(told, percentile)))) if told else limit

    def _alike(self, words: frozenset[str]) -> list[int]:
        """Lengths of the answers that tell."""
        if len(self._known) < self.FEWEST:
            return []
        likeness = [len(words & other) / max(1, len(words | other)) for other, _ in self._known]
        order = sorted(range(len(likeness)), key=lambda i: (-likeness[i], -i))
        alike = [i for i in order[: self.NEAREST] if likeness[i] >= self.ALIKE]
        return [self._known[i][1] for i in (alike if len(alike) >= self.FEWEST else order)]


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
