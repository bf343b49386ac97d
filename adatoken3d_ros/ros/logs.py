# SPDX-License-Identifier: Apache-2.0
"""The library's log in the log of a ROS node."""

from __future__ import annotations

import logging

from rclpy.node import Node


class ForwardedLog(logging.Handler):
    """Forwards records to the log of a node, with the name of the logger that they came from."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._log = node.get_logger()
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            self._log.error(text)
        elif record.levelno >= logging.WARNING:
            self._log.warning(text)
        else:
            self._log.info(text)
