# SPDX-License-Identifier: Apache-2.0
"""The files of bags: compressed, damaged, and made to do harm."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import struct
from pathlib import Path

import pytest
from ros_bags import STORE, frames, write
from rosbags.rosbag2 import CompressionMode, StoragePlugin, Writer
from rosbags.typesys.store import Typestore

from adatoken3d_ros.ros import bag_files
from adatoken3d_ros.ros.bag import BagError, read_bag


def test_what_is_no_bag(tmp_path: Path) -> None:
    with pytest.raises(BagError, match="does not exist"):
        list(read_bag(tmp_path / "none"))
    (tmp_path / "broken.mcap").write_bytes(b"not a bag at all")
    with pytest.raises(BagError, match=r"broken\.mcap"):
        list(read_bag(tmp_path / "broken.mcap"))
    folder = write(tmp_path / "cut", frames())
    (file,) = folder.glob("*.mcap")
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(BagError):
        list(read_bag(folder))
    file.rename(folder / "other.mcap")
    with pytest.raises(BagError, match=rf"its metadata\.yaml lists {file.name}, which is not there"):
        list(read_bag(folder))
    (folder / "metadata.yaml").unlink()
    with pytest.raises(BagError, match=r"no metadata\.yaml; name one of its files \(other\.mcap\).*ros2 bag reindex"):
        list(read_bag(folder))
    (folder / "other.mcap").unlink()
    with pytest.raises(BagError, match=r"the folder has no metadata\.yaml and no \.mcap or \.db3 file$"):
        list(read_bag(folder))


COMPRESSIONS = [
    (StoragePlugin.SQLITE3, CompressionMode.FILE),
    (StoragePlugin.SQLITE3, CompressionMode.MESSAGE),
    (StoragePlugin.MCAP, CompressionMode.FILE),
    (StoragePlugin.MCAP, CompressionMode.MESSAGE),
    (StoragePlugin.MCAP, CompressionMode.STORAGE),
]


@pytest.mark.parametrize(("plugin", "mode"), COMPRESSIONS)
def test_a_compressed_bag_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugin: StoragePlugin, mode: CompressionMode
) -> None:
    path = write(tmp_path / "bag", frames(), plugin, mode)
    assert [int(frame.rgb[0, 0, 0]) for frame in read_bag(path)] == [0, 1, 2]
    monkeypatch.setattr(bag_files, "FREE_GROWTH", -bag_files.MOST_GROWTH * 10**6)
    with pytest.raises(BagError, match="grows"):
        list(read_bag(path))


def test_definitions_in_a_bag_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bag"
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        evil = "int32 x\n" + "=" * 80 + "\nMSG: a/msg/B):\n    import os\nint32 y"
        other = writer.add_connection("/other", "evil_msgs/msg/Evil", msgdef=evil, rihs01="RIHS01_0")
        writer.write(other, 1, b"\0\1\0\0\0\0\0\0")
        for topic, message, stamp in frames():
            kind = message.__msgtype__
            found = next((c for c in writer.connections if c.topic == topic), None)
            connection = found or writer.add_connection(topic, kind, msgdef="float64 nothing of the kind", rihs01="x")
            writer.write(connection, stamp, STORE.serialize_cdr(message, kind))
    for name in ("register", "generate_msgdef", "hash_rihs01"):
        monkeypatch.delattr(Typestore, name)
    assert len(list(read_bag(path))) == 3


def chunk(data: bytes, size: int, kind: bytes = b"zstd") -> bytes:
    body = struct.pack("<QQQII", 0, 0, size, 0, len(kind)) + kind + struct.pack("<Q", len(data)) + data
    head = struct.pack("<BQII", 1, 8 + 4, 4, 0)[:9] + struct.pack("<I", 4) + b"ros2" + struct.pack("<I", 0)
    return b"\x89MCAP0\r\n" + head + struct.pack("<BQ", 6, len(body)) + body + b"\x89MCAP0\r\n"


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
def test_compressed_data_that_grows_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    zeros = b"\0" * 2**22
    codec = bag_files.importlib.import_module("lz4.frame" if kind == "lz4" else "backports.zstd")
    packed = codec.compress(zeros)
    monkeypatch.setattr(bag_files, "FREE_GROWTH", 2**20)
    monkeypatch.setattr(bag_files, "MOST_GROWTH", 2)
    for size in (2**22, 1000, 2**60):
        (tmp_path / "bomb.mcap").write_bytes(chunk(packed, size, kind.encode()))
        with pytest.raises(BagError, match=r"bomb\.mcap is no bag that can be read: .*grows"):
            list(read_bag(tmp_path / "bomb.mcap"))


def test_short_messages_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they cost to read counts, not only their bytes."""
    monkeypatch.setattr(bag_files, "FREE_GROWTH", 2**20)
    record = struct.pack("<BQ", 5, 22) + b"\0" * 22
    packed = bag_files.importlib.import_module("backports.zstd").compress(record * 20_000)
    (tmp_path / "bomb.mcap").write_bytes(chunk(packed, 20_000 * len(record)))
    with pytest.raises(BagError, match="grows beyond"):
        list(read_bag(tmp_path / "bomb.mcap"))


@pytest.mark.parametrize("plugin", list(StoragePlugin))
def test_any_bytes_give_frames_or_the_documented_error(tmp_path: Path, plugin: StoragePlugin) -> None:
    folder, choose = write(tmp_path / "bag", frames("tf"), plugin, CompressionMode.NONE), random.Random(0)
    path = next(file for file in folder.iterdir() if file.suffix in (".mcap", ".db3"))
    content = path.read_bytes()
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(choose.randrange(1, 4)):
            damaged[choose.randrange(len(damaged))] = choose.randrange(256)
        path.write_bytes(damaged)
        with contextlib.suppress(BagError):
            list(read_bag(path, on_drop=lambda *why: None))


def test_metadata_that_is_none_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "bag", frames())
    metadata = path / "metadata.yaml"
    for content in (
        "",
        "[]",
        "a: [",
        "rosbag2_bagfile_information: 3",
        "rosbag2_bagfile_information: {}",
        "[" * 5000,
        "!!python/object/apply:os.getcwd []",
        "rosbag2_bagfile_information: {relative_file_paths: [..]}",
        "rosbag2_bagfile_information: {relative_file_paths: [a], compression_mode: file}",
    ):
        metadata.write_text(content)
        with pytest.raises(BagError, match="is no bag that can be read"):
            list(read_bag(path))
    metadata.unlink()
    os.mkfifo(metadata)
    with pytest.raises(BagError, match="no regular file"):
        list(read_bag(path))
    for name in ("pipe.mcap", "pipe.db3"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(BagError, match="no regular file"):
            list(read_bag(tmp_path / name))


@pytest.mark.parametrize(
    "made",
    [
        "CREATE VIEW extra AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n",
        "CREATE TABLE big(x, y AS (zeroblob(1000000000)))",
        "CREATE VIRTUAL TABLE v USING fts5(x)",
    ],
)
def test_a_database_that_computes_as_it_is_read_is_refused(tmp_path: Path, made: str) -> None:
    folder = write(tmp_path / "bag", frames(), StoragePlugin.SQLITE3)
    (file,) = folder.glob("*.db3")
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute(made)
        database.commit()
    with pytest.raises(BagError, match="is no plain table"):
        list(read_bag(folder))
