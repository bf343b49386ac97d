# SPDX-License-Identifier: Apache-2.0
"""What is missing on a robot is named, with the line that installs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from adatoken3d_ros import requirements

ROOT = Path(__file__).resolve().parents[1]


def test_nothing_is_missing_here() -> None:
    assert requirements.missing() == []
    assert requirements.advice([]) == ""


def test_what_pip_brings_and_what_the_system_brings() -> None:
    lacks = requirements.missing(lambda module: module not in ("torch", "cv2"))
    assert lacks == ["cv2", "torch"]
    both, pip, system = (requirements.advice(modules) for modules in (lacks, ["torch"], ["cv2"]))
    assert sys.executable in both and "cv2, torch" in both
    assert f"-m pip install -r {ROOT / 'requirements.txt'}" in pip and "rosdep" not in pip
    assert "rosdep install" in system and "pip" not in system


def test_in_a_workspace_the_file_of_the_share_folder_is_named(tmp_path: Path) -> None:
    module = tmp_path / "lib" / "python3.12" / "site-packages" / "adatoken3d_ros" / "requirements.py"
    module.parent.mkdir(parents=True)
    module.write_text((ROOT / "adatoken3d_ros" / "requirements.py").read_text())
    share = tmp_path / "share" / "adatoken3d" / "requirements.txt"
    share.parent.mkdir(parents=True)
    share.touch()
    # No site: a Python without any package, as a robot's.
    done = subprocess.run([sys.executable, "-I", "-S", str(module)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "torch, transformers" in done.stdout and f"-r {share}" in done.stdout
