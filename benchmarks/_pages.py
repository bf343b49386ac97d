# SPDX-License-Identifier: Apache-2.0
"""Figures in pages: the command that measures them writes them, a test compares them with their JSON.

They stand between `<!-- name: F -->`, where F is the JSON that they are of, and `<!-- end of name -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

_BLOCK = re.compile(r"<!-- (\w+)(?:: (\S+))? -->\n(.*?)<!-- end of \1 -->", re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[str, str | None, str]]:
    """(name, JSON if it is told, text) of each block of a page."""
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        yield found[1], found[2], found[3]


def check(pages: Sequence[Path], name: str) -> None:
    """Raises ValueError for a page without such a block, OSError for one that cannot be read."""
    for page in pages:
        if all(found != name for found, _, _ in blocks(page)):
            raise ValueError(f"{page} has no <!-- {name} --> with <!-- end of {name} --> behind it")


def put(page: Path, name: str, text: str, source: Path | None = None) -> None:
    """Replaces the text of the page's first block of that name; `source`: its JSON, as the page shall name it.

    Raises:
        ValueError: for a page without one.
    """
    check([page], name)
    content = page.read_text(encoding="utf-8")
    found = next(one for one in _BLOCK.finditer(content) if one[1] == name)
    told = "" if source is None else f": {source.as_posix()}"
    block = f"<!-- {name}{told} -->\n{text}<!-- end of {name} -->"
    page.write_text(content[: found.start()] + block + content[found.end() :], encoding="utf-8")


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head."""
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *rest]


def points(difference: float) -> str:
    """A difference of accuracies in points, with its sign."""
    rounded = round(100 * difference, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"
