# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end the process cleanly, in bounded time, however often they come."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Calls `on_stop` once, from a thread of its own, when the process is asked to end; further requests do nothing.

    rclpy's own handlers invalidate the context at once, so that nobody can be told anything any more, and a second
    SIGINT breaks into the shutdown; use this with `rclpy.init(signal_handler_options=SignalHandlerOptions.NO)`.
    A Python handler alone would not do either: it runs only when the main thread comes back from waiting.

    Args:
        on_stop: called with the signal's name.
        limit: seconds after which the process leaves with status 0 even if something still hangs.
    """

    def __init__(self, on_stop: Callable[[str], object], limit: float = 1.2) -> None:
        self._on_stop = on_stop
        self._limit = limit
        self._done = threading.Event()

    def __enter__(self) -> StopSignals:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        for number in SIGNALS:
            signal.signal(number, _noted)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, name="stop-signals", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        # The signals stay caught: one that comes during the last steps must not change the exit status.
        self._done.set()

    def _watch(self) -> None:
        number = self._read.recv(1)[0]
        while number not in SIGNALS:
            number = self._read.recv(1)[0]
        self._on_stop(signal.Signals(number).name)
        if not self._done.wait(self._limit):
            print(
                f"still busy {self._limit} s after {signal.Signals(number).name}, leaving", file=sys.stderr, flush=True
            )
            os._exit(0)


def _noted(number: int, frame: FrameType | None) -> None:
    """The wakeup descriptor has told the watching thread already."""
