# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import io
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.lmm.llava3d.tokenizer import MARK, TokenizerError, load_tokenizer, merges_of

CORPUS = [
    "The related object is located at the door, next to the small table.",
    "Describe the chair in detail: it's a red one, 0.5 metres wide.",
    "What is the colour of the sofa? It is localized at [1.25, -0.30, 0.45].",
    "A chat between a curious human and an artificial intelligence assistant.",
] * 5


def _sentencepiece_model(**options: object) -> bytes:
    spm = pytest.importorskip("sentencepiece", reason="the sentencepiece package, the oracle here, is not installed")
    writer = io.BytesIO()
    training = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "num_threads": 1,
        "minloglevel": 3,
    }
    spm.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=writer, **{**training, **options})
    return writer.getvalue()


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    return _sentencepiece_model()


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def test_merges_by_hand():
    # "abc" can be made of "a" + "bc" and of "ab" + "c": better scores come first, then shorter left parts.
    scores = {"abc": -1.0, "ab": 0.0, "bc": -2.0, "a": -3.0, "b": -4.0, "c": -5.0}
    assert merges_of(scores) == [("a", "b"), ("a", "bc"), ("ab", "c"), ("b", "c")]


def test_same_tokens_as_sentencepiece(sentencepiece_model, tmp_path):
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer, path = load_tokenizer(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    assert path.name == "tokenizer.model" and len(tokenizer) == oracle.get_piece_size()
    rng = random.Random(0)
    letters = " ".join(CORPUS) + "\n\t<>/s_é漢😀  "
    texts = ["", " ", " x", "  a  b ", "\n", ". D", "</s> <s>", "<0x0A>", "<unk>"]
    texts += ["".join(rng.choices(letters, k=rng.randrange(1, 50))) for _ in range(300)]
    for text in texts + CORPUS:
        assert _encode(tokenizer, text) == oracle.encode(text), repr(text)
        assert tokenizer.decode(_encode(tokenizer, text)) == text


@pytest.mark.parametrize("text", ["says 日本語", "😀 and é漢", "漢字"])
def test_a_text_cut_inside_a_character_reads_as_by_sentencepiece(sentencepiece_model, tmp_path, text):
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer, _ = load_tokenizer(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    ids = oracle.encode(text)
    for start in range(len(ids)):
        for end in range(start, len(ids) + 1):
            assert tokenizer.decode(ids[start:end]) == oracle.decode(ids[start:end]), (start, end)


@pytest.mark.parametrize("cut", [0, 1, 7, 100, 0.5, -1])
def test_truncated_sentencepiece_is_refused(sentencepiece_model, tmp_path, cut):
    end = int(cut * len(sentencepiece_model)) if isinstance(cut, float) else cut
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model[:end])
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("options", [{"model_type": "unigram", "vocab_size": 320}, {"normalization_rule_name": "nfkc"}])
def test_other_kinds_of_sentencepiece_are_refused(tmp_path, options):
    (tmp_path / "tokenizer.model").write_bytes(_sentencepiece_model(**options))
    with pytest.raises(TokenizerError, match="not a tokenizer of Llama's kind"):
        load_tokenizer(tmp_path)


@given(st.text(max_size=60))
def test_any_text_survives(tokenizer, text):
    ids = _encode(tokenizer, text)
    assert tokenizer.decode(ids) == text.replace(MARK, " ")
    assert not {0, 1, 2} & set(ids)


def test_an_unfinished_character_costs_only_itself(tokenizer):
    ids = _encode(tokenizer, "says 日本語")
    assert tokenizer.decode(ids) == "says 日本語"
    assert tokenizer.decode(ids[:-1]) == "says 日本\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode(ids[:-2]) == "says 日本\N{REPLACEMENT CHARACTER}"
    assert tokenizer.decode(ids[:-3]) == "says 日本"
    assert tokenizer.decode([ids[:-3], ids]) == ["says 日本", "says 日本語"]
    # One that never gets finished, in the middle.
    assert (
        tokenizer.decode([*ids[:-1], *_encode(tokenizer, "a")])
        == "says 日本\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} a"
    )


def test_control_tokens_in_text_stay_text(tokenizer):
    assert tokenizer.decode(_encode(tokenizer, "a</s><s><unk>")) == "a</s><s><unk>"
    assert tokenizer("x</s>", add_special_tokens=False).input_ids.count(2) == 0  # without being asked for
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.decode([1, *_encode(tokenizer, "a b"), 2], skip_special_tokens=True) == "a b"


def test_every_text_gets_one_word_start_whatever_it_begins_with(tokenizer):
    assert tokenizer.convert_ids_to_tokens(_encode(tokenizer, "the")) == [f"{MARK}the"]
    assert tokenizer.convert_ids_to_tokens(_encode(tokenizer, " the")) == [MARK, f"{MARK}the"]
    assert _encode(tokenizer, "") == []


def test_no_tokenizer(tmp_path):
    with pytest.raises(TokenizerError, match="neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)


def _rename(content: dict, old: str, new: str) -> None:
    vocab = content["model"]["vocab"]
    vocab[new] = vocab.pop(old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update(type="Unigram"), "is a Unigram tokenizer"),
        (lambda c: c["model"].update(byte_fallback=False), "byte_fallback False"),
        (lambda c: _rename(c, "</s>", "</S>"), "lacks the control token </s>"),
        (lambda c: _rename(c, "<0x0A>", "<0x0a>"), "lacks the byte token <0x0A>"),
        (lambda c: c["model"]["vocab"].pop("</s>"), "does not number its 933 pieces"),
        (lambda c: c["model"].update(merges=[["a", "b", "c"]]), r"merge of other.*\('a', 'b', 'c'\)"),
        (lambda c: c["model"].update(merges=[["t", "zzz"]]), "zzz"),
        (lambda c: c.pop("model"), "no tokenizer file"),
        (lambda c: c["model"].update(vocab=["a"]), "no tokenizer file"),
        (lambda c: c["model"].update(merges=[[["t"], ["h"]]]), "merge of other"),
        (lambda c: c["model"].update(merges=[[{}, "h"]]), "merge of other"),
        (lambda c: c["model"].update(merges=3), "no tokenizer file"),
        (lambda c: c["model"]["vocab"].update({"a": 1e999}), "does not number"),
        (lambda c: c["model"]["vocab"].update({"a": True}), "does not number"),
        (lambda c: c["model"]["vocab"].update({"a": [1]}), "no tokenizer file"),
        (lambda c: _rename(c, "a", "a" * 5000), "piece of 5000 characters"),
        (lambda c: _rename(c, "|", "\ud800"), "no tokenizer file"),
        (lambda c: c["model"].update(type=["BPE"]), "is a .'BPE'. tokenizer"),
    ],
)
def test_damaged_tokenizer_json_is_refused(tiny_path: Path, tmp_path, change, message):
    content = json.loads((tiny_path / "tokenizer.json").read_text())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_merges_written_as_strings_are_read(tiny_path: Path, tmp_path, tokenizer):
    content = json.loads((tiny_path / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert _encode(load_tokenizer(tmp_path)[0], "the chair") == _encode(tokenizer, "the chair")


def test_numbers_and_bytes_in_each_others_place_are_refused(sentencepiece_model, tmp_path):
    def field(number: int, wire: int, value: bytes) -> bytes:
        return bytes([number << 3 | wire]) + value

    for damaged, named in [
        (field(3, 2, b"\x06" + field(2, 0, b"\xff\xff\xff\xff\x0f")), "tokenizer.model"),  # a map of 4 GB
        (field(2, 2, b"\x04" + field(3, 2, b"\x02ab")), "2 bytes in place of a number"),
        (field(1, 2, b"\x08" + field(1, 2, b"\x01a") + field(2, 5, b"\0\0\xc0\x7f")), "a score of nan"),
        (field(1, 2, b"\x03" + field(1, 2, b"\x01a")) * 2, "comes twice"),
        (b"\xff" * 100, "more than 64 bits"),
    ]:
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(TokenizerError, match=named):
            load_tokenizer(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6000), st.binary(max_size=8), st.integers(0, 8))
def test_any_bytes_give_a_tokenizer_or_the_documented_error(sentencepiece_model, tmp_path_factory, at, noise, cut):
    folder = tmp_path_factory.mktemp("noise")
    (folder / "tokenizer.model").write_bytes(sentencepiece_model[:at] + noise + sentencepiece_model[at + cut :])
    with contextlib.suppress(TokenizerError):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(TokenizerError, match=f"{name} is no regular file"):
        load_tokenizer(tmp_path)
