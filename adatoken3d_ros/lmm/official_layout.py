# SPDX-License-Identifier: Apache-2.0
"""What the loaders of architectures have in common: names by prefix, layers, a tower apart, the end of a load.

An architecture's own loader says which names its tensors have and what else it takes or refuses.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adatoken3d_ros.lmm.identity import model_identity
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.quantized.foreign import chosen_kind, original_of
from adatoken3d_ros.lmm.quantized.linear import check_device
from adatoken3d_ros.lmm.safetensors_files import (
    CheckpointError,
    LoadReport,
    Progress,
    Stored,
    check_filled,
    fill,
    inventory,
    local_directory,
    read_json,
    some,
)
from adatoken3d_ros.text import quoted


def by_prefix(names: Iterable[str], table: Sequence[tuple[str, str]]) -> dict[str, str]:
    """{our name: its name in the checkpoint}; the first prefix of `table` that fits is exchanged for the other."""
    found = {}
    for ours in names:
        prefix, official = next(pair for pair in table if ours.startswith(pair[0]))
        found[ours] = official + ours.removeprefix(prefix)
    return found


def linear_weights(model: SpatialLMM) -> list[str]:
    """Names of what may be had in few bits: the weights of the linear layers inside the language model's layers."""
    inside = set(model.decoder.linears())
    return [f"{name}.weight" for name, module in model.named_modules() if module in inside]


def check_layers(said: int, stored: Iterable[str], path: Path) -> None:
    """Raises CheckpointError unless the files hold as many decoder layers as config.json says."""
    found = {int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    if len(found) != said:
        raise CheckpointError(f"{path}: config.json has num_hidden_layers {said}, the files hold {len(found)}")


def check_vocabulary(tokenizer: Any, file: Path, rows: int) -> None:
    """Raises CheckpointError for a tokenizer with more tokens than the model's table has rows."""
    if len(tokenizer) > rows:
        raise CheckpointError(f"{file} has {len(tokenizer)} tokens, the model's table has {rows}")


def tower_directory(path: Path, vision_path: str | Path | None) -> Path | None:
    """Where the vision tower is for a checkpoint that carries none: what is given, else the directory of a checkpoint
    that `mm_vision_tower` names relative to this one, if there is one.

    Raises:
        CheckpointError: if the given one is no directory, or config.json is missing or damaged.
    """
    if vision_path is not None:
        return local_directory(vision_path)
    named = read_json(path / "config.json").get("mm_vision_tower")
    if not isinstance(named, str) or not named or Path(named).is_absolute():
        return None
    try:
        found = (path / named).resolve()
        return found if found != path.resolve() and (found / "config.json").is_file() else None
    except (OSError, RuntimeError, ValueError):  # no path at all: too long, a null byte, links in a circle
        return None


def locate(
    wanted: Mapping[str, str], stored: Mapping[str, Stored], prefix: str, vision_dir: Path | None, path: Path
) -> tuple[dict[str, Stored], str]:
    """Our name -> stored tensor, for all that were found, and where the vision tower comes from.

    Args:
        wanted: {our name: its name in the checkpoint}. stored: what the checkpoint holds.
        prefix: of the vision tower's tensors there.
        vision_dir: directory of a vision tower, for a checkpoint that carries none.
        path: the checkpoint.

    Raises:
        CheckpointError: for a tower that is missing or incomplete.
    """
    sources = {ours: stored[official] for ours, official in wanted.items() if official in stored}
    tower = {ours: official for ours, official in wanted.items() if official.startswith(prefix)}
    missing = [official for ours, official in tower.items() if ours not in sources]
    if not missing:
        return sources, "embedded"
    # Some but not all is a damaged checkpoint, none is one that relies on a separate tower.
    if len(missing) < len(tower):
        raise CheckpointError(f"{path} lacks {some(missing)} of its vision tower")
    if vision_dir is None:
        named = quoted(read_json(path / "config.json").get("mm_vision_tower"), 200)
        raise CheckpointError(
            f"{path} carries no vision tower ({prefix}*), and there is none at what config.json names, {named}: give "
            "the directory of that model as vision_path"
        )
    separate = inventory(vision_dir)
    for ours, official in tower.items():
        bare = official.removeprefix(prefix)
        found = separate.get(f"vision_model.{bare}") or separate.get(bare) or separate.get(official)
        if found is None:
            raise CheckpointError(f"{vision_dir} lacks vision_model.{bare}")
        sources[ours] = found
    return sources, str(vision_dir)


def finish(
    model: SpatialLMM,
    sources: Mapping[str, Stored],
    wanted: Mapping[str, str],
    *,
    path: Path,
    tokenizer: Path,
    ignored: Sequence[str],
    started: float,
    vision: str = "embedded",
    tied: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device,
    quantization: str = "none",
    progress: Progress | None = None,
    free_memory: Callable[[torch.device], int] | None = None,
) -> LoadReport:
    """Fills a model that was made on the meta device, with what is computed and not stored, too; see `fill`.

    Args:
        path: the checkpoint. tokenizer: its file. ignored: tensors that no part of the model takes.
        started: of the load, by `time.monotonic`. vision: where the tower comes from.
        quantization: of the language model's linear layers; a checkpoint that has them so already stays as it is.

    Raises:
        CheckpointError: as `fill` and `check_filled`; for a checkpoint that is quantised in another way.
        DeviceLacks: for a device that cannot make such products.
    """
    linears = linear_weights(model)
    stored = {sources[name].quantization for name in linears if name in sources} - {"none"}
    try:
        kind = chosen_kind(quantization, stored, path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if kind != "none":
        check_device(kind, device)
    filled = fill(
        model,
        sources,
        wanted,
        dtype=dtype,
        device=device,
        tied=tied,
        quantization=kind,
        linears=linears,
        progress=progress,
        free_memory=free_memory,
    )
    model.quantization = kind
    original = original_of(path) if stored else filled.original
    model.loaded_identity = model_identity(model.shape_hash, filled.weights, kind, original)
    model.decoder.restore_buffers(device)
    model.vision.restore_buffers(device)
    check_filled(model)
    return LoadReport(
        path=path,
        tensors=len(sources),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        ignored=sorted(ignored),
        files=tuple(sorted({source.file for source in sources.values()})),
        vision=vision,
        tokenizer=tokenizer,
        seconds=time.monotonic() - started,
    )
