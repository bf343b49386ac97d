# SPDX-License-Identifier: Apache-2.0
"""Questions of a file, questions that somebody types, and an answer that is shown as it is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

MAX_QUESTIONS_BYTES = 1 << 20


def read_questions(path: Path) -> tuple[str, ...]:
    """One question a line; empty lines and lines that begin with # are passed over. Raises ValueError, OSError."""
    with path.open("rb") as file:
        content = file.read(MAX_QUESTIONS_BYTES + 1)
    if len(content) > MAX_QUESTIONS_BYTES:
        raise ValueError(f"{path} is larger than {MAX_QUESTIONS_BYTES} bytes")
    try:
        lines = [line.strip() for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    questions = tuple(line for line in lines if line and not line.startswith("#"))
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def typed_questions(prompt: str = "> ") -> Iterator[str]:
    """Lines from standard input until an empty one or its end; on a terminal they can be edited, after a prompt."""
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  input() edits lines with it
    while True:
        try:
            line = input(prompt if terminal else "").strip()
        except EOFError:
            if terminal:
                print()
            return
        if not line:
            return
        yield line


@dataclass
class Streamed:
    """Writes a text as it grows; what was written is not taken back: a text that changes goes on in a new line."""

    out: TextIO
    written: str = ""

    def show(self, text: str, tokens: int = 0) -> None:
        """The text so far."""
        kept = os.path.commonprefix([self.written, text])
        piece = text[len(kept) :] if kept == self.written else f"\n{text}"
        self.written = text
        print(piece, end="", file=self.out, flush=True)
