# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint in the layout of the official LLaVA-3D release: a local directory, safetensors only.

Nothing is downloaded and no pickle is opened. The model is built without memory, checked against the names and shapes
in the files, and only then filled, tensor by tensor.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adatoken3d_ros.files import UnusableFile, open_regular, parse_json, read_file
from adatoken3d_ros.lmm.identity import model_identity, tensor_digest, weights_identity
from adatoken3d_ros.lmm.llava3d.config import ConfigError, Llava3DConfig
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.tokenizer import TokenizerError, load_tokenizer
from adatoken3d_ros.text import quoted

# Our names and those of the release. The first prefix that fits counts.
_POSITION = {"lift": "0", "norm": "1", "out": "3"}
_OFFICIAL = (
    ("language.", ""),
    ("projector.", "model.mm_projector."),
    ("position.", "model.video_tower.video_tower.positional_embedding.position_embedding_head."),
    ("click.", "model.video_tower.prompt_encoder.pos_emb3d.position_embedding_head."),
    ("vision.tower.", "model.vision_tower.vision_tower.vision_model."),
)
_VISION_PREFIX = _OFFICIAL[-1][1]
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
MAX_JSON_BYTES = 16 * 2**20  # of config.json or an index
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# Memory that a load takes beyond the weights: the largest tensor in transit, and the allocator's slack.
_MEMORY_FACTOR = 1.05

Progress = Callable[[float, str], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file, tensor or size that is wrong."""


@dataclass(frozen=True)
class LoadReport:
    """What was read.

    Attributes:
        path: the checkpoint's directory.
        tensors: how many tensors were used.
        parameters: how many numbers they hold.
        ignored: names of tensors in the files that the model has no use for, sorted.
        files: the weight files that were read.
        vision: where the vision tower came from: `embedded` or its directory.
        tokenizer: the tokenizer's file.
        seconds: how long it took.
    """

    path: Path
    tensors: int
    parameters: int
    ignored: list[str] = field(default_factory=list)
    files: tuple[Path, ...] = ()
    vision: str = "embedded"
    tokenizer: Path = Path()
    seconds: float = 0.0


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vision_path: str | Path | None = None,
    progress: Progress | None = None,
    free_memory: Callable[[torch.device], int] | None = None,
) -> tuple[Llava3D, PreTrainedTokenizerFast, LoadReport]:
    """Loads model and tokenizer from a local directory.

    Args:
        path: directory with config.json, the tokenizer (tokenizer.model or tokenizer.json) and safetensors files,
            sharded with or without an index, or single.
        dtype: of all weights; None keeps what is stored.
        device: where the weights go.
        vision_path: directory of a CLIP model in safetensors, used where the checkpoint carries no vision tower.
        progress: called with (fraction of the bytes, name of the file) as loading goes on.
        free_memory: bytes free on a device; the machine's own answer if None.

    Returns:
        The model in evaluation mode without gradients, its tokenizer, and what was read.

    Raises:
        CheckpointError: if anything is missing, damaged, misshapen or does not fit into memory.
    """
    started = time.monotonic()
    path, device = _local_directory(path), torch.device(device)
    vision_dir = _local_directory(vision_path) if vision_path is not None else None
    config = load_config(path, vision_dir)
    stored = _inventory(path)
    _check_layers(config, stored, path)  # first: what no file holds is not even built
    try:
        tokenizer, tokenizer_file = load_tokenizer(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    if len(tokenizer) > config.language.vocab_size:
        raise CheckpointError(
            f"{tokenizer_file} has {len(tokenizer)} tokens, config.json gives the model {config.language.vocab_size}"
        )

    with torch.device("meta"):
        model = Llava3D(config)
    wanted = official_names(model)
    sources, vision_source = _locate(wanted, stored, vision_dir, path)
    _check(model, sources, wanted)
    needed = _bytes(sources.values(), dtype)
    _check_memory(needed, device, free_memory or free_bytes)

    tensors, digests = _read(sources, dtype, device, progress or (lambda _fraction, _text: None))
    model.loaded_identity = model_identity(config.hash(), weights_identity(digests.items()))
    tied = config.language.tie_word_embeddings
    if tied:
        tensors["language.lm_head.weight"] = tensors["language.model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    if tied:  # assigning made two parameters of the one tensor
        model.language.lm_head.weight = model.language.model.embed_tokens.weight
    _restore_buffers(model, device)
    model.requires_grad_(False).eval()
    used = {source.name for source in sources.values() if source.file.parent == path}
    report = LoadReport(
        path=path,
        tensors=len(sources),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        ignored=sorted(set(stored) - used),
        files=tuple(sorted({source.file for source in sources.values()})),
        vision=vision_source,
        tokenizer=tokenizer_file,
        seconds=time.monotonic() - started,
    )
    return model, tokenizer, report


def load_config(path: Path, vision_dir: Path | None = None) -> Llava3DConfig:
    """The configuration of the checkpoint in `path`, with the vision tower's own if config.json does not describe it.

    Raises:
        CheckpointError: if a config.json is missing, damaged or not supported.
    """
    vision = _json(vision_dir / "config.json") if vision_dir is not None else None
    try:
        config = Llava3DConfig.from_dict(_json(path / "config.json"), vision)
        if vision is not None:
            # Heads leave no trace in the shapes of tensors: a tower with others would load and be wrong.
            given = Llava3DConfig.from_dict({**_json(path / "config.json"), "mm_vision_tower": "", **_only(vision)})
            for key in ("num_attention_heads", "patch_size", "image_size", "hidden_act", "taps"):
                ours, theirs = getattr(config.vision, key, None), getattr(given.vision, key, None)
                if ours != theirs:
                    raise CheckpointError(f"{vision_dir}: {key} is {theirs!r}, the checkpoint asks for {ours!r}")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config


def official_names(model: Llava3D) -> dict[str, str]:
    """For each tensor of the model, by our name, its name in the official checkpoint.

    A tied output layer is not among them: it is the embedding table.
    """
    names = {}
    for ours in model.state_dict():
        if ours == "language.lm_head.weight" and model.config.language.tie_word_embeddings:
            continue
        prefix, official = next(pair for pair in _OFFICIAL if ours.startswith(pair[0]))
        rest = ours.removeprefix(prefix)
        if prefix in ("position.", "click."):
            layer, parameter = rest.split(".")
            rest = f"{_POSITION[layer]}.{parameter}"
        names[ours] = official + rest
    return names


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on a CUDA device, or in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _local_directory(path: str | Path) -> Path:
    try:
        directory = Path(path).expanduser()
    except RuntimeError as error:  # a home that nobody has
        raise CheckpointError(f"{quoted(str(path))}: {error}") from error
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; a model must lie on this machine, nothing is downloaded"
        )
    return directory.resolve()


def _only(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {"vision_config": vision.get("vision_config", vision)}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_file(path, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except UnusableFile as error:
        raise CheckpointError(str(error)) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content


def _inventory(directory: Path) -> dict[str, _Stored]:
    """All tensors of a directory by name, without reading any."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        listed = _json(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"{index} has no weight_map")
        names = sorted({str(name) for name in listed.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(f"{index} names {name!r}, which is no safetensors file in this directory")
            if not (directory / name).is_file():
                raise CheckpointError(f"{directory / name} is missing, {index.name} lists it")
        files = [directory / name for name in names]
    else:
        single = directory / "model.safetensors"
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
        listed = {}
    if not files:
        pickles = sorted(p.name for pattern in _PICKLES for p in directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{directory} has {', '.join(pickles)} but no safetensors file: pickled weights are never opened, "
                "convert them with transformers' save_pretrained"
            )
        raise CheckpointError(f"{directory} has no safetensors file")

    _check_numbering(directory, files)
    stored: dict[str, _Stored] = {}
    for file in files:
        with _open(file, torch.device("cpu")) as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                part = shard.get_slice(name)
                if name in stored:
                    raise CheckpointError(f"{name} is in {stored[name].file.name} and in {file.name} of {directory}")
                stored[name] = _Stored(file, name, tuple(part.get_shape()), part.get_dtype())
    for name, shard_name in listed.items():
        if name not in stored or stored[name].file.name != shard_name:
            raise CheckpointError(f"{directory / str(shard_name)} lacks {name}, which {index.name} says is in it")
    return stored


def _check_numbering(directory: Path, files: list[Path]) -> None:
    """Without an index the numbers in the names (model-00001-of-00003) still tell whether a shard is missing."""
    for file in files:
        if match := re.search(r"-(\d+)-of-(\d+)\.safetensors$", file.name):
            for number in range(1, int(match[2]) + 1):
                width = len(match[1])
                name = f"{file.name[: match.start()]}-{number:0{width}d}-of-{match[2]}.safetensors"
                if not (directory / name).is_file():
                    raise CheckpointError(f"{directory / name} is missing")


def _open(file: Path, device: torch.device) -> Any:
    """A lazy reader; the format's header says how long the file must be, so a truncated one is found here."""
    try:
        with open_regular(file) as start:
            beginning, size = start.read(24), os.fstat(start.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    try:
        return safe_open(str(file), framework="pt", device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        if beginning.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights: run git lfs pull") from error
        raise CheckpointError(f"{file} is truncated or damaged ({size} bytes): {error}") from error


def _locate(
    wanted: Mapping[str, str], stored: Mapping[str, _Stored], vision_dir: Path | None, path: Path
) -> tuple[dict[str, _Stored], str]:
    """Our name -> stored tensor, for all that were found, and where the vision tower comes from."""
    sources = {ours: stored[official] for ours, official in wanted.items() if official in stored}
    tower = {ours: official for ours, official in wanted.items() if official.startswith(_VISION_PREFIX)}
    missing = [official for ours, official in tower.items() if ours not in sources]
    if not missing:
        return sources, "embedded"
    if vision_dir is None:
        # Some but not all is a damaged checkpoint, none is one that relies on a separate tower.
        if len(missing) < len(tower):
            raise CheckpointError(f"{path} lacks {_some(missing)} of its vision tower")
        raise CheckpointError(
            f"{path} carries no vision tower ({_VISION_PREFIX}*): give the directory of the CLIP model as vision_path"
        )
    separate = _inventory(vision_dir)
    for ours, official in tower.items():
        bare = official.removeprefix(_VISION_PREFIX)
        found = separate.get(f"vision_model.{bare}") or separate.get(bare)
        if found is None:
            raise CheckpointError(f"{vision_dir} lacks vision_model.{bare}")
        sources[ours] = found
    return sources, str(vision_dir)


def _check_layers(config: Llava3DConfig, stored: Mapping[str, _Stored], path: Path) -> None:
    """As many layers in the files as config.json says."""
    found = {int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    said = int(config.language.num_hidden_layers)
    if len(found) != said:
        raise CheckpointError(f"{path}: config.json has num_hidden_layers {said}, the files hold {len(found)}")


def _check(model: Llava3D, sources: Mapping[str, _Stored], wanted: Mapping[str, str]) -> None:
    """Every tensor there, of the right shape and of a kind that can be used."""
    if missing := [official for ours, official in wanted.items() if ours not in sources]:
        raise CheckpointError(f"the checkpoint lacks {_some(missing)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for ours, source in sources.items():
        if source.shape != shapes[ours]:
            raise CheckpointError(f"{source.name} in {source.file} has shape {source.shape}, expected {shapes[ours]}")
        if source.kind not in _FLOATS:
            raise CheckpointError(f"{source.name} in {source.file} is {source.kind}; read are {', '.join(_FLOATS)}")


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _bytes(sources: Iterable[_Stored], dtype: torch.dtype | None) -> int:
    return sum(
        torch.Size(source.shape).numel() * (_FLOATS[source.kind] if dtype is None else dtype.itemsize)
        for source in sources
    )


def _check_memory(needed: int, device: torch.device, free_memory: Callable[[torch.device], int]) -> None:
    if device.type not in ("cpu", "cuda"):
        return
    free = free_memory(device)
    if needed * _MEMORY_FACTOR > free:
        raise CheckpointError(
            f"the weights need {needed * _MEMORY_FACTOR / 1e9:.3f} GB on {device}, {free / 1e9:.3f} GB are free"
        )


def _read(
    sources: Mapping[str, _Stored], dtype: torch.dtype | None, device: torch.device, progress: Progress
) -> tuple[dict[str, torch.Tensor], dict[str, bytes]]:
    """The tensors as they are wanted, and the digests of what is stored."""
    tensors: dict[str, torch.Tensor] = {}
    digests: dict[str, bytes] = {}
    total, done = _bytes(sources.values(), None), 0
    for file in sorted({source.file for source in sources.values()}):
        progress(done / total, file.name)
        with _open(file, device) as shard:
            for ours, source in sources.items():
                if source.file != file:
                    continue
                stored = shard.get_tensor(source.name)
                # A copy: tensors from the file are views of a memory map, and would change or fault with the file.
                tensor = stored.to(device=device, dtype=dtype or stored.dtype, copy=device.type == "cpu")
                if not torch.isfinite(tensor.sum(dtype=torch.float32)):
                    raise CheckpointError(f"{source.name} in {file} holds values that are not finite in {tensor.dtype}")
                tensors[ours], digests[ours] = tensor, tensor_digest(stored)
                done += _bytes([source], None)
                progress(done / total, file.name)
    return tensors, digests


def _restore_buffers(model: Llava3D, device: torch.device) -> None:
    """Fills what is computed and not stored: rotary frequencies (float32 whatever the weights are), patch numbers."""
    model.language.model.rotary_emb = LlamaRotaryEmbedding(model.config.language).to(device)
    model.vision.restore_buffers(device)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{name} was left without a value")
