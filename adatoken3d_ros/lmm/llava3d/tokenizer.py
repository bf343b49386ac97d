# SPDX-License-Identifier: Apache-2.0
"""Llama's SentencePiece tokenizer as a `tokenizers` model, with the behaviour that LLaVA-3D was trained with.

transformers 5 would need protobuf to read a `tokenizer.model`, and its Llama class does not prefix a text that begins
with a space. The weights know the original behaviour: every text gets one word-start mark in front, whatever it begins
with, and no text is read as a control token.
"""

from __future__ import annotations

import codecs
import math
import re
import string
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.files import UnusableFile, parse_json, read_file
from adatoken3d_ros.lmm.protobuf import fields
from adatoken3d_ros.text import quoted, shown

MARK = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's visible space
CONTROL_TOKENS = ("<unk>", "<s>", "</s>")
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")

# Kinds of pieces and of models in SentencePiece's file format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BPE = 2

MAX_BYTES = 64 * 2**20
_MOST_PIECES = 2**20
_LONGEST_PIECE = 512


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used; the message names the file."""


class LlamaTokenizer(PreTrainedTokenizerFast):
    """Reads bytes as SentencePiece does: each that belongs to no whole character is one replacement character, and the
    characters around it stay. The backend's own decoder gives up the whole run of byte tokens for one of them.
    """

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        backend = self.backend_tokenizer
        left_out = {backend.token_to_id(token) for token in CONTROL_TOKENS} if skip_special_tokens else set()
        text = bytearray()
        for index in [token_ids] if isinstance(token_ids, int) else token_ids:
            token = None if index in left_out else backend.id_to_token(index)
            if token is not None:
                byte = _BYTE_TOKEN.fullmatch(token)
                text += bytes.fromhex(byte[1]) if byte else token.replace(MARK, " ").encode()
        return text.decode(errors=_EACH_BYTE).removeprefix(" ")


def load_tokenizer(directory: Path) -> tuple[LlamaTokenizer, Path]:
    """Reads `tokenizer.model`, else `tokenizer.json`, of a checkpoint; returns the tokenizer and its file.

    Raises:
        TokenizerError: if there is neither, or the file is damaged or of another kind than Llama's.
    """
    for name, read in (("tokenizer.model", _read_sentencepiece), ("tokenizer.json", _read_json)):
        path = directory / name
        try:
            content = read_file(path, MAX_BYTES)
        except FileNotFoundError:
            continue
        except UnusableFile as error:
            raise TokenizerError(str(error)) from error
        except OSError as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        vocab, merges = read(path, bytes(content))
        try:
            return llama_tokenizer(vocab, merges), path
        except Exception as error:  # the library raises this very class
            raise TokenizerError(f"{path} is no tokenizer file: {shown(error, 300)}") from error
    raise TokenizerError(f"{directory} has neither tokenizer.model nor tokenizer.json")


def llama_tokenizer(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> LlamaTokenizer:
    """Byte-pair encoding with Llama's conventions: word-start marks, bytes for unknown characters, `<s>` and `</s>`."""
    backend = Tokenizer(
        BPE(vocab=dict(vocab), merges=list(merges), unk_token=CONTROL_TOKENS[0], byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    unk, bos, eos = CONTROL_TOKENS
    return LlamaTokenizer(
        tokenizer_object=backend,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def word_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges for a small model: control tokens, all bytes, printable ASCII, and `words` with all their
    beginnings.

    A word is built letter by letter from its start, so the longest known beginning of a word becomes one token and the
    rest single characters; other characters become bytes.
    """
    pieces = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), MARK]
    pieces += [*string.digits, *string.ascii_letters, *string.punctuation]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    merges: list[tuple[str, str]] = []
    for word in words:
        piece = MARK
        for letter in word:
            vocab.setdefault(letter, len(vocab))
            if piece + letter not in vocab:
                vocab[piece + letter] = len(vocab)
                merges.append((piece, letter))
            piece += letter
    return vocab, merges


def merges_of(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that build the given pieces out of each other, best score first (SentencePiece stores only scores)."""
    ranked: list[tuple[float, int, int, str]] = []
    for order, (piece, score) in enumerate(scores.items()):
        ranked.extend(
            (-score, order, cut, piece)
            for cut in range(1, len(piece))
            if piece[:cut] in scores and piece[cut:] in scores
        )
    return [(piece[:cut], piece[cut:]) for _, _, cut, piece in sorted(ranked)]


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


_EACH_BYTE = "adatoken3d.replace_each_byte"
codecs.register_error(_EACH_BYTE, _replace_each_byte)


def _read_json(path: Path, content: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    try:
        model = parse_json(content)["model"]
        kind, fallback = model["type"], model.get("byte_fallback")
        if kind != "BPE" or fallback is not True:
            raise TokenizerError(
                f"{path} is a {shown(kind, 80)} tokenizer, byte_fallback {quoted(fallback)}; Llama's is BPE with bytes"
            )
        vocab, listed = dict(model["vocab"]), list(model["merges"])
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in listed]
        numbers = sorted(vocab.values())
    except TokenizerError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(f"{path} is no tokenizer file: {quoted(error, 300)}") from error
    if not all(type(number) is int for number in numbers) or numbers != list(range(len(vocab))):
        raise TokenizerError(f"{path} does not number its {len(vocab)} pieces from 0 on")
    _check_pieces(path, vocab)
    for merge in merges:
        if len(merge) != 2 or not all(isinstance(part, str) and part in vocab for part in merge):
            raise TokenizerError(f"{path} has a merge of other than two known pieces: {quoted(merge, 200)}")
        if "".join(merge) not in vocab:
            raise TokenizerError(f"{path} has a merge of two pieces into none that is known: {quoted(merge, 200)}")
    _check_control_tokens(path, vocab)
    return vocab, [(a, b) for a, b in merges]


def _read_sentencepiece(path: Path, content: bytes) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces and merges of a SentencePiece model file: a protocol buffer of which a dozen fields matter here."""
    vocab: dict[str, int] = {}
    scores: dict[str, float] = {}
    kind, byte_fallback, char_map = 0, False, b""
    try:
        for field, value in fields(content):
            if field == 1 and isinstance(value, bytes):
                piece, score, piece_kind = _piece(value)
                if piece in vocab:
                    raise ValueError(f"the piece {quoted(piece)} comes twice")
                if piece_kind == _NORMAL:
                    scores[piece] = score
                vocab[piece] = len(vocab)
            elif field == 2 and isinstance(value, bytes):
                trainer = dict(fields(value))
                kind, byte_fallback = _number(trainer.get(3, 1)), bool(_number(trainer.get(35, 0)))
            elif field == 3 and isinstance(value, bytes) and isinstance(found := dict(fields(value)).get(2), bytes):
                char_map = found
    except (ValueError, struct.error) as error:
        raise TokenizerError(f"{path} is no SentencePiece model, or truncated: {error}") from error
    if not vocab:
        raise TokenizerError(f"{path} is no SentencePiece model: it has no pieces")
    if kind != _BPE or not byte_fallback or char_map:
        raise TokenizerError(
            f"{path} is not a tokenizer of Llama's kind: model type {kind} (BPE is {_BPE}), byte fallback "
            f"{byte_fallback}, {len(char_map)} bytes of character map"
        )
    _check_pieces(path, vocab)
    _check_control_tokens(path, vocab)
    return vocab, merges_of(scores)


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError(f"{len(value)} bytes in place of a number")
    return value


def _check_pieces(path: Path, vocab: Mapping[str, int]) -> None:
    """Neither so many nor so long that working out merges would take more than a moment."""
    if len(vocab) > _MOST_PIECES:
        raise TokenizerError(f"{path} has {len(vocab)} pieces, more than {_MOST_PIECES}")
    if (longest := max(vocab, key=len, default="")) and len(longest) > _LONGEST_PIECE:
        raise TokenizerError(f"{path} has a piece of {len(longest)} characters, more than {_LONGEST_PIECE}")


def _check_control_tokens(path: Path, vocab: Mapping[str, int]) -> None:
    for token in CONTROL_TOKENS:
        if token not in vocab:
            raise TokenizerError(f"{path} lacks the control token {token}")
    if missing := next((b for b in range(256) if f"<0x{b:02X}>" not in vocab), None):
        raise TokenizerError(f"{path} lacks the byte token <0x{missing:02X}>")


def _piece(message: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, _NORMAL
    for field, value in fields(message):
        if field == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif field == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
            if not math.isfinite(score):
                raise ValueError(f"a score of {score}")
        elif field == 3 and isinstance(value, int):
            kind = value
    return text, score, kind
