# SPDX-License-Identifier: Apache-2.0
"""The published layout: sizes, names, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.qwen3vl.checkpoint import official_names, outline
from adatoken3d_ros.lmm.qwen3vl.tiny import write_tiny_checkpoint
from adatoken3d_ros.lmm.safetensors_files import CheckpointError
from benchmarks.real_size import MODELS

# How many numbers the published models hold.
PUBLISHED = {"2b": 2_127_532_032, "4b": 4_437_815_808, "8b": 8_767_123_696}
IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_originals_tensors(size: str, tmp_path: Path) -> None:
    content = {**MODELS[f"qwen3-vl-{size}"][1], **IDS}
    (tmp_path / "config.json").write_text(json.dumps(content))
    ours = outline(tmp_path)
    with torch.device("meta"):
        theirs = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(content))
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()}
    found = {official: shapes[name] for name, official in official_names(ours).items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    if content["tie_word_embeddings"]:
        del wanted["lm_head.weight"]
    assert found == wanted
    assert sum(torch.Size(shape).numel() for shape in found.values()) == PUBLISHED[size]
    assert (ours.sizes.patches.rows, ours.sizes.patches.columns) == (15, 20)
    assert ours.settings.stride == 32 and ours.sizes.max_spatial_tokens == 20 * 300
    assert ours.decoder.size.keys == 8 * 128 and len(ours.decoder) == content["text_config"]["num_hidden_layers"]


@pytest.mark.parametrize("tied", [True, False])
def test_loads_what_it_writes_and_knows_it_again(tied: bool, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(tmp_path / "a", seed=5, layers=4, tie_word_embeddings=tied)
    model, tokenizer, report = registry.load(path)
    again = registry.load(write_tiny_checkpoint(tmp_path / "b", seed=5, layers=4, tie_word_embeddings=tied)).model
    other = registry.load(write_tiny_checkpoint(tmp_path / "c", seed=6, layers=4, tie_word_embeddings=tied)).model
    assert model.identity == again.identity != other.identity
    assert model.identity.split("-")[0] == other.identity.split("-")[0] == model.shape_hash
    loaded = model.loaded_identity
    model.loaded_identity = None
    assert model.identity == loaded
    assert report.tensors == len(load_file(path / "model.safetensors")) and not report.ignored
    half = registry.load(path, dtype=torch.bfloat16).model
    assert half.identity == loaded and half.dtype == torch.bfloat16
    assert half.decoder.language.model.rotary_emb.inv_freq.dtype == torch.float32
    assert tokenizer.decode(tokenizer.encode("Where is the chair? \N{GREEK SMALL LETTER ALPHA}")).startswith("Where")


def change(path: Path, **tensors: torch.Tensor | None) -> None:
    file = path / "model.safetensors"
    weights = {**load_file(file), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: change(p, model__language_model__norm__weight=None), r"lacks model\.language_model\.norm\.weight"),
        (lambda p: change(p, model__visual__extra=torch.ones(2)), r"no part of the model takes: model\.visual\.extra"),
        (lambda p: change(p, model__language_model__norm__weight=torch.ones(3)), r"has shape \(3,\), expected \(64,\)"),
        (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "is no tokenizer file"),
        (lambda p: rewrite(p, "config.json", text_config=None), "has no object text_config"),
        (lambda p: rewrite(p, "config.json", image_token_id=10**6), "image_token_id is 1000000"),
        (lambda p: rewrite(p, "config.json", tie_word_embeddings=1), "tie_word_embeddings is 1"),
        (lambda p: rewrite(p, "preprocessor_config.json", patch_size=14), "patch_size is 14, config.json has 8"),
        (lambda p: rewrite(p, "preprocessor_config.json", size={"longest_edge": 4}), "fewest to most pixels"),
        (lambda p: rewrite(p, "preprocessor_config.json", image_std=[0, 1, 1]), "image_std"),
        (lambda p: inside(p, "vision_config", out_hidden_size=48), "out_hidden_size is 48, text_config's is 64"),
        (lambda p: inside(p, "vision_config", deepstack_visual_indexes=[0, 9]), "deepstack_visual_indexes"),
        (lambda p: inside(p, "vision_config", patch_size="8"), r"vision_config.patch_size is '8'"),
        (lambda p: inside(p, "text_config", hidden_size=None), "text_config lacks hidden_size"),
        (lambda p: inside(p, "text_config", rope_scaling={"rope_type": "yarn"}), "three interleaved axes"),
        (
            lambda p: inside(p, "text_config", rope_scaling={"mrope_section": [1, 1, 1]}),
            r"mrope_section is \[1, 1, 1\]",
        ),
        (lambda p: inside(p, "text_config", num_attention_heads=3), "3 heads of 16 on 2 of keys"),
        (lambda p: inside(p, "text_config", num_hidden_layers=9), r"lacks model\.language_model\.layers\.8"),
    ],
)
def test_refused_by_name(qwen_path: Path, tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    path = tmp_path / "spoilt"
    path.mkdir()
    for file in qwen_path.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        registry.load(path)


def rewrite(path: Path, name: str, **changes: Any) -> None:
    content = json.loads((path / name).read_text())
    content.update(changes)
    (path / name).write_text(json.dumps(content))


def inside(path: Path, part: str, **changes: Any) -> None:
    rewrite(path, "config.json", **{part: {**json.loads((path / "config.json").read_text())[part], **changes}})


def test_takes_no_other_tower(qwen_path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has a vision tower of its own"):
        registry.load(qwen_path, vision_path=tmp_path)
