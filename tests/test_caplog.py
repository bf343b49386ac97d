# SPDX-License-Identifier: Apache-2.0
"""The log of the package is heard in tests although ROS's launch has changed Python's loggers."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


class LaunchLogger(logging.Logger):
    """As launch's: its pytest plugins make it the class of every later logger."""

    def __init__(self, name: str, level: int = logging.NOTSET) -> None:
        super().__init__(name, level)
        self.propagate = False


@pytest.fixture
def launch_is_installed() -> Iterator[None]:
    before = logging.getLoggerClass()
    logging.setLoggerClass(LaunchLogger)
    logging.getLogger("adatoken3d_ros.made_before")
    yield
    logging.setLoggerClass(before)


@pytest.mark.parametrize("name", ["adatoken3d_ros.made_before", "adatoken3d_ros.made_later"])
def test_loggers_of_launch_are_heard(launch_is_installed: None, caplog: pytest.LogCaptureFixture, name: str) -> None:
    logging.getLogger(name).warning("here")
    assert caplog.messages == ["here"]
