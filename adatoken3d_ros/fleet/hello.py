# SPDX-License-Identifier: Apache-2.0
"""What a shared engine says of itself to a robot that comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adatoken3d_ros.engine.loading import checkpoint_path
from adatoken3d_ros.fleet import wire
from adatoken3d_ros.fleet.encoder import encoder_identity, outline_files
from adatoken3d_ros.fleet.far_model import shape_of
from adatoken3d_ros.settings import Settings


def hello_of(engine: Any, settings: Settings, max_body: int) -> dict[str, Any]:
    """As JSON takes it.

    Args:
        engine: which was loaded by the settings. max_body: bytes of a request that are taken.
    """
    path = checkpoint_path(settings["model.path"])
    vision = Path(settings["model.vision_path"]) if settings["model.vision_path"] else None
    return {
        "version": wire.VERSION,
        "model": engine.model.identity,
        "model_id": engine.model_id,
        "encoder": encoder_identity(path, vision),
        "shape": shape_of(engine.model),
        "files": outline_files(path, vision),
        "fitted": {name: one.text() for name, one in engine.fitted.items()},
        "max_body": max_body,
    }
