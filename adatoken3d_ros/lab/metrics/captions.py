# SPDX-License-Identifier: Apache-2.0
"""BLEU, ROUGE-L and CIDEr with the numbers of pycocoevalcap, which the published tables were made with.

Texts are tokens here, as `tokens` or the Penn Treebank tokenizer (`metrics.java`) makes them. What is needed of each
question is apart from what is made of all, so that a metric can be drawn again for a part of them.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = Sequence[str]
FloatArray = NDArray[np.float64]

ORDERS = 4  # n-grams of 1 to 4 words
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
_TINY, _SMALL = 1e-15, 1e-9  # of pycocoevalcap, in place of a zero

_TOKEN = re.compile(
    r"n't\b|'(?:s|re|ve|ll|d|m)\b|-[lr][rcs]b-|\d+(?:[.,:/]\d+)+|\w+(?:['/\-]\w+)*|[$%&#@+=*]", re.ASCII
)
_BRACKETS = {ord(one): f" -{name}b- " for one, name in zip("()[]{}", ("lr", "rr", "ls", "rs", "lc", "rc"), strict=True)}


def tokens(text: str) -> list[str]:
    """Words in lower case without punctuation; contractions are parted, hyphens kept and brackets named, as the Penn
    Treebank tokenizer of pycocoevalcap does it (which knows abbreviations, too)."""
    text = re.sub(r"(\w)n't\b", r"\1 n't", text.lower())
    text = re.sub(r"(\w)('(?:s|re|ve|ll|d|m))\b", r"\1 \2", text)
    return _TOKEN.findall(re.sub(r"\bcannot\b", "can not", text).translate(_BRACKETS))


def bleu_counts(answer: Tokens, right: Sequence[Tokens]) -> FloatArray:
    """(2 + 2 * ORDERS,) what BLEU needs of one answer: its length, that of the right answer closest to it (the shorter
    of two), and of each order the n-grams that are right and all n-grams."""
    closest = min((abs(len(one) - len(answer)), len(one)) for one in right)[1]
    found = [float(len(answer)), float(closest)]
    own, most = _grams(answer), Counter[tuple[str, ...]]()
    for one in right:
        most |= _grams(one)
    shared = own & most
    for order in range(1, ORDERS + 1):
        found.append(float(sum(count for gram, count in shared.items() if len(gram) == order)))
        found.append(float(max(0, len(answer) - order + 1)))
    return np.array(found)


def bleu(counts: FloatArray) -> FloatArray:
    """(..., ORDERS) BLEU-1 to -4 of sums (..., 2 + 2 * ORDERS) of `bleu_counts`."""
    length, wanted = counts[..., 0], counts[..., 1]
    precisions = (counts[..., 2::2] + _TINY) / (counts[..., 3::2] + _SMALL)
    means = np.exp(np.cumsum(np.log(precisions), axis=-1) / np.arange(1, ORDERS + 1))
    ratio = (length + _TINY) / (wanted + _SMALL)
    brevity = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return np.asarray(means * brevity[..., None])


def rouge_l(answer: Tokens, right: Sequence[Tokens]) -> float:
    """F of the longest common subsequence, its precision and its recall each the best of all right answers."""
    if not answer or not all(right):
        return 0.0
    common = [_common(answer, one) for one in right]
    precision = max(n / len(answer) for n in common)
    recall = max(n / len(one) for n, one in zip(common, right, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def cider(answers: Sequence[Tokens], right: Sequence[Sequence[Tokens]]) -> FloatArray:
    """(Q,) CIDEr-D of each answer (Vedantam et al. 2015), 10 at most; n-grams weigh by how many of the Q questions have
    them in a right answer, so the value of one question depends on all of them. It is 0 where Q is 1.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    for several in right:
        seen.update(set().union(*map(_grams, several)))
    every = math.log(len(right)) if right else 0.0

    def weighed(words: Tokens) -> tuple[list[dict[tuple[str, ...], float]], FloatArray]:
        """Weights of the n-grams of each order, and their norms."""
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in _grams(words).items():
            vectors[len(gram) - 1][gram] = count * (every - math.log(max(1.0, seen[gram])))
        return vectors, np.array([math.sqrt(sum(w * w for w in vector.values())) for vector in vectors])

    found = np.zeros(len(answers))
    for index, (answer, several) in enumerate(zip(answers, right, strict=True)):
        own, norms = weighed(answer)
        total = np.zeros(ORDERS)
        for one in several:
            other, lengths = weighed(one)
            pairs = zip(own, other, strict=True)
            shared = np.array([sum(min(w, b.get(g, 0.0)) * b.get(g, 0.0) for g, w in a.items()) for a, b in pairs])
            norm = norms * lengths
            # Longer or shorter by so many pairs of words, as pycocoevalcap counts a sentence's length.
            longer = max(0, len(answer) - 1) - max(0, len(one) - 1)
            near = math.exp(-(longer**2) / (2 * _CIDER_SIGMA**2))
            total += np.divide(shared, norm, out=np.zeros(ORDERS), where=norm > 0) * near
        found[index] = 10.0 * total.mean() / len(several)
    return found


def _grams(words: Tokens) -> Counter[tuple[str, ...]]:
    """How often each n-gram of 1 to ORDERS words is there."""
    return Counter(tuple(words[at : at + n]) for n in range(1, ORDERS + 1) for at in range(len(words) - n + 1))


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        above = 0
        for at, other in enumerate(b, start=1):
            above, row[at] = row[at], above + 1 if word == other else max(row[at], row[at - 1])
    return row[-1]
