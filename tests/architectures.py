# SPDX-License-Identifier: Apache-2.0
"""The architectures that ship, and a tiny checkpoint of each: what holds for one is tested for all of them.

They are found by their folders, so a new one is tested as soon as it is there.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

NAMES = sorted(
    path.parent.name for path in (Path(__file__).parents[1] / "adatoken3d_ros" / "lmm").glob("*/checkpoint.py")
)


def write_tiny(name: str, path: Path, **sizes: Any) -> Path:
    """Writes the tiny checkpoint of an architecture into `path`; returns it."""
    module: Any = import_module(f"adatoken3d_ros.lmm.{name}.tiny")
    written: Path = module.write_tiny_checkpoint(path, **sizes)
    return written
