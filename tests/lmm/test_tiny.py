# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from adatoken3d_ros.lmm.llava3d import checkpoint
from adatoken3d_ros.lmm.llava3d.config import ConfigError
from adatoken3d_ros.lmm.llava3d.prompt import build_prompt
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint


def _digest(path: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.iterdir())}


def test_same_seed_same_bytes(tmp_path):
    first = _digest(write_tiny_checkpoint(tmp_path / "a", seed=3, shards=2))
    assert first == _digest(write_tiny_checkpoint(tmp_path / "b", seed=3, shards=2))
    assert first == _digest(write_tiny_checkpoint(tmp_path / "b", seed=3, shards=2))  # over an older one
    other = _digest(write_tiny_checkpoint(tmp_path / "c", seed=4, shards=2))
    assert {name for name in first if first[name] != other[name]} == {n for n in first if n.endswith(".safetensors")}


def test_default_sizes(tmp_path):
    path = write_tiny_checkpoint(tmp_path / "new" / "folder")
    assert sum(f.stat().st_size for f in path.iterdir()) < 5_000_000
    model, tokenizer, report = checkpoint.load(path)
    config = model.config
    assert (config.language.num_hidden_layers, config.language.hidden_size) == (8, 64)
    assert (config.image_size, config.grid, config.context_length) == (112, 8, 4096)
    assert config.language.num_key_value_heads == config.language.num_attention_heads == 4
    assert len(tokenizer) == config.language.vocab_size
    assert report.vision == "embedded"
    # The layer of the tower that never runs is in the file, as it is in the release.
    assert len(report.ignored) == 16 and all(".encoder.layers.2." in name for name in report.ignored)


def test_sizes_are_arguments(tmp_path):
    path = write_tiny_checkpoint(
        tmp_path, layers=2, hidden_size=48, heads=6, kv_heads=2, image_size=56, vision_layers=2, vision_hidden_size=16
    )
    model, _, _ = checkpoint.load(path)
    assert model.language.model.layers[0].self_attn.k_proj.weight.shape == (16, 48)
    assert model.config.grid == 4 and len(model.vision.tower.encoder.layers) == 1


def test_sizes_that_fit_no_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="50"):
        write_tiny_checkpoint(tmp_path, hidden_size=50)
    with pytest.raises(ValueError, match="got 0"):
        write_tiny_checkpoint(tmp_path, shards=0)


@torch.no_grad()
def test_answers_are_printable_and_depend_on_scene_and_question(model, tokenizer):
    def answer(question: str, seed: int) -> str:
        spatial = torch.randn(20, 64, generator=torch.Generator().manual_seed(seed))
        embeds = model.splice(build_prompt(tokenizer, question), spatial).embeds
        mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
        ids = model.language.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        return str(tokenizer.decode(ids[0], skip_special_tokens=True))

    texts = [answer(q, s) for q in ("What is it?", "How many chairs are there?") for s in (0, 1)]
    assert all(text.isprintable() for text in texts)
    assert len(set(texts)) == 4
