# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint anew: its linear layers in few bits, or only as safetensors. Tensor by tensor, shard by shard."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.identity import tensor_digest, weights_identity
from adatoken3d_ros.lmm.official_layout import linear_weights
from adatoken3d_ros.lmm.quantized.foreign import KEY, described, kept_kind
from adatoken3d_ros.lmm.quantized.formats import fits, quantise
from adatoken3d_ros.lmm.safetensors_files import (
    CheckpointError,
    Progress,
    Stored,
    inventory,
    local_directory,
    opened,
    pickled,
    read_json,
)

SHARD = 2 * 10**9  # bytes of a file, at most, unless one tensor is larger
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".gguf")


def from_pickles(source: Path, out: Path, say: Callable[[str], None]) -> None:
    """Makes safetensors of a checkpoint's PyTorch files, in a process of its own that reads nothing but weights.

    Args:
        source: directory with PyTorch files. out: a directory that is there. say: told which file is opened.

    Raises:
        CheckpointError: for what that process refuses, in its words.
    """
    command = [sys.executable, "-m", "adatoken3d_ros.lmm.quantized.pickles", str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            say(line.strip())
        problem = process.stderr.read()
    if process.returncode:
        last = (problem.strip().splitlines() or [f"status {process.returncode}"])[-1]
        raise CheckpointError(f"{source}: {last}")
    copy_others(source, out)


def write(source: Path, out: Path, kind: str, *, vision_path: Path | None = None, progress: Progress) -> int:
    """Writes the checkpoint of `source` to `out`, which is there and empty; returns the bytes of its weights.

    Args:
        kind: of its linear layers, one of `formats.KINDS` or `none`.
        vision_path: its vision tower, if it carries none. progress: told (share that is done, file).

    Raises:
        CheckpointError: for a checkpoint that cannot be read, or is quantised already.
    """
    source = local_directory(source)
    if kept := kept_kind(source):
        raise CheckpointError(f"{source} is quantised to {kept} already: convert the checkpoint that it was made of")
    model = registry.outline(source, vision_path)
    names = registry.architecture_of(source).import_loader().official_names(model)
    linears = {names[name] for name in linear_weights(model)} if kind != "none" else set()
    ours = {official: name for name, official in names.items()}
    stored = inventory(source)
    shards = _Shards(out)
    digests: dict[str, bytes] = {}
    files = sorted({one.file for one in stored.values()})
    for done, file in enumerate(files):
        progress(done / len(files), file.name)
        with opened(file) as shard:
            for name, one in stored.items():
                if one.file != file:
                    continue
                tensor = shard.get_tensor(one.name)
                if name in ours:
                    digests[ours[name]] = tensor_digest(tensor)
                for part, made in _parts(tensor, name, one, kind, linears).items():
                    shards.add(f"{name}{part}", made)
    size = shards.finish()
    copy_others(source, out)
    if kind != "none":
        whole = digests.keys() == names.keys()
        original = weights_identity(digests.items()) if whole else ""
        content = {**read_json(source / "config.json"), KEY: described(kind, original)}
        (out / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    progress(1.0, "config.json")
    return size


def copy_others(source: Path, out: Path) -> None:
    """Everything of a checkpoint but its weights: configuration, tokenizer, strategies, what is known of its answers,
    and a vision tower that lies inside it."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, out / file.name)
    tower = read_json(source / "config.json").get("mm_vision_tower")
    folders = ["strategies"]
    if isinstance(tower, str) and (parts := Path(tower).parts) and not {"..", "/"}.intersection(parts):
        folders.append(tower)
    for name in folders:
        if (source / name).is_dir():
            shutil.copytree(source / name, out / name, dirs_exist_ok=True)


def has_pickles_alone(source: Path) -> bool:
    """Whether the weights come as PyTorch files and not as safetensors."""
    return not any(source.glob("*.safetensors")) and bool(pickled(source))


def _parts(tensor: torch.Tensor, name: str, one: Stored, kind: str, linears: set[str]) -> dict[str, torch.Tensor]:
    if name in linears and fits(one.shape, kind):
        if not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise CheckpointError(f"{name} in {one.file} holds values that are not finite")
        return quantise(tensor, kind)
    return {"": tensor}


class _Shards:
    """Collects tensors, and writes them where they have become SHARD bytes."""

    def __init__(self, out: Path) -> None:
        self._out, self._now, self._files, self._size, self._total = out, dict[str, Any](), list[Path](), 0, 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._now and self._size + tensor.nbytes > SHARD:
            self._flush()
        self._now[name] = tensor.contiguous()
        self._size += tensor.nbytes

    def finish(self) -> int:
        """Names the files by how many there are; returns the bytes of all tensors."""
        self._flush()
        for number, file in enumerate(self._files, 1):
            name = "model" if len(self._files) == 1 else f"model-{number:05d}-of-{len(self._files):05d}"
            file.rename(self._out / f"{name}.safetensors")
        return self._total

    def _flush(self) -> None:
        file = self._out / f"part-{len(self._files)}"
        save_file(self._now, file, metadata={"format": "pt"})
        self._files.append(file)
        self._total += self._size
        self._now, self._size = {}, 0
