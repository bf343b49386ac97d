# SPDX-License-Identifier: Apache-2.0
"""Child processes that never outlive their parent, however it ends (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from adatoken3d_ros.cli import interrupts

GRACE_SECONDS = 1.0  # between the interrupt and the kill: with what the parent itself needs, less than two in all
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
LOG_LINES = 5


class ProcessError(OSError):
    """A process that should run has ended, or one that should have done its work has failed."""


class Processes:
    """Starts processes, each in a process group of its own, and ends them all on leaving.

    Ctrl-C in a terminal thus reaches only the parent, which decides what happens. A parent that is killed takes its
    children with it: the kernel is told so before each of them starts.

    Args:
        show: let the processes write to the terminal; otherwise into files, whose end is part of an error's message.
    """

    def __init__(self, *, show: bool = False) -> None:
        self._show = show
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._kill_at: float | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._logs = tempfile.TemporaryDirectory(prefix="adatoken3d-")

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """Starts `command`; it should run until `stop`."""
        # Loaded here: the child between fork and exec should do nothing but the system call.
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        parent = os.getpid()

        def die_with_parent() -> None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            # A shell has what it starts in the background ignore SIGINT, which is inherited; here it is the way to end.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        with open(self.log(name), "wb") as log:
            output = None if self._show else log
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._processes[name] = process
        return process

    def run(self, name: str, command: Sequence[str]) -> None:
        """Runs `command` to its end. Raises ProcessError if it fails, or if another process ends meanwhile."""
        process = self.start(name, command)
        while process.poll() is None:
            self.check(besides=name)
            time.sleep(0.05)
        del self._processes[name]
        if process.returncode:
            raise ProcessError(self._obituary(name, process.returncode))

    def check(self, besides: str = "") -> None:
        """Raises ProcessError if a process, `besides` apart, has ended; the message has the end of what it wrote.

        Raises KeyboardInterrupt if there was an interrupt that got lost.
        """
        interrupts.check()
        for name, process in sorted(self._processes.items()):
            if name != besides and (code := process.poll()) is not None:
                raise ProcessError(self._obituary(name, code))

    def log(self, name: str) -> Path:
        """Where the process's output goes."""
        return Path(self._logs.name) / f"{name}.log"

    def last_words(self, name: str) -> str:
        """The end of what the process wrote, to be added to an error's message; empty if that is not known."""
        lines = [line.strip() for line in self.log(name).read_text(errors="replace").splitlines() if line.strip()]
        return f"; it wrote last: {' | '.join(lines[-LOG_LINES:])}" if lines else ""

    def interrupt(self) -> None:
        """SIGINT to every process, once; does not wait.

        Until `stop` returns, signals to the parent are ignored: a second Ctrl-C must not leave half of them behind.
        """
        if self._kill_at is not None:
            return
        self._kill_at = time.monotonic() + GRACE_SECONDS
        self._handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        for process in self._processes.values():
            _signal_group(process, signal.SIGINT)

    def stop(self) -> None:
        """Interrupts every process and kills those that are still there GRACE_SECONDS later. Safe to call twice."""
        self.interrupt()
        assert self._kill_at is not None
        try:
            while time.monotonic() < self._kill_at and any(p.poll() is None for p in self._processes.values()):
                time.sleep(0.02)
            for process in self._processes.values():
                _signal_group(process, signal.SIGKILL)
                process.wait()
            self._processes.clear()
            self._logs.cleanup()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)

    def _obituary(self, name: str, code: int) -> str:
        return f"the process {name} ended with status {code}{self.last_words(name)}"


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signals the group of a process that has not been waited for, or what is left of the group."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
