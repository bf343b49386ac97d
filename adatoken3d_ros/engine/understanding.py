# SPDX-License-Identifier: Apache-2.0
"""What a model says of itself: the questions that it was trained on, and how often it is right when it is sure.

A checkpoint may have a file `understanding.json` beside its config.json; one that was trained on free text has none.

    words       every word of its questions, as it was trained on them: the first of a question in either case
    things      the names of what it knows, singular and plural, {p} for a point; colours: what may stand before them
    wordings    by family: its questions, with {p} for a point, {k} for a kind of thing, which has no point, any other
                {letter} for a thing
    unknown     what it was trained to answer about places that nobody saw; one that was not has none
    confidence  model_hash, slope, offset and offsets by family: how likely an answer is right, by the probability p of
                its first token: 1 / (1 + exp(-(slope * log(p / (1 - p)) + offset of the family))). Written by
                `benchmarks.confidence`; without it, or with that of other weights, confidences are NaN
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from adatoken3d_ros.files import parse_json, read_file, replacing
from adatoken3d_ros.lmm.identity import original_identity
from adatoken3d_ros.lmm.text_places import CLICK_MARK
from adatoken3d_ros.text import quoted, shown

logger = logging.getLogger(__name__)

FILE = "understanding.json"
MAX_BYTES = 2**20
WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_FEW = r"((?:{0} ){{0,4}}?{0})"  # words of a thing: few, so that no text takes long
_GAP = _FEW.format(r"\S+")
_GAPS = {"p": CLICK_MARK, "k": _FEW.format(rf"[^\s{CLICK_MARK}]+")}
_STOPS = " ?.!"
_NAMED = 5  # unknown words that are named
_LEAST = 1e-6  # probabilities are kept so far from 0 and 1


class UnderstandingError(ValueError):
    """A file of no use; the message names it."""


@dataclass(frozen=True)
class Calibration:
    """How likely an answer is right by the probability of its first token; see the module's text."""

    slope: float
    offset: float
    offsets: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, probability: float, family: str) -> float:
        """Of an answer to a question of this family, from 0 to 1."""
        return 1 / (1 + math.exp(-(self.slope * log_odds(probability) + self.offsets.get(family, self.offset))))


@dataclass(frozen=True, eq=False)
class Understanding:
    """See the module's text. One of nothing takes every question for understood and knows no confidence."""

    words: Collection[str] = ()
    things: Collection[str] = ()
    colours: Collection[str] = ()
    wordings: Mapping[str, Collection[str]] = field(default_factory=dict)
    calibration: Calibration | None = None
    unknown: str = ""

    @cached_property
    def _thing(self) -> re.Pattern[str]:
        names, colours = ("|".join(_escaped(one) for one in some) for some in (self.things, self.colours))
        before = f"(?:(?:{colours}) )?" if colours else ""
        return re.compile(rf"(?:(?:the|an?) )?{before}(?:{names})")

    @cached_property
    def _patterns(self) -> list[tuple[str, str, re.Pattern[str]]]:
        return [
            (family, one[len(one.rstrip(_STOPS)) :], _pattern(one))
            for family, some in self.wordings.items()
            for one in some
        ]

    def judge(self, question: str, n_clicks: int = 0) -> tuple[str, str]:
        """The family of a question, and what is not understood of it; the family is empty where that is something.

        Args:
            question: with `CLICK_MARK` for each point that is written in it.
            n_clicks: all of its points, those beside the text included.
        """
        if not self.wordings:
            return "", ""
        if unknown := self._unknown(question):
            more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
            return "", f"the model does not know the word{'s'[: len(unknown) > 1]} {', '.join(unknown[:_NAMED])}{more}"
        family, _, strange = self._recognised(question)
        if family and n_clicks > question.count(CLICK_MARK):
            return "", "the model was trained on points that stand in the question, as [x, y, z], alone"
        return family, strange

    def as_trained(self, question: str) -> str:
        """A question that is understood with the spaces and the stop of its wording, any other as it is: to a small
        model two spaces, a line break or "!!!" are other words, and it answers as if it had read others.

        Args:
            question: with `CLICK_MARK` for each point that is written in it.
        """
        if not self.wordings or self._unknown(question):
            return question
        family, stop, _ = self._recognised(question)
        return _without_stop(question) + stop if family else question

    def _recognised(self, question: str) -> tuple[str, str, str]:
        """The family of a question and the stop of its wording, and what is strange about it where it has none."""
        text, strange = _plain(question), ""
        for family, stop, pattern in self._patterns:
            if not (found := pattern.fullmatch(text)):
                continue
            gaps = found.groups()
            others = [gap for gap in gaps if not self._thing.fullmatch(gap)]
            twice = [gap for gap in gaps if gaps.count(gap) > 1 and CLICK_MARK not in gap]
            if not others and not twice:
                return family, stop, ""
            if others:
                strange = strange or f"the model knows no thing called {quoted(others[0], 60)}"
            else:
                strange = strange or f"the question names {quoted(twice[0], 60)} twice, as two things"
        known = ", ".join(self.wordings)
        return "", "", strange or f"the model was trained on no question like this, only on its wordings of {known}"

    def confidence(self, probability: float, family: str) -> float:
        """How likely an answer is right whose first token had this probability; NaN where nobody calibrated it."""
        return math.nan if self.calibration is None else self.calibration(probability, family)

    def says_unknown(self, answer: str) -> bool:
        """Whether an answer is the one that the model was trained to give where it does not know."""
        return bool(self.unknown) and _plain(answer) == _plain(self.unknown)

    def _unknown(self, question: str) -> list[str]:
        """Words that the model was not trained on, each once; of one that it knows in small letters, both."""
        found: dict[str, None] = {}
        for place, match in enumerate(WORD.finditer(question)):
            word = match[0]
            small = word[0].lower() + word[1:]
            if word in self.words or (not place and (small in self.words or word[0].upper() + word[1:] in self.words)):
                continue
            hint = f" (it knows {word.lower()})" if word.lower() in self.words else ""
            found[shown(word, 40) + hint] = None
        return list(found)


def log_odds(probability: float) -> float:
    """log(p / (1 - p)) of a probability, kept finite."""
    p = min(max(probability, _LEAST), 1 - _LEAST)
    return math.log(p / (1 - p))


def read_understanding(directory: Path, model_hash: str) -> Understanding:
    """That of a checkpoint; without its file, the one of nothing.

    Raises:
        UnderstandingError: for a file that is damaged.
    """
    path = directory / FILE
    try:
        content: Any = parse_json(read_file(path, MAX_BYTES))
    except FileNotFoundError:
        return Understanding()
    except (ValueError, OSError) as error:
        raise UnderstandingError(f"{path}: {shown(error, 300)}") from error
    try:
        wordings = {str(family): _texts(some) for family, some in content["wordings"].items()}
        words, things, colours = (frozenset(_texts(content[key])) for key in ("words", "things", "colours"))
        if not things or not wordings:
            raise ValueError("things or wordings are empty")
        unknown = content.get("unknown", "")
        if not isinstance(unknown, str):
            raise ValueError(f"unknown {quoted(unknown)} is no text")
        return Understanding(words, things, colours, wordings, _calibration(content, path, model_hash), unknown)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnderstandingError(f"{path} is damaged: {type(error).__name__}: {shown(error, 300)}") from error


def write_understanding(directory: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint's file, complete or not at all."""
    with replacing(directory / FILE) as file:
        file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def _calibration(content: Mapping[str, Any], path: Path, model_hash: str) -> Calibration | None:
    if not (fitted := content.get("confidence")):
        return None
    offsets = {str(family): float(value) for family, value in fitted["offsets"].items()}
    found = Calibration(float(fitted["slope"]), float(fitted["offset"]), offsets)
    if not all(map(math.isfinite, (found.slope, found.offset, *offsets.values()))):
        raise ValueError("confidence is not finite")
    if fitted["model_hash"] not in (model_hash, original_identity(model_hash)):
        logger.warning("%s: the confidence was fitted to other weights, and is not used", path)
        return None
    return found


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ValueError(f"{quoted(value)} is no list of texts")
    return tuple(value)


def _plain(text: str) -> str:
    """In lower case, with single spaces, without the stop at its end."""
    return _without_stop(text.lower())


def _without_stop(text: str) -> str:
    return " ".join(text.split()).rstrip(_STOPS)


def _escaped(name: str) -> str:
    return re.escape(name.lower().replace("{p}", CLICK_MARK))


def _pattern(wording: str) -> re.Pattern[str]:
    """Of a question: groups for its things."""
    pieces = [re.escape(piece) for piece in re.split(r"\{(\w)\}", _plain(wording))]
    pieces[1::2] = [_GAPS.get(letter, _GAP) for letter in re.findall(r"\{(\w)\}", wording)]
    return re.compile("".join(pieces))
