# SPDX-License-Identifier: Apache-2.0
"""Awaiting other threads from a coroutine that an rclpy executor runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from typing import Any, TypeVar

from rclpy.node import Node
from rclpy.task import Future

T = TypeVar("T")


async def completed(node: Node, source: ThreadFuture[T]) -> T:
    """The result of a future that another thread completes, or its exception."""
    await finished(node, source)
    return source.result()


async def finished(node: Node, source: ThreadFuture[Any]) -> None:
    """Awaits a future that another thread completes, whatever comes of it."""
    mirror: Future = Future(executor=node.executor)

    def done(_: ThreadFuture[Any]) -> None:
        mirror.set_result(None)
        # A coroutine that awaits is looked at only when the executor wakes up.
        if node.executor is not None:
            node.executor.wake()

    source.add_done_callback(done)
    await mirror


async def beside(node: Node, function: Callable[[], Any]) -> None:
    """Awaits a call that takes long, in a thread of its own."""
    done: ThreadFuture[None] = ThreadFuture()

    def run() -> None:
        try:
            function()
        except BaseException as error:  # whatever it is, somebody waits for it
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="adatoken3d-beside", daemon=True).start()
    await completed(node, done)
