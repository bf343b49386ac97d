# SPDX-License-Identifier: Apache-2.0
"""The node's log: whatever is said, a line stays a line of bounded length, and a library's warnings are no flood."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from rclpy.impl import rcutils_logger
from rclpy.impl.rcutils_logger import RcutilsLogger

from adatoken3d_ros.text import Trace, shown, trace

WARN_SECONDS = 5.0  # between two warnings or errors from one line of the program

# The caller of a line is who called this file; rclpy lets others add their files here.
rcutils_logger._internal_callers.append(os.path.realpath(__file__))


class NodeLog(RcutilsLogger):
    """rclpy's logger. Only a traceback (`text.trace`) may have several lines; all else is escaped and cut."""

    def log(self, message: Any, severity: Any, *args: Any, **kwargs: Any) -> bool:
        """As of RcutilsLogger, whose further arguments differ from one ROS to another."""
        text = message if isinstance(message, Trace) else shown(message)
        return bool(super().log(str(text), severity, *args, **kwargs))


class ForwardedLog(logging.Handler):
    """Forwards the library's log to the node's; of one line's warnings and errors, one every WARN_SECONDS.

    Args:
        log: where to.
        clock: seconds, monotonic.
    """

    def __init__(self, log: Any, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._log = log
        self._clock = clock
        self._last: dict[tuple[str, int], tuple[float, int]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """As of logging.Handler."""
        text = f"{record.name}: {record.getMessage()}"
        if record.levelno < logging.WARNING:
            self._log.info(text)
            return
        line, now = (record.pathname, record.lineno), self._clock()
        then, left_out = self._last.get(line, (-WARN_SECONDS, 0))
        if now - then < WARN_SECONDS:
            self._last[line] = then, left_out + 1
            return
        self._last[line] = now, 0
        if left_out:
            text += f" ({left_out} more of these were left out)"
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text = trace(error, heading=text)
        if record.levelno >= logging.ERROR:
            self._log.error(text)
        else:
            self._log.warning(text)
