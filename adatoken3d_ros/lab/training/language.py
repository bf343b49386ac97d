# SPDX-License-Identifier: Apache-2.0
"""The small model: its sizes, its vocabulary, and a checkpoint in the loader's layout."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.lab.synthetic.facts import DIRECTIONS
from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS
from adatoken3d_ros.lab.synthetic.wordings import STANDPOINTS, WORDINGS, article, plural
from adatoken3d_ros.lmm.interface import PromptIds
from adatoken3d_ros.lmm.llava3d.checkpoint import official_names
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.position import PositionMLP
from adatoken3d_ros.lmm.llava3d.prompt import TEMPLATES, build_prompt
from adatoken3d_ros.lmm.llava3d.tokenizer import llama_tokenizer, load_tokenizer, word_vocabulary
from adatoken3d_ros.lmm.vision.efficientnet import EfficientNetLiteConfig
from adatoken3d_ros.lmm.vision.tower import VisionTower

_LIKENESS = 1.4  # of query and key maps with orthonormal rows: 1 is logits of sqrt(head width) for a row with itself
_TAKEN = 0.1
_REACH = 4.5  # metres from the middle of a room
_HEIGHTS = (-0.3, 3.0)  # metres
_POSITION_GAIN = 2.0


@dataclass(frozen=True)
class ModelSize:
    """What can be chosen about the model.

    Attributes:
        layers, width, heads, intermediate: of the language model; its heads are width / heads wide.
        rope_theta: base of the rotary frequencies. Large, because a word must find its tokens wherever they stand:
            with the usual 10,000, positions up to 1,000 turn most of a small head's dimensions.
        image_size, taps: of the vision tower. voxel_size: metres. views: of a scene. max_tokens: of a scene.
    """

    layers: int = 12
    width: int = 192
    heads: int = 4
    intermediate: int = 512
    rope_theta: float = 1e8
    image_size: int = 224
    taps: tuple[int, ...] = (0, 3, 5, 7)
    voxel_size: float = 0.2
    views: int = 8
    max_tokens: int = 1600
    context_length: int = 2048


def words() -> Iterator[str]:
    """Every word of questions and answers, beginnings of sentences, parts of numbers; in a fixed order."""
    yield from ",.?:;[]()"
    for before, after in TEMPLATES.values():
        yield from before.split()
        yield from after.format(question="").split()
    texts = [text for group in (WORDINGS, STANDPOINTS) for wording in group.values() for text in wording]
    texts += [name for kind in KINDS for name in (article(kind), plural(kind))]
    texts += [*COLOURS, *DIRECTIONS, "yes no floor wall ceiling the colour color I metres"]
    for text in texts:
        for word in re.sub(r"\{\w\}|[?,.:]", " ", text).split():
            yield word
            # Without a space before it after the line break that a question begins with, in both cases.
            yield "\n" + word[0].upper() + word[1:]
            yield word[0].lower() + word[1:]
            yield "\n" + word[0].lower() + word[1:]
    for sign in ("", "-", "[", "[-"):
        yield from (f"{sign}{digit}." for digit in range(10))


def prompt_of(tokenizer: Any, question: str, *, n_clicks: int = 0) -> PromptIds:
    """As the model will be asked; raises PromptError."""
    return build_prompt(tokenizer, question, n_clicks=n_clicks)


def tokenizer() -> PreTrainedTokenizerFast:
    """Words as single tokens, digits after the decimal point one by one, letters and bytes for the rest."""
    return llama_tokenizer(*word_vocabulary(words()))


def config_content(size: ModelSize, vocab_size: int) -> dict[str, Any]:
    """The config.json of such a model."""
    vision = EfficientNetLiteConfig(size.image_size, size.taps)
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": vocab_size,
        "hidden_size": size.width,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "max_position_embeddings": size.context_length,
        "tokenizer_model_max_length": size.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": size.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "efficientnet-lite0",
        "mm_vision_select_feature": "patch",
        "mm_video_tower": "SpatialAwareModule",
        "num_frames": size.views,
        "voxel_size": size.voxel_size,
        "max_spatial_tokens": size.max_tokens,
        "vision_config": vision.to_dict(),
    }


def sizes_of(size: ModelSize) -> Llava3DConfig:
    """What scenes and the vision tower depend on."""
    return Llava3DConfig.from_dict(config_content(size, vocab_size=512))


def shape_hash_of(content: Mapping[str, Any]) -> str:
    """Of the model that a config.json describes (`SpatialLMM.shape_hash`); raises ValueError for one of none."""
    return Llava3DConfig.from_dict(content).hash()


def vocabulary_of(directory: Path) -> dict[str, int]:
    """Of a checkpoint's tokenizer; raises ValueError for a file that is damaged."""
    return load_tokenizer(directory)[0].get_vocab()


def stored_names(model: Llava3D) -> dict[str, str]:
    """{name in the model: name in the checkpoint} of every tensor."""
    return official_names(model)


def new_model(content: Mapping[str, Any], vision: VisionTower, seed: int) -> Llava3D:
    """Random weights everywhere but in the vision tower, which is `vision` itself, frozen."""
    generator = torch.Generator().manual_seed(seed)
    size = int(content["hidden_size"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Llava3D(Llava3DConfig.from_dict(content))
    model.vision = vision
    for layer in model.projector:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    for position in (model.position, model.click):
        spread_knots(position, generator)
    # Of length 1, as the classes of the tokens are told by likeness to these vectors.
    nn.init.normal_(model.language.model.embed_tokens.weight, std=size**-0.5, generator=generator)
    for layer in model.language.model.layers:
        _look_for_likeness(layer.self_attn, generator)
    return model.train()


def spread_knots(position: PositionMLP, generator: torch.Generator) -> None:
    """Each unit of the hidden layer begins to say something at another place of a room.

    Three of four look along an axis, and where they change (the knots) is spread evenly, so that coordinates can be
    read off to centimetres; the others look in any direction. Without biases, LayerNorm would take away how far from
    the origin a point is.
    """
    width = position.lift.out_features
    direction = torch.nn.functional.normalize(torch.randn(width, 3, generator=generator), dim=1)
    knot = torch.empty(width).uniform_(-_REACH, _REACH, generator=generator)
    for axis, (low, high) in enumerate(((-_REACH, _REACH), (-_REACH, _REACH), _HEIGHTS)):
        rows = torch.arange(axis, 3 * width // 4, 3)
        # As far between the knots along each axis; half of the units look backwards.
        scale = 2 * _REACH / (high - low) * torch.where(torch.arange(len(rows)) % 2 == 0, 1.0, -1.0)
        direction[rows] = 0.0
        direction[rows, axis] = scale
        knot[rows] = scale * torch.linspace(low, high, len(rows))
    with torch.no_grad():
        position.lift.weight.copy_(direction)
        position.lift.bias.copy_(-knot)
        position.out.weight.mul_(_POSITION_GAIN)
        position.out.bias.zero_()


def _look_for_likeness(attention: Any, generator: torch.Generator) -> None:
    """Half of the heads begin by attending to what is like the row itself, and by taking over what they find.

    After Trockman and Kolter 2023 (arXiv:2305.09828): in trained transformers query and key maps are alike. Here it is
    what a word has to do to find its tokens, which from random weights takes thousands of steps to come about.
    """
    size, heads = attention.config.hidden_size, attention.config.num_attention_heads
    width = size // heads
    assert attention.config.num_key_value_heads == heads  # a head's own keys
    with torch.no_grad():
        for head in range(heads // 2):
            rows = slice(head * width, (head + 1) * width)
            basis = torch.linalg.qr(torch.randn(size, width, generator=generator)).Q.T
            attention.q_proj.weight[rows] = _LIKENESS * basis
            attention.k_proj.weight[rows] = _LIKENESS * basis
            attention.v_proj.weight[rows] = basis
            attention.o_proj.weight[:, rows] = _TAKEN * basis.T


def save_model(
    model: Llava3D,
    content: Mapping[str, Any],
    words: PreTrainedTokenizerFast,
    directory: Path,
    recipe: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes config.json (with the recipe), tokenizer.json and model.safetensors, each complete or not at all.

    Args:
        dtype: of all weights but the vision tower's.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = {ours: tensor.detach().float() for ours, tensor in model.state_dict().items()}
    # The tower stays what it was published as, and what scenes were encoded with.
    weights = {
        theirs: (state[ours] if ours.startswith("vision.") else state[ours].to(dtype)).contiguous()
        for ours, theirs in official_names(model).items()
    }
    partial = directory / "model.safetensors.part"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(directory / "model.safetensors")
    content = {**content, "torch_dtype": str(dtype).removeprefix("torch.")}
    text = json.dumps({**content, "training": dict(recipe)}, indent=2, sort_keys=True) + "\n"
    partial = directory / "config.json.part"
    partial.write_text(text, encoding="utf-8")
    partial.replace(directory / "config.json")
    words.backend_tokenizer.save(str(directory / "tokenizer.json"))
