# SPDX-License-Identifier: Apache-2.0
"""What has been asked, and questions that are asked twice to see what an answer rests on. Nothing of a browser."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.view.report import Reported
from adatoken3d_ros.view.source import Source, Told

KEPT = 50  # answers


@dataclass(frozen=True, eq=False)
class Asked:
    """A question and its answer."""

    question: Question
    strategy: str
    answer: Reported

    @property
    def text(self) -> str:
        return str(self.answer.record["text"])


@dataclass(frozen=True, eq=False)
class Pair:
    """One question, answered in two ways that have names.

    Attributes:
        chances: (text, probability on the left, on the right) of the answers, NaN where it is not known.
    """

    names: tuple[str, str]
    left: Asked
    right: Asked
    chances: tuple[tuple[str, float, float], ...]


class Dialogue:
    """Asks a source. One thread at a time.

    Attributes:
        history: the newest KEPT answers, oldest first.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.history: deque[Asked] = deque(maxlen=KEPT)

    def ask(self, question: Question, strategy: str, on_text: Told = print, on_stage: Told = print) -> Asked:
        """One question, which goes into the history; raises as `Source.ask`."""
        asked = Asked(question, strategy, self._source.ask(question, strategy, on_text, on_stage))
        self.history.append(asked)
        return asked

    def again(self, first: Asked, places: NDArray[np.floating], keep: bool, on_text: Told, on_stage: Told) -> Pair:
        """A question once more, without these places (n, 3) or with only them; raises as `Source.ask`."""
        question, chosen = first.question, places.astype(np.float64)
        changed = replace(question, only=chosen) if keep else replace(question, without=chosen)
        name = f"{'with only' if keep else 'without'} {len(places)} tokens"
        left, right = (question, first.strategy), (changed, first.strategy)
        return self._twice(left, right, ("as before", name), on_text, on_stage, first)

    def compare(
        self, question: Question, strategies: tuple[str, str], on_text: Told = print, on_stage: Told = print
    ) -> Pair:
        """A question by two strategies; raises as `Source.ask`."""
        left, right = ((question, strategy) for strategy in strategies)
        return self._twice(left, right, strategies, on_text, on_stage)

    def _twice(
        self,
        left: tuple[Question, str],
        right: tuple[Question, str],
        names: tuple[str, str],
        on_text: Told,
        on_stage: Told,
        first: Asked | None = None,
    ) -> Pair:
        """The left one is asked twice: what its scene makes of the right one's answer is known after that alone.

        Its times are those of the first time: a question that comes again finds much done.
        """

        def ask(which: tuple[Question, str], *candidates: str, on_text: Told = on_text) -> Asked:
            question, strategy = replace(which[0], candidates=tuple(dict.fromkeys(candidates))), which[1]
            return Asked(question, strategy, self._source.ask(question, strategy, on_text, on_stage))

        one = ask(left, on_text=lambda text: None)
        times = {name: value for name, value in (first or one).answer.record.items() if name.endswith("_ms")}
        other = ask(right, one.text)
        one = ask(left, one.text, other.text, on_text=lambda text: None)
        if _unknown(other, one.text):  # the scene of a camera that moves is another one by now
            other = ask(right, one.text)
        one = replace(one, answer=replace(one.answer, record={**one.answer.record, **times}))
        texts = list(dict.fromkeys((one.text, other.text)))
        told = [(text, _chance(one, text), _chance(other, text)) for text in texts if text]
        self.history.extend((one, other))
        return Pair(names, one, other, tuple(told))


def _unknown(asked: Asked, text: str) -> bool:
    return bool(text) and math.isnan(_chance(asked, text))


def _chance(asked: Asked, text: str) -> float:
    """How probable a text was to a question that named it, or that it answers."""
    record = asked.answer.record
    given: Sequence[float] = record["candidate_probabilities"]
    known = dict(zip(asked.question.candidates, given, strict=False))
    own = record["probability"]
    if text not in known and text == record["text"] and own is not None:
        return float(own)
    return known.get(text, float("nan"))
