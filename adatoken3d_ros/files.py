# SPDX-License-Identifier: Apache-2.0
"""Files that come from outside: opened without waiting, read once and no further than a limit, replaced as a whole."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_DEPTH = 32  # levels of lists and objects in JSON


class UnusableFile(OSError):
    """Something else than a regular file, or one that is larger than may be; the message names it."""


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a file for reading, and only a file: a pipe, a device or a socket is neither waited for nor read.

    Raises:
        UnusableFile: for what is no regular file, links followed.
        OSError: for what cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a NUL in the name
        raise UnusableFile(f"{str(path)!r} is no name of a file") from error
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UnusableFile(f"{path} is no regular file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_file(path: str | Path, limit: int) -> bytearray:
    """The content of a regular file of at most `limit` bytes, read once.

    Raises:
        UnusableFile: for what is no regular file, or larger.
        OSError: for what cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise UnusableFile(f"{path} has {size} bytes, more than {limit}")
        content = bytearray(size)
        view, done = memoryview(content), 0
        while done < size and (read := file.readinto(view[done:])):  # type: ignore[attr-defined]
            done += read
        view.release()
        del content[done:]  # it shrank meanwhile; what was appended is not read
        return content


def parse_json(content: bytes | bytearray | str) -> Any:
    """A JSON text's value, nested no deeper than MAX_DEPTH.

    Raises:
        ValueError: for anything else.
    """
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, list | dict)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the place of `path` when all is written and safe; else nothing changes.

    Raises:
        OSError: if it cannot be written.
    """
    path = Path(path)
    draft = path.parent / f".{path.name}.{secrets.token_hex(4)}.part"
    try:
        handle = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except ValueError as error:  # a NUL in the name
        raise UnusableFile(f"{str(path)!r} is no name of a file") from error
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
