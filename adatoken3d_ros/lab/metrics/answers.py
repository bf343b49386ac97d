# SPDX-License-Identifier: Apache-2.0
"""One answer against those that are right: exact match as published for ScanQA and SQA3D, and overlap of boxes."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

import numpy as np

# Spelling mistakes of the annotators and wordings that count as one; `\b` stands around each.
_SPELLINGS = {
    **{"letf": "left", "let": "left", "tehre": "there", "rigth": "right", "rght": "right", "behine": "behind"},
    **{"tv": "TV", "chai": "chair", "wasing": "washing", "waslked": "walked", "oclock": "o'clock"},
    r"o'[ ]+clock": "o'clock",
}
_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_NUMBERS = {"none": "zero", "23": "twenty-three"} | {str(number): word for number, word in enumerate(_WORDS)}
_REPLACED = tuple((re.compile(rf"\b{key}\b"), word) for key, word in (_SPELLINGS | _NUMBERS).items())
_DIGIT_AT_A_WORD = re.compile(r"\b([a-zA-Z]+)[0-9]\b")
_ARTICLES = tuple(re.compile(rf"\b{article}\b ([a-zA-Z]+)") for article in ("a", "an", "the"))


def cleaned(text: str) -> str:
    """An answer as LEO (embodied-generalist) normalises it before it is compared, which LLaVA-3D's, Chat-Scene's and
    Video-3D LLM's evaluations do alike: lower case, letters, digits and , ' - : alone, known misspellings, small
    numbers as words, no articles.
    """
    text = re.sub(" {2,}", " ", text.lower().strip(" "))
    text = re.sub(r"[^a-z0-9,'\s\-:]+", "", text)
    for pattern, word in _REPLACED:
        text = pattern.sub(word, text)
    text = _DIGIT_AT_A_WORD.sub(r"\1", text)
    for pattern in _ARTICLES:
        text = pattern.sub(r"\1", text)
    return re.sub(r"\bbackwards\b", "backward", text)


def exact(answer: str, right: Collection[str]) -> bool:
    """EM: whether the answer is one of the right ones, all of them `cleaned`."""
    return cleaned(answer) in {cleaned(one) for one in right}


def refined(answer: str, right: Collection[str]) -> bool:
    """EM-refined: whether the answer is, contains or is part of one of the right ones, without white space. An empty
    answer is right in none; published code, which finds it in each, has no empty ones.
    """
    own = "".join(cleaned(answer).split())
    others = ["".join(cleaned(one).split()) for one in right]
    return exact(answer, right) or bool(own) and any(own in other or (other and other in own) for other in others)


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (cx, cy, cz, dx, dy, dz); 0 where a size is not positive."""
    first, second = np.array(a, np.float64), np.array(b, np.float64)
    if (first[3:] <= 0).any() or (second[3:] <= 0).any():
        return 0.0
    low = np.maximum(first[:3] - first[3:] / 2, second[:3] - second[3:] / 2)
    high = np.minimum(first[:3] + first[3:] / 2, second[:3] + second[3:] / 2)
    shared = float(np.prod(np.maximum(high - low, 0)))
    return shared / float(np.prod(first[3:]) + np.prod(second[3:]) - shared)
