# SPDX-License-Identifier: Apache-2.0
"""A small random Llama, prompts for it, and the oracle: the same model at full length with dropped tokens masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import GateTrace, Layout
from adatoken3d_ros.pruning.view import SceneTokens

N_LAYERS = 6


def tiny_decoder(n_kv_heads: int = 4, context: int = 512, seed: int = 0, **shape: Any) -> Decoder:
    """Six layers, hidden 64, four heads; fewer key/value heads for grouped queries. Float32 random weights.

    `shape`: further settings of LlamaConfig.
    """
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        max_position_embeddings=context,
        attn_implementation="sdpa",
        **{"intermediate_size": 112, **shape},
    )
    return Decoder(randomised(LlamaForCausalLM, config, seed))


def randomised(kind: Any, config: Any, seed: int = 0) -> Any:
    """A language model of transformers with random weights of a size at which a mistake can be seen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or name.endswith(("bias", "_norm.weight")):
                # the default of 0.02 makes attention flat and a mistake invisible; biases of 0 would be none
                torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim == 2 else 0.5)
    return model


@dataclass
class Prompt:
    """Random embeddings (1, S, 64) with their layout, and a scene."""

    embeds: Tensor
    layout: Layout
    scene: SceneTokens


def make_prompt(n_before: int, n_spatial: int, n_after: int, seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    n_tokens = n_before + n_spatial + n_after
    embeds = torch.randn(1, n_tokens, 64, generator=generator)
    return Prompt(
        embeds, Layout(n_before, n_spatial, n_tokens), SceneTokens(torch.rand(n_spatial, 3, generator=generator) * 5)
    )


@torch.no_grad()
def attention_map(decoder: Decoder, embeds: Tensor, layer: int) -> Tensor:
    """(H, S, S) attention that a layer of the unpruned model pays to a prompt (1, S, D), as transformers gives it."""
    decoder.language.set_attn_implementation("eager")
    try:
        found: Tensor = decoder.language(inputs_embeds=embeds, output_attentions=True).attentions[layer][0]
    finally:
        decoder.language.set_attn_implementation("sdpa")
    return found


class MaskedOracle:
    """A prompt at full length: nothing is removed, but what was dropped is hidden from the rows of later layers.

    With `renumber` each layer sees the positions that a contiguous count of its visible tokens gives.
    """

    def __init__(self, language: LlamaForCausalLM, start: int, last_layer: Tensor, renumber: bool = False) -> None:
        self.language, self.start, self.last_layer, self.renumber = language, start, last_layer, renumber
        self.cache = DynamicCache()

    @torch.no_grad()
    def __call__(self, embeds: Tensor) -> Tensor:
        """Logits (V,) of the last of (q, D) further embeddings."""
        model, past = self.language.model, self.cache.get_seq_length()
        n, hidden = past + len(embeds), embeds[None]
        for i, layer in enumerate(model.layers):
            visible = torch.ones(n, dtype=torch.bool)
            visible[self.start : self.start + len(self.last_layer)] = self.last_layer >= i
            positions = (visible.cumsum(0) - 1).clamp(min=0) if self.renumber else torch.arange(n)
            mask = torch.ones(n, n, dtype=torch.bool).tril() & (visible | torch.eye(n, dtype=torch.bool))
            hidden = layer(
                hidden,
                attention_mask=mask[None, None, past:],
                position_embeddings=model.rotary_emb(hidden, positions[None, past:]),
                past_key_values=self.cache,
            )
        return self.language.lm_head(model.norm(hidden[0, -1]))


def oracle_logits(
    decoder: Decoder, prompt: Prompt, trace: GateTrace, tokens: Sequence[int], renumber: bool = False
) -> Tensor:
    """Logits (1 + T, V) of the prompt and of each of T tokens after it."""
    oracle = MaskedOracle(decoder.language, prompt.layout.spatial_start, trace.last_layer, renumber)
    steps = [oracle(prompt.embeds[0])]
    return torch.stack(steps + [oracle(decoder.embed(torch.tensor([token]))) for token in tokens])


def last_of_rows(layout: Layout, last_layer: torch.Tensor, n_layers: int) -> torch.Tensor:
    """(S,) the last layer that sees each row, given that (N,) of the spatial tokens: what closes a line goes with the
    last token of it.
    """
    spatial = torch.arange(layout.spatial_start, layout.spatial_end) if layout.rows is None else layout.rows
    last = torch.full((layout.n_tokens,), n_layers - 1)
    last[spatial] = last_layer
    for row in () if layout.closing is None else set(layout.closing.tolist()) - {-1}:
        last[row] = last_layer[layout.closing == row].max()
    return last
