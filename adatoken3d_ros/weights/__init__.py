# SPDX-License-Identifier: Apache-2.0
"""Where the weights that come with the package lie, once there are some worth shipping (see docs/model_card.md)."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def embedded_path() -> Path:
    """Directory of the small model that comes with the package, as `lmm.registry.load` takes it.

    Raises:
        FileNotFoundError: if this version carries no weights.
    """
    path = Path(str(files("adatoken3d_ros.weights").joinpath("embedded")))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is missing: this version has no trained model, see docs/model_card.md")
    return path
