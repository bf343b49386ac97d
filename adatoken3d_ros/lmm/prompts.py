# SPDX-License-Identifier: Apache-2.0
"""What the prompts of different architectures have in common: what may be asked, clicks in the wording, token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

from adatoken3d_ros.lmm.interface import Placeholder
from adatoken3d_ros.lmm.text_places import CLICK_MARK, MAX_CLICKS, MAX_QUESTION_CHARS, PromptError, check_text
from adatoken3d_ros.text import quoted

Ids = tuple[int, ...]


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    all_special_tokens: list[str]
    all_special_ids: list[int]

    def get_added_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]: ...


def checked(
    tokenizer: Tokenizer,
    question: str,
    template: str,
    known: Collection[str],
    words: Collection[str],
    most: int = MAX_QUESTION_CHARS,
) -> str:
    """The question without space around it.

    Args:
        known: the model's templates. words: its commands beside its tokenizer's added tokens. most: characters.

    Raises:
        PromptError: for a template that is not among `known`, an empty or too long question, and control `words`,
            special tokens or control characters in it.
    """
    if template not in known:
        raise PromptError(f"template {quoted(template)} is unknown, known: {', '.join(known)}")
    question = question.strip()
    check_text(question, max_chars=most, control_words=(*words, *added_tokens(tokenizer)))
    return question


def added_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens that are commands: those called special, and those that were added without being called so."""
    special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return {**tokenizer.get_added_vocab(), **dict(special)}


def with_clicks(question: str, n_clicks: int, lead: Callable[[int, str], str]) -> tuple[str, Iterator[int]]:
    """The question in which every click has a mark, and the clicks in the order of their marks.

    Args:
        question: click k of `parse_clicks` is its mark k.
        n_clicks: all clicks. Those beyond the ones that the question mentions are put before it.
        lead: the sentence that does so, of their number and their marks.

    Raises:
        PromptError: for a number of clicks that is too high or lower than the question mentions.
    """
    written = question.count(CLICK_MARK)
    if n_clicks < written:
        raise PromptError(f"the question mentions {written} points, but only {n_clicks} clicks were given")
    if n_clicks > MAX_CLICKS:
        raise PromptError(f"{n_clicks} clicks are more than {MAX_CLICKS}")
    if added := n_clicks - written:
        question = lead(added, ", ".join([CLICK_MARK] * added)) + question
    return question, iter([*range(written, n_clicks), *range(written)])


def encode(tokenizer: Any, text: str) -> Ids:
    """Token ids of a run of plain text; raises PromptError for one that a special token would come of."""
    ids = tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    if special := set(ids) & set(added_tokens(tokenizer).values()):
        raise PromptError(f"the text {quoted(text)} contains the special token {min(special)}")
    return ids


def pieces(tokenizer: Any, text: str, clicks: Iterator[int]) -> list[Ids | Placeholder]:
    """Runs of token ids, each tokenised by itself, and a placeholder for each mark of a click."""
    found: list[Ids | Placeholder] = []
    for k, run in enumerate(text.split(CLICK_MARK)):
        if k:
            found.append(Placeholder("click", next(clicks)))
        if run:
            found.append(encode(tokenizer, run))
    return found
