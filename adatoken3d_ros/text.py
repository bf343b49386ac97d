# SPDX-License-Identifier: Apache-2.0
"""Text and values from outside, as they may stand in a message, a log line or a status: escaped, and of bounded length.

Whoever makes an error puts the offending value into it with `quoted`. What leaves the node goes through `shown` (one
line) or `trace` (a traceback) once more, so that nothing which was forgotten forges a line or fills a disk.
"""

from __future__ import annotations

import traceback
from array import array
from collections.abc import Iterator, Mapping, Sequence, Set

import numpy as np

QUOTE = 80  # characters of one value inside a message
MESSAGE = 2000  # characters of a whole message, status or log line
TRACE = 8000  # characters of a traceback

_DEEPEST = 4  # levels of nesting that are written
_LONG_INTEGER = 256  # bits; a longer one is told by its length: writing it down takes quadratic time


def escaped(text: str) -> str:
    """`text` with what is not printable (control characters, line breaks, half surrogates, marks that change the
    direction of writing) as Python writes it in a literal, such as \\n or \\x1b. Escaping twice changes nothing."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def shown(text: object, limit: int = MESSAGE) -> str:
    """A text as one line of at most `limit` characters (of at least 40); says how much was cut off. Idempotent."""
    text = _text(text)
    # No character becomes shorter, so what is behind the limit is not needed; a megabyte is not escaped for nothing.
    line = escaped(text[: limit + 1])
    if len(text) <= limit and len(line) <= limit:
        return line
    kept = limit - 40
    return f"{line[:kept]}... ({len(text) - kept} more characters)"


def quoted(value: object, limit: int = QUOTE) -> str:
    """A value as it may stand inside a message: what `repr` says, escaped, in some `limit` characters.

    Text is cut behind its first `limit` characters and sequences, mappings and arrays behind the elements that fit;
    then it is said how long the whole is. Never more than that of a value is looked at.
    """
    return _quoted(value, limit, 0)


class Trace(str):
    """A text of several lines, each of which is escaped."""


def trace(error: BaseException, limit: int = TRACE, heading: object = "") -> Trace:
    """An exception with its traceback, over several lines; the exception's own text is one of them, escaped.

    Args:
        error: the exception.
        limit: characters of the traceback. heading: a line above it.
    """
    lines = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        stack = "".join(traceback.format_tb(current.__traceback__))
        lines.append(f"{stack}{type(current).__name__}: {shown(current)}")
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    text = "\ncaused this:\n".join(reversed(lines))
    # The end says what happened; what is cut is the way there.
    if len(text) > limit:
        text = f"({len(text) - limit} characters left out)\n{text[-limit:]}"
    return Trace(f"{shown(heading)}\n{text}" if heading else text)


def described(error: BaseException, limit: int = MESSAGE) -> str:
    """An exception that nobody foresaw as one line: its kind and its text."""
    return shown(f"{type(error).__name__}: {shown(error, limit)}", limit)


def _quoted(value: object, limit: int, depth: int) -> str:
    if isinstance(value, str | bytes | bytearray):
        unit = "characters" if isinstance(value, str) else "bytes"
        part = value[:limit]
        written = repr(part if isinstance(part, str) else bytes(part))
        return written if len(value) <= limit else f"{written}... ({len(value)} {unit})"
    if isinstance(value, int) and value.bit_length() > _LONG_INTEGER:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, np.ndarray):
        items = (one.item() for one in value.flat)
        shape = "" if value.ndim == 1 else f"shape {value.shape}"
        return _elements((_quoted(one, limit, depth + 1) for one in items), value.size, "[]", limit, shape)
    if isinstance(value, Mapping | Sequence | Set | array | memoryview) and depth >= _DEEPEST:
        return f"{len(value)} elements"
    if isinstance(value, Mapping):
        pairs = (f"{_quoted(key, limit, depth + 1)}: {_quoted(one, limit, depth + 1)}" for key, one in value.items())
        return _elements(pairs, len(value), "{}", limit)
    if isinstance(value, Sequence | Set | array | memoryview):
        brackets = "()" if isinstance(value, tuple) else "[]"
        return _elements((_quoted(one, limit, depth + 1) for one in value), len(value), brackets, limit)
    return shown(_repr(value), max(limit, 41))


def _elements(elements: Iterator[str], count: int, brackets: str, limit: int, shape: str = "") -> str:
    """As many of `count` elements as fit into `limit` characters, at least one, which then may be cut."""
    written: list[str] = []
    length = 0
    for text in elements:
        length += len(text) + 2
        if written and length > limit:
            break
        written.append(text)
    inside = ", ".join(written)
    if len(inside) > 2 * limit:
        inside = f"{inside[: 2 * limit]}..."
    notes = [shape] if shape else []
    if len(written) < count:
        inside += ", ..."
        notes.append(f"{count} in all")
    return f"{brackets[0]}{inside}{brackets[1]}" + (f" ({', '.join(notes)})" if notes else "")


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # what cannot even be written must not hide what it was to explain
        return f"<{type(value).__name__}, which raises {type(error).__name__} when it is written>"


def _repr(value: object) -> str:
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__name__}, which raises {type(error).__name__} when it is written>"
