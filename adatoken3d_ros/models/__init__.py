# SPDX-License-Identifier: Apache-2.0
"""Weights that come with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def embedded_path() -> Path:
    """Directory of the small model that comes with the package, as `model.checkpoint.load` takes it.

    Raises:
        FileNotFoundError: if the package was installed without it, or lies in an archive.
    """
    path = Path(str(files("adatoken3d_ros.models").joinpath("embedded")))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is missing: the package was installed without its model")
    return path
