# SPDX-License-Identifier: Apache-2.0
"""A small language model with prompts on it, and a cost that can be computed by hand."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import Layout
from adatoken3d_ros.lab.probe import (
    Probe,
    Sample,
)
from adatoken3d_ros.pruning.policies import make_policy

N_LAYERS = 5


class LinearCost:
    """Text costs a tenth of a layer, spatial tokens the rest."""

    def of_layer(self, ratio: float) -> float:
        return 0.1 + 0.9 * ratio


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(1.0 if parameter.ndim == 1 else 6.0)
    return Decoder(model)


def samples(n: int = 2) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    return [Sample(torch.randn(1, 30 + i, 32, generator=generator), Layout(3, 20 + i, 30 + i)) for i in range(n)]


@pytest.fixture(scope="module")
def probe(decoder: Decoder) -> Probe:
    return Probe(decoder, samples(), make_policy("ours"), n_tokens=3)
