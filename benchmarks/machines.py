# SPDX-License-Identifier: Apache-2.0
"""Which model fits onto which machine, and what to expect of it there: computed, nothing is measured.

Whether it fits is what a load would say (`engine.preflight`), of the memory that is left beside a system. Times are
bounds times the share of them that good programs reach: a token reads all weights of the language model and its keys
from memory, a prefill multiplies. Peaks are those that makers publish, without sparsity, at the highest power mode.

    python -m benchmarks.machines > table.md
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from adatoken3d_ros.engine.preflight import need
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.quantized.formats import BITS
from adatoken3d_ros.lmm.registry import outline
from adatoken3d_ros.pruning.flops import prefill_flops
from benchmarks.real_size import MODELS

VIEWS, TEXT = 20, 60
READING, MULTIPLYING = 0.75, 0.45  # shares of the published peaks
SYSTEM_GB = 2.5  # of memory that a system and its drivers take, where it is shared with the GPU
KINDS = ("none", "int8", "int4")


class Machine(NamedTuple):
    """Memory in GB, GB/s, and 10^12 operations a second in bfloat16."""

    name: str
    memory: float
    bandwidth: float
    tera: float
    shared: bool = True


MACHINES = (
    Machine("Orin Nano 8 GB", 8, 102, 17),
    Machine("Orin NX 16 GB", 16, 102, 15),
    Machine("AGX Orin 32 GB", 32, 205, 27),
    Machine("AGX Orin 64 GB", 64, 205, 42),
    Machine("AGX Thor 128 GB", 128, 273, 258),
    Machine("RTX 4090 laptop 16 GB", 16, 576, 79, shared=False),
)


def rows() -> Iterator[str]:
    """Lines of the table, Markdown."""
    yield "| model | weights | needs | " + " | ".join(one.name for one in MACHINES) + " |"
    yield "|---" * (3 + len(MACHINES)) + "|"
    for name, (_, config) in MODELS.items():
        model = outline_of(config)
        for kind in KINDS:
            needed = need(model, torch.bfloat16, quantization=kind, max_views=VIEWS).total / 1e9
            cells = (_cell(one, model, kind, needed) for one in MACHINES)
            yield f"| {name} | {'bf16' if kind == 'none' else kind} | {needed:.1f} GB | {' | '.join(cells)} |"


def _cell(machine: Machine, model: SpatialLMM, kind: str, needed: float) -> str:
    if needed > machine.memory - (SYSTEM_GB if machine.shared else 0.5):
        return "no"
    size = model.decoder.size
    layers = sum(part.weight.numel() for part in model.decoder.linears())
    head = size.hidden * size.vocabulary
    read = layers * (BITS[kind] / 8 if kind != "none" else 2) + 2 * head
    spatial = min(model.sizes.max_spatial_tokens, VIEWS * model.sizes.max_spatial_tokens // model.sizes.num_views)
    keys = 2 * size.n_layers * size.keys * (spatial + TEXT) * 2
    tokens = READING * machine.bandwidth * 1e9 / (read + keys)
    prefill = prefill_flops(size, [spatial] * size.n_layers, TEXT) / (MULTIPLYING * machine.tera * 1e12)
    return f"{1e3 * prefill:.0f} ms, {tokens:.0f}/s"


def outline_of(config: dict[str, object]) -> SpatialLMM:
    """The model of a config.json, without weights; ids of tokens are made up."""
    ids = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    with tempfile.TemporaryDirectory() as folder:
        content = {**dict.fromkeys(ids, 1), **config} if "text_config" in config else config
        (Path(folder) / "config.json").write_text(json.dumps(content), encoding="utf-8")
        return outline(folder)


if __name__ == "__main__":
    print("\n".join(rows()))
