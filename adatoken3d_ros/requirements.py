# SPDX-License-Identifier: Apache-2.0
"""Which packages this Python lacks, and the line that installs them: `python3 requirements.py`, status 1 if any.

Runs without anything but the standard library, at build time, too.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

# What the node needs to answer, beside ROS: modules that rosdep's packages bring, and those of requirements.txt.
OF_THE_SYSTEM = ("cv2", "numpy", "PIL", "psutil", "scipy", "yaml")
OF_PIP = ("torch", "transformers", "tokenizers", "safetensors")


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def missing(is_here: Callable[[str], bool] = _is_here) -> list[str]:
    """The modules that this Python cannot import."""
    return [module for module in (*OF_THE_SYSTEM, *OF_PIP) if not is_here(module)]


def requirements_file() -> str:
    """requirements.txt of the source tree, or of the workspace's share folder that holds this module."""
    here = Path(__file__).resolve()
    for file in (
        here.parents[1] / "requirements.txt",
        *(p / "share/adatoken3d/requirements.txt" for p in here.parents),
    ):
        if file.is_file():
            return str(file)
    return "requirements.txt"


def advice(modules: list[str]) -> str:
    """What is missing and the lines that install it; empty if nothing is."""
    if not modules:
        return ""
    lines = []
    if set(modules) & set(OF_PIP):
        lines.append(
            f"{sys.executable} -m pip install -r {requirements_file()} (in a virtual environment, see docs/robot.md)"
        )
    if set(modules) & set(OF_THE_SYSTEM):
        lines.append("rosdep install --from-paths src --ignore-src -y")
    return f"{sys.executable} has no {', '.join(modules)}; this installs what is missing: {' and '.join(lines)}"


def main() -> int:
    text = advice(missing())
    if text:
        print(text)
    return 1 if text else 0


if __name__ == "__main__":
    sys.exit(main())
