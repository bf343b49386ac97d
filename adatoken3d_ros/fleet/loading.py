# SPDX-License-Identifier: Apache-2.0
"""From settings to an engine, in this process or shared; what is imported for one is not for the other."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from adatoken3d_ros.engine import loading
from adatoken3d_ros.fleet.tokens import check_token, read_token
from adatoken3d_ros.settings import Settings

if TYPE_CHECKING:
    from adatoken3d_ros.engine.engine import Engine


def load_engine(settings: Settings, progress: Callable[[float, str], None] | None = None) -> Engine:
    """The engine that the settings name; raises as `engine.loading.load_engine` and `connecting.connected`."""
    if not settings["engine.url"]:
        return loading.load_engine(settings, progress)
    from adatoken3d_ros.fleet.connecting import connected

    robot = settings["engine.robot"] or host_name()
    return connected(settings, token_of(settings["engine.token"]), robot, progress)


def token_of(value: str) -> str:
    """The token of `engine.token`: empty, itself, or the first line of the file that is named in its place.

    Raises:
        ValueError: for what cannot be a token, and for a file that cannot be read; the text names it.
    """
    if value.startswith("/"):
        try:
            return read_token(value, least=1)
        except ValueError as error:
            raise ValueError(f"engine.token: {error}") from error
    return value and check_token(value, "engine.token", least=1)


def host_name() -> str:
    """This machine's name, as a robot may be called."""
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._~-") else "-" for c in socket.gethostname())
    return name[:64].strip("-._~") or "robot"
