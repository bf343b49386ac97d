# SPDX-License-Identifier: Apache-2.0
"""Where a text that is still being written may be cut."""

from __future__ import annotations

import re

# Chinese and Japanese have no spaces between words: each character counts as one.
_NO_SPACES = re.compile(
    "[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
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
