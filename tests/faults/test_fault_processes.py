# SPDX-License-Identifier: Apache-2.0
"""The faults that need several processes, tested in a process where nothing else was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = "ADATOKEN3D_FAULT_NODE"  # set where `test_fault_node.py` has a process to itself
LIMIT = 600  # seconds


@pytest.mark.timeout(LIMIT + 30)
@pytest.mark.skipif(ALONE in os.environ, reason="this is that process")
def test_faults_that_need_processes() -> None:
    """Every test of `test_fault_node.py` passes."""
    pytest.importorskip("rclpy")
    file = Path(__file__).with_name("test_fault_node.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env={**os.environ, ALONE: "1"}, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stdout + done.stderr
    closing = done.stdout.splitlines()[-1]
    assert "5 passed" in closing, closing
