# SPDX-License-Identifier: Apache-2.0
"""A program of its own: PyTorch files of a checkpoint, opened for weights alone, become safetensors.

    python -m adatoken3d_ros.lmm.quantized.pickles SOURCE OUT

`torch.load(weights_only=True)` builds tensors and plain containers and calls nothing that a file names; torch before
2.10 had holes in that (CVE-2025-32434, CVE-2026-24747) and is refused. Each file is said before it is opened.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import save_file

_SAFE_FROM = (2, 10)
_PATTERNS = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt")  # the first that finds files counts
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler).*")


class Refused(ValueError):
    """A file that is not opened, or holds no weights; the message names it."""


def files_of(source: Path) -> list[Path]:
    """The files with weights. Raises Refused if there are none."""
    for pattern in _PATTERNS:
        if found := sorted(one for one in source.glob(pattern) if not _NO_WEIGHTS.match(one.name)):
            return found
    raise Refused(f"{source} has no PyTorch file with weights")


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file. Raises Refused for one with anything else in it, or that is damaged."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise Refused(f"{path} holds more than weights and was not run: {reason}") from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise Refused(f"{path} is damaged, or written by a torch before 1.6: {str(error)[:200]}") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise Refused(f"{path} holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise Refused(f"{path}: {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor")
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in content.items()}


def main(words: list[str]) -> None:
    """Raises Refused."""
    source, out = map(Path, words)
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_FROM:
        raise Refused(f"torch {torch.__version__} does not open PyTorch files safely: 2.10 or a newer one does")
    files = files_of(source)
    for number, file in enumerate(files, 1):
        print(f"opening {file} ({file.stat().st_size / 1e9:.2f} GB) for its weights alone", flush=True)
        name = "model" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}"
        save_file(read(file), out / f"{name}.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as error:
        sys.exit(str(error))
