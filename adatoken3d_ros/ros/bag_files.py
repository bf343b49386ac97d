# SPDX-License-Identifier: Apache-2.0
"""The files of a ROS 2 bag: MCAP, SQLite, and folders of either, compressed or not.

A bag comes from anywhere. Its own definitions of message types are never read: messages are decoded as the types that
ROS has under their names. Compressed data may grow by a limited factor, and nothing but BagError comes out.
"""

from __future__ import annotations

import heapq
import importlib
import sqlite3
import struct
import sys
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO
from urllib.parse import quote

import yaml
from rosbags.typesys import Stores, get_typestore

from adatoken3d_ros.files import open_regular, read_file
from adatoken3d_ros.text import described, quoted, shown

STORE = get_typestore(Stores.ROS2_KILTED)
METADATA, SUFFIXES = "metadata.yaml", (".mcap", ".db3")
MAX_METADATA = 2**20  # bytes of metadata.yaml
FREE_GROWTH, MOST_GROWTH = 32 * 2**20, 1000  # compressed data may grow to so many bytes, and to so many times its size
MOST_CHUNK = 2**29  # bytes of a chunk when it is unpacked
_RECORD = 1024  # bytes that a record in a chunk counts for besides its own: reading it takes time, however short it is

_MAGIC = b"\x89MCAP0\r\n"
_SCHEMA, _CHANNEL, _MESSAGE, _CHUNK = 3, 4, 5, 6
_MAX_DESCRIPTION = 2**24  # bytes of a schema or channel


class BagError(ValueError):
    """A bag that cannot be read, or that does not hold what is needed; the message names topics and types."""


@dataclass(frozen=True)
class Connection:
    """A topic in one file of a bag."""

    topic: str
    msgtype: str
    encoding: str
    file: int
    id: int


class BagReader:
    """A bag that is open.

    Args:
        path: an .mcap or .db3 file, or a bag's folder.

    Raises:
        BagError: for anything that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._stack = ExitStack()
        self._files: list[_Mcap | _Sqlite] = []
        self._size = 0
        self._each_message = False
        try:
            with _only_bag_errors(path):
                self._open(path)
        except BaseException:
            self.close()
            raise
        self.connections = [
            Connection(shown(topic, 300), shown(msgtype, 300), encoding, number, key)
            for number, file in enumerate(self._files)
            for key, (topic, msgtype, encoding) in file.topics.items()
        ]

    def close(self) -> None:
        self._stack.close()

    def messages(self, connections: Collection[Connection]) -> Iterator[tuple[Connection, Any]]:
        """The messages of some connections, file by file in the order of their times, decoded; raises as `timed`."""
        return ((connection, message) for _, connection, message in self.timed(connections))

    def timed(self, connections: Collection[Connection]) -> Iterator[tuple[int, Connection, Any]]:
        """As `messages`, each with the time of its recording, nanoseconds.

        Raises:
            BagError: for what is damaged or not encoded as ROS does.
        """
        growth = _Growth(self._size)
        for number, file in enumerate(self._files):
            wanted = {connection.id: connection for connection in connections if connection.file == number}
            for connection in wanted.values():
                if connection.encoding != "cdr" or connection.msgtype not in STORE.fielddefs:
                    raise BagError(
                        f"{connection.topic} is {quoted(connection.encoding)} of {connection.msgtype}, not cdr"
                    )
            raw = file.messages(set(wanted)) if wanted else iter(())
            while True:
                with _only_bag_errors(file.path):
                    if (found := next(raw, None)) is None:
                        break
                    time, key, data = found
                    if self._each_message:
                        data = growth.unpacked(data, "zstd", growth.left)
                    message = STORE.deserialize_cdr(data, wanted[key].msgtype)
                yield time, wanted[key], message

    def _open(self, path: Path) -> None:
        if not path.exists():
            raise BagError("it does not exist")
        paths, mode = ([path], "") if not path.is_dir() else self._listed(path)
        if mode == "file":
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
            paths = [self._unpacked(file, folder) for file in paths]
        for file in paths:
            if file.suffix not in SUFFIXES:
                raise BagError(f"{file.name} is neither .mcap nor .db3")
            opened = _Mcap(file) if file.suffix == ".mcap" else _Sqlite(file)
            self._stack.callback(opened.close)
            self._files.append(opened)
            self._size += file.stat().st_size
        self._each_message = mode == "message"

    def _listed(self, path: Path) -> tuple[list[Path], str]:
        """The files that a bag's metadata lists, and how they are compressed."""
        if not (path / METADATA).exists():
            raise BagError(_without_metadata(path))
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = yaml.load(bytes(read_file(path / METADATA, MAX_METADATA)), Loader=loader)
        info = content["rosbag2_bagfile_information"]
        mode, packed = str(info.get("compression_mode") or "").lower(), str(info.get("compression_format") or "")
        if mode not in ("", "none", "file", "message", "storage") or (mode in ("file", "message") and packed != "zstd"):
            raise BagError(f"it is compressed by {quoted(packed)} in mode {quoted(mode)}; read is zstd")
        files = [path / PurePath(str(name)).name for name in info["relative_file_paths"]]
        if missing := [file.name for file in files if not file.exists()]:
            raise BagError(f"its {METADATA} lists {shown(', '.join(missing), 300)}, which is not there")
        return files, mode

    def _unpacked(self, file: Path, folder: Path) -> Path:
        out = folder / file.stem
        growth = _Growth(file.stat().st_size)
        with open_regular(file) as packed, out.open("xb") as plain:
            growth.stream(packed, plain)
        return out


def _without_metadata(path: Path) -> str:
    """What a folder holds instead of the files of a bag, in words."""
    text, names = f"the folder has no {METADATA}", {file.name for file in path.iterdir()}
    if recorded := sorted(name for name in names if PurePath(name).suffix in SUFFIXES):
        which = shown(", ".join(recorded), 300)
        return f"{text}; name one of its files ({which}), or have 'ros2 bag reindex {path}' write it"
    if "intrinsics.json" in names:
        return f"{text} and no .mcap or .db3 file, but an intrinsics.json: it is a folder of posed frames (--folder)"
    return f"{text} and no .mcap or .db3 file"


@contextmanager
def _only_bag_errors(path: Path) -> Iterator[None]:
    """Whatever damaged bytes lead the libraries to raise."""
    try:
        yield
    except BagError as error:
        raise BagError(f"{path} is no bag that can be read: {error}") from error
    except Exception as error:
        raise BagError(f"{path} is no bag that can be read: {described(error, 500)}") from error


def _codec(kind: str) -> Any:
    """A decompressor, of the libraries that come with rosbags."""
    if kind == "lz4":
        return importlib.import_module("lz4.frame").LZ4FrameDecompressor()
    module = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    return importlib.import_module(module).ZstdDecompressor()


class _Growth:
    """How many bytes may still come out of `compressed` ones."""

    def __init__(self, compressed: int) -> None:
        self.left = FREE_GROWTH + MOST_GROWTH * compressed

    def unpacked(self, data: bytes, kind: str, size: int) -> bytes:
        """At most `size` bytes. Raises BagError if more come out."""
        out, size = bytearray(), max(0, min(size, self.left))
        while data:
            codec = _codec(kind)
            out += codec.decompress(data, max_length=size + 1 - len(out))
            if len(out) > size:
                raise BagError(f"{kind} data that grows beyond {size} bytes")
            if not codec.eof:
                raise BagError(f"{kind} data that is cut short")
            data = codec.unused_data or b""
        self.take(len(out))
        return bytes(out)

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise BagError(f"compressed data that grows beyond {FREE_GROWTH} bytes and {MOST_GROWTH} times its size")

    def stream(self, packed: BinaryIO, plain: BinaryIO) -> None:
        codec, data = _codec("zstd"), b""
        while True:
            if codec.eof:
                data = codec.unused_data
                if not data and not (data := packed.read(2**20)):
                    return
                codec = _codec("zstd")
            elif codec.needs_input and not (data := packed.read(2**20)):
                raise BagError("zstd data that is cut short")
            out = codec.decompress(data, max_length=2**22)
            data = b""
            self.take(len(out))
            plain.write(out)


class _Mcap:
    """An MCAP file: its chunks and messages by where they are; the index at its end is not needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        try:
            self._scan()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def _scan(self) -> None:
        self._schemas: dict[int, str] = {}
        self.topics: dict[int, tuple[str, str, str]] = {}
        self._parts: list[tuple[int, int, int, bool]] = []  # time, place, length, whether it is a chunk
        self._size = size = self._file.seek(0, 2)
        self._growth = _Growth(size)
        if size < 16 or self._read(0, 8) != _MAGIC or self._read(size - 8, 8) != _MAGIC:
            raise BagError("it does not begin and end as MCAP")
        at = 8
        while at < size - 8:
            kind, length = struct.unpack("<BQ", self._read(at, 9))
            begin, at = at + 9, at + 9 + length
            if at > size - 8 or not kind:
                raise BagError(f"a record of kind {kind} and {length} bytes at {begin} of {size}")
            if kind in (_SCHEMA, _CHANNEL):
                if length > _MAX_DESCRIPTION:
                    raise BagError(f"a schema or channel of {length} bytes")
                self._describe(kind, self._read(begin, length))
            elif kind in (_CHUNK, _MESSAGE):
                # A chunk begins with the time of its first message, a message has its own after 6 bytes.
                (time,) = struct.unpack("<Q", self._read(begin + (6 if kind == _MESSAGE else 0), 8))
                self._parts.append((time, begin, length, kind == _CHUNK))
        if not self.topics:  # no summary at the end
            for _, begin, length, chunk in self._parts:
                if chunk:
                    for _ in self._in_chunk(begin, length, set()):
                        pass

    def messages(self, keys: set[int]) -> Iterator[tuple[int, int, bytes]]:
        """(time, channel, bytes) in the order of their times, those of one time in the order of the file."""
        self._growth = _Growth(self._size)  # each reading of the file may take as much as the first
        waiting: list[tuple[int, int, int, int, bytes]] = []
        for start, begin, length, chunk in sorted(self._parts):
            while waiting and waiting[0][0] < start:
                yield _first(waiting)
            found = self._in_chunk(begin, length, keys) if chunk else _message(self._read(begin, length), keys)
            for number, (time, key, data) in enumerate(found):
                heapq.heappush(waiting, (time, begin, number, key, data))
        while waiting:
            yield _first(waiting)

    def _in_chunk(self, begin: int, length: int, keys: set[int]) -> Iterator[tuple[int, int, bytes]]:
        """(time, channel, bytes) of a chunk's messages; its schemas and channels are taken note of."""
        head = self._read(begin, min(length, 64))
        size, crc, name_length = struct.unpack_from("<QII", head, 16)
        if name_length > 16:
            raise BagError(f"a compression whose name has {name_length} bytes")
        kind = head[32 : 32 + name_length].decode()
        (packed,) = struct.unpack_from("<Q", head, 32 + name_length)
        if 40 + name_length + packed > length:
            raise BagError(f"a chunk of {packed} bytes in a record of {length}")
        data = self._read(begin + 40 + name_length, packed)
        if kind in ("lz4", "zstd"):
            if size > min(self._growth.left, MOST_CHUNK):
                raise BagError(f"a chunk that grows from {packed} to {size} bytes")
            data = self._growth.unpacked(data, kind, size)
        elif kind:
            raise BagError(f"a chunk that is compressed by {quoted(kind)}; read are lz4 and zstd")
        if len(data) != size or (crc and zlib.crc32(data) != crc):
            raise BagError(f"a chunk of {len(data)} bytes that should be {size}, or of a wrong checksum")
        at = 0
        while at < size:
            op, inside = struct.unpack_from("<BQ", data, at)
            at += 9
            if at + inside > size or op not in (_SCHEMA, _CHANNEL, _MESSAGE):
                raise BagError(f"a record of kind {op} and {inside} bytes in a chunk of {size}")
            if kind:
                self._growth.take(_RECORD)
            if op == _MESSAGE:
                yield from _message(data[at : at + inside], keys)
            else:
                self._describe(op, data[at : at + inside])
            at += inside

    def _describe(self, kind: int, data: bytes) -> None:
        (key,) = struct.unpack_from("<H", data)
        if kind == _SCHEMA:
            self._schemas[key] = _text(data, 2)[0]
            return
        (schema,) = struct.unpack_from("<H", data, 2)
        topic, at = _text(data, 4)
        self.topics[key] = (topic, self._schemas.get(schema, ""), _text(data, at)[0])

    def _read(self, at: int, length: int) -> bytes:
        self._file.seek(at)
        data = self._file.read(length)
        if len(data) != length:
            raise BagError(f"it ends at {at + len(data)}, before {at + length}")
        return data


def _first(waiting: list[tuple[int, int, int, int, bytes]]) -> tuple[int, int, bytes]:
    time, _, _, key, data = heapq.heappop(waiting)
    return time, key, data


def _message(record: bytes, keys: set[int]) -> Iterator[tuple[int, int, bytes]]:
    key, _, time = struct.unpack_from("<HIQ", record)
    if len(record) < 22:
        raise BagError(f"a message record of {len(record)} bytes")
    if key in keys:
        yield time, key, record[22:]


def _text(data: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<I", data, at)
    if at + 4 + length > len(data):
        raise BagError(f"a text of {length} bytes in a record of {len(data)}")
    return data[at + 4 : at + 4 + length].decode(), at + 4 + length


class _Sqlite:
    """A SQLite file of plain tables: what computes as it is read (views, generated columns) is refused."""

    def __init__(self, path: Path) -> None:
        self.path = path
        open_regular(path).close()
        address = f"file:{quote(str(path.absolute()))}?mode=ro&immutable=1"
        self._database = sqlite3.connect(address, uri=True, check_same_thread=False)
        try:
            for kind, name, made in self._database.execute("SELECT type, name, sql FROM sqlite_master"):
                words = str(made or "").lower().replace("(", " ").split()
                if kind not in ("table", "index") or {"virtual", "generated", "as"} & set(words):
                    raise BagError(f"{quoted(name)} is no plain table")
            topics = self._database.execute("SELECT id, name, type, serialization_format FROM topics").fetchall()
            self._database.execute("SELECT topic_id, timestamp, data FROM messages LIMIT 1").fetchall()
        except BaseException:
            self._database.close()
            raise
        self.topics = {int(key): (str(name), str(kind), str(encoding)) for key, name, kind, encoding in topics}

    def close(self) -> None:
        self._database.close()

    def messages(self, keys: set[int]) -> Iterator[tuple[int, int, bytes]]:
        """(time, topic, bytes) in the order of their times."""
        marks = ",".join("?" * len(keys))
        query = f"SELECT timestamp, topic_id, data FROM messages WHERE topic_id IN ({marks}) ORDER BY timestamp"
        for time, key, data in self._database.execute(query, sorted(keys)):
            if not isinstance(data, bytes) or not isinstance(time, int):
                raise BagError(f"a message that is a {type(data).__name__}, of the time {quoted(time)}")
            yield time, key, data
