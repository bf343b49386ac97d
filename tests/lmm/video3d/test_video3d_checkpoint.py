# SPDX-License-Identifier: Apache-2.0
"""What the loader takes of the family's releases, and what it refuses, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.safetensors_files import CheckpointError
from adatoken3d_ros.lmm.video3d.model import Video3D
from adatoken3d_ros.lmm.video3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.patches import PatchConfig

HEADS = ("ground_head_obj.0.weight", "ground_head_query.3.bias", "ground_head_score.0.weight", "ground_head.0.bias")
HEAD = "ground_head_zero_target"
TRAINING = ("corres_linear.weight", "model.linear_dc.bias", "proj_3d.0.weight", "model.mask_token")


def small(path: Path, **options: Any) -> Path:
    return write_tiny_checkpoint(path, layers=2, **options)


def change(path: Path, **settings: Any) -> None:
    file = path / "config.json"
    content = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_registry_knows_it_and_the_files_tell_the_vocabulary(tiny_path):
    model, tokenizer, report = registry.load(tiny_path)
    assert isinstance(model, Video3D)
    said = json.loads((tiny_path / "config.json").read_text())["vocab_size"]
    assert model.config.language.vocab_size == len(tokenizer) == said + 5
    assert all(".post_layernorm." in name for name in report.ignored)
    assert registry.outline(tiny_path).sizes == model.sizes


def test_training_tensors_are_left_out_and_others_refused_by_name(tmp_path):
    extra = {name: torch.zeros(2, 2) for name in (*HEADS, *TRAINING, "model.mm_inv_projector.net.0.weight")}
    path = small(tmp_path / "a", extra=extra)
    assert set(extra) <= set(registry.load(path).report.ignored)
    last = "model.vision_tower.vision_tower.vision_model.encoder.layers.2.layer_norm1.weight"
    assert last in registry.load(small(tmp_path / "last", extra={last: torch.ones(32)})).report.ignored
    for name in ("model.mm_projector.4.weight", "model.image_newline2", "corres.weight", "ground_head_obj.7.weight"):
        path = small(tmp_path / name, extra={name: torch.zeros(1)})
        with pytest.raises(CheckpointError, match=f"has {name}, which this model has not"):
            registry.load(path)


def test_the_head_that_points_at_boxes_is_loaded_where_there_is_one(tmp_path):
    path = small(tmp_path, grounds=True)
    model, _, report = registry.load(path)
    assert model.grounds and not registry.load(small(tmp_path / "without")).model.grounds
    weights = load_file(path / "model.safetensors")
    own = sorted(name for name in weights if name.startswith("ground_head"))
    layers = [f"{name}.{kind}" for name in (0, 2, 3) for kind in ("bias", "weight")]
    assert own == [*(f"ground_head_{which}.{name}" for which in ("obj", "query") for name in layers), HEAD]
    assert not set(own) & set(report.ignored)
    assert torch.equal(model.head.query[3].weight, weights["ground_head_query.3.weight"])
    assert model.sizes.parts == 4 and model.sizes.feature_width == 64 + 4 * 32
    # The files tell, too, where config.json does not; and what belongs to the head is there as a whole.
    change(path, ground_head_type=None, ground_head_temperature=0.5)
    assert registry.load(path).model.head.temperature == 0.07
    save_file({k: v for k, v in weights.items() if k != "ground_head_obj.2.bias"}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks ground_head_obj\.2\.bias"):
        registry.load(path)
    save_file({k: v for k, v in weights.items() if k not in own}, path / "model.safetensors")
    assert not registry.load(path).model.grounds
    change(path, ground_head_type="infonce", ground_head_temperature=0.5)
    with pytest.raises(CheckpointError, match=r"lacks ground_head_zero_target, .* and 8 more"):
        registry.load(path)
    assert registry.outline(path).head.temperature == 0.5
    change(path, ground_head_temperature=-1)
    with pytest.raises(CheckpointError, match="grounding must be positive"):
        registry.outline(path)
    change(path, ground_head_temperature=None, object_feature_type="patch27")
    with pytest.raises(CheckpointError, match="object_feature_type is 'patch27'"):
        registry.outline(path)


@pytest.mark.parametrize("name", ["model.image_newline", "model.layers.1.self_attn.q_proj.bias", "lm_head.weight"])
def test_missing_and_misshapen_tensors_are_named(tmp_path, name):
    path = small(tmp_path)
    weights = load_file(path / "model.safetensors")
    shape = tuple(weights[name].shape)
    save_file({**weights, name: torch.zeros(3, *shape)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} in .* has shape"):
        registry.load(path)
    del weights[name]
    save_file(weights, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        registry.load(path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"world_position_embedding_type": None}, "lacks world_position_embedding_type"),
        ({"world_position_embedding_type": "mlp"}, "world_position_embedding_type is 'mlp'"),
        ({"mm_newline_position": "frame"}, "mm_newline_position is 'frame'"),
        ({"mm_spatial_pool_mode": "max"}, "mm_spatial_pool_mode is 'max'"),
        ({"add_faster_video": True}, "add_faster_video is True"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of 3"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 3, the files hold 2"),
        ({"voxel_size": -0.1}, "cell must be positive"),
        ({"min_xyz_range": [16, 0, 0]}, "which is no box"),
        ({"min_xyz_range": [0, 0]}, "wrong value"),
        ({"coord_token_ids": [9999]}, "coord_token_ids has 9999"),
        ({"coord_token_ids": "a"}, "coord_token_ids is 'a'"),
        ({"mm_hidden_size": 5}, "mm_hidden_size is 5"),
        ({"vision_config": None}, "mm_vision_tower is 'tiny', which is not known"),
        ({"model_type": "llava_qwen2"}, "llava_llama .*llava_qwen"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, said):
    path = small(tmp_path)
    change(path, **settings)
    with pytest.raises(CheckpointError, match=said):
        registry.load(path)


def test_tower_of_its_own_directory(tmp_path):
    path, tower = small(tmp_path / "model"), tmp_path / "tower"
    weights = load_file(path / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    described = json.loads((path / "config.json").read_text())["vision_config"]
    whole = registry.load(path).model.state_dict()
    save_file({k: v for k, v in weights.items() if not k.startswith(prefix)}, path / "model.safetensors")
    change(path, vision_config=None)
    with pytest.raises(CheckpointError, match="mm_vision_tower"):
        registry.load(path)
    tower.mkdir()
    (tower / "config.json").write_text(json.dumps({"model_type": "siglip", "vision_config": described}))
    save_file(
        {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}, tower / "model.safetensors"
    )
    again = registry.load(path, vision_path=tower).model.state_dict()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_tokenizer_of_three_files(tmp_path, tokenizer):
    _, split, report = registry.load(small(tmp_path, split_tokenizer=True))
    assert report.tokenizer.name == "vocab.json"
    for text in ("What is the red table?", "  two\n\nlines 12 \N{SNOWMAN} don't", "a<|im_end|>b"):
        ids = split.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode(text, add_special_tokens=False)
        assert split.decode(ids) == text
    assert split.convert_tokens_to_ids("<coord>") == 592
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="merges.txt is missing"):
        registry.load(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="neither tokenizer.json nor vocab.json"):
        registry.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.raises(CheckpointError, match="Unigram tokenizer"):
        registry.load(tmp_path)


def test_missing_depth_is_averaged_in_where_the_config_says_so(tiny_path, tmp_path):
    """Another model to scenes, as its places are others; a value that is none is named."""
    rgb, depth = np.zeros((120, 160, 3), np.uint8), np.full((120, 160), 2.0, np.float32)
    depth[::2] = 0.0
    frame = PosedFrame(rgb, depth, np.diag([120.0, 120.0, 1.0]), np.eye(4), 0)
    path = Path(shutil.copytree(tiny_path, tmp_path / "model"))
    change(path, average_missing_depth=True)
    ours, theirs = registry.load(tiny_path).model, registry.load(path).model
    config = PatchConfig(ours.sizes.patches)
    assert ours.place_tokens(frame, config).xyz[:, 2] == pytest.approx(2.0)
    assert 0.8 < theirs.place_tokens(frame, config).xyz[:, 2].mean() < 1.2
    assert ours.shape_hash != theirs.shape_hash and ours.identity != theirs.identity
    change(path, average_missing_depth="yes")
    with pytest.raises(CheckpointError, match="average_missing_depth is 'yes', neither true nor false"):
        registry.load(path)
