# SPDX-License-Identifier: Apache-2.0
"""Another small architecture, all that the interface asks for and nothing more: a wide grid over the whole picture,
a decoder with norms on queries and keys, no clicks and no boxes, a first legal gate, and line breaks in the scene.

`register` makes it known, and then its checkpoints go through everything that loads a model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import Layout
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.interface import ModelSizes, Placeholder, PromptIds, SpatialLMM, Spliced, SpliceError
from adatoken3d_ros.lmm.official_layout import finish
from adatoken3d_ros.lmm.safetensors_files import LoadReport, inventory
from adatoken3d_ros.lmm.text_places import PromptError, check_text
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.geometry import PatchGeometry

WIDTH, LAYERS, FIRST_GATE, BREAK_EVERY = 32, 6, 2, 4
ARCHITECTURE = registry.Architecture("fake", "FakeLMM", __name__)


class MeanColour(VisionTower):
    """Three rows of five patches, of which each feature is the mean colour."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 8), PatchGeometry(24, 40, 3, 5, crop=False), width=8)

    @property
    def flops_per_view(self) -> float:
        return 2.0 * self.patches * 3 * 8

    def features(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.tower(nn.functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2))
        return out


class FakeTokenizer:
    """A token for each character; 0 ends an answer."""

    eos_token_id = 0

    def __call__(self, text: str) -> tuple[int, ...]:
        return tuple(1 + ord(character) % 90 for character in text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(64 + index % 26) for index in ids if index or not skip_special_tokens)


class FakeLMM(SpatialLMM):
    """Places are embedded by a sinusoid of the mean point; a line break follows every fourth spatial token."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        config = Qwen3Config(
            vocab_size=100,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            attn_implementation="sdpa",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vision = MeanColour()
            self.project = nn.Linear(8, WIDTH)
            self.line_break = nn.Parameter(torch.randn(1, WIDTH))
            self.language = Qwen3ForCausalLM(config)
            for parameter in self.language.parameters():
                if parameter.ndim == 2:
                    nn.init.normal_(parameter, std=0.2)
        self.requires_grad_(False).eval()
        self.decoder = Decoder(self.language, first_gate=FIRST_GATE)
        self.shape_hash = "fa4e" * 4
        self.sizes = ModelSizes(
            patches=self.vision.geometry,
            feature_width=8,
            voxel_size=0.25,
            num_views=4,
            max_spatial_tokens=60,
            context_length=512,
        )

    def lift_places(self, xyz: Tensor) -> Tensor:
        return nn.functional.pad(xyz.float(), (0, self.sizes.feature_width - 3))

    def scene_tokens(self, features: Tensor, places: Tensor) -> Tensor:
        tokens: Tensor = self.project(features + torch.sin(places))
        return tokens

    def prompt(self, tokenizer: Any, question: str, *, n_clicks: int = 0, template: str = "") -> PromptIds:
        if template:
            raise PromptError(f"there is no template {template!r}")
        check_text(question.strip(), control_words=["<scene>"])
        return PromptIds((tokenizer("Scene: "), Placeholder("image"), tokenizer(f" {question.strip()} Answer: ")))

    def splice(self, prompt: PromptIds, spatial: Tensor, clicks: Tensor | None = None, *, where: Any = None) -> Spliced:
        assert clicks is None
        before, _, after = prompt.pieces
        tokens = torch.arange(len(spatial)) + torch.arange(len(spatial)) // BREAK_EVERY  # their rows in the block
        block = self.line_break.repeat(len(spatial) + len(spatial) // BREAK_EVERY, 1)
        block[tokens] = spatial
        texts = [self.decoder.embed(torch.tensor(piece)) for piece in (before, after)]
        embeds = torch.cat([texts[0], block, texts[1]])[None]
        if embeds.shape[1] > self.sizes.context_length:
            raise SpliceError(f"{embeds.shape[1]} tokens are more than {self.sizes.context_length}")
        start = len(texts[0])
        return Spliced(embeds, Layout(start, len(spatial), embeds.shape[1], rows=start + tokens))


# --- its checkpoint, as a loader of the registry finds it -------------------------------------------------------------


def register(patch: pytest.MonkeyPatch) -> None:
    """Makes it known until the patch is undone."""
    patch.setattr(registry, "_further", [])
    registry.register(ARCHITECTURE)


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    """Writes config.json and the weights into a directory; returns it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": ARCHITECTURE.model_type, "seed": seed}))
    save_file(FakeLMM(seed).state_dict(), path / "model.safetensors")
    return path


def outline(path: Path, vision_path: str | Path | None = None) -> FakeLMM:
    """See `registry.Loader`."""
    with torch.device("meta"):
        return FakeLMM()


def official_names(model: FakeLMM) -> dict[str, str]:
    """See `registry.Loader`."""
    return {name: name for name in model.state_dict()}


def load(
    path: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", **options: Any
) -> tuple[FakeLMM, FakeTokenizer, LoadReport]:
    """See `registry.Loader`."""
    model, stored = outline(path), inventory(path)
    names = {name: name for name in model.state_dict()}
    del options["vision_path"]
    report = finish(
        model,
        {name: stored[name] for name in names if name in stored},
        names,
        path=path,
        tokenizer=path,
        ignored=(),
        started=time.monotonic(),
        dtype=dtype,
        device=torch.device(device),
        **options,
    )
    return model, FakeTokenizer(), report
