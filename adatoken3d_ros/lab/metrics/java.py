# SPDX-License-Identifier: Apache-2.0
"""The Penn Treebank tokenizer and METEOR of the published tables: Java programs that pycocoevalcap brings along.

Both are used where the extra `evaluate` is installed and a `java` is there; else `captions.tokens` parts the words, and
METEOR is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Sequence

BUILT_IN = "built in"


def why_not() -> str:
    """What is missing here, in words; empty where nothing is."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed (pip install 'adatoken3d-ros[evaluate]')"
    return "" if shutil.which("java") else "there is no java (apt install default-jre-headless)"


def penn_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Words of each text, by the tokenizer of pycocoevalcap: lower case, without punctuation."""
    module = importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer")
    lines = {index: [{"caption": " ".join(text.split())}] for index, text in enumerate(texts)}
    found = module.PTBTokenizer().tokenize(lines)
    return [found[index][0].split() for index in range(len(texts))]


def meteor(answers: Sequence[str], right: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of all answers; texts are tokens with one space between them."""
    scorer = importlib.import_module("pycocoevalcap.meteor.meteor").Meteor()
    try:
        score, _ = scorer.compute_score(
            {index: list(several) for index, several in enumerate(right)},
            {index: [answer] for index, answer in enumerate(answers)},
        )
    finally:
        scorer.meteor_p.kill()
        scorer.meteor_p.wait()
    return float(score)
