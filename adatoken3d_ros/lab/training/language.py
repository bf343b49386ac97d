# SPDX-License-Identifier: Apache-2.0
"""The small model: its sizes, its vocabulary, and a checkpoint in the loader's layout."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from adatoken3d_ros.engine.understanding import WORD, write_understanding
from adatoken3d_ros.lab.synthetic.facts import DIRECTIONS
from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS
from adatoken3d_ros.lab.synthetic.wordings import STANDPOINTS, UNKNOWN, WORDINGS, article, plural, wordings
from adatoken3d_ros.lab.training.pretrained import DETECTOR
from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.untrained import ModelSize, trainable, trainable_of
from adatoken3d_ros.lmm.vision.tower import VisionTower

_LIKENESS = 1.4  # of query and key maps with orthonormal rows: 1 is logits of sqrt(head width) for a row with itself
_TAKEN = 0.1


def words(of_prompts: Sequence[str] = ()) -> Iterator[str]:
    """Every word of questions and answers, beginnings of sentences, parts of numbers; in a fixed order."""
    yield from ",.?:;[]()"
    yield from of_prompts
    texts = [text for group in (WORDINGS, STANDPOINTS) for wording in group.values() for text in wording]
    texts += [name for kind in KINDS for name in (article(kind), plural(kind))]
    texts += [*COLOURS, *DIRECTIONS, "yes no floor wall ceiling the colour color I metres", UNKNOWN]
    for text in texts:
        for word in re.sub(r"\{\w\}|[?,.:]", " ", text).split():
            yield word
            # Without a space before it after the line break that a question begins with, in both cases.
            yield "\n" + word[0].upper() + word[1:]
            yield word[0].lower() + word[1:]
            yield "\n" + word[0].lower() + word[1:]
    for sign in ("", "-", "[", "[-"):
        yield from (f"{sign}{digit}." for digit in range(10))


def tokenizer(tokens: str = "voxels") -> Any:
    """Of the model with such spatial tokens."""
    form = trainable(tokens)
    return form.tokenizer(words(form.PROMPT_WORDS))


def config_content(size: ModelSize, vocab_size: int) -> dict[str, Any]:
    """The config.json of such a model."""
    return trainable(size.tokens).config_content(size, vocab_size)


def outline(size: ModelSize) -> SpatialLMM:
    """What scenes depend on: the model without weights."""
    with torch.device("meta"):
        return trainable(size.tokens).make(config_content(size, vocab_size=512))


def shape_hash_of(content: Mapping[str, Any]) -> str:
    """Of the model that a config.json describes (`SpatialLMM.shape_hash`); raises ValueError for one of none."""
    with torch.device("meta"):
        return trainable_of(content).make(content).shape_hash


def vocabulary_of(directory: Path, content: Mapping[str, Any]) -> dict[str, int]:
    """Of a checkpoint's tokenizer; raises ValueError for a file that is damaged."""
    found: dict[str, int] = trainable_of(content).load_tokenizer(directory)[0].get_vocab()
    return found


def new_model(content: Mapping[str, Any], vision: VisionTower, seed: int) -> SpatialLMM:
    """Random weights everywhere but in the vision tower, which is `vision` itself, frozen."""
    generator = torch.Generator().manual_seed(seed)
    size, form = int(content["hidden_size"]), trainable_of(content)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = form.make(content)
    model.vision = vision
    form.begin(model, generator)
    # Of length 1, as the classes of the tokens are told by likeness to these vectors.
    language = model.decoder.language.model
    nn.init.normal_(language.embed_tokens.weight, std=size**-0.5, generator=generator)
    for layer in language.layers:
        _look_for_likeness(layer.self_attn, generator)
    return model.train()


def _look_for_likeness(attention: Any, generator: torch.Generator) -> None:
    """Half of the heads begin by attending to what is like the row itself, and by taking over what they find.

    After Trockman and Kolter 2023 (arXiv:2305.09828): in trained transformers query and key maps are alike. Here it is
    what a word has to do to find its tokens, which from random weights takes thousands of steps to come about.
    """
    config = attention.config
    size, groups = config.hidden_size, attention.num_key_value_groups
    width = attention.head_dim
    with torch.no_grad():
        for shared in range(config.num_key_value_heads // 2):
            rows = slice(shared * width, (shared + 1) * width)
            basis = torch.linalg.qr(torch.randn(size, width, generator=generator)).Q.T
            attention.k_proj.weight[rows] = _LIKENESS * basis
            attention.v_proj.weight[rows] = basis
            for head in range(shared * groups, (shared + 1) * groups):
                rows = slice(head * width, (head + 1) * width)
                attention.q_proj.weight[rows] = _LIKENESS * basis
                attention.o_proj.weight[:, rows] = _TAKEN / groups * basis.T


def understanding(*, unseen: bool = False, told: bool = False) -> dict[str, Any]:
    """What such a model understands, as `engine.understanding` reads it from beside the weights.

    unseen: whether it was trained to say that it does not know (`synthetic.unseen`). told: whether distances said from
    where to where they are.
    """
    stands = [words for group in STANDPOINTS.values() for words in group]
    known: dict[str, list[str]] = {}
    for name, group in wordings(told).items():
        texts = [text.replace("{s}", words.replace("{s}", "{x}")) for text in group for words in stands]
        known.setdefault(name.split()[0], []).extend(dict.fromkeys(texts))
    things = [name for kind in KINDS for name in (kind, plural(kind))] + ["object at {p}"]
    said = [text for group in known.values() for text in group] + [*things, *map(article, KINDS), *COLOURS, "the"]
    found = {word for text in said for word in WORD.findall(re.sub(r"\{\w\}", " ", text))}
    both = sorted(found | {word[0].lower() + word[1:] for word in found})
    content = {"words": both, "things": things, "colours": list(COLOURS), "wordings": known}
    return {**content, "unknown": UNKNOWN} if unseen else content


def save_model(
    model: SpatialLMM,
    content: Mapping[str, Any],
    words: Any,
    directory: Path,
    recipe: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    tower: Path | None = None,
) -> None:
    """Writes config.json (with the recipe), tokenizer.json and model.safetensors, each complete or not at all.

    Args:
        words: the tokenizer.
        dtype: of all weights but the vision tower's.
        tower: a checkpoint with the very tower: it is named in config.json, relative to the directory, and not written
            a second time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if tower is not None:
        content = {**content, "mm_vision_tower": os.path.relpath(tower.resolve(), directory.resolve())}
    state = {ours: tensor.detach().float() for ours, tensor in model.state_dict().items()}
    # The tower stays what it was published as, and what scenes were encoded with; its detector has float16's values.
    kept = {"vision.": torch.float32, f"vision.tower.{DETECTOR}": torch.float16}
    weights = {
        theirs: state[ours].to(next((t for p, t in reversed(kept.items()) if ours.startswith(p)), dtype)).contiguous()
        for ours, theirs in trainable_of(content).official_names(model).items()
        if tower is None or not ours.startswith("vision.")
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
    write_understanding(directory, understanding(unseen=recipe.get("unseen", 0) > 0, told=recipe.get("told", False)))
