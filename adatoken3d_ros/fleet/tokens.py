# SPDX-License-Identifier: Apache-2.0
"""Tokens by which robots come in: one for all of them, or one for each; what is wrong with one is told, never it."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from adatoken3d_ros.files import UnusableFile, read_file
from adatoken3d_ros.text import quoted, shown

LEAST, MOST = 16, 512  # letters of a token
NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._~-]{0,63}")  # of robots
_MOST_FILE = 2**20


def check_token(token: str, where: str, least: int = LEAST) -> str:
    """The token, if it may be one.

    Raises:
        ValueError: for one that is too short or too long, or holds what is no visible ASCII; says `where` it is from.
    """
    if not least <= len(token) <= MOST:
        raise ValueError(f"{where}: a token has {least} to {MOST} letters, this one {len(token)}")
    for place, letter in enumerate(token, 1):
        if not "!" <= letter <= "~":
            what = "a space" if letter.isspace() else "no ASCII" if letter > "~" else "a control character"
            raise ValueError(f"{where}: letter {place} of the token is {what}; visible ASCII is allowed")
    return token


def read_token(path: str | Path, least: int = LEAST) -> str:
    """The first line of a file; raises as `check_token`, and ValueError for a file that cannot be read."""
    lines = _lines(path)
    return check_token(lines[0].strip() if lines else "", f"{path}, line 1", least)


def read_tokens(path: str | Path) -> dict[str, str]:
    """{robot: token} of a file with a line `NAME: TOKEN` for each robot; empty lines, and those after #, say nothing.

    Raises:
        ValueError: as `read_token`, and for a robot that has no name, or two lines; the text names the line.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, token = (part.strip() for part in line.partition(":"))
        where = f"{path}, line {number}"
        if not colon or not NAMES.fullmatch(name):
            raise ValueError(f"{where}: NAME: TOKEN is expected, the name of at most 64 of A-Z a-z 0-9 . _ ~ -")
        if name in found:
            raise ValueError(f"{where}: {name} has a token already")
        if check_token(token, where) in found.values():
            raise ValueError(f"{where}: another robot has this token: whoever has it could call itself by both names")
        found[name] = token
    if not found:
        raise ValueError(f"{path} names no robot: a line for each, NAME: TOKEN")
    return found


def _lines(path: str | Path) -> list[str]:
    try:
        return read_file(path, _MOST_FILE).decode("utf-8", "replace").splitlines()
    except (OSError, UnusableFile) as error:
        raise ValueError(f"no token can be read: {shown(error)}") from error


def bearer(authorization: str) -> str:
    """The token of an Authorization header; empty if it has none."""
    kind, _, token = authorization.partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def same(given: str, expected: str) -> bool:
    """Whether two tokens are equal, in a time that depends on neither's letters nor on their lengths."""
    digests = (hashlib.sha256(one.encode("utf-8", "surrogateescape")).digest() for one in (given, expected))
    return hmac.compare_digest(*digests)


def refusal(name: str) -> str:
    """What a robot is told that does not come in, whatever is wrong."""
    return f"the request bears no token, or not that of {quoted(name, 80)} (engine.token, engine.robot)"
