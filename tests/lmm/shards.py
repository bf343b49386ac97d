# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in several files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def split(path: Path, *, index: bool = True) -> None:
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for k in range(3):
        file = f"model-0000{k + 1}-of-00003.safetensors"
        save_file({n: weights[n] for n in names[k::3]}, path / file)
        weight_map |= dict.fromkeys(names[k::3], file)
    if index:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
