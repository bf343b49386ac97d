# SPDX-License-Identifier: Apache-2.0
"""Questions to token ids, with placeholders where the scene and clicked points go; boxes out of answers."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Protocol

from adatoken3d_ros.lmm.interface import Placeholder, PromptError, PromptIds
from adatoken3d_ros.text import quoted, shown

MAX_QUESTION_CHARS = 2000
MAX_CLICKS = 32
MAX_POINT_CHARS = 200  # of a point or box that is written into a question
MAX_WRITTEN_CHARS = MAX_QUESTION_CHARS + MAX_CLICKS * MAX_POINT_CHARS  # of a question with all its points

# Conversation templates of Vicuna 1.5. LLaVA-3D was trained with vicuna_v1, its authors ask with llava_v1.
TEMPLATES = {
    "llava_v1": (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions. USER: ",
        "\n{question} ASSISTANT:",
    ),
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ",
        "\n{question} ASSISTANT:",
    ),
}

# Words that are commands to this model or to its relatives; as plain text they could only be meant as such.
CONTROL_WORDS = (
    "<image>",
    "<video>",
    "<boxes>",
    "<points>",
    "<loc_start>",
    "<loc_end>",
    "<vid_start>",
    "<vid_end>",
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
)

# Stands for a click inside a text whose points were taken out; users cannot write it (`parse_clicks` refuses it).
CLICK_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"

_GROUP = re.compile(r"\[([^\[\]]*)\]")
_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE)
_SEPARATOR = re.compile(r"\s*[,;]\s*|\s+")
_WORD = re.compile(r"[^\s,;\[\]]+")
_OPEN_NUMBERS = re.compile(r"\s*\[[0-9\s,;.eE+\-\N{MINUS SIGN}]*$")  # a bracket that may still become a box


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    bos_token_id: int
    all_special_tokens: list[str]
    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...


def build_prompt(
    tokenizer: Tokenizer,
    question: str,
    *,
    n_clicks: int = 0,
    template: str = "llava_v1",
    max_chars: int = MAX_QUESTION_CHARS,
) -> PromptIds:
    """Tokenises a question in its conversation template, `... USER: (scene)\\n{question} ASSISTANT:`.

    Each run of text between placeholders is tokenised by itself, so it begins with the tokenizer's word-start mark, as
    in training; the beginning-of-sequence token stands once, at the very start.

    Args:
        tokenizer: from `checkpoint.load`.
        question: plain words. Points written in it must have been taken out by `parse_clicks`; click k of that call is
            placeholder k here.
        n_clicks: all clicks. Those beyond the ones that `question` mentions are put before it in the wording of the
            training data ("The related object is located at ...").
        template: `llava_v1` or `vicuna_v1`.
        max_chars: longest question, in characters.

    Raises:
        PromptError: for an empty or too long question, control words or characters in it, an unknown template, or a
            number of clicks that is too high or lower than the question mentions.
    """
    if template not in TEMPLATES:
        raise PromptError(f"template {quoted(template)} is unknown, known: {', '.join(TEMPLATES)}")
    question = question.strip()
    check_text(question, max_chars=max_chars, special=tokenizer.all_special_tokens)
    written = question.count(CLICK_MARK)
    if n_clicks < written:
        raise PromptError(f"the question mentions {written} points, but only {n_clicks} clicks were given")
    if n_clicks > MAX_CLICKS:
        raise PromptError(f"{n_clicks} clicks are more than {MAX_CLICKS}")
    added = n_clicks - written
    if added:
        noun = "object is" if added == 1 else "objects are"
        question = f"The related {noun} located at {', '.join([CLICK_MARK] * added)}. {question}"

    before, after = TEMPLATES[template]
    order = iter([*range(written, n_clicks), *range(written)])  # the added sentence stands before the question
    pieces: list[tuple[int, ...] | Placeholder] = [
        (tokenizer.bos_token_id, *_encode(tokenizer, before)),
        Placeholder("image"),
    ]
    for k, text in enumerate(after.format(question=question).split(CLICK_MARK)):
        if k:
            pieces.append(Placeholder("click", next(order)))
        if text:
            pieces.append(_encode(tokenizer, text))
    return PromptIds(tuple(pieces))


def parse_clicks(question: str) -> tuple[str, list[tuple[float, float, float]]]:
    """Takes the points out of a question: `[x, y, z]`, or a box of 6 or 9 numbers, whose centre is the point.

    Returns:
        The question with `CLICK_MARK` for each point, and the points (metres, in the frame the user wrote them in).

    Raises:
        PromptError: for a text that is too long, control words or characters, a point that is not finite, or a bracket
            with another number of coordinates. Brackets with one or two numbers, or with words, are left as text.
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


def check_text(text: str, *, max_chars: int | None = MAX_QUESTION_CHARS, special: list[str] | None = None) -> None:
    """Raises PromptError for a text that is empty or too long, or contains control words or characters.

    Line breaks and tabs are allowed. `special` names further control words.
    """
    if not text:
        raise PromptError("the question is empty")
    if max_chars is not None and len(text) > max_chars:
        raise PromptError(f"the question has {len(text)} characters, more than {max_chars}")
    lowered = text.lower()
    for word in _control_words(special or []):
        if word.lower() in lowered:
            raise PromptError(f"the question contains the control word {word}")
    for character in text:
        # Cs: halves of surrogate pairs, which have no UTF-8 encoding.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t":
            raise PromptError(f"the question contains the control character U+{ord(character):04X}")


def check_length(question: str) -> None:
    """Raises PromptError for a question that is too long, whatever its points take of it."""
    if len(question) > MAX_WRITTEN_CHARS:
        raise PromptError(f"the question has {len(question)} characters, more than {MAX_QUESTION_CHARS}")


def _control_words(special: list[str]) -> Iterator[str]:
    yield from CONTROL_WORDS
    yield from (word for word in special if word not in CONTROL_WORDS)


def _numbers(group: str) -> tuple[float, ...]:
    """The numbers of a bracket's content, or nothing if it holds anything else."""
    parts = _SEPARATOR.split(group.replace("\N{MINUS SIGN}", "-").strip())
    return tuple(float(part) for part in parts) if all(_NUMBER.fullmatch(part) for part in parts) else ()


def _encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    if special := set(ids) & set(tokenizer.all_special_ids):
        raise PromptError(f"the text {quoted(text)} contains the special token {sorted(special)[0]}")
    return ids
