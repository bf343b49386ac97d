# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import Layout
from adatoken3d_ros.lab.probe import (
    Probe,
    Sample,
    horizon,
    massive_dims,
    sensitivity,
    withdrawal_scan,
)
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, Stage
from tests.lab.conftest import N_LAYERS, samples


def test_an_unpruned_schedule_moves_nothing(probe: Probe) -> None:
    """But for rounding: products of other shapes are added in another order on some processors."""
    assert probe.divergence(Schedule()) == pytest.approx(0.0, abs=1e-6)
    assert probe.divergence(Schedule((Stage(2, 1.0),))) == pytest.approx(0.0, abs=1e-6)
    assert probe.divergence(Schedule(withdraw_layer=N_LAYERS)) == pytest.approx(0.0, abs=1e-6)


def test_the_reference_is_what_transformers_generates(decoder: Decoder, probe: Probe) -> None:
    for sample, reference in zip(probe.samples, probe.references, strict=True):
        with torch.inference_mode():
            expected = decoder.language.generate(
                inputs_embeds=sample.embeds, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert list(reference.tokens) == expected[0].tolist()


def test_the_answer_ends_at_the_end_token(decoder: Decoder, probe: Probe) -> None:
    second = probe.references[0].tokens[1]
    short = Probe(decoder, samples(1), make_policy("ours"), n_tokens=3, eos_ids=[second])
    assert short.references[0].tokens == probe.references[0].tokens[:1]
    assert short.references[0].log_probs.shape == (2, 50)


def test_withdrawal_from_the_start_equals_a_prompt_without_spatial_tokens(decoder: Decoder) -> None:
    """Slow oracle: whole sequences without a cache, rows of spatial tokens left out, positions kept."""
    (sample,) = samples(1)
    one = Probe(decoder, [sample], make_policy("none"), n_tokens=2)
    tokens = one.references[0].tokens
    with torch.inference_mode():
        whole = torch.cat([sample.embeds, decoder.embed(torch.tensor([tokens]))], dim=1)
        positions = torch.arange(whole.shape[1])
        text = torch.cat([positions[:3], positions[3 + sample.n_spatial :]])
        rows = []
        for keep in (positions, text):
            states = whole[:, keep]
            rope = decoder.rotary(states, keep)
            for layer in decoder.layers:
                states = layer.run(states, rope)
            rows.append(decoder.logits(states)[0, -3:].double().log_softmax(-1))
    expected = (rows[0].exp() * (rows[0] - rows[1])).sum(-1).mean().item()
    assert one.divergence(Schedule(withdraw_layer=0)) == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3


def test_sensitivity_has_a_row_for_each_layer(probe: Probe) -> None:
    seen: list[tuple[int, int]] = []
    found = sensitivity(probe, [1, 3], [0.5, 0.1], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert found[1, 0] == probe.divergence(Schedule((Stage(3, 0.5),)))
    assert found[0, 1] == probe.divergence(Schedule((Stage(1, 0.1),)))
    assert (found > 0).all()


def test_horizon_is_the_first_layer_below_the_threshold(probe: Probe) -> None:
    assert horizon(np.array([0.9, 0.2, 0.3, 0.002, 0.004, 0.0])) == 3
    assert horizon(np.array([0.9, 0.2, 0.0]), eta=0.1) is None
    scan = withdrawal_scan(probe)
    assert scan.shape == (N_LAYERS + 1,) and scan[-1] == 0.0 and scan[0] > scan[-2]


def test_massive_dimensions_are_those_that_stand_out_in_most_layers(mha: Decoder) -> None:
    # One of 64 dimensions stands out by at most sqrt(64) = 8 root mean squares.
    embeds = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0))
    embeds[0, 6, 11] = 1e4
    assert massive_dims(mha, [Sample(embeds, Layout(3, 12, 20))], threshold=6.0) == (11,)
    assert massive_dims(mha, [Sample(embeds, Layout(3, 12, 20))]) == ()
    assert not any(layer._forward_pre_hooks for layer in mha.language.model.layers)
