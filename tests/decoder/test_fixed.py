# SPDX-License-Identifier: Apache-2.0
"""Decoding in buffers of fixed size gives the tokens that transformers' own layers give over caches that grow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adatoken3d_ros.decoder import decode as decoding
from adatoken3d_ros.decoder import fixed, graphs
from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.cache import RaggedCache
from adatoken3d_ros.decoder.decode import Steps, decode, generate
from adatoken3d_ros.decoder.prefill import Layout, Prefill, prefill
from adatoken3d_ros.decoder.prefix import ScenePrefix
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.quantized.formats import quantise
from adatoken3d_ros.lmm.quantized.linear import QuantizedLinear
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import SceneTokens
from tests.architectures import NAMES
from tests.decoder.oracle import tiny_decoder

N_NEW = 9


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tiny_of: Callable[[str], Path]) -> Decoder:
    loaded: Any = registry.load(tiny_of(request.param))[0]
    generator = torch.Generator().manual_seed(1)
    for parameter in loaded.decoder.language.parameters():  # at the default size every next token is the same
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return loaded.decoder


def filled(decoder: Decoder, n_spatial: int = 40) -> Prefill:
    """Pruned once, so that layers hold different numbers of keys; the first layers' outputs are added to."""
    n_tokens, random = n_spatial + 12, torch.Generator().manual_seed(0)
    embeds = torch.randn(1, n_tokens, decoder.size.hidden, generator=random)
    added = tuple(torch.randn(n_spatial, decoder.size.hidden, generator=random) for _ in range(2))
    layout = Layout(5, n_spatial, n_tokens, added=added)
    schedule = Schedule.of([max(1, decoder.first_gate)], [0.4])
    scene = SceneTokens(torch.rand(n_spatial, 3, generator=random) * 5)
    return prefill(decoder, embeds, layout, schedule, make_policy("ours"), scene=scene)


def growing(decoder: Decoder, state: Prefill, n: int) -> list[int]:
    """Greedy tokens by transformers' layers, one chunk of one token after the other."""
    found = [int(state.logits.argmax())]
    while len(found) < n:
        found.append(int(decode(decoder, state, found[-1]).argmax()))
    return found


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request: pytest.FixtureRequest) -> Decoder:
    decoder = tiny_decoder(2, intermediate_size=128)
    for layer in decoder.layers:
        for name, part in list(layer.module.named_modules()):
            if isinstance(part, torch.nn.Linear):
                parts = quantise(part.weight.detach(), request.param)
                layer.module.set_submodule(name, QuantizedLinear(request.param, parts, torch.float32))
    assert not list(decoder.linears())
    return decoder


def test_weights_in_few_bits_through_gates_prefix_and_steps(
    quantised: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates choose, a prefix serves, and steps in one piece write as with the restored matrices."""
    plain = tiny_decoder(2, intermediate_size=128)
    for ours, theirs in zip(quantised.layers, plain.layers, strict=True):
        for name, part in ours.module.named_modules():
            if isinstance(part, QuantizedLinear):
                theirs.module.get_submodule(name).weight.data.copy_(part.weight)
    found, known = filled(quantised), filled(plain)
    assert found.cache.lengths == known.cache.lengths and len(set(found.cache.lengths)) > 1
    assert (found.trace.retained == known.trace.retained).float().mean() > 0.9
    assert torch.corrcoef(torch.stack([found.logits, known.logits]))[0, 1] > 0.98
    expected = growing(quantised, found, N_NEW)
    assert len(set(expected)) > 1
    for stepping in (None, graphs._compiled("eager")):
        monkeypatch.setattr(quantised, "stepping", stepping)
        assert list(generate(quantised, filled(quantised), max_new_tokens=N_NEW, eos_ids=())) == expected
    random = torch.Generator().manual_seed(2)
    embeds = torch.randn(1, 52, 64, generator=random)
    whole = prefill(quantised, embeds, Layout(5, 40, 52), Schedule(), make_policy("none"))
    with ScenePrefix(quantised, embeds[:, :45], 5).asking(embeds[:, 45:]) as state:
        torch.testing.assert_close(state.logits, whole.logits, rtol=0, atol=0.05)


@pytest.mark.parametrize("most", [256, 4])
def test_eager_steps_give_what_growing_caches_give(model: Decoder, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(decoding, "MOST_STEPS", most)
    expected, state = growing(model, filled(model), N_NEW), filled(model)
    before, position = state.cache.lengths, state.next_position
    assert len(set(before)) > 1 and len(set(expected)) > 1
    assert list(generate(model, state, max_new_tokens=N_NEW, eos_ids=())) == expected
    assert state.cache.lengths == tuple(n + N_NEW - 1 for n in before)
    assert state.next_position == position + N_NEW - 1
    # What follows reads the steps' keys as its own.
    again = filled(model)
    growing(model, again, N_NEW)
    torch.testing.assert_close(decode(model, state, 3), decode(model, again, 3), rtol=0, atol=1e-4)


def test_one_captured_step_serves_prompts_of_any_length(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "stepping", graphs._compiled("eager"))
    for n_spatial in (40, 25, 90):
        expected = growing(model, filled(model, n_spatial), N_NEW)
        assert list(generate(model, filled(model, n_spatial), max_new_tokens=N_NEW, eos_ids=())) == expected


def test_a_compiled_step_is_proved_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder(2)
    decoder.layers = decoder.layers[:2]
    monkeypatch.setattr(graphs, "_PROOF_STEPS", 1)
    assert graphs.prepare(decoder) == ""
    assert decoder.stepping is not None
    whole = tiny_decoder(2)
    whole.layers = whole.layers[:2]
    expected = list(generate(whole, filled(whole), max_new_tokens=N_NEW, eos_ids=()))
    assert list(generate(decoder, filled(decoder), max_new_tokens=N_NEW, eos_ids=())) == expected


def test_what_cannot_be_compiled_or_is_wrong_stays_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny_decoder(2)

    def broken(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nand much advice")

    monkeypatch.setattr(graphs, "_compiled", lambda: broken)
    assert graphs.prepare(decoder) == "a decode step could not be compiled: RuntimeError: no C++ compiler"

    def wrong(decoder: Decoder, state: fixed.Buffers) -> Callable[[], None]:
        def one() -> None:
            state.keys[1].add_(1.0)

        return one

    monkeypatch.setattr(graphs, "_compiled", lambda: wrong)
    assert "makes keys that differ from eager ones by" in graphs.prepare(decoder)
    assert decoder.stepping is None


class Replayed:
    """Stands in for a CUDA graph: the same operations on the same buffers."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


@pytest.mark.parametrize("works", [True, False])
def test_steps_that_are_recorded_or_cannot_be(
    mha: Decoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, works: bool
) -> None:
    """The first step is eager, the second records and replays; without a GPU it is said once, and eager it stays."""
    seen: list[str] = []

    def record(run: Callable[[], None]) -> Any:
        seen.append("recorded")
        return Replayed(run)

    if works:
        monkeypatch.setattr(graphs, "_record", record)
    expected = list(generate(mha, filled(mha), max_new_tokens=N_NEW, eos_ids=()))
    monkeypatch.setattr(mha, "stepping", graphs.recorded)
    assert list(generate(mha, filled(mha), max_new_tokens=N_NEW, eos_ids=())) == expected
    assert seen == (["recorded"] if works else [])
    assert caplog.text.count("no CUDA graph could be recorded") == (0 if works else 1)


def test_a_prefix_is_itself_again_and_not_copied(mha: Decoder) -> None:
    random = torch.Generator().manual_seed(2)
    prefix = ScenePrefix(mha, torch.randn(1, 45, 64, generator=random), 5)
    question, places, answers = torch.randn(1, 7, 64, generator=random), [], []
    for _ in range(3):
        with prefix.asking(question) as state:
            answers.append(list(generate(mha, state, max_new_tokens=5, eos_ids=())))
            places.append(prefix.cache.layers[0].keys.data_ptr())
        assert prefix.cache.lengths == (45,) * len(mha)
    assert answers[0] == answers[1] == answers[2]
    assert places[0] == places[1] == places[2]


def test_slots_that_are_not_seen_count_nothing(mha: Decoder) -> None:
    """Whatever a rolled-back question left in them."""
    found = []
    for rubbish in (0.0, 1e4):
        state = filled(mha)
        for buffers in state.cache.with_room(4, fixed.SLOTS):
            for buffer in buffers:
                buffer[:, :, 60:] = rubbish
        found.append(list(generate(mha, state, max_new_tokens=4, eos_ids=())))
    assert found[0] == found[1]


def test_a_cancelled_answer_leaves_the_cache_in_step(mha: Decoder) -> None:
    state = filled(mha)
    before = state.cache.lengths
    stream = generate(mha, state, max_new_tokens=50, eos_ids=())
    for _ in range(3):
        next(stream)
    stream.close()
    assert state.cache.lengths == tuple(n + 2 for n in before)


def test_buffers_are_made_once(mha: Decoder) -> None:
    state = filled(mha)
    steps = Steps(mha, state, 1, 30)
    places = [tensor.data_ptr() for pair in state.cache.with_room(30, fixed.SLOTS) for tensor in pair]
    for _ in range(30):
        steps.next()
    steps.note()
    assert isinstance(state.cache, RaggedCache)
    assert [layer.keys.data_ptr() for layer in state.cache.layers] == places[::2]
