# SPDX-License-Identifier: Apache-2.0
"""A node as a program: until a signal comes; an exception that comes out of a callback costs the callback alone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import rclpy
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future

from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.ros.parameters import at_start
from adatoken3d_ros.ros.signals import StopSignals
from adatoken3d_ros.text import described, trace

N = TypeVar("N", bound=Node)


class Failures:
    """Counts and logs what came out of callbacks and listeners; the node goes on without what those would have done.

    Attributes:
        log: the node's.
        count: how many there were. last: the last of them, in words.
    """

    def __init__(self, log: Any) -> None:
        self.log = log
        self.count = 0
        self.last = ""

    def note(self, error: Exception) -> None:
        """One more, in any thread."""
        self.count += 1
        self.last = described(error)
        text = trace(error, heading=f"a callback failed, the node goes on (failure {self.count})")
        self.log.error(text, throttle_duration_sec=WARN_SECONDS)


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


def run(
    name: str,
    make: Callable[[], N],
    serve: Callable[[N, SingleThreadedExecutor, Future[Any]], object],
    *,
    refused: int,
    args: list[str] | None = None,
) -> int:
    """Runs a node until SIGINT or SIGTERM; 0 then, `refused` if a parameter given at the start cannot be used.

    Args:
        name: of the program, for what it says before there is a node.
        make: the node.
        serve: spins it in the executor until the future is done, with the signal's name, or the context is shut down.
        args: of the command line, for rclpy; None: this process's.
    """
    stopped: Future[Any] = Future()
    with StopSignals(stopped.set_result):
        rclpy.init(args=args, signal_handler_options=SignalHandlerOptions.NO)
        try:
            executor = SingleThreadedExecutor()
            try:
                node = make()
            except (InvalidParameterValueException, InvalidParameterTypeException) as error:
                print(f"{name}: {at_start(error)}", file=sys.stderr)
                return refused
            executor.add_node(node)
            serve(node, executor, stopped)
            executor.shutdown()
            return 0
        finally:
            rclpy.try_shutdown()
