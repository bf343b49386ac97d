# SPDX-License-Identifier: Apache-2.0
"""A process of the tests that dies does not take the others with it, nor hold them up for ever."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 120.0
DIES = """
import os, pathlib, pytest

@pytest.fixture
def dies():
    yield
    flag = pathlib.Path(__file__).with_name("died")
    if {always} or not flag.exists():
        flag.touch()
        os.abort()

def test_first(): pass
def test_last(dies): pass
"""


@pytest.mark.parametrize("always", [False, True])
def test_after_a_crash_the_file_goes_on_once(tmp_path: Path, always: bool) -> None:
    """With a single test left in it, where the scheduler of xdist would wait for ever."""
    folder = tmp_path / "tests" / "ros"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").touch()
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "tests")
    for number in range(4):
        (folder / f"test_{number}.py").write_text("def test_it(): pass\n")
    (folder / "test_2_dies.py").write_text(DIES.format(always=always))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    if always:
        assert ended.returncode == 1 and "maximum crashed workers reached" in ended.stdout, ended.stdout
    else:
        assert ended.returncode == 0 and " passed, 1 rerun in" in ended.stdout, ended.stdout
        assert "this file goes on in a new process" in ended.stdout
