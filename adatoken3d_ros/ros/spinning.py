# SPDX-License-Identifier: Apache-2.0
"""One place where an exception ends that nobody caught: that of a callback costs the callback, not the node."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.task import Future


def spin(executor: SingleThreadedExecutor, stopped: Future[Any], on_error: Callable[[Exception], object]) -> None:
    """Runs callbacks until `stopped` is done.

    Args:
        executor: whose nodes' callbacks run.
        stopped: may be completed in any thread.
        on_error: told every exception that came out of a callback; the other callbacks go on. What it raises is lost.

    Raises:
        ExternalShutdownException: if the ROS context was shut down.
    """
    # A task of its own wakes the executor and is work, so that it looks at `stopped` once more.
    stopped.add_done_callback(lambda _: _ignore(executor.create_task(_ignore)))
    while not stopped.done():
        if not executor.context.ok():
            raise ExternalShutdownException()
        try:
            executor.spin_once()
        except ExternalShutdownException:
            raise
        except Exception as error:
            with contextlib.suppress(Exception):
                on_error(error)


def _ignore(_: object = None) -> None:
    """There is nothing to do."""
