# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.lmm.llava3d.checkpoint import official_names
from adatoken3d_ros.lmm.llava3d.config import ConfigError, Llava3DConfig
from adatoken3d_ros.lmm.llava3d.model import Llava3D

# The keys of the published config.json.
OFFICIAL = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "max_length": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "pretraining_tp": 1,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.37.2",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_patch_merge_type": "flat",
    "image_aspect_ratio": "square",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "mm_video_tower": "SpatialAwareModule",
    "num_frames": 20,
    "num_sample_tokens": 1152,
    "tokenizer_model_max_length": 4096,
    "tokenizer_padding_side": "right",
    "use_cache": True,
    "vocab_size": 32000,
}
SMALL_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def test_official_config_gives_the_published_numbers():
    config = Llava3DConfig.from_dict(OFFICIAL)
    assert (config.image_size, config.patch_size, config.grid) == (336, 14, 24)
    assert (config.vision.num_hidden_layers, config.vision_layers) == (24, 23)
    assert (config.num_views, config.voxel_size, config.max_spatial_tokens) == (20, 0.2, 2560)
    assert config.context_length == 4096
    assert config.language.rms_norm_eps == 1e-5
    assert config.language.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.language._attn_implementation == config.vision._attn_implementation == "sdpa"


def test_missing_optional_keys_fall_back_to_the_trained_constants():
    config = Llava3DConfig.from_dict({k: v for k, v in OFFICIAL.items() if k not in ("rms_norm_eps", "rope_theta")})
    assert config.language.rms_norm_eps == 1e-5
    assert config.language.rope_parameters["rope_theta"] == 10000.0
    assert config.shape() == Llava3DConfig.from_dict(OFFICIAL).shape()


def test_overrides_and_context():
    changed = {"num_frames": 8, "voxel_size": 0.1, "max_spatial_tokens": 512, "tokenizer_model_max_length": 2048}
    config = Llava3DConfig.from_dict({**OFFICIAL, **changed})
    assert (config.num_views, config.voxel_size, config.max_spatial_tokens) == (8, 0.1, 512)
    assert config.context_length == 2048
    assert Llava3DConfig.from_dict({**OFFICIAL, "max_position_embeddings": 1024}).context_length == 1024


def test_hash_tells_shapes_apart_and_nothing_else():
    official = Llava3DConfig.from_dict(OFFICIAL)
    assert official.hash() == Llava3DConfig.from_dict(json.loads(json.dumps(OFFICIAL))).hash()
    assert official.hash() == Llava3DConfig.from_dict({**OFFICIAL, "torch_dtype": "float16"}).hash()
    assert len(official.hash()) == 16 and int(official.hash(), 16) >= 0
    changes = [
        {"num_hidden_layers": 31},
        {"num_key_value_heads": 8},
        {"rope_theta": 5e5},
        {"voxel_size": 0.1},
        {"max_spatial_tokens": 100},
        {"mm_vision_select_layer": -1},
        {"tie_word_embeddings": True},
    ]
    assert len({Llava3DConfig.from_dict({**OFFICIAL, **c}).hash() for c in [{}, *changes]}) == len(changes) + 1


def test_vision_tower_described_in_the_config_comes_first():
    config = Llava3DConfig.from_dict(
        {**OFFICIAL, "vision_config": SMALL_TOWER, "mm_hidden_size": 32}, {**SMALL_TOWER, "image_size": 28}
    )
    assert (config.vision.hidden_size, config.grid, config.vision_layers) == (32, 4, 2)


@pytest.mark.parametrize("wrap", [lambda v: v, lambda v: {"model_type": "clip", "vision_config": v}])
def test_unknown_tower_takes_the_description_from_its_own_directory(wrap):
    content = {**OFFICIAL, "mm_vision_tower": "somewhere/else", "mm_hidden_size": 32}
    assert Llava3DConfig.from_dict(content, wrap(SMALL_TOWER)).grid == 4
    with pytest.raises(ConfigError, match="'somewhere/else'"):
        Llava3DConfig.from_dict(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
        ({"mm_vision_select_layer": -25}, "select_layer -25"),
        ({"mm_vision_select_layer": 25}, "select_layer 25"),
        ({"mm_hidden_size": 768}, "mm_hidden_size is 768"),
        ({"hidden_size": "wide"}, "wide"),
        ({"hidden_size": 4095}, "4095"),
        ({"voxel_size": 0.0}, "voxel_size must be positive, got 0.0"),
        ({"voxel_size": float("nan")}, "voxel_size must be positive, got nan"),
        ({"num_frames": -1}, "num_views must be positive, got -1"),
        ({"vision_config": {"hidden_size": 32}}, "lacks intermediate_size"),
        ({"vision_config": {**SMALL_TOWER, "image_size": 60}, "mm_hidden_size": 32}, "60 is no multiple"),
        ({"vision_config": {**SMALL_TOWER, "image_size": [56, 56]}, "mm_hidden_size": 32}, "one integer"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    with pytest.raises(ConfigError, match=message):
        Llava3DConfig.from_dict({**OFFICIAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, not a whole number from 1 to 512"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 5}, "32 is no multiple of 5 key heads"),
        ({"vocab_size": 2**60}, "vocab_size is 1152921504606846976"),
        ({"vocab_size": 32000.0}, "vocab_size is 32000.0"),
        ({"hidden_size": -4096}, "hidden_size is -4096"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 96}, "heads are 3 wide"),
        ({"head_dim": 10**9}, "head_dim is"),
        ({"hidden_act": "magic"}, "hidden_act is 'magic'"),
        ({"hidden_act": ["silu"]}, "hidden_act is"),
        ({"pad_token_id": 32000}, "pad_token_id is 32000"),
        ({"pad_token_id": [0]}, "pad_token_id is"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id is"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": 10**400}, "wrong value"),
        ({"rope_parameters": 3}, "wrong value"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"num_frames": float("inf")}, "wrong value"),
        ({"max_spatial_tokens": 10**12}, "max_spatial_tokens must be at most"),
        ({"voxel_size": 1e300}, "voxel_size must be at most"),
        ({"tokenizer_model_max_length": [1]}, "wrong value"),
        ({"mm_hidden_size": "x" * 10**6}, "mm_hidden_size is .{,130}, but"),
        ({"model_type": "x" * 10**6}, "model_type is .{,250}, supported"),
        ({"vision_config": {**SMALL_TOWER, "patch_size": 0}, "mm_hidden_size": 32}, "patch_size is 0"),
        (
            {"vision_config": {**SMALL_TOWER, "num_attention_heads": 0}, "mm_hidden_size": 32},
            "num_attention_heads is 0",
        ),
        ({"vision_config": {**SMALL_TOWER, "num_hidden_layers": 10**6}, "mm_hidden_size": 32}, "num_hidden_layers is"),
        (
            {"vision_config": {**SMALL_TOWER, "image_size": 7000, "patch_size": 1}, "mm_hidden_size": 32},
            "patches, more",
        ),
        ({"vision_config": {"model_type": "efficientnet_lite0", "image_size": 2**20}}, "image_size|patches"),
        ({"vision_config": {"model_type": "efficientnet_lite0", "taps": 3}}, "wrong value"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(change, message):
    with pytest.raises(ConfigError, match=message):
        Llava3DConfig.from_dict({**OFFICIAL, **change})


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([10**400, -(10**400), 1e308]),
)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(OFFICIAL)), VALUES, max_size=2),
    st.dictionaries(st.sampled_from([*SMALL_TOWER, "hidden_act", "layer_norm_eps", "model_type"]), VALUES, max_size=2),
)
def test_any_values_give_a_model_that_can_be_built_or_the_documented_error(change, tower):
    content = {**OFFICIAL, "num_hidden_layers": 2, "mm_hidden_size": 32, **change}
    with contextlib.suppress(ConfigError):
        config = Llava3DConfig.from_dict({**content, "vision_config": {**SMALL_TOWER, **tower}})
        if config.language.num_hidden_layers <= 4:
            with torch.device("meta"):
                Llava3D(config)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_missing_sizes_are_named(key):
    with pytest.raises(ConfigError, match=f"lacks {key}"):
        Llava3DConfig.from_dict({k: v for k, v in OFFICIAL.items() if k != key})


def test_full_size_model_has_exactly_the_published_tensors():
    with torch.device("meta"):
        model = Llava3D(Llava3DConfig.from_dict(OFFICIAL))
    state = model.state_dict()
    shapes = {official: tuple(state[ours].shape) for ours, official in official_names(model).items()}

    language = {
        "model.embed_tokens.weight": (32000, 4096),
        "lm_head.weight": (32000, 4096),
        "model.norm.weight": (4096,),
    }
    for i in range(32):
        layer = f"model.layers.{i}."
        language |= {f"{layer}self_attn.{p}_proj.weight": (4096, 4096) for p in "qkvo"}
        language |= {f"{layer}mlp.{p}_proj.weight": (11008, 4096) for p in ("gate", "up")}
        language |= {f"{layer}mlp.down_proj.weight": (4096, 11008)}
        language |= {f"{layer}{p}_layernorm.weight": (4096,) for p in ("input", "post_attention")}
    projector = {
        "model.mm_projector.0.weight": (4096, 1024),
        "model.mm_projector.0.bias": (4096,),
        "model.mm_projector.2.weight": (4096, 4096),
        "model.mm_projector.2.bias": (4096,),
    }

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{prefix}.0.weight": (width, 3),
            f"{prefix}.0.bias": (width,),
            f"{prefix}.1.weight": (width,),
            f"{prefix}.1.bias": (width,),
            f"{prefix}.3.weight": (width, width),
            f"{prefix}.3.bias": (width,),
        }

    position = mlp("model.video_tower.video_tower.positional_embedding.position_embedding_head", 1024)
    click = mlp("model.video_tower.prompt_encoder.pos_emb3d.position_embedding_head", 4096)
    tower = {name: shape for name, shape in shapes.items() if name.startswith("model.vision_tower.")}

    def numbers(group: dict[str, tuple[int, ...]]) -> tuple[int, int]:
        return len(group), sum(torch.Size(shape).numel() for shape in group.values())

    assert numbers(language) == (291, 6_738_415_616)
    assert numbers(projector) == (4, 20_979_712)
    assert numbers(position) == (6, 1_055_744)
    assert numbers(click) == (6, 16_805_888)
    assert shapes == language | projector | position | click | tower
    # 391 tensors are published; the 16 of the layer that never runs are not built.
    assert numbers(tower) == (375, 303_507_456 - 12_596_224)
    assert tower["model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight"] == (577, 1024)
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in tower
