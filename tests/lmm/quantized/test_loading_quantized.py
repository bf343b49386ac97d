# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of each architecture, quantised while it is loaded: what is, what is not, who it then is, and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.identity import original_identity
from adatoken3d_ros.lmm.quantized.formats import KINDS
from adatoken3d_ros.lmm.quantized.linear import QuantizedLinear
from adatoken3d_ros.lmm.safetensors_files import CheckpointError
from tests.architectures import NAMES, write_tiny


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_tiny(name, tmp_path_factory.mktemp(name)) for name in NAMES}


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Of the first token after a made-up scene of five tokens."""
    from adatoken3d_ros.decoder.prefill import prefill
    from adatoken3d_ros.pruning.policies import make_policy
    from adatoken3d_ros.pruning.schedule import Schedule

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, model.sizes.feature_width, generator=generator)
    spatial = model.scene_tokens(features, model.lift_places(torch.rand(5, 3, generator=generator)))
    spliced = model.splice(model.prompt(tokenizer, "What is this?"), spatial)
    return prefill(model.decoder, spliced.embeds, spliced.layout, Schedule(), make_policy("none")).logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_are_and_the_rest_is_not(checkpoints: dict[str, Path], name: str, kind: str) -> None:
    plain, tokenizer, _ = registry.load(checkpoints[name], dtype=torch.float32)
    model, _, _ = registry.load(checkpoints[name], dtype=torch.float32, quantization=kind)
    assert model.quantization == kind and plain.quantization == "none"
    inside = [part for layer in model.decoder.layers for part in layer.module.modules()]
    quantised = [part for part in model.modules() if isinstance(part, QuantizedLinear)]
    assert len(quantised) == 7 * len(model.decoder) and all(part in inside for part in quantised)
    others = {name for name, _ in plain.named_parameters()} - {name for name, _ in model.named_parameters()}
    assert len(others) == len(quantised)
    expected, found = logits(plain, tokenizer), logits(model, tokenizer)
    assert (found - expected).norm() > 0
    # It answers as the plain one does with the matrices that were kept.
    with torch.no_grad():
        for at, part in model.named_modules():
            if isinstance(part, QuantizedLinear):
                plain.get_submodule(at).weight.copy_(part.weight)
    expected = logits(plain, tokenizer)
    assert (found - expected).norm() / expected.norm() < 0.1
    # Another model, which remembers what it was.
    assert model.identity != plain.identity == original_identity(model.identity)
    assert f"-{kind}-of-" in model.identity


def test_what_is_no_kind_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="'int3' is none of int8, int4, fp8"):
        registry.load(checkpoints[NAMES[0]], quantization="int3")


@pytest.mark.parametrize(
    ("said", "named"),
    [({"quant_method": "awq", "bits": 4}, "'awq'"), ({"quant_method": "gptq"}, "'gptq'"), ("int4", "'int4'")],
)
def test_a_foreign_format_is_named(checkpoints: dict[str, Path], tmp_path: Path, said: Any, named: str) -> None:
    path = Path(shutil.copytree(checkpoints[NAMES[0]], tmp_path / "copy"))
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "quantization_config": said}))
    with pytest.raises(CheckpointError, match=f"quantised by {named}, .* take the original checkpoint in 16 bits"):
        registry.load(path)


def test_foreign_tensors_and_files_are_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(checkpoints[NAMES[0]], tmp_path / "copy"))
    weights = load_file(path / "model.safetensors")
    save_file({**weights, "model.layers.0.mlp.up_proj.qweight": torch.zeros(1)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="up_proj.qweight: quantised by GPTQ or AWQ"):
        registry.load(path)
    (path / "model.safetensors").rename(path / "model.Q4_K.gguf")
    for other in (None, "config.json"):  # published GGUF files have none beside them
        if other:
            (path / other).unlink()
        with pytest.raises(CheckpointError, match="model.Q4_K.gguf: GGUF"):
            registry.load(path)


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations have made and that are still there; `most` of them at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and not getattr(func, "is_view", False):
                    self._count(storage._cdata, storage.nbytes(), tensor, weakref)
        return made

    def _count(self, key: int, size: int, tensor: torch.Tensor, weakref: Any) -> None:
        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, gone)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_peak_is_the_quantised_model_and_little_more(tmp_path: Path, kind: str) -> None:
    """The files are read through a memory map, of which one at a time is open: what is counted is beside that."""
    path = write_tiny(NAMES[0], tmp_path, layers=16, hidden_size=256, intermediate_size=512)
    with Living() as living:
        model, _, _ = registry.load(path, quantization=kind)
    kept = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    plain, _, _ = registry.load(path)
    full = sum(parameter.nbytes for parameter in plain.parameters())
    assert held < (0.5 if kind == "int8" else 0.4) * full
    assert living.most <= 1.10 * held, (living.most / held, held / full)
