# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in few bits: what config.json says of ours, and how those of other programs are known and named."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from adatoken3d_ros.files import UnusableFile, parse_json, read_file
from adatoken3d_ros.lmm.quantized.formats import KINDS
from adatoken3d_ros.text import quoted

KEY, METHOD = "quantization_config", "adatoken3d"  # of config.json, and its `quant_method`
_MOST = 16 * 2**20  # bytes of a config.json
# Endings of tensors' names that only these methods write.
_TENSORS = {".qweight": "GPTQ or AWQ", ".qzeros": "GPTQ or AWQ", ".absmax": "bitsandbytes", ".SCB": "bitsandbytes"}
_INSTEAD = "take the original checkpoint in 16 bits, with model.quantization or through 'adatoken3d convert'"


def described(kind: str, original: str) -> dict[str, Any]:
    """What config.json says of a checkpoint that `adatoken3d convert` has made.

    Args:
        kind: one of `formats.KINDS`. original: hash of the weights that it was made of.
    """
    return {"quant_method": METHOD, "kind": kind, "original": original}


def original_of(directory: Path) -> str:
    """Hash of the weights that a converted checkpoint was made of; empty where config.json does not say."""
    found = _said(directory).get("original", "")
    return found if isinstance(found, str) and found.isalnum() and len(found) <= 64 else ""


def kept_kind(directory: Path) -> str:
    """What a converted checkpoint's layers are, as its config.json says; empty for any other."""
    found = _said(directory).get("kind", "")
    return found if found in KINDS else ""


def _said(directory: Path) -> dict[str, Any]:
    try:
        content = parse_json(read_file(directory / "config.json", _MOST))
        found = content.get(KEY)
    except (OSError, ValueError, UnusableFile, AttributeError):
        return {}
    return found if isinstance(found, dict) and found.get("quant_method") == METHOD else {}


def chosen_kind(wanted: str, stored: Collection[str], directory: Path) -> str:
    """What the linear layers are to be.

    Args:
        wanted: one of `formats.KINDS` or `none`. stored: what they are in the files, `none` among it.

    Raises:
        ValueError: for an unknown kind, and where the files have another one than what is wanted.
    """
    if wanted not in ("none", *KINDS):
        raise ValueError(f"quantization {quoted(wanted)} is none of {', '.join(KINDS)}")
    kinds = sorted(set(stored) - {"none"})
    if len(kinds) > 1 or (kinds and wanted not in ("none", kinds[0])):
        raise ValueError(
            f"{directory} is quantised to {' and '.join(kinds)} already and cannot become {wanted}: take the original "
            "checkpoint, or model.quantization: none"
        )
    return kinds[0] if kinds else wanted


def foreign_config(content: Mapping[str, Any], file: Path) -> str:
    """What to do about a config.json of a model in few bits that another program has made; empty if it is not."""
    if not (said := content.get(KEY)):
        return ""
    method = said.get("quant_method") if isinstance(said, dict) else said
    if method == METHOD:
        return ""
    return f"{file}: the checkpoint is quantised by {quoted(method, 60)}, which is not read here: {_INSTEAD}"


def foreign_tensors(names: Iterable[str], directory: Path) -> str:
    """The same, by the names of the tensors."""
    for name in names:
        for ending, method in _TENSORS.items():
            if name.endswith(ending):
                return f"{directory} has {name}: quantised by {method}, which is not read here: {_INSTEAD}"
    return ""


def foreign_files(directory: Path) -> str:
    """The same, by files that are not safetensors."""
    if found := sorted(file.name for file in directory.glob("*.gguf")):
        return f"{directory} has {', '.join(found[:3])}: GGUF, which is not read here: {_INSTEAD}"
    return ""
