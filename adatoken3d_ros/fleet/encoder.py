# SPDX-License-Identifier: Apache-2.0
"""A model without its language model: what a robot needs of it to encode its views, or only to place their patches."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.identity import tensor_digest, weights_identity
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.official_layout import tower_directory
from adatoken3d_ros.lmm.safetensors_files import (
    CheckpointError,
    Stored,
    fill,
    inventory,
    local_directory,
    opened,
    some,
)

_FILES = ("config.json", "preprocessor_config.json")
_TOWER = "tower"  # folder of a vision tower that is apart
_MOST_FILE = 2**20


def _without_language(path: Path, vision_path: Path | None) -> tuple[SpatialLMM, dict[str, Stored], dict[str, str]]:
    """A model of which nothing but its language model's sizes is left of that; where its other tensors lie, by our
    names, and what they are called there."""
    model = registry.outline(path, vision_path)
    official = registry.architecture_of(path).import_loader().official_names(model)
    delattr(model, next(name for name, child in model.named_children() if child is model.decoder.language))
    stored, apart = inventory(path), tower_directory(path, vision_path)
    tower = inventory(apart) if apart is not None else {}
    sources, wanted = {}, {ours: official[ours] for ours in model.state_dict()}
    for ours, called in wanted.items():
        bare = ours.removeprefix("vision.tower.")
        found = stored.get(called) or tower.get(f"vision_model.{bare}") or tower.get(bare) or tower.get(called)
        if found is None:
            raise CheckpointError(f"{path} lacks {called}, which its views are encoded with")
        sources[ours] = found
    return model, sources, wanted


def encoder_identity(path: Path, vision_path: Path | None = None) -> str:
    """16 hexadecimal digits of the weights that views are encoded with, and of the model's shape.

    Raises:
        CheckpointError: for a checkpoint that lacks some.
    """
    path = local_directory(path)
    model, sources, _ = _without_language(path, vision_path)

    def digests() -> list[tuple[str, bytes]]:
        found = []
        for file in sorted({source.file for source in sources.values()}):
            with opened(file) as shard:
                mine = [(ours, source) for ours, source in sources.items() if source.file == file]
                found += [(ours, tensor_digest(shard.get_tensor(source.name))) for ours, source in mine]
        return found

    return f"{model.shape_hash}-{weights_identity(digests())}"


def load_encoder(
    path: Path, vision_path: Path | None, *, device: torch.device, dtype: torch.dtype | None
) -> SpatialLMM:
    """A model that encodes views; its language model stays without weights (on the meta device).

    Raises:
        CheckpointError: for a checkpoint that lacks something, or does not fit into memory.
    """
    path = local_directory(path)
    model, sources, wanted = _without_language(path, vision_path)
    fill(model, sources, wanted, dtype=dtype, device=device)
    model.vision.restore_buffers(device)
    return model


def outline_files(path: Path, vision_path: Path | None = None) -> dict[str, str]:
    """The texts from which `outline_of` makes the model without weights, by their names."""
    path = local_directory(path)
    found = {name: (path / name).read_text(encoding="utf-8") for name in _FILES if (path / name).is_file()}
    if (apart := tower_directory(path, vision_path)) is not None:
        found[f"{_TOWER}/config.json"] = (apart / "config.json").read_text(encoding="utf-8")
    return found


def outline_of(files: Mapping[str, str]) -> SpatialLMM:
    """The model on the meta device, of texts that came from elsewhere: JSON, which is checked as a checkpoint's is.

    Raises:
        CheckpointError: for other files, and for a configuration of no model.
    """
    if strange := files.keys() - {*_FILES, f"{_TOWER}/config.json"}:
        raise CheckpointError(f"no configuration of a model: {some(sorted(strange))}")
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            if len(text) > _MOST_FILE:
                raise CheckpointError(f"{name} has {len(text)} characters, more than {_MOST_FILE}")
            file = Path(folder) / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text, encoding="utf-8")
            json.loads(text)
        apart = Path(folder) / _TOWER
        return registry.outline(Path(folder), apart if apart.is_dir() else None)
