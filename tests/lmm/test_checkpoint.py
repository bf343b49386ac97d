# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adatoken3d_ros.lmm.llava3d import checkpoint
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.lmm.official_layout import tower_directory
from adatoken3d_ros.lmm.safetensors_files import CheckpointError, free_bytes
from tests.lmm.shards import split

TOWER = "model.vision_tower.vision_tower.vision_model."
NORM = "model.norm.weight"


def _change_weights(path: Path, change, file: str = "model.safetensors") -> None:
    weights = load_file(path / file)
    change(weights)
    save_file(weights, path / file)


def _change_config(path: Path, **changes: object) -> None:
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **changes}))


def _separate_tower(path: Path, prefix: str) -> Path:
    """Takes the vision tower out of a checkpoint and lays it down like a CLIP model of its own."""
    weights = load_file(path / "model.safetensors")
    tower = {prefix + n.removeprefix(TOWER): weights.pop(n) for n in list(weights) if n.startswith(TOWER)}
    save_file(weights, path / "model.safetensors")
    folder = path.parent / "clip"
    folder.mkdir()
    save_file({**tower, "text_model.final_layer_norm.weight": torch.ones(3)}, folder / "model.safetensors")
    vision = json.loads((path / "config.json").read_text())["vision_config"]
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    return folder


def _equal(a: Llava3D, b: Llava3D) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_every_tensor_arrives_in_its_place(tiny_path, loaded):
    model, _, report = loaded
    stored = load_file(tiny_path / "model.safetensors")
    state = model.state_dict()
    names = checkpoint.official_names(model)
    assert names.keys() == state.keys()
    assert all(torch.equal(state[ours], stored[official]) for ours, official in names.items())
    assert report.tensors == len(names) and report.parameters == sum(t.numel() for t in state.values())
    assert sorted([*report.ignored, *names.values()]) == sorted(stored)
    assert (report.path, report.vision, report.tokenizer) == (tiny_path, "embedded", tiny_path / "tokenizer.json")
    assert report.files == (tiny_path / "model.safetensors",)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_computes_the_same_as_a_model_that_was_built_in_memory(model):
    built = Llava3D(model.config).eval()
    built.load_state_dict(model.state_dict())
    embeds = torch.randn(1, 30, 64)
    assert torch.equal(built.language(inputs_embeds=embeds).logits, model.language(inputs_embeds=embeds.clone()).logits)
    images = [np.full((112, 112, 3), 90, np.uint8)]
    assert torch.equal(built.encode_images(images), model.encode_images(images))
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(built.named_buffers()).keys()
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in built.named_buffers())


@pytest.mark.parametrize("index", [True, False])
def test_shards_with_and_without_an_index(path, model, index):
    split(path, index=index)
    sharded, _, report = checkpoint.load(path)
    assert _equal(sharded, model) and len(report.files) == 3


def test_progress_rises_to_one(path):
    split(path)
    steps: list[tuple[float, str]] = []
    checkpoint.load(path, progress=lambda fraction, text: steps.append((fraction, text)))
    fractions = [fraction for fraction, _ in steps]
    assert fractions[0] == 0.0 and fractions[-1] == 1.0 and fractions == sorted(fractions)
    assert {text for _, text in steps} == {f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)}


def test_cast_keeps_the_rotary_frequencies_in_float32(path, model):
    half, _, _ = checkpoint.load(path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half.dtype == torch.bfloat16
    rotary = half.language.model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert torch.equal(rotary, model.language.model.rotary_emb.inv_freq)
    assert torch.equal(half.click.out.weight, model.click.out.weight.bfloat16())
    spliced_width = half.embed_clicks(torch.zeros(1, 3))
    assert spliced_width.dtype == torch.bfloat16


def test_stored_dtype_is_kept_if_none_is_asked_for(path):
    _change_weights(path, lambda w: w.update({n: t.half() for n, t in w.items()}))
    assert checkpoint.load(path)[0].dtype == torch.float16


def test_weights_do_not_hang_on_the_file(path, model):
    mine, _, _ = checkpoint.load(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert _equal(mine, model)


def test_unknown_tensors_are_listed(path, loaded):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        f"{TOWER}embeddings.position_ids": torch.ones(65),
    }
    _change_weights(path, lambda w: w.update(extra))
    assert sorted({*checkpoint.load(path)[2].ignored} - {*loaded[2].ignored}) == sorted(extra)


def test_tied_output_layer(tmp_path):
    path = write_tiny_checkpoint(tmp_path, layers=1, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    tied, _, _ = checkpoint.load(path)
    assert tied.language.lm_head.weight is tied.language.model.embed_tokens.weight


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_separate_vision_tower(path, model, prefix):
    folder = _separate_tower(path, prefix)
    joined, _, report = checkpoint.load(path, vision_path=folder)
    assert _equal(joined, model)
    assert report.vision == str(folder.resolve()) and report.ignored == []
    assert {file.parent.name for file in report.files} == {"copy", "clip"}


def test_embedded_tower_comes_first(path, tmp_path, model):
    other = write_tiny_checkpoint(tmp_path / "other", seed=9, layers=1)
    folder = _separate_tower(other, "")
    assert _equal(checkpoint.load(path, vision_path=folder)[0], model)


def test_no_vision_tower_at_all(path):
    _separate_tower(path, "")
    with pytest.raises(CheckpointError, match="carries no vision tower.*vision_path"):
        checkpoint.load(path)


def test_damaged_vision_tower(path):
    _change_weights(path, lambda w: w.pop(f"{TOWER}pre_layrnorm.weight"))
    with pytest.raises(CheckpointError, match="lacks model.vision_tower.*pre_layrnorm.weight of its vision tower"):
        checkpoint.load(path)


def test_separate_tower_that_is_incomplete_or_another(path):
    folder = _separate_tower(path, "vision_model.")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_attention_heads is 2, the checkpoint asks for 4"):
        checkpoint.load(path, vision_path=folder)
    config["vision_config"]["num_attention_heads"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    _change_weights(folder, lambda w: w.pop("vision_model.encoder.layers.1.mlp.fc1.bias"))
    with pytest.raises(CheckpointError, match=r"clip lacks vision_model.encoder.layers.1.mlp.fc1.bias"):
        checkpoint.load(path, vision_path=folder)


# --- what must be refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        NORM,
        "lm_head.weight",
        "model.mm_projector.2.bias",
        "model.video_tower.video_tower.positional_embedding.position_embedding_head.1.weight",
        "model.video_tower.prompt_encoder.pos_emb3d.position_embedding_head.3.bias",
    ],
)
def test_missing_tensor_is_named(path, name):
    _change_weights(path, lambda w: w.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks {name}$"):
        checkpoint.load(path)


def test_many_missing_tensors_are_counted(path):
    _change_weights(
        path, lambda w: [w.pop(n) for n in list(w) if ".layers.2." in n and "vision" not in n and "up_proj" not in n]
    )
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.\S+, .* and 3 more"):
        checkpoint.load(path)


def test_misshapen_tensor_is_named_with_both_shapes(path):
    _change_weights(path, lambda w: w.update({NORM: torch.ones(63)}))
    with pytest.raises(CheckpointError, match=rf"{NORM} in .*model.safetensors has shape \(63,\), expected \(64,\)"):
        checkpoint.load(path)


def test_config_of_another_size_is_a_shape_error(path):
    _change_config(path, intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"mlp.* has shape .*160.*expected .*128"):
        checkpoint.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(path, value):
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights[NORM][5] = value

    _change_weights(path, spoil)
    with pytest.raises(CheckpointError, match=f"{NORM} in .* not finite in torch.float32"):
        checkpoint.load(path)


def test_cast_that_overflows(path):
    _change_weights(path, lambda w: w.update({NORM: torch.full((64,), 1e6)}))
    with pytest.raises(CheckpointError, match="not finite in torch.float16"):
        checkpoint.load(path, dtype=torch.float16)


def test_quantised_weights(path):
    _change_weights(path, lambda w: w.update({NORM: torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=f"{NORM} in .* is I8"):
        checkpoint.load(path)


def test_vocabulary_larger_than_the_model(path):
    _change_config(path, vocab_size=900)
    with pytest.raises(CheckpointError, match="has 934 tokens, the model's table has 900"):
        checkpoint.load(path)


def test_too_little_memory(path, loaded):
    needed = loaded[2].parameters * 4
    asked: list[torch.device] = []

    def free(device: torch.device) -> int:
        asked.append(device)
        return needed

    with pytest.raises(CheckpointError, match=r"need 0\.00\d GB on cpu, 0\.00\d GB are free"):
        checkpoint.load(path, free_memory=free)
    assert asked == [torch.device("cpu")]
    checkpoint.load(path, dtype=torch.bfloat16, free_memory=free)  # half the size fits


def test_free_memory_of_this_machine():
    assert free_bytes(torch.device("cpu")) > 0


def test_more_layers_than_the_files_hold_are_refused_before_any_is_built(path, monkeypatch):
    monkeypatch.setattr(checkpoint, "Llava3D", None)
    _change_config(path, num_hidden_layers=500)
    with pytest.raises(CheckpointError, match="num_hidden_layers 500, the files hold 3"):
        checkpoint.load(path)
    _change_config(path, num_hidden_layers=1_000_000)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1000000"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "named", ["no\0path", "a" * 5000, "loop/x"], ids=["null byte", "too long", "a circle of links"]
)
def test_a_tower_that_is_named_by_no_path_is_looked_for_nowhere(path, named):
    (path / "loop").symlink_to(path / "loop")
    _change_config(path, mm_vision_tower=named)
    assert tower_directory(path, None) is None
    checkpoint.load(path)  # which carries its own
