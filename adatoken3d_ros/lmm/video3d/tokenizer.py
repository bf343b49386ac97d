# SPDX-License-Identifier: Apache-2.0
"""Qwen2's byte-level tokenizer from a checkpoint's own files, with the tokens that were added in training."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.files import UnusableFile, parse_json, read_file
from adatoken3d_ros.lmm.video3d.prompt import COORD, END, END_OF_TEXT, START
from adatoken3d_ros.text import quoted, shown

SPECIAL = (END_OF_TEXT, START, END)
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MAX_BYTES = 64 * 2**20
_MOST_PIECES = 2**20


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used; the message names the file."""


def load_tokenizer(directory: Path) -> tuple[PreTrainedTokenizerFast, Path]:
    """Reads `tokenizer.json`, else `vocab.json` with `merges.txt`, of a checkpoint; the tokenizer and its file.

    Tokens that were added come from `added_tokens.json`, and from what tokenizer.json itself adds.

    Raises:
        TokenizerError: if there is neither, or a file is damaged or of another kind than Qwen2's.
    """
    file, vocabulary = directory / "tokenizer.json", directory / "vocab.json"
    added: dict[str, int] = {}
    if (content := _content(file)) is not None:
        whole = _json(file, content)
        try:
            model = whole["model"]
            if model["type"] != "BPE" or model.get("byte_fallback"):
                raise TokenizerError(f"{file} is a {shown(model['type'], 80)} tokenizer; Qwen2's is BPE of bytes")
            vocab, listed = dict(model["vocab"]), list(model["merges"])
            merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in listed]
            added = {one["content"]: one["id"] for one in whole.get("added_tokens") or []}
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise _no_tokenizer(file, error) from error
    elif (content := _content(vocabulary)) is not None:
        file, vocab = vocabulary, _json(vocabulary, content)
        merges = _merges(directory / "merges.txt")
    else:
        raise TokenizerError(f"{directory} has neither tokenizer.json nor vocab.json")
    extra = directory / "added_tokens.json"
    if (content := _content(extra)) is not None:
        added.update(_json(extra, content))
    try:
        return qwen_tokenizer(vocab, merges, added), file
    except TokenizerError as error:
        raise TokenizerError(f"{file}: {error}") from error
    except Exception as error:  # the library raises this very class
        raise _no_tokenizer(file, error) from error


def qwen_tokenizer(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, ...]], added: Mapping[str, int]
) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with Qwen2's conventions; `added` tokens have ids right behind the vocabulary's.

    Raises:
        TokenizerError: for ids that leave a gap, or a missing token of the conversation.
    """
    if len(vocab) + len(added) > _MOST_PIECES:
        raise TokenizerError(f"{len(vocab)} pieces and {len(added)} added tokens are more than {_MOST_PIECES}")
    if missing := [token for token in SPECIAL if token not in {**vocab, **added}]:
        raise TokenizerError(f"it lacks the token {missing[0]}")
    behind = sorted((index, token) for token, index in added.items() if token not in vocab)
    for number, (index, token) in enumerate(behind, len(vocab)):
        if index != number:
            raise TokenizerError(f"the added token {quoted(token)} has id {quoted(index)}, expected {number}")
    backend = Tokenizer(BPE(vocab=dict(vocab), merges=[(a, b) for a, b in merges]))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for _, token in behind]
        + [AddedToken(token, normalized=False, special=True) for token in SPECIAL if token in vocab]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END_OF_TEXT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def word_vocabulary(
    words: Iterable[str], *, bare: Iterable[str] = ()
) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]:
    """Vocabulary, merges and added tokens for a small model: all bytes, and `words` with all their beginnings, each
    with a space before it; `bare` ones without.
    """
    vocab = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # as bytes are shown
    # Bare words come last: a merge of two letters inside a word must not come before those from its beginning on.
    for word in itertools.chain((space + word for word in words), bare):
        piece = word[0]
        for letter in word[1:]:
            if piece + letter not in vocab:
                vocab[piece + letter] = len(vocab)
                merges.append((piece, letter))
            piece += letter
    return vocab, merges, {token: len(vocab) + k for k, token in enumerate((*SPECIAL, "<ground>", COORD))}


def _content(file: Path) -> bytes | None:
    """What a file holds; None where there is none."""
    try:
        return bytes(read_file(file, _MAX_BYTES))
    except FileNotFoundError:
        return None
    except UnusableFile as error:
        raise TokenizerError(str(error)) from error
    except OSError as error:
        raise TokenizerError(f"{file} cannot be read: {error}") from error


def _json(file: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = parse_json(content)
    except ValueError as error:
        raise _no_tokenizer(file, error) from error
    if not isinstance(parsed, dict):
        raise TokenizerError(f"{file} holds a {type(parsed).__name__}, not an object")
    return parsed


def _merges(file: Path) -> list[tuple[str, ...]]:
    content = _content(file)
    if content is None:
        raise TokenizerError(f"{file} is missing")
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        raise _no_tokenizer(file, error) from error
    return [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]


def _no_tokenizer(file: Path, error: Exception) -> TokenizerError:
    return TokenizerError(f"{file} is no tokenizer file: {shown(error, 300)}")
