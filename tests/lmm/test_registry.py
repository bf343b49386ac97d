# SPDX-License-Identifier: Apache-2.0
"""Which architecture a checkpoint is taken for."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.registry import ARCHITECTURES, Architecture, architecture_of
from adatoken3d_ros.lmm.safetensors_files import CheckpointError


def with_config(folder: Path, content: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_a_checkpoint_is_loaded_by_its_architecture(tiny_path: Path, loaded: tuple[Any, ...]) -> None:
    model, tokenizer, report = registry.load(tiny_path)
    assert type(model) is type(loaded[0]) and model.identity == loaded[0].identity
    assert len(tokenizer) == len(loaded[1]) and report.path == tiny_path.resolve()


def test_an_outline_has_sizes_and_no_weights(tiny_path: Path, loaded: tuple[Any, ...]) -> None:
    model = registry.outline(tiny_path)
    assert (model.sizes, model.decoder.size) == (loaded[0].sizes, loaded[0].decoder.size)
    assert model.shape_hash == loaded[0].shape_hash and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "llava_llama"},
        {"model_type": "llava_llama", "architectures": ["Renamed"]},
        {"architectures": ["LlavaLlamaForCausalLM"]},
    ],
    ids=str,
)
def test_either_name_is_enough(tmp_path: Path, content: dict[str, Any]) -> None:
    assert architecture_of(with_config(tmp_path, content)) is ARCHITECTURES[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2"]}, r"model_type is 'gpt2', architectures is \['GPT2'\]"),
        ({"model_type": "gpt2", "architectures": ["LlavaLlamaForCausalLM"]}, "model_type is 'gpt2'"),
        ({"model_type": ["llava_llama"]}, r"model_type is \['llava_llama'\]"),
        ({"architectures": "LlavaLlamaForCausalLM"}, "architectures is 'Llava"),
        ({"hidden_size": 8}, "neither model_type nor architectures"),
        ({"model_type": "x" * 10**6}, "model_type is .{,250}"),
    ],
    ids=["other", "both", "a list", "no list", "neither", "long"],
)
def test_what_is_not_known_is_refused_with_what_is(tmp_path: Path, content: dict[str, Any], says: str) -> None:
    path = with_config(tmp_path, content)
    known = re.escape(", ".join(f"{one.model_type} ({one.class_name})" for one in ARCHITECTURES))
    with pytest.raises(CheckpointError, match=rf"json: {says}.*; known are {known}$"):
        registry.load(path)
    with pytest.raises(CheckpointError, match=says):
        registry.outline(path)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        registry.load(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not a directory; a model must lie on this machine"):
        registry.load("somebody/model")


def test_a_registered_architecture_is_known_like_those_that_ship(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up, asked = ModuleType("made_up_loader"), []
    made_up.load = lambda path, **options: (asked.append((path, options)), ("model", "tokenizer", "report"))[1]  # type: ignore[attr-defined]
    made_up.outline = lambda path, vision_path: "outline"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "made_up_loader", made_up)
    monkeypatch.setattr(registry, "_further", [])
    path = with_config(tmp_path, {"model_type": "made_up"})
    with pytest.raises(CheckpointError, match="'made_up'; known are llava_llama "):
        registry.load(path)
    registry.register(Architecture("made_up", "MadeUpModel", "made_up_loader"))
    found = registry.load(path, dtype=torch.float16)
    assert found == ("model", "tokenizer", "report") and registry.outline(path) == "outline"
    assert asked[0][0] == tmp_path.resolve() and asked[0][1]["dtype"] == torch.float16
    with pytest.raises(CheckpointError, match=r"known are llava_llama .*, made_up \(MadeUpModel\)$"):
        registry.load(with_config(tmp_path, {"model_type": "gpt2"}))
    for taken in ("made_up", ARCHITECTURES[0].model_type):
        with pytest.raises(ValueError, match=f"an architecture '{taken}' already"):
            registry.register(Architecture(taken, "Another", "another_loader"))
