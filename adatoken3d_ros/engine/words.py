# SPDX-License-Identifier: Apache-2.0
"""Where a text that is still being written may be cut, and whether one says yes or no."""

from __future__ import annotations

import re

# Chinese and Japanese have no spaces between words: each character counts as one.
_NO_SPACES = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_YES = re.compile(r"\W*yes\b", re.IGNORECASE)
_NO = re.compile(
    r"\W*(?:no|not|none|nothing|never)\b|.*\bthere (?:is|are)(?: no| not| none|n['\u2019]t)\b"
    r"|.*\b(?:can(?: ?not|['\u2019]t)|(?:could|do|did)(?: not|n['\u2019]t)) see\b",
    re.IGNORECASE | re.DOTALL,
)


def whole_words(text: str) -> str:
    """The text without a last word or number that may be unfinished; all of `text + more` begins with it.

    "it is 1." may be going to be "it is 1.25", so that it becomes "it is", while the stop of "a chair." ends it. One
    that would leave nothing stays, of a number without its stop: an empty answer would say less. A Chinese or Japanese
    character is a word.
    """
    end = len(text)
    while end and _may_go_on(text[end - 1], text[max(0, end - 2) : end - 1]):
        end -= 1
    return text[:end].rstrip() or text.rstrip(".,:/")


def _may_go_on(last: str, before: str) -> bool:
    """Whether a word or number may go on behind `last`: as in "don'", "dark-", "1." of "1.25", "[" of "[0.5"."""
    if _NO_SPACES.match(last):
        return False
    return last.isalnum() or last in "_'\u2019-+([" or (last in ".,:/" and before.isdecimal())


def sees(text: str) -> bool | None:
    """Whether an answer says that a thing is there; None where it says neither yes nor no."""
    return True if _YES.match(text) else False if _NO.match(text) else None
