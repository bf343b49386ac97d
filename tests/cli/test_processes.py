# SPDX-License-Identifier: Apache-2.0
"""Processes end with their parent, and an error says what they wrote."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from adatoken3d_ros.cli.processes import ProcessError, Processes

FOREVER = "import signal\nprint('ready', flush=True)\nsignal.pause()"
STUBBORN = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{FOREVER}"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for_output(processes: Processes, name: str) -> None:
    while not processes.log(name).read_text():
        processes.check()


def test_leaving_interrupts() -> None:
    with Processes() as processes:
        process = processes.start("sleeper", python(FOREVER))
        wait_for_output(processes, "sleeper")
        logs = processes.log("sleeper").parent
    assert process.returncode == -signal.SIGINT
    assert not logs.exists()


def test_leaving_interrupts_where_the_shell_had_it_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        test_leaving_interrupts()
    finally:
        signal.signal(signal.SIGINT, before)


def test_leaving_kills_what_ignores_the_interrupt() -> None:
    with Processes() as processes:
        process = processes.start("stubborn", python(STUBBORN))
        wait_for_output(processes, "stubborn")
    assert process.returncode == -signal.SIGKILL


def test_each_process_has_a_group_of_its_own_and_the_group_ends_with_it() -> None:
    # The grandchild has no handle of ours; it holds the write end of the pipe that stands for its life.
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {STUBBORN!r}])\n{FOREVER}"
    with Processes() as processes:
        process = processes.start("parent", python(code))
        while processes.log("parent").read_text().count("ready") < 2:
            processes.check()
        group = os.getpgid(process.pid)
        assert group == process.pid
    with pytest.raises(ProcessLookupError):
        while True:
            # The group is gone when nobody in it is left to be reaped.
            os.killpg(group, 0)


def test_signals_are_handled_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Processes() as processes:
        processes.interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is before
    processes.stop()
    assert signal.getsignal(signal.SIGINT) is before


def test_death_of_a_process_is_an_error_with_its_last_words() -> None:
    with Processes() as processes:
        process = processes.start("short", python("print('so long')\nraise SystemExit(3)"))
        process.wait()
        with pytest.raises(ProcessError, match="the process short ended with status 3; it wrote last: so long"):
            processes.check()


def test_run_waits_for_the_end_and_reports_failure() -> None:
    with Processes() as processes:
        processes.run("good", python("pass"))
        processes.check()
        with pytest.raises(ProcessError, match="the process bad ended with status 1; it wrote last: .*ValueError: no"):
            processes.run("bad", python("raise ValueError('no')"))


def test_run_ends_early_when_another_process_dies() -> None:
    with Processes() as processes:
        processes.start("node", python("raise SystemExit(4)"))
        with pytest.raises(ProcessError, match="the process node ended with status 4"):
            processes.run("writer", python(FOREVER))
