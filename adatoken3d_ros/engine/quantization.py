# SPDX-License-Identifier: Apache-2.0
"""Which quantisation a model is loaded in, whether it fits, and whether what was loaded is sane."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adatoken3d_ros.engine import preflight, self_test
from adatoken3d_ros.engine.self_test import Known, SelfTestError
from adatoken3d_ros.lmm import registry, safetensors_files
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.quantized.foreign import kept_kind
from adatoken3d_ros.lmm.quantized.linear import DeviceLacks, check_device
from adatoken3d_ros.settings import Settings

logger = logging.getLogger(__name__)

MOST_LOSS = 0.5  # points of right answers that `auto` may cost, at most; see `Known.losses`
_PRESSING = ("int8", "int4")


@dataclass(frozen=True)
class Plan:
    """What a load would be.

    Attributes:
        kinds: quantisations that may be loaded, the preferred first; empty where nothing fits.
        need: of the first, or of what does not fit. free: bytes.
        problem: why nothing can be loaded. instead: what would fit, as settings.
    """

    kinds: tuple[str, ...]
    need: preflight.Need
    free: int
    problem: str = ""
    instead: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises ValueError where nothing fits."""
        if self.problem:
            advice = f"what would fit: {'; or '.join(self.instead)}" if self.instead else "take a smaller model"
            raise ValueError(f"{self.problem}; {advice}")


def plan(
    path: Path,
    settings: Mapping[str, Any],
    device: str,
    dtype: torch.dtype,
    *,
    free: int | None = None,
    model: SpatialLMM | None = None,
) -> Plan:
    """What the settings' model would be loaded as, without loading it.

    Args:
        device: as torch calls it. dtype: of the weights. free: bytes there; the machine's own answer if None.
        model: without weights, if it was made already.

    Raises:
        CheckpointError: for a config.json that is missing or describes no model we can build.
        SelfTestError: for a damaged file of what is known of the model.
    """
    model = model or registry.outline(path, settings["model.vision_path"] or None)
    where = torch.device(device)
    free = safetensors_files.free_bytes(where) if free is None else free
    asked: dict[str, Any] = {
        "max_views": settings["scene.max_views"],
        "question_views": settings["scene.question_views"],
        "max_new_tokens": settings["max_new_tokens"],
    }
    wanted, kept = settings["model.quantization"], kept_kind(path)
    kinds: tuple[str, ...]
    if kept:
        kinds = (kept,)
    elif wanted == "auto":
        kinds = _by_quality(where, _losses(path))
    else:
        kinds = (wanted,)
    needs = {kind: preflight.need(model, dtype, quantization=kind, **asked) for kind in kinds}
    if fitting := tuple(kind for kind in kinds if needs[kind].total <= free):
        return Plan(fitting, needs[fitting[0]], free)
    last = kinds[-1]  # the smallest of `auto`
    others = () if kept else tuple(kind for kind in _PRESSING if preflight.fewer_bits(kind, last))
    name = f"{path.name} in {str(dtype).removeprefix('torch.')}{'' if last == 'none' else f' with {last} layers'}"
    instead = preflight.remedies(model, dtype, free, (last, *others), **asked)
    return Plan((), needs[last], free, preflight.short_of_memory(name, needs[last], free, device), tuple(instead))


def load_checked(
    path: Path,
    settings: Settings,
    device: str,
    dtype: torch.dtype,
    progress: Callable[[float, str], None] | None = None,
) -> tuple[SpatialLMM, Any]:
    """Model and tokenizer as the settings want them, once they are known to fit and have passed the self-test.

    Raises:
        ValueError: for too little memory, a device without the instructions, a checkpoint that cannot be loaded, and
            (SelfTestError) one that gives garbage.
    """
    found = plan(path, settings, device, dtype)
    found.check()
    known = self_test.read_known(path) if settings["model.self_test"] else None
    for place, kind in enumerate(found.kinds):
        try:
            loaded = _load(path, settings, device, dtype, kind, known, progress)
            break
        except (DeviceLacks, SelfTestError) as error:
            if place + 1 == len(found.kinds):
                raise
            logger.warning("%s is passed over: %s", kind, error)
    if settings["model.quantization"] == "auto" and kind != "none" and not _losses(path):
        logger.warning("what %s costs this model in right answers was never measured", kind)
    return loaded


def _load(
    path: Path,
    settings: Settings,
    device: str,
    dtype: torch.dtype,
    kind: str,
    known: Known | None,
    progress: Callable[[float, str], None] | None,
) -> tuple[SpatialLMM, Any]:
    model, tokenizer, _ = registry.load(
        path,
        dtype=dtype,
        device=device,
        vision_path=Path(settings["model.vision_path"]) if settings["model.vision_path"] else None,
        quantization=kind,
        progress=None if progress is None else lambda share, file: progress(share, f"reading {file}"),
    )
    if settings["model.self_test"]:
        if progress is not None:
            progress(0.0, "testing it")
        logger.info("%s", self_test.check(model, tokenizer, known))
    return model, tokenizer


def _losses(path: Path) -> Mapping[str, float]:
    known = self_test.read_known(path)
    return {} if known is None else known.losses


def _by_quality(device: torch.device, losses: Mapping[str, float]) -> tuple[str, ...]:
    """What `auto` chooses from, the most exact first: what the device has, and where it was measured what any of it
    costs, only what was found to cost little enough."""
    found = ["none"]
    for kind in ("fp8", "int8", "int4") if device.type == "cuda" else ("int8", "int4"):  # fp8 is emulated on a CPU
        try:
            check_device(kind, device)
        except DeviceLacks as error:
            logger.info("%s", error)
            continue
        if not losses or losses.get(kind, math.inf) <= MOST_LOSS:
            found.append(kind)
    return tuple(found)
