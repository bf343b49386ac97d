# SPDX-License-Identifier: Apache-2.0
"""From settings to an engine, in this process or shared; what is imported for one is not for the other."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from adatoken3d_ros.engine import loading
from adatoken3d_ros.files import UnusableFile, read_file
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.text import shown

if TYPE_CHECKING:
    from adatoken3d_ros.engine.engine import Engine

_MOST_TOKEN = 4096


def load_engine(settings: Settings, progress: Callable[[float, str], None] | None = None) -> Engine:
    """The engine that the settings name; raises as `engine.loading.load_engine` and `remote_engine.connected`."""
    if not settings["engine.url"]:
        return loading.load_engine(settings, progress)
    from adatoken3d_ros.fleet.remote_engine import connected

    robot = settings["engine.robot"] or host_name()
    return connected(settings, read_token(settings["engine.token"]), robot, progress)


def read_token(value: str) -> str:
    """A token, or what the file says that is named in its place.

    Raises:
        ValueError: for a file that cannot be read; the text names it.
    """
    if not value.startswith("/"):
        return value
    try:
        return read_file(value, _MOST_TOKEN).decode("ascii").strip()
    except (OSError, UnusableFile, UnicodeDecodeError) as error:
        raise ValueError(f"engine.token: {shown(error)}") from error


def host_name() -> str:
    """This machine's name, as a robot may be called."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._~-") else "-" for c in socket.gethostname())
    return name[:64].strip("-._~") or "robot"
