# SPDX-License-Identifier: Apache-2.0
"""FrameFusion by hand, beside slow and obvious implementations, and through the gate."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.lab.rivals import make_rival
from adatoken3d_ros.lab.rivals.framefusion import heads
from adatoken3d_ros.pruning.schedule import Schedule
from tests.decoder.oracle import attention_map
from tests.lab.rivals.test_rivals import PROMPT, known, run


def test_runs_of_what_is_alike_by_hand() -> None:
    """Three views of two places, one token missing: at the second place the third view follows the first.

    Cosines with the one before: of the first place 0.8 and 1, of the second 0.
    """
    states = torch.tensor([[1.0, 0], [0, 1.0], [0.8, 0.6], [4.0, 3.0], [1.0, 0]])
    views = torch.tensor([[0, 0], [0, 1], [3, 0], [5, 0], [5, 1]])
    assert heads(states, views, 4, 0.6).tolist() == [0, 1, 0, 0, 4], "a run has one head"
    assert heads(states, views, 1, 0.6).tolist() == [0, 1, 2, 2, 4], "the most alike"
    assert heads(states, views, 4, 0.9).tolist() == [0, 1, 2, 2, 4]
    assert heads(states, views, 4, -torch.inf).tolist() == [0, 1, 0, 0, 1]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), n_views=st.integers(1, 5), cells=st.integers(1, 6), share=st.floats(0, 1))
def test_heads_are_those_of_loops(seed: int, n_views: int, cells: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(n_views * cells, generator=generator) < 0.7
    there[0] = True
    place = torch.arange(n_views * cells)[there]
    views, states = torch.stack([place // cells, place % cells], 1), torch.randn(len(place), 3, generator=generator)
    most, before = int(share * len(place)), dict[int, int]()
    for k, (_, cell) in enumerate(views.tolist()):
        earlier = [j for j in range(k) if views[j, 1] == cell]
        if earlier:
            before[k] = earlier[-1]
    cosine = {k: float(states[k] @ states[j] / (states[k].norm() * states[j].norm())) for k, j in before.items()}
    merged = [k for k in sorted(cosine, key=lambda k: -cosine[k])[:most] if cosine[k] >= 0.2]
    expected = list(range(len(place)))
    for k in sorted(merged):
        expected[k] = expected[before[k]]
    assert heads(states, views, most, 0.2).tolist() == expected


def test_what_is_alike_is_averaged_and_the_least_attended_go(mha: Decoder) -> None:
    """Before layer 2, four views of ten places: pairs that are alike enough become means, then attention decides."""
    prompt, scene = PROMPT, known(PROMPT)
    seen: list[Tensor] = []
    hooks = [
        mha.layers[k].module.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 5:-7].clone()))
        for k in (1, 2)
    ]
    plain = prefill(mha, prompt.embeds, prompt.layout, Schedule(), make_rival("none"), scene=scene)
    before = seen[1]
    assert scene.views is not None and plain.logits.isfinite().all()
    likeness = sorted(
        (float(torch.cosine_similarity(before[k], before[k - 10], dim=0)) for k in range(10, 40)), reverse=True
    )
    alike = (likeness[2] + likeness[3]) / 2  # three are
    seen.clear()
    policy = make_rival("framefusion", alike=alike)
    found = prefill(mha, prompt.embeds, prompt.layout, Schedule.of([2], [0.5]), policy, scene=scene)
    for hook in hooks:
        hook.remove()
    head = heads(before, scene.views, 20, alike)
    assert int((head != torch.arange(40)).sum()) == 3
    attention = attention_map(mha, prompt.embeds, 1)[:, -1, 5:45].mean(0)
    left = torch.tensor([k for k in range(40) if head[k] == k])
    stay = left[attention[left].topk(20).indices].sort().values
    assert found.trace.retained.nonzero()[:, 0].tolist() == stay.tolist()
    expected = torch.stack([before[head == k].mean(0) for k in stay])
    torch.testing.assert_close(seen[1], expected)


def test_before_the_first_layer_the_most_alike_go_whatever_the_bound(mha: Decoder) -> None:
    found = run(mha, "framefusion", Schedule.of([0], [0.5]), alike=1.0).trace.retained
    head = heads(PROMPT.embeds[0, 5:45], known(PROMPT).views, 20, -torch.inf)  # type: ignore[arg-type]
    assert found.nonzero()[:, 0].tolist() == [k for k in range(40) if head[k] == k]
    least = run(mha, "framefusion", Schedule.of([0], [0.1])).trace.retained
    assert least.nonzero()[:, 0].tolist() == [0, 1, 2, 3], "of ten with none before them"
