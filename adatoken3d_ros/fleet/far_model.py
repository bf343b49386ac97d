# SPDX-License-Identifier: Apache-2.0
"""What a robot has of a model that runs elsewhere: its sizes, where patches lie, and how views are encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from adatoken3d_ros.engine.loading import checkpoint_path, device_of, dtype_of
from adatoken3d_ros.fleet.encoder import encoder_identity, load_encoder, outline_files, outline_of
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
        identity: of the model there; empty while it is not known.
        device: where the tower is, or the scene's tensors are.
        pictures: whether pictures are sent: what stands for a patch's features here is its number then.

    Attributes:
        encoder_is: `encoder_identity` of what encodes here; empty where pictures are sent.
    """

    encoder_is = ""

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


def far_model(settings: Settings, hello: Mapping[str, Any] | None) -> FarModel:
    """What a robot needs of the model that an engine has told of; of model.path's, while none has (None).

    Raises:
        ValueError, OSError: for a checkpoint here that is of another model, and for what cannot be loaded.
    """
    path = checkpoint_path(settings["model.path"])
    vision: Path | None = type(path)(settings["model.vision_path"]) if settings["model.vision_path"] else None
    if settings["engine.encode"] == "picture":
        files = outline_files(path, vision) if hello is None else hello.get("files")
        if not isinstance(files, dict) or not all(isinstance(text, str) for text in files.values()):
            raise ValueError(f"{settings['engine.url']} tells no configuration of its model")
        try:
            outline = outline_of(files)
        except CheckpointError as error:
            raise ValueError(f"the model of {settings['engine.url']}: {error}") from error
        made = FarModel(outline, "", torch.device("cpu"), pictures=True)
    else:
        device = device_of(settings["model.device"])
        encoder_is = encoder_identity(path, vision)
        if hello is not None:
            _check_encoder(encoder_is, settings, hello)  # before it is loaded
        encoder = load_encoder(
            path, vision, device=torch.device(device), dtype=dtype_of(settings["model.dtype"], device)
        )
        made = FarModel(encoder, "", torch.device(device), pictures=False)
        made.encoder_is = encoder_is
    if hello is not None:
        made.identity = identity_of(made, settings, hello)
    return made


def identity_of(made: FarModel, settings: Settings, hello: Mapping[str, Any]) -> str:
    """The identity of the model that an engine has told of.

    Raises:
        ValueError: where the engine has another model than what is here is of.
    """
    identity, url = hello.get("model"), settings["engine.url"]
    if not isinstance(identity, str) or not identity:
        raise ValueError(f"the shared engine calls its model {quoted(identity)}")
    if not made.pictures:
        _check_encoder(made.encoder_is, settings, hello)
    if (shape := shape_of(made)) != hello.get("shape"):
        raise ValueError(
            f"{url} has a model of {quoted(hello.get('shape'))}, here its configuration is of {shape} (model.path, of "
            "which, with engine.encode picture, the file config.json is enough)"
        )
    return identity


def _check_encoder(own: str, settings: Settings, hello: Mapping[str, Any]) -> None:
    if own != hello.get("encoder"):
        raise ValueError(
            f"{checkpoint_path(settings['model.path'])} encodes views as {own}, {settings['engine.url']} has "
            f"{quoted(hello.get('encoder'))}: they are of different models (model.path), or engine.encode is to be "
            "picture"
        )


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
