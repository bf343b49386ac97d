# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM end a ROS program cleanly, in bounded time, at any moment, however often they come.

    leave_at_once()            # the first statement: while modules are imported, nobody has to be told anything
    with StopSignals(stop):    # from here on somebody has: `stop` ends what runs
        ...
    leave(0)                   # the last statement: what the interpreter would still do serves nobody

A command of the terminal has `cli.interrupts` instead: there Ctrl-C is an exception and another exit status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_at_once() -> None:
    """From now on SIGINT and SIGTERM end the process with status 0, until `StopSignals` takes them over.

    To be called before anything heavy is imported. A KeyboardInterrupt would be lost in the callback of a weak
    reference, or made another exception by an import that tells its own story.
    """
    for number in SIGNALS:
        signal.signal(number, _leave_early)
    # The launch files start the programs with both held back, so that none comes before this.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def leave(status: int) -> NoReturn:
    """Ends the process now. Everything of ROS has to be closed.

    What the interpreter would still do, taking torch or Open3D apart and waiting for threads, takes seconds in which a
    signal would have its default effect again.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # whoever read it has gone
            stream.flush()
    os._exit(status)


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
        # In this order no signal falls between the handlers before and these.
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _noted)
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
            leave(0)


def _leave_early(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{signal.Signals(number).name} during the start: ending\n".encode())
    os._exit(0)


def _noted(number: int, frame: FrameType | None) -> None:
    """The wakeup descriptor has told the watching thread already."""
