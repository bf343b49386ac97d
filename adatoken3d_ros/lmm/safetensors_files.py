# SPDX-License-Identifier: Apache-2.0
"""The weights of any model out of a local directory: safetensors only, single or in shards.

Nothing is downloaded and no pickle is opened. A model is built without memory, checked against the names and shapes in
the files, and only then filled, tensor by tensor (`fill`). An architecture adds its tensors' names and its config.json.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from adatoken3d_ros.files import UnusableFile, open_regular, parse_json, read_file
from adatoken3d_ros.lmm.identity import tensor_digest, weights_identity
from adatoken3d_ros.lmm.quantized.foreign import foreign_files, foreign_tensors
from adatoken3d_ros.lmm.quantized.formats import GROUP, SCALE, ZERO, Parts, fits, kind_of, quantise, stored_bytes
from adatoken3d_ros.lmm.quantized.linear import QuantizedLinear
from adatoken3d_ros.text import quoted

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
class Stored:
    """Where a tensor lies; one in few bits has the shape of the matrix that it stands for.

    Attributes:
        kind: dtype, as safetensors calls it. parts: what goes with a matrix in few bits, by what its name adds.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str
    parts: Mapping[str, Stored] = field(default_factory=dict)

    @property
    def quantization(self) -> str:
        """`int8`, `int4`, `fp8`, or `none`."""
        return kind_of(self.kind) if self.parts else "none"


class Filled(NamedTuple):
    """The identities of the weights that a model got: its own, and of those that they were before quantisation."""

    weights: str
    original: str


def fill(
    model: nn.Module,
    sources: Mapping[str, Stored],
    wanted: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device,
    tied: Mapping[str, str] | None = None,
    quantization: str = "none",
    linears: Collection[str] = (),
    progress: Progress | None = None,
    free_memory: Callable[[torch.device], int] | None = None,
) -> Filled:
    """Gives a model that was made on the meta device its weights; returns their identities.

    Args:
        model: keeps its buffers that no file holds, without values.
        sources: {name in the model: where it lies}. wanted: {name in the model: name in the checkpoint}, for all that
            the model needs; messages call tensors by the latter.
        dtype: of all weights; None keeps what is stored. device: where they go.
        tied: {name: name of the tensor that it is, too}.
        quantization: what `linears`, weights of linear layers, become while they are read, one after the other.
        progress: called with (fraction of the bytes, name of the file) as loading goes on.
        free_memory: bytes free on a device; the machine's own answer if None.

    Raises:
        CheckpointError: for a tensor that is missing, misshapen, of a kind that is not read or not finite, a damaged
            file, and for weights that do not fit into memory.
    """
    _check(model, sources, wanted, linears)
    needed = _bytes(sources, dtype, quantization, linears)
    _check_memory(needed, device, free_memory or free_bytes)
    tell = progress or (lambda _fraction, _text: None)
    tensors: dict[str, torch.Tensor] = {}
    digests: dict[str, bytes] = {}
    before: dict[str, bytes] = {}
    for name, stored, parts in _read(sources, device, tell):
        if not parts:
            before[name] = tensor_digest(stored)
        if not parts and name in linears and quantization != "none" and fits(stored.shape, quantization):
            _finite(stored, sources[name])
            parts = quantise(stored.to(device), quantization)
        if parts:
            digests |= {f"{name}{part}": tensor_digest(tensor) for part, tensor in parts.items()}
            module = name.rpartition(".")[0]
            kind = quantization if sources[name].quantization == "none" else sources[name].quantization
            bias = getattr(model.get_submodule(module), "bias", None)
            layer = QuantizedLinear(kind, parts, dtype or _kept_dtype(stored), bias)
            model.set_submodule(module, layer)
        else:
            # A copy: tensors from the file are views of a memory map, and would change or fault with the file.
            tensors[name] = stored.to(device=device, dtype=dtype or stored.dtype, copy=device.type == "cpu")
            _finite(tensors[name], sources[name])
            digests[name] = before[name]
    tied = tied or {}
    model.load_state_dict({**tensors, **{name: tensors[source] for name, source in tied.items()}}, assign=True)
    for name, source in tied.items():  # assigning made two parameters of the one tensor
        module, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(module), parameter, model.get_parameter(source))
    model.requires_grad_(False).eval()
    return Filled(weights_identity(digests.items()), weights_identity(before.items()))


def check_filled(model: nn.Module) -> None:
    """Raises CheckpointError if a weight or buffer is without a value."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise CheckpointError(f"{name} was left without a value")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on a CUDA device, or in main memory."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def local_directory(path: str | Path) -> Path:
    """Raises CheckpointError for what is no directory on this machine."""
    try:
        directory = Path(path).expanduser()
    except RuntimeError as error:  # a home that nobody has
        raise CheckpointError(f"{quoted(str(path))}: {error}") from error
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is not a directory; a model must lie on this machine, nothing is downloaded"
        )
    return directory.resolve()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError, naming the file."""
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


def inventory(directory: Path) -> dict[str, Stored]:
    """All tensors of a directory by name, without reading any."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
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
        if other := foreign_files(directory):
            raise CheckpointError(other)
        if pickles := pickled(directory):
            raise CheckpointError(
                f"{directory} has {', '.join(one.name for one in pickles)} but no safetensors file: pickled weights "
                f"are never opened here, make safetensors of them: adatoken3d convert {directory} OUT"
            )
        raise CheckpointError(f"{directory} has no safetensors file")

    _check_numbering(directory, files)
    stored: dict[str, Stored] = {}
    for file in files:
        with opened(file, torch.device("cpu")) as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                part = shard.get_slice(name)
                if name in stored:
                    raise CheckpointError(f"{name} is in {stored[name].file.name} and in {file.name} of {directory}")
                stored[name] = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
    for name, shard_name in listed.items():
        if name not in stored or stored[name].file.name != shard_name:
            raise CheckpointError(f"{directory / str(shard_name)} lacks {name}, which {index.name} says is in it")
    if other := foreign_tensors(stored, directory):
        raise CheckpointError(other)
    return _together(stored)


def pickled(directory: Path) -> list[Path]:
    """Weights as PyTorch files, which the loader does not open."""
    return sorted(path for pattern in _PICKLES for path in directory.glob(pattern))


def _together(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """What belongs to a matrix in few bits is in its `parts`, and no tensor of its own."""
    found = dict(stored)
    for name, one in stored.items():
        if not (kind := kind_of(one.kind)) or len(one.shape) != 2:
            continue
        names = (SCALE, ZERO) if kind == "int4" else (SCALE,)
        if missing := [name + part for part in names if name + part not in stored]:
            raise CheckpointError(f"{name} in {one.file} is {one.kind} and lacks {', '.join(missing)}")
        parts = {part: found.pop(name + part) for part in names}
        rows, columns = one.shape[0], one.shape[1] * (2 if kind == "int4" else 1)
        wanted = (rows, columns // GROUP) if kind == "int4" else (rows,)
        for part in parts.values():
            if part.shape != wanted or part.kind not in _FLOATS or part.file != one.file:
                raise CheckpointError(
                    f"{part.name} in {part.file} is {part.kind} {part.shape}, beside {name} it must be a float {wanted}"
                )
        found[name] = replace(one, shape=(rows, columns), parts=parts)
    return found


def _check_numbering(directory: Path, files: list[Path]) -> None:
    """Without an index the numbers in the names (model-00001-of-00003) still tell whether a shard is missing."""
    for file in files:
        if match := re.search(r"-(\d+)-of-(\d+)\.safetensors$", file.name):
            for number in range(1, int(match[2]) + 1):
                width = len(match[1])
                name = f"{file.name[: match.start()]}-{number:0{width}d}-of-{match[2]}.safetensors"
                if not (directory / name).is_file():
                    raise CheckpointError(f"{directory / name} is missing")


def opened(file: Path, device: torch.device | str = "cpu") -> Any:
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


def _check(
    model: nn.Module, sources: Mapping[str, Stored], wanted: Mapping[str, str], linears: Collection[str]
) -> None:
    """Every tensor there, of the right shape and of a kind that can be used."""
    if missing := [official for ours, official in wanted.items() if ours not in sources]:
        raise CheckpointError(f"the checkpoint lacks {some(missing)}")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for ours, source in sources.items():
        if source.shape != shapes[ours]:
            raise CheckpointError(f"{source.name} in {source.file} has shape {source.shape}, expected {shapes[ours]}")
        if source.kind not in _FLOATS and not (source.parts and ours in linears):
            raise CheckpointError(f"{source.name} in {source.file} is {source.kind}; read are {', '.join(_FLOATS)}")


def some(names: list[str], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _bytes(
    sources: Mapping[str, Stored], dtype: torch.dtype | None, quantization: str, linears: Collection[str]
) -> int:
    """Of all weights as they will be in memory."""
    total = 0
    for ours, source in sources.items():
        kind = source.quantization if source.parts else quantization if ours in linears else "none"
        if kind != "none" and fits(source.shape, kind):
            total += stored_bytes(torch.Size(source.shape).numel(), kind)
        else:
            total += torch.Size(source.shape).numel() * (_FLOATS[source.kind] if dtype is None else dtype.itemsize)
    return total


def _length(source: Stored) -> int:
    """Bytes in the file, about."""
    return torch.Size(source.shape).numel() * _FLOATS.get(source.kind, 1)


def _kept_dtype(stored: torch.Tensor) -> torch.dtype:
    return stored.dtype if stored.dtype in (torch.float16, torch.float32) else torch.bfloat16


def _finite(tensor: torch.Tensor, source: Stored) -> None:
    if not torch.isfinite(tensor.sum(dtype=torch.float32)):
        raise CheckpointError(f"{source.name} in {source.file} holds values that are not finite in {tensor.dtype}")


def _check_memory(needed: int, device: torch.device, free_memory: Callable[[torch.device], int]) -> None:
    if device.type not in ("cpu", "cuda"):
        return
    free = free_memory(device)
    if needed * _MEMORY_FACTOR > free:
        raise CheckpointError(
            f"the weights need {needed * _MEMORY_FACTOR / 1e9:.3f} GB on {device}, {free / 1e9:.3f} GB are free"
        )


def _read(
    sources: Mapping[str, Stored], device: torch.device, progress: Progress
) -> Iterator[tuple[str, torch.Tensor, Parts]]:
    """(our name, tensor as it is stored, its parts if it is one in few bits), file by file."""
    total, done = sum(map(_length, sources.values())), 0
    for file in sorted({source.file for source in sources.values()}):
        progress(done / total, file.name)
        with opened(file, device) as shard:
            for ours, source in sources.items():
                if source.file != file:
                    continue
                stored, parts = shard.get_tensor(source.name), {}
                if source.parts:
                    parts = {"": stored} | {part: shard.get_tensor(one.name) for part, one in source.parts.items()}
                    parts = {part: tensor.to(device, copy=device.type == "cpu") for part, tensor in parts.items()}
                    for part, one in source.parts.items():
                        _finite(parts[part], one)
                yield ours, stored, parts
                done += _length(source)
                progress(done / total, file.name)
