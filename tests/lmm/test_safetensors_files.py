# SPDX-License-Identifier: Apache-2.0
"""Files that are missing, damaged, cut off or no files at all; each is refused by its name."""

from __future__ import annotations

import os
import shutil

import pytest

from adatoken3d_ros.lmm.llava3d import checkpoint
from adatoken3d_ros.lmm.safetensors_files import MAX_JSON_BYTES, CheckpointError
from tests.lmm.shards import split

NORM = "model.norm.weight"


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.02, 0.5, -1])
def test_truncated_file_is_named(path, keep):
    file = path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated or damaged \(\d+ bytes\)"):
        checkpoint.load(path)


def test_truncated_shard_is_named(path):
    split(path)
    file = path / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is truncated"):
        checkpoint.load(path)


def test_pointer_in_place_of_weights(path):
    (path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        checkpoint.load(path)


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard_is_named(path, index):
    split(path, index=index)
    (path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors is missing"):
        checkpoint.load(path)


def test_tensor_in_two_files(path):
    shutil.copy(path / "model.safetensors", path / "a.safetensors")
    (path / "model.safetensors").rename(path / "b.safetensors")
    with pytest.raises(CheckpointError, match="is in a.safetensors and in b.safetensors"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "holds a list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../evil.safetensors"}}', "names '../evil.safetensors'"),
        ('{"weight_map": {"a": "weights.bin"}}', "names 'weights.bin'"),
        ('{"weight_map": {"a": "model.safetensors"}}', "model.safetensors lacks a,"),
    ],
)
def test_bad_index(path, index, message):
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_never_opened(path, pickle):
    (path / "model.safetensors").unlink()
    (path / pickle).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=f"{pickle} but no safetensors file"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, r"config\.json is missing"),
        ("config.json", "{", r"config\.json is not readable as JSON"),
        ("config.json", "\xff", r"config\.json is not readable"),
        ("config.json", "3", r"config\.json holds a int"),
        ("config.json", "{}", "lacks|not known"),
        ("tokenizer.json", None, "neither tokenizer.model nor tokenizer.json"),
        ("tokenizer.json", "{}", r"tokenizer\.json is no tokenizer"),
        ("model.safetensors", None, "has no safetensors file"),
    ],
)
def test_missing_and_damaged_files(path, file, content, message):
    (path / file).unlink()
    if content is not None:
        (path / file).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


def test_no_directory(path):
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        checkpoint.load(path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        checkpoint.load(path, vision_path=path / "nowhere")
    with pytest.raises(CheckpointError, match="openai/clip is not a directory.*nothing is downloaded"):
        checkpoint.load("openai/clip")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "other.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_a_pipe_or_a_device_in_place_of_a_file_is_refused_and_not_waited_for(path, name, kind):
    if name == "other.safetensors":  # one of several files without an index
        (path / "model.safetensors").rename(path / "a.safetensors")
    (path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path / name)
    else:
        (path / name).symlink_to(kind)
    with pytest.raises(CheckpointError, match=f"{name}.* (is no regular file|is missing)|has no safetensors file"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" * 100_000, "nested deeper|not readable"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested deeper"),
        ('{"vocab_size": %s}' % ("9" * 5000), "not readable|vocab_size|lacks"),
        ('{"model_type": 1e999}', "model_type is inf"),
        ("\udcff", "not readable"),
    ],
    ids=["open", "nested", "digits", "infinite", "bytes"],
)
def test_json_that_is_none_is_refused(path, text, named):
    (path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=named):
        checkpoint.load(path)


def test_a_large_config_is_not_read(path):
    with (path / "config.json").open("r+b") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"more than {MAX_JSON_BYTES}"):
        checkpoint.load(path)
