# SPDX-License-Identifier: Apache-2.0
"""A prompt whose scene was read for another question is the prompt that was read whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from adatoken3d_ros.decoder.adapter import Decoder, Layer
from adatoken3d_ros.decoder.decode import decode
from adatoken3d_ros.decoder.prefill import Cancelled, Layout, Prefill, prefill
from adatoken3d_ros.decoder.stem import Stems, first_asking_gate
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import Policy, SceneTokens
from tests.architectures import NAMES

N, BEFORE = 40, 5
RANDOM = torch.Generator().manual_seed(0)
SCENES = [SceneTokens(torch.rand(N, 3, generator=RANDOM) * 5) for _ in range(2)]


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tiny_of: Callable[[str], Path]) -> Decoder:
    loaded: Any = registry.load(tiny_of(request.param))[0]
    return loaded.decoder


def read(decoder: Decoder, schedule: Schedule, *, n_question: int = 7, scene: int = 0, form: str = "line",
         policy: Policy | None = None, **options: Any) -> Prefill:  # fmt: skip
    """A prompt about one of the scenes; `rows`: with a closing row after every eighth token."""
    width, random = decoder.size.hidden, torch.Generator().manual_seed(scene)
    lines = N // 8 if form == "rows" else 0
    head = torch.randn(1, BEFORE + N + lines, width, generator=random)
    tail = torch.randn(1, n_question, width, generator=torch.Generator().manual_seed(100 + n_question))
    embeds = torch.cat([head, tail], dim=1)
    added = tuple(torch.randn(N, width, generator=random) for _ in range(2))
    layout = Layout(BEFORE, N, embeds.shape[1], added=added)
    if form == "rows":
        every = torch.arange(N)
        rows, closing = BEFORE + every + every // 8, BEFORE + 9 * (every // 8) + 8
        layout = Layout(BEFORE, N, embeds.shape[1], rows=rows, closing=closing, added=added)
    return prefill(decoder, embeds, layout, schedule, policy or make_policy("ours"), scene=SCENES[scene], **options)


def same(ours: Prefill, whole: Prefill, decoder: Decoder) -> None:
    torch.testing.assert_close(ours.logits, whole.logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.trace.contribution, whole.trace.contribution, rtol=0, atol=1e-6)
    for name in ("last_layer", "retained"):
        assert torch.equal(getattr(ours.trace, name), getattr(whole.trace, name))
    assert ours.trace.rows_per_layer == whole.trace.rows_per_layer
    assert ours.trace.spatial_per_layer == whole.trace.spatial_per_layer
    assert ours.cache.lengths == whole.cache.lengths and ours.next_position == whole.next_position
    torch.testing.assert_close(decode(decoder, ours, 3), decode(decoder, whole, 3), rtol=0, atol=2e-5)


@pytest.mark.parametrize("form", ["line", "rows"])
@pytest.mark.parametrize("start", [False, True])
def test_questions_that_share_a_scene(model: Decoder, form: str, start: bool) -> None:
    if start and model.first_gate:
        pytest.skip("this model has no gate before the first layer")
    first = max(1, model.first_gate)
    layers, ratios = ([0, first], [0.7, 0.3]) if start else ([first], [0.3])
    schedule, stems = Schedule.of(layers, ratios), Stems()
    for n_question, scene, used in ((7, 0, 0), (1, 0, 1), (12, 0, 2), (7, 1, 2), (3, 1, 3)):
        given: dict[str, Any] = {"n_question": n_question, "scene": scene, "form": form}
        same(read(model, schedule, **given, stems=stems), read(model, schedule, **given), model)
        assert stems.used == used


def test_a_gate_that_compares_tokens_with_words_is_asked_each_time(mha: Decoder) -> None:
    named, stems = make_policy("ours", named=0.5), Stems()
    assert first_asking_gate([30, 30, 20, 20], 40, named) == 0 and first_asking_gate([40, 40, 20, 20], 40, named) == 2
    schedule = Schedule.of([0, 2], [0.5, 0.3])
    kept = []
    for n_question in (7, 12):
        given: dict[str, Any] = {"n_question": n_question, "policy": named}
        same(found := read(mha, schedule, **given, stems=stems), read(mha, schedule, **given), mha)
        kept.append(found.trace.retained)
    assert not torch.equal(*kept)  # other words, other tokens


def test_where_there_is_none(mha: Decoder) -> None:
    ours, fastv = make_policy("ours"), make_policy("fastv")
    assert first_asking_gate([40, 40, 20, 20], 40, ours) == 2
    assert first_asking_gate([30, 30, 20, 20], 40, ours) == 2
    assert first_asking_gate([30, 30, 20, 20], 40, fastv) == 0  # it might look at the question
    assert first_asking_gate([40, 40, 40], 40, ours) == 0
    assert first_asking_gate([0, 0, 0], 40, ours) == 0
    schedule, stems = Schedule.of([2], [0.5]), Stems()
    for options in ({"at_most": lambda g, n: None}, {"rope": "renumber"}):
        same(read(mha, schedule, stems=stems, **options), read(mha, schedule, **options), mha)
    read(mha, schedule, stems=stems)
    assert stems.used == 0
    read(mha, schedule, stems=stems)
    assert stems.used == 1
    stems.forget()
    read(mha, schedule, stems=stems)
    assert stems.used == 1


def test_it_is_cancelled_before_each_layer_and_keeps_nothing_half_read(mha: Decoder) -> None:
    schedule, stems = Schedule.of([2], [0.5]), Stems()
    for most in (1, 3):  # in the stem, in the question
        asked = iter([False] * most + [True])
        with pytest.raises(Cancelled, match="before layer 1 of 6"):
            read(mha, schedule, stems=stems, should_stop=partial(next, asked))
    same(read(mha, schedule, stems=stems), read(mha, schedule), mha)


def test_rows_are_noted_where_a_gate_looks_at_them_and_nowhere_else(
    mha: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates before layers 2 and 4: the layers before them note the question's rows, with a stem and without."""
    noted: list[int] = []
    asked = Layer.asked

    def counted(layer: Layer, n: int) -> Any:
        noted.append(n)
        return asked(layer, n)

    monkeypatch.setattr(Layer, "asked", counted)
    schedule, stems = Schedule.of([2, 4], [0.5, 0.3]), Stems()
    for options in ({}, {"stems": stems}, {"stems": stems}):
        noted.clear()
        read(mha, schedule, **options)
        assert noted == [0, 7, 0, 7, 0, 0], options
