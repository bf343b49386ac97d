# SPDX-License-Identifier: Apache-2.0
"""From settings to a shared engine, which need not be there yet: it is met as soon as it can be reached."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from adatoken3d_ros.engine import loading
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.fleet.far_model import far_model
from adatoken3d_ros.fleet.link import Address, Link, LinkError, Unreachable
from adatoken3d_ros.fleet.remote_engine import RemoteEngine, of_fallback
from adatoken3d_ros.pruning.strategy import StrategyError
from adatoken3d_ros.settings import Settings

logger = logging.getLogger(__name__)


def connected(
    settings: Settings, token: str, robot: str, progress: Callable[[float, str], None] | None = None
) -> Engine:
    """The shared engine that the settings name, for a robot that is called so and has this token.

    Raises:
        ValueError, OSError: for one that refuses the token or has another model than model.path, and as
            `engine.loading.load_engine` for the fallback; the text names it. One that is out of reach is met later.
    """
    url = settings["engine.url"]
    link = Link(Address(url, token, settings["engine.ca_file"], robot))
    if progress is not None:
        progress(0.0, f"asking {url} for its model")
    hello: dict[str, Any] | None = None
    try:
        hello = link.hello()
        link.hello()  # once more: the first had to find the way
    except Unreachable as error:
        who = "the fallback answers" if settings["engine.fallback"] else "no question is answered (engine.fallback)"
        logger.warning("%s; until it can be, %s", error, who)
    except LinkError as error:
        raise ValueError(f"engine.url: {error}") from error
    model = far_model(settings, hello)
    if settings["model.tell_poses"] and not model.tells_poses:
        raise ValueError("model.tell_poses is true, but this model reads no views and cannot be told where they are")
    fallback = None
    if settings["engine.fallback"]:
        fallback = loading.load_engine(of_fallback(settings), progress)
    try:
        engine = RemoteEngine(model, hello, link, settings, fallback)
    except StrategyError as error:
        raise ValueError(f"the strategies of {url}: {error}") from error
    try:  # a wrong one is told at once
        loading.strategy_of(engine, settings["strategy"])
    except ValueError as error:
        unknown = "" if engine.met else f" (the strategies of {url} are not known before it is reached)"
        raise ValueError(f"{error}{unknown}") from error
    return engine
