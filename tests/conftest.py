# SPDX-License-Identifier: Apache-2.0
"""What every folder of tests shares."""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # most tests need no torch
    from adatoken3d_ros.decoder.adapter import Decoder


def pytest_configure() -> None:
    """What a shell starts in the background without job control ignores Ctrl-C, and so would what the tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file at a time, as xdist's own `loadfile`, which waits for ever after a crash.

    A process runs a test once it knows the next one, or that there is none. One that took a crashed one's place is told
    of a single file: where that had a single test left, nothing came any more, and 90 minutes passed so.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _reschedule(self, node: Any) -> None:
            super()._reschedule(node)
            while self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
                self._assign_work_unit(node)
            if not self.workqueue:
                node.shutdown()  # after what it was given

    return Files(config, log)


_crashes: Counter[str] = Counter()


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport, sched: Any) -> None:
    """Of tests with ROS one process may die: the file goes on in another, and the summary counts a `rerun`.

    Fast DDS crashes about once in some thousand participants that are destroyed (inside of `rcl_node_fini`), in the
    test's own process, and xdist then blames whichever test came next.
    """
    _crashes[crashitem] += 1
    if crashitem.startswith(("tests/ros/", "tests/faults/")) and _crashes.total() == 1:
        report.outcome = "rerun"  # type: ignore[assignment]
        sched.config.get_terminal_writer().line(f"\n{report.longrepr}; this file goes on in a new process")


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.LogCaptureFixture]:
    """caplog hears the package where ROS's launch is installed, too.

    Its pytest plugins make every later logger one that keeps its records from the root's handlers.
    """
    before = logging.getLoggerClass()
    logging.setLoggerClass(logging.Logger)
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if name.partition(".")[0] == "adatoken3d_ros" and isinstance(logger, logging.Logger):
            monkeypatch.setattr(logger, "propagate", True)
    yield caplog
    logging.setLoggerClass(before)


@pytest.fixture(scope="session", params=[4, 2], ids=["mha", "gqa"])
def decoder(request: pytest.FixtureRequest) -> Decoder:
    """A random Llama with as many key/value heads as heads, then one with half of them."""
    from tests.decoder.oracle import tiny_decoder

    return tiny_decoder(request.param)


@pytest.fixture(scope="session")
def mha() -> Decoder:
    from tests.decoder.oracle import tiny_decoder

    return tiny_decoder()


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of an architecture's tiny checkpoint, named after it; not to be written to."""
    from tests.architectures import write_tiny

    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: write_tiny(name, root / f"tiny-{name}"))
