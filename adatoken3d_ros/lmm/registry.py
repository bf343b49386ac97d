# SPDX-License-Identifier: Apache-2.0
"""Which architecture a checkpoint is of: its config.json says it, and the architecture's own loader does the rest.

A new one is a folder beside this file and a line in `ARCHITECTURES`; one that lives elsewhere is made known by
`register`, before the node or a command is started.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch

from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.quantized.foreign import foreign_config, foreign_files
from adatoken3d_ros.lmm.safetensors_files import CheckpointError, LoadReport, Progress, local_directory, read_json
from adatoken3d_ros.text import quoted


class LoadedModel(NamedTuple):
    """A model in evaluation mode without gradients, its tokenizer, and what was read."""

    model: SpatialLMM
    tokenizer: Any
    report: LoadReport


class Loader(Protocol):
    """What an architecture's module has; both raise CheckpointError, naming the file, tensor or size that is wrong."""

    def load(
        self,
        path: Path,
        *,
        dtype: torch.dtype | None,
        device: torch.device | str,
        vision_path: str | Path | None,
        quantization: str,
        progress: Progress | None,
        free_memory: Callable[[torch.device], int] | None,
    ) -> tuple[SpatialLMM, Any, LoadReport]:
        """See `load` of this file."""
        ...

    def outline(self, path: Path, vision_path: str | Path | None) -> SpatialLMM:
        """The model on the meta device, of its config.json alone."""
        ...

    def official_names(self, model: Any) -> dict[str, str]:
        """For each tensor of the model, by our name, its name in the checkpoint."""
        ...


@dataclass(frozen=True)
class Architecture:
    """How a checkpoint of it is known, and what loads it.

    Attributes:
        model_type: of its config.json. class_name: among the `architectures` there.
        loader: name of the module, which is imported when the first such checkpoint is met.
        untrained: name of the module that makes a model to be trained from nothing, if it has one (`lmm.untrained`).
    """

    model_type: str
    class_name: str
    loader: str
    untrained: str = ""

    def made(self, content: dict[str, Any]) -> bool:
        """Whether a config.json is of this architecture; what it says in `model_type` counts more."""
        if "model_type" in content:
            return bool(content["model_type"] == self.model_type)
        classes = content.get("architectures")
        return isinstance(classes, list) and self.class_name in classes

    def import_loader(self) -> Loader:
        return cast(Loader, import_module(self.loader))


ARCHITECTURES = (
    Architecture(
        "llava_llama",
        "LlavaLlamaForCausalLM",
        "adatoken3d_ros.lmm.llava3d.checkpoint",
        "adatoken3d_ros.lmm.llava3d.untrained",
    ),
    Architecture("qwen3_vl", "Qwen3VLForConditionalGeneration", "adatoken3d_ros.lmm.qwen3vl.checkpoint"),
    Architecture(
        "llava_qwen",
        "LlavaQwenForCausalLM",
        "adatoken3d_ros.lmm.video3d.checkpoint",
        "adatoken3d_ros.lmm.video3d.untrained",
    ),
)
_further: list[Architecture] = []


def register(architecture: Architecture) -> None:
    """Makes another architecture known to everything in this process that loads a model.

    Raises:
        ValueError: if its model_type is known already.
    """
    if architecture.model_type in (one.model_type for one in known()):
        raise ValueError(f"there is an architecture {architecture.model_type!r} already")
    _further.append(architecture)


def known() -> tuple[Architecture, ...]:
    """Those that ship, and those that were registered."""
    return (*ARCHITECTURES, *_further)


def architecture_of(path: str | Path) -> Architecture:
    """The architecture of the checkpoint in a local directory.

    Raises:
        CheckpointError: if config.json is missing or damaged, or names none that is known; the message lists those.
    """
    directory = local_directory(path)
    file = directory / "config.json"
    if not file.exists() and (other := foreign_files(directory)):  # GGUF has everything in one file
        raise CheckpointError(other)
    content = read_json(file)
    if other := foreign_config(content, file):
        raise CheckpointError(other)
    for one in known():
        if one.made(content):
            return one
    says = ", ".join(f"{k} is {quoted(content[k], 200)}" for k in ("model_type", "architectures") if k in content)
    names = ", ".join(f"{one.model_type} ({one.class_name})" for one in known())
    raise CheckpointError(f"{file}: {says or 'neither model_type nor architectures'}; known are {names}")


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vision_path: str | Path | None = None,
    quantization: str = "none",
    progress: Progress | None = None,
    free_memory: Callable[[torch.device], int] | None = None,
) -> LoadedModel:
    """Loads model and tokenizer from a local directory; nothing is downloaded and no pickle is opened.

    Args:
        path: directory with config.json, the tokenizer and safetensors files.
        dtype: of all weights; None keeps what is stored.
        device: where the weights go.
        vision_path: directory of the vision tower, where the checkpoint carries none.
        quantization: of the weights of the language model's linear layers, `none` or one of
            `lmm.quantized.formats.KINDS`; they are converted while they are read. A checkpoint that has them so
            already is `none`, too.
        progress: called with (fraction of the bytes, name of the file) as loading goes on.
        free_memory: bytes free on a device; the machine's own answer if None.

    Raises:
        CheckpointError: if anything is missing, damaged, misshapen or does not fit into memory, or the architecture is
            not known.
    """
    path = local_directory(path)
    found = architecture_of(path).import_loader()
    model, tokenizer, report = found.load(
        path,
        dtype=dtype,
        device=device,
        vision_path=vision_path,
        quantization=quantization,
        progress=progress,
        free_memory=free_memory,
    )
    return LoadedModel(model, tokenizer, report)


def outline(path: str | Path, vision_path: str | Path | None = None) -> SpatialLMM:
    """The model of a checkpoint without its weights (on the meta device): its parts and sizes; raises as `load`."""
    path = local_directory(path)
    return architecture_of(path).import_loader().outline(path, vision_path)


def write_tiny(directory: str | Path) -> None:
    """Writes a tiny checkpoint of random weights, with which everything can be tried but nothing is known."""
    import_module("adatoken3d_ros.lmm.llava3d.tiny").write_tiny_checkpoint(directory)
