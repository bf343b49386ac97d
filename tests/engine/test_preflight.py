# SPDX-License-Identifier: Apache-2.0
"""Memory before work: the formula by hand, and what would fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from adatoken3d_ros.engine import preflight
from adatoken3d_ros.engine.preflight import Need, need, remedies
from adatoken3d_ros.engine.quantization import plan
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.quantized.foreign import KEY, described
from adatoken3d_ros.settings import Settings
from tests.architectures import NAMES, write_tiny


class Made(nn.Module):
    """Two linear layers of 64 x 64, one of which is the language model's, and sizes to count with."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.other = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        size = SimpleNamespace(n_layers=3, hidden=64, intermediate=100, queries=64, keys=16)
        self.decoder: Any = SimpleNamespace(size=size, linears=lambda: [self.inside])
        self.vision: Any = SimpleNamespace(width=2)
        patches = SimpleNamespace(patches=10)
        self.sizes: Any = SimpleNamespace(
            patches=patches, tokens="voxels", num_views=4, max_spatial_tokens=35, feature_width=5, context_length=1000
        )


def test_by_hand() -> None:
    found = need(Made(), torch.bfloat16, quantization="int4", max_views=6, max_new_tokens=8)
    rows = 35 + 2 * 4 + 256 + 8  # four views of ten patches, of which 35 are in a prompt
    assert found.weights == 64 * 64 * 5 // 8 + (64 * 64 + 64) * 2
    assert found.keys == 2 * 2 * 3 * 16 * rows * 2
    assert found.activations == rows * (6 * 64 + 3 * 100 + 64 + 2 * 16) * 2
    assert found.scene == 6 * 10 * 2 * 5 * 4
    assert found.total == -(-found.weights * 105 // 100) + found.keys + found.activations + found.scene
    plain = need(Made(), torch.float32, max_views=6, max_new_tokens=8)
    assert plain.weights == (2 * 64 * 64 + 64) * 4 and plain.keys == 2 * found.keys
    assert str(Need(10**9, 2 * 10**9, 0, 0)).startswith("3.05 GB (weights 1.00 GB, keys 2.00 GB, ")


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_that_are_loaded(name: str, tmp_path: Path) -> None:
    path = write_tiny(name, tmp_path)
    for kind in ("none", "int8", "int4"):
        model, _, _ = registry.load(path, dtype=torch.float32, quantization=kind)
        held = {t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
        found = need(registry.outline(path), torch.float32, quantization=kind, max_views=2).weights
        assert found == pytest.approx(sum(held.values()), rel=0.05)  # scales of int8, rotary frequencies


def test_what_would_fit_is_named_and_fits() -> None:
    model: Any = Made()
    sizes = {"max_new_tokens": 8}
    whole = need(model, torch.float32, max_views=6, **sizes).total
    less = need(model, torch.float32, max_views=2, **sizes).total
    quantised = need(model, torch.float32, quantization="int4", max_views=6, **sizes).total
    assert less < quantised < whole
    free = quantised + 1
    found = remedies(model, torch.float32, free, ("none", "int8", "int4"), max_views=6, **sizes)
    assert found[0].startswith("scene.max_views: ") and found[-1].startswith("model.quantization: int4 (")
    views = int(found[0].split()[1])
    assert need(model, torch.float32, max_views=views, **sizes).total <= free
    assert need(model, torch.float32, max_views=views + 1, **sizes).total > free
    assert remedies(model, torch.float32, 1000, ("none", "int4"), max_views=6, **sizes) == []


def test_auto_takes_the_most_exact_that_fits(tiny_directory: Path) -> None:
    settings = Settings({"model.path": str(tiny_directory), "model.quantization": "auto"})
    needs = {
        kind: need(registry.outline(tiny_directory), torch.float32, quantization=kind, max_views=20).total
        for kind in ("none", "int8", "int4")
    }
    for k, kind in enumerate(needs):
        kinds = plan(tiny_directory, settings, "cpu", torch.float32, free=needs[kind]).kinds
        assert kinds == ("none", "int8", "int4")[k:]
    short = plan(tiny_directory, settings, "cpu", torch.float32, free=needs["int4"] - 1)
    assert short.kinds == () and "with int4 layers needs" in short.problem
    with pytest.raises(ValueError, match=r"int4 layers needs .* are free; what would fit: scene.max_views: \d+ \("):
        short.check()
    # What cannot be had in few bits is said at once, and what would do.
    plain = settings | {"model.quantization": "none"}
    with pytest.raises(ValueError, match="; or model.quantization: int8, scene.max_views"):
        plan(tiny_directory, plain, "cpu", torch.float32, free=needs["int4"] - 1).check()
    with pytest.raises(ValueError, match="take a smaller model"):
        plan(tiny_directory, plain, "cpu", torch.float32, free=1000).check()


def test_a_converted_checkpoint_is_counted_as_it_is(tmp_path: Path) -> None:
    import json

    path = write_tiny(NAMES[0], tmp_path)
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, KEY: described("int4", "0" * 16)}))
    found = plan(path, Settings({"model.path": str(path)}), "cpu", torch.float32, free=10**12)
    assert found.kinds == ("int4",)
    assert found.need == need(registry.outline(path), torch.float32, quantization="int4", max_views=20)
    assert preflight.fewer_bits("int4", "int8") and not preflight.fewer_bits("int8", "fp8")
