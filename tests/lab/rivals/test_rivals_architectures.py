# SPDX-License-Identifier: Apache-2.0
"""Every rival in a scene of each architecture that ships, with tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adatoken3d_ros.decoder.prefill import Prefill, prefill
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.lab.rivals import RIVAL_NAMES, make_rival
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.pruning.view import Bypassing, PolicyError, SceneTokens
from tests.architectures import NAMES
from tests.decoder.oracle import last_of_rows
from tests.engine.conftest import _wall_frame
from tests.engine.scenes import new_scene

Run = Callable[..., Prefill]


@pytest.fixture(scope="module", params=NAMES)
def run(request: pytest.FixtureRequest, tiny_of: Callable[[str], Path]) -> Run:
    """A question about three frames, read with a rival on its own schedule."""
    loaded = registry.load(tiny_of(request.param))
    scene = new_scene(loaded.model, loaded.tokenizer)
    for frame in (_wall_frame(i) for i in range(3)):
        scene.observe(frame)
    scene.encode_pending()
    spliced, block = scene.spliced(Question("What is red?"))
    n, decoder = spliced.n_spatial, loaded.model.decoder
    place = torch.arange(n)
    views = torch.stack([place // 9, place % 9], dim=1)
    known = SceneTokens(block.scene.xyz, block.scene.features, attended=torch.rand(n), views=views)

    def read(name: str, scene: SceneTokens = known) -> Prefill:
        policy = make_rival(name)
        schedule = policy.default_schedule(len(decoder)).not_before(decoder.first_gate)
        found = prefill(decoder, spliced.embeds, spliced.layout, schedule, policy, scene=scene)
        assert found.trace.spatial_per_layer == schedule.counts(n, len(decoder), policy.kept)
        assert int(found.trace.retained.sum()) == found.trace.spatial_per_layer[-1] < n
        if isinstance(policy, Bypassing) and policy.bypass:  # tokens may come back, and with them lines
            text = spliced.layout.n_tokens - n
            rows = [text + k for k in found.trace.spatial_per_layer]
        else:
            last = last_of_rows(spliced.layout, found.trace.last_layer, len(decoder))
            rows = [int((last >= layer).sum()) for layer in range(len(decoder))]
        assert found.cache.lengths == found.trace.rows_per_layer == tuple(rows), "all else stays"
        return found

    read.plain = SceneTokens(block.scene.xyz, block.scene.features)  # type: ignore[attr-defined]
    return read


@pytest.mark.parametrize("name", RIVAL_NAMES)
def test_each_rival_prunes_each_architecture(run: Run, name: str) -> None:
    first, second = run(name), run(name)
    assert first.logits.isfinite().all() and torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("name", ["visionzip", "holov", "evs", "framefusion"])
def test_what_is_not_offered_is_said(run: Run, name: str) -> None:
    with pytest.raises(PolicyError, match=f"{name} .* (none is given|of no view)"):
        run(name, run.plain)  # type: ignore[attr-defined]
