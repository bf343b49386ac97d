# SPDX-License-Identifier: Apache-2.0
"""Tokens that somebody added to a tokenizer without calling them special: no question becomes one by its words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.safetensors_files import CheckpointError
from adatoken3d_ros.lmm.text_places import PromptError
from tests.architectures import NAMES

ADDED = "<|extra|>"


def add_token(path: Path, *, instead: bool) -> int:
    """Adds it behind the others, or in the place of the last one that was added; returns its id."""
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    added = content.setdefault("added_tokens", [])
    last = max([*content["model"]["vocab"].values(), *(token["id"] for token in added)])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    entry = {"id": last if instead else last + 1, "content": ADDED, **plain}
    content["added_tokens"] = [token for token in added if token["id"] != entry["id"]] + [entry]
    file.write_text(json.dumps(content))
    return int(entry["id"])


@pytest.mark.parametrize("instead", [False, True], ids=["one more", "one of those"])
@pytest.mark.parametrize("name", NAMES)
def test_words_of_a_question_are_no_added_token(
    name: str, tiny_of: Callable[[str], Path], tmp_path: Path, instead: bool
) -> None:
    """It is named where the table of words has no row for it, and in a question; or the model's own words go on."""
    path = Path(shutil.copytree(tiny_of(name), tmp_path / "model"))
    token = add_token(path, instead=instead)
    try:
        model, tokenizer, _ = registry.load(path)
    except CheckpointError as error:
        rows = json.loads((path / "config.json").read_text())["vocab_size"]
        assert f"has {token + 1} tokens, the model's table has " in str(error) and rows <= token, error
        return
    if ADDED in tokenizer.get_added_vocab():
        with pytest.raises(PromptError, match=r"the control word <\|extra\|>"):
            model.prompt(tokenizer, f"What is {ADDED} there?")
        return
    pieces = model.prompt(tokenizer, f"What is {ADDED} there?").pieces
    ids = [index for piece in pieces if isinstance(piece, tuple) for index in piece]
    assert token not in ids and ADDED in tokenizer.decode(ids)
