# SPDX-License-Identifier: Apache-2.0
"""What a robot has of a model that runs elsewhere: its sizes, where patches lie, and how views are encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch

from adatoken3d_ros.engine.loading import checkpoint_path, device_of, dtype_of
from adatoken3d_ros.fleet.encoder import encoder_identity, load_encoder, outline_of
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.safetensors_files import CheckpointError
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.text import quoted

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from adatoken3d_ros.scene.frames import PosedFrame
    from adatoken3d_ros.scene.patches import PatchConfig, PatchPoints


class FarModel:
    """In the place of a `SpatialLMM`, for a scene memory: places are lifted where the model is.

    Args:
        outline: the model, of which the language model has no weights.
        identity: of the model there.
        device: where the tower is, or the scene's tensors are.
        pictures: whether pictures are sent: what stands for a patch's features here is its number then.
    """

    def __init__(self, outline: SpatialLMM, identity: str, device: torch.device, *, pictures: bool) -> None:
        self._outline = outline
        self.identity = identity
        self.device = device
        self.pictures = pictures
        self.whole_sizes = outline.sizes
        self.sizes = replace(outline.sizes, feature_width=1) if pictures else outline.sizes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outline, name)

    def place_tokens(self, frame: PosedFrame, config: PatchConfig) -> PatchPoints:
        """As `SpatialLMM.place_tokens`."""
        return self._outline.place_tokens(frame, config)

    def encode_views(
        self, rgb: Sequence[NDArray[np.uint8]], *, should_stop: Callable[[], bool] | None = None
    ) -> list[torch.Tensor]:
        """As `SpatialLMM.encode_views`; where pictures are sent, the patches' numbers (P, 1)."""
        if not self.pictures:
            return [one.to(self.device) for one in self._outline.encode_views(rgb, should_stop=should_stop)]
        grids = [self._outline.grid(*image.shape[:2]) for image in rgb]
        return [torch.arange(rows * columns, dtype=torch.float32)[:, None] for rows, columns in grids]

    def lift_places(self, xyz: torch.Tensor) -> torch.Tensor:
        """Nothing: (..., 0)."""
        return torch.zeros(*xyz.shape[:-1], 0, device=self.device)


def far_model(settings: Settings, hello: Mapping[str, Any]) -> SpatialLMM:
    """What a robot needs of the model that an engine has told of.

    Raises:
        ValueError, OSError: for a checkpoint here that is of another model, and for what cannot be loaded.
    """
    identity = hello.get("model")
    if not isinstance(identity, str):
        raise ValueError(f"the shared engine calls its model {quoted(identity)}")
    url = settings["engine.url"]
    if settings["engine.encode"] == "picture":
        files = hello.get("files")
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise ValueError(f"{url} tells no configuration of its model")
        try:
            outline = outline_of(files)
        except CheckpointError as error:
            raise ValueError(f"the model of {url}: {error}") from error
        made = FarModel(outline, identity, torch.device("cpu"), pictures=True)
    else:
        path = checkpoint_path(settings["model.path"])
        vision: Path | None = type(path)(settings["model.vision_path"]) if settings["model.vision_path"] else None
        if (own := encoder_identity(path, vision)) != hello.get("encoder"):
            raise ValueError(
                f"{path} encodes views as {own}, {url} has {quoted(hello.get('encoder'))}: they are of different "
                "models (model.path), or engine.encode is to be picture"
            )
        device = device_of(settings["model.device"])
        dtype = dtype_of(settings["model.dtype"], device)
        encoder = load_encoder(path, vision, device=torch.device(device), dtype=dtype)
        made = FarModel(encoder, identity, torch.device(device), pictures=False)
    if (shape := shape_of(made)) != hello.get("shape"):
        raise ValueError(f"{url} has a model of {quoted(hello.get('shape'))}, its configuration is of {shape}")
    return cast(SpatialLMM, made)


def shape_of(model: Any) -> dict[str, Any]:
    """What robot and engine must agree about, by name."""
    sizes = getattr(model, "whole_sizes", model.sizes)
    geometry = sizes.patches
    return {
        "layers": len(model.decoder),
        "first_gate": model.decoder.first_gate,
        "features": sizes.feature_width,
        "tokens": sizes.tokens,
        "parts": sizes.parts,
        "voxel_size": sizes.voxel_size,
        "patches": [geometry.rows, geometry.columns],
    }
