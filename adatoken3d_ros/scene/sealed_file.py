# SPDX-License-Identifier: Apache-2.0
"""A safetensors file that describes itself, with a checksum over every byte of it."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adatoken3d_ros.files import parse_json, replacing
from adatoken3d_ros.text import quoted, shown

KINDS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bool: "BOOL",
    torch.uint8: "U8",
}
_CONTENT, _CHECKSUM = "adatoken3d_scene", "sha256"
_UNSEALED = "0" * 64  # stands in the checksum's place while the checksum is taken
_MAX_HEADER = 64 * 1024

# Name in the file -> the shape and the kind of its numbers.
Shapes = Mapping[str, tuple[list[int], torch.dtype]]


class SceneFileError(ValueError):
    """A file that is no scene, or not one of this model and frame; the message names the offending value."""


class AnotherSceneError(SceneFileError):
    """A whole file, of another model, frame, map or format: of use to somebody else."""


def write_sealed(path: Path, parts: Mapping[str, Sequence[Tensor]], content: Mapping[str, Any]) -> None:
    """Writes tensors, each in parts that are joined, and what they are; the file appears complete or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    # Wide numbers first, so that each lies where its kind may.
    parts = dict(sorted(parts.items(), key=lambda item: -item[1][0].element_size()))
    header = _header(parts, {_CONTENT: json.dumps(content, sort_keys=True), _CHECKSUM: _UNSEALED})
    seal = hashlib.sha256(header)
    with replacing(path) as file:
        file.write(header)
        for chunk in _bytes(parts):
            seal.update(chunk)
            file.write(chunk)
        file.seek(header.index(_UNSEALED.encode()))
        file.write(seal.hexdigest().encode())


def _header(parts: Mapping[str, Sequence[Tensor]], metadata: dict[str, str]) -> bytes:
    """The length and the JSON that a safetensors file begins with."""
    described: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensors in parts.items():
        first, begin = tensors[0], end
        end += sum(tensor.numel() for tensor in tensors) * first.element_size()
        shape = [sum(len(tensor) for tensor in tensors), *first.shape[1:]]
        described[name] = {"dtype": KINDS[first.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(parts: Mapping[str, Sequence[Tensor]]) -> Iterator[memoryview]:
    for tensors in parts.values():
        for tensor in tensors:
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def checksum(data: bytes | bytearray, written: str) -> str:
    """The checksum of a file's bytes, in which `written` stands in its place."""
    at = bytes(data[: 8 + _MAX_HEADER]).index(written.encode())
    digest = hashlib.sha256(memoryview(data)[:at])
    digest.update(_UNSEALED.encode())
    digest.update(memoryview(data)[at + len(written) :])
    return digest.hexdigest()


class SealedFile:
    """The bytes of such a file, whose checksum is right.

    Args:
        path: for messages. data: what was read. wanted: formats of which it must have one.

    Attributes:
        content: what it says of itself.

    Raises:
        SceneFileError: for anything else.
    """

    def __init__(self, path: Path, data: bytearray, wanted: Collection[int]) -> None:
        self.path, self._data = path, data
        try:
            (length,) = struct.unpack_from("<Q", data)
            if length > min(_MAX_HEADER, len(data) - 8):
                raise ValueError(f"a header of {length} bytes in {len(data)}")
            self._header = parse_json(data[8 : 8 + length])
            metadata = self._header["__metadata__"]
            self.content, written = parse_json(metadata[_CONTENT]), metadata.get(_CHECKSUM)
            if not isinstance(self.content, dict):
                raise ValueError(f"it describes itself by a {type(self.content).__name__}")
        except (struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SceneFileError(f"{path} is no scene: {error}") from error
        found = self.content.get("format")
        if type(found) is not int or found not in wanted:
            read = " and ".join(map(str, wanted))
            raise AnotherSceneError(f"{path} has format {quoted(found)}, this program reads {read}")
        sealed = isinstance(written, str) and re.fullmatch("[0-9a-f]{64}", written)
        if not sealed or written.encode() not in data[:length]:
            raise SceneFileError(f"{path} is damaged: it has no checksum")
        if (summed := checksum(data, written)) != written:
            raise SceneFileError(f"{path} is damaged: its checksum is {summed}, it says {written}")
        self._at = 8 + length

    def check_names(self, names: set[str]) -> None:
        """Raises SceneFileError for tensors of other names."""
        if (found := set(self._header) - {"__metadata__"}) != names:
            raise SceneFileError(
                f"{self.path} is no scene: it holds {shown(', '.join(sorted(found)) or 'nothing', 200)}"
            )

    def length(self, name: str) -> int:
        """Rows of a tensor; 0 for one that is described wrongly."""
        return self._number(name, "shape")

    def _number(self, name: str, key: str) -> int:
        described = self._header[name]
        listed = described.get(key) if isinstance(described, dict) else None
        first = listed[0] if isinstance(listed, list) and listed else 0
        return first if type(first) is int and 0 <= first <= len(self._data) else 0

    def tensors(self, shapes: Shapes) -> dict[str, Tensor]:
        """Views of the data; raises SceneFileError where it is not of these shapes and kinds."""
        path, data, at = self.path, self._data, self._at
        tensors = {}
        for name, (shape, kind) in shapes.items():
            size = int(np.prod(shape, dtype=object)) * kind.itemsize
            found, begin = self._header[name], self._number(name, "data_offsets")
            if found != {"dtype": KINDS[kind], "shape": shape, "data_offsets": [begin, begin + size]}:
                raise SceneFileError(f"{path}: {name} is {quoted(found)}, expected {KINDS[kind]} {shape}")
            if at + begin + size > len(data) or (at + begin) % kind.itemsize:
                raise SceneFileError(
                    f"{path}: {name} is at {at + begin} to {at + begin + size} of {len(data)} bytes, past the end or "
                    "askew"
                )
            part = torch.frombuffer(data, dtype=torch.uint8, count=size, offset=at + begin) if size else torch.empty(0)
            if kind == torch.bool and size and int(part.max()) > 1:
                raise SceneFileError(f"{path}: {name} holds {int(part.max())}, neither true nor false")
            tensors[name] = (part.view(kind) if size else part.to(kind)).reshape(shape)
        return tensors
