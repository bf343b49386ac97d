# SPDX-License-Identifier: Apache-2.0
"""What a question's text may be, and the points and boxes that people and models write in it: `[x, y, z]`, in metres.

Of any model; what one model alone understands (its conversation, its control words) is in its own folder.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

from adatoken3d_ros.text import shown

MAX_QUESTION_CHARS = 2000
MAX_CLICKS = 32
LOCATE = "locate:"  # begins a question about where something is; the rest describes it
MAX_POINT_CHARS = 200  # of a point or box that is written into a question
MAX_WRITTEN_CHARS = MAX_QUESTION_CHARS + MAX_CLICKS * MAX_POINT_CHARS  # of a question with all its points

# Stands for a click inside a text whose points were taken out; users cannot write it (`parse_clicks` refuses it).
CLICK_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"

_GROUP = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)
_SEPARATOR = re.compile(r"\s*[,;]\s*|\s+")
_WORD = re.compile(r"[^\s,;\[\]]+")
_OPEN_NUMBERS = re.compile(r"\s*\[[0-9\s,;.eE+\-\N{MINUS SIGN}]*$")  # a bracket that may still become a box


class PromptError(ValueError):
    """A question that cannot be put to the model; the message names what is wrong with it."""


def parse_clicks(question: str) -> tuple[str, list[tuple[float, float, float]]]:
    """Takes the points out of a question: `[x, y, z]`, or a box of 6 or 9 numbers, whose centre is the point.

    Returns:
        The question with `CLICK_MARK` for each point, and the points (metres, in the frame the user wrote them in).

    Raises:
        PromptError: for a text that is too long, control characters, a point that is not finite, or a bracket with
            another number of coordinates. Brackets with one or two numbers, or with words, are left as text.
    """
    check_length(question)
    if CLICK_MARK in question:
        raise PromptError("the question contains the control character U+FFFC")
    check_text(question.strip(), max_chars=None)
    clicks: list[tuple[float, float, float]] = []

    def take(match: re.Match[str]) -> str:
        numbers = _numbers(match[1])
        if len(numbers) < 3:
            return match[0]
        written = shown(match[0], MAX_POINT_CHARS)
        if len(match[0]) > MAX_POINT_CHARS:
            raise PromptError(f"the point {written} is longer than {MAX_POINT_CHARS} characters")
        if len(numbers) not in (3, 6, 9):
            raise PromptError(f"{written} has {len(numbers)} numbers; a point has 3, a box 6 or 9")
        x, y, z = numbers[:3]
        if not all(math.isfinite(v) for v in numbers):
            raise PromptError(f"{written} is not finite")
        clicks.append((x, y, z))
        return CLICK_MARK

    text = _GROUP.sub(take, question)
    if len(clicks) > MAX_CLICKS:
        raise PromptError(f"{len(clicks)} clicks are more than {MAX_CLICKS}")
    return text, clicks


def parse_boxes(text: str) -> list[tuple[float, ...]]:
    """Boxes in an answer: every bracket of 6 numbers (centre, size) or 9 (centre, size, three Euler angles), in metres.

    Any spacing and sign is understood; brackets that hold anything else, or a number that is not finite, are skipped.
    """
    return [
        numbers
        for group in _GROUP.finditer(text)
        if len(numbers := _numbers(group[1])) in (6, 9) and all(math.isfinite(v) for v in numbers)
    ]


def move_boxes(text: str, by: Sequence[float]) -> str:
    """The text of an answer with the centre of each of its boxes (see `parse_boxes`) moved by (3,) metres.

    Numbers keep their decimals (one with an exponent is written as it comes) and all else stays as it is, but a bracket
    of numbers at the end that is not closed is left out, with the space before it: it may be half a box, whose numbers
    could not be told from moved ones. So what this makes of an unfinished text begins what it makes of the whole.
    Nothing changes where `by` is zero.
    """
    if not any(by):
        return text

    def move(group: re.Match[str]) -> str:
        numbers = _numbers(group[1])
        if len(numbers) not in (6, 9) or not all(math.isfinite(v) for v in numbers):
            return group[0]
        steps = iter(by)
        return _WORD.sub(lambda word: _moved(word[0], next(steps)), group[0], count=3)

    return _GROUP.sub(move, _OPEN_NUMBERS.sub("", text))


def _moved(number: str, by: float) -> str:
    plain = number.replace("\N{MINUS SIGN}", "-")
    value = float(plain) + by
    if "e" in plain.lower():
        return repr(value)
    _, point, decimals = plain.partition(".")
    written = f"{value:{'#' if point else ''}.{len(decimals)}f}"
    if not float(written):
        written = written.removeprefix("-")
    elif value > 0 and plain.startswith("+"):
        written = f"+{written}"
    return written.replace("-", "\N{MINUS SIGN}") if "\N{MINUS SIGN}" in number else written


def check_text(text: str, *, max_chars: int | None = MAX_QUESTION_CHARS, control_words: Iterable[str] = ()) -> None:
    """Raises PromptError for a text that is empty or too long, or contains control words or characters.

    Line breaks and tabs are allowed. `control_words` are a model's commands, which as text could only be meant as such.
    """
    if not text:
        raise PromptError("the question is empty")
    if max_chars is not None and len(text) > max_chars:
        raise PromptError(f"the question has {len(text)} characters, more than {max_chars}")
    lowered = text.lower()
    for word in control_words:
        if word.lower() in lowered:
            raise PromptError(f"the question contains the control word {word}")
    for character in text:
        # Cs: halves of surrogate pairs, which have no UTF-8 encoding.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            raise PromptError(f"the question contains the control character U+{ord(character):04X}")


def located(question: str) -> str | None:
    """What a question that begins with LOCATE, in any case, asks for; None for any other question.

    Raises:
        PromptError: if it asks for nothing.
    """
    question = question.strip()
    if question[: len(LOCATE)].lower() != LOCATE:
        return None
    if not (wanted := question[len(LOCATE) :].strip()):
        raise PromptError(f"nothing is described after {LOCATE!r}")
    return wanted


def check_length(question: str) -> None:
    """Raises PromptError for a question that is too long, whatever its points take of it."""
    if len(question) > MAX_WRITTEN_CHARS:
        raise PromptError(f"the question has {len(question)} characters, more than {MAX_QUESTION_CHARS}")


def _numbers(group: str) -> tuple[float, ...]:
    """The numbers of a bracket's content, or nothing if it holds anything else."""
    parts = _SEPARATOR.split(group.replace("\N{MINUS SIGN}", "-").strip())
    return tuple(float(part) for part in parts) if all(_NUMBER.fullmatch(part) for part in parts) else ()
