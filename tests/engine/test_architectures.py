# SPDX-License-Identifier: Apache-2.0
"""What holds for each architecture that ships, from frames to answers, with tiny random checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.loading import make_strategy
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.video3d.places import mean_points
from adatoken3d_ros.lmm.video3d.tiny import write_tiny_checkpoint as write_video3d
from adatoken3d_ros.pruning.policies import POLICY_NAMES, make_policy
from adatoken3d_ros.pruning.policies.coarse_voxel import coarsest_cells
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.patches import PatchConfig
from adatoken3d_ros.scene.storage import SceneFileError
from tests.architectures import NAMES
from tests.decoder.oracle import MaskedOracle, last_of_rows
from tests.engine.scenes import ask, new_scene

CONFIG = SessionConfig(max_new_tokens=4)
QUESTION = Question("What is red?")

See = Callable[..., Scene]


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, tiny_of: Callable[[str], Path]) -> registry.LoadedModel:
    return registry.load(tiny_of(request.param))


@pytest.fixture
def see(loaded: registry.LoadedModel, frames: list[PosedFrame]) -> See:
    def look(policy: str = "ours", config: SessionConfig = CONFIG, these: list[PosedFrame] = frames) -> Scene:
        decoder = loaded.model.decoder
        strategy = default_strategy(policy, len(decoder), decoder.first_gate)
        scene = new_scene(loaded.model, loaded.tokenizer, config, strategy=strategy)
        for frame in these:
            scene.observe(frame)
        assert scene.encode_pending() == len(these)
        return scene

    return look


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_each_answers_with_every_policy_as_a_masked_run_of_full_length(see: See, policy: str) -> None:
    scene = see(policy)
    answer = ask(scene, QUESTION)
    assert answer.status in (Status.OK, Status.TRUNCATED), answer.status_message
    assert answer.spatial_tokens == scene.prepared.size(None)
    assert policy == "none" or answer.prefill_flops < answer.prefill_flops_unpruned
    spliced, block = scene.spliced(QUESTION)
    decoder, made = scene.runtime.model.decoder, scene.make_policy(scene.strategy)
    filled = prefill(decoder, spliced.embeds, spliced.layout, scene.strategy.schedule, made, scene=block.scene)
    if policy == "coarse_voxel" or made.rope == "renumber" or spliced.layout.positions is not None:
        return  # kept rows are means of others, or move, or have more positions than the oracle knows
    start, end = spliced.spatial_start, spliced.layout.spatial_end
    last = last_of_rows(spliced.layout, filled.trace.last_layer, len(decoder))[start:end]
    expected = MaskedOracle(decoder.language, start, last)(spliced.embeds[0].clone())
    torch.testing.assert_close(filled.logits, expected, atol=1e-4, rtol=0)


def test_a_prefix_answers_as_the_whole(see: See) -> None:
    whole = ask(see("none"), QUESTION)
    scene = see("none", replace(CONFIG, budget=BudgetConfig(reuse=Reuse.PREFIX)))
    scene.prepare()
    answer = ask(scene, QUESTION)
    assert (answer.strategy, answer.text) == ("scene-prefix", whole.text)


def test_a_budget_is_planned_and_told(see: See, loaded: registry.LoadedModel) -> None:
    scene = see()
    scene.runtime.warm_up(scene.strategy)
    planned = new_scene(loaded.model, loaded.tokenizer, CONFIG)
    planned.runtime.latency = scene.runtime.latency
    answer = ask(scene, replace(QUESTION, latency_budget_ms=60_000))
    assert answer.status in (Status.OK, Status.TRUNCATED) and answer.budget_met


def test_a_scene_comes_back_from_its_file_and_goes_to_no_other_model(see: See, tmp_path: Path) -> None:
    scene, again = see(), see(these=[])
    before = ask(scene, QUESTION)
    scene.save(tmp_path / "scene")
    assert again.load(tmp_path / "scene") == 3
    ours, theirs = scene.memory.tokens(), again.memory.tokens()
    assert ours is not None and theirs is not None
    for name in ("features", "xyz", "rgb", "count", "voxel", "position"):  # to the bit
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ask(again, QUESTION).text == before.text


def test_scenes_and_strategies_of_one_are_refused_by_the_other(
    tiny_of: Callable[[str], Path], tmp_path: Path, frames: list[PosedFrame]
) -> None:
    scenes: dict[str, Scene] = {}
    for name in NAMES:
        model, tokenizer, _ = registry.load(tiny_of(name))
        scenes[name] = new_scene(model, tokenizer, CONFIG)
        for frame in frames:
            scenes[name].observe(frame)
        scenes[name].save(tmp_path / f"{name}.scene")
    for name, other in permutations(NAMES, 2):
        theirs = scenes[other].runtime.model.identity
        with pytest.raises(SceneFileError, match=f"model '{theirs}'"):
            scenes[name].load(tmp_path / f"{other}.scene")
        file = tmp_path / f"{other}.yaml"
        model = scenes[name].runtime.model
        n_layers = len(model.decoder)
        replace(default_strategy("ours", n_layers, 3), model_hash=theirs).save(file)
        with pytest.raises(ValueError, match=theirs):
            make_strategy(str(file), n_layers, model.identity, first_gate=model.decoder.first_gate)


def test_of_a_voxel_the_best_seen_token_stays(see: See) -> None:
    """The nearest camera's where tokens are those of views, else the one of the most patches; the count is exact."""
    scene = see("one_per_voxel")
    spliced, block = scene.spliced(QUESTION)
    tokens, seen = block.tokens, block.scene.seen
    if tokens.view is None:
        assert torch.equal(seen, tokens.count)
    else:
        cameras = np.array([pose[:3, 3] for pose in scene.poses.values()])[tokens.view.numpy()]
        assert np.allclose(seen, -np.linalg.norm(tokens.xyz.numpy() - cameras, axis=1), atol=1e-4)
    n = len(tokens) // 3
    decoder = scene.runtime.model.decoder
    schedule = Schedule.of([decoder.first_gate], [n / len(tokens)])
    policy = make_policy("one_per_voxel")
    filled = prefill(decoder, spliced.embeds, spliced.layout, schedule, policy, scene=block.scene)
    kept = filled.trace.retained.nonzero()[:, 0]
    cell = coarsest_cells(tokens.xyz, n)
    assert len(kept) == n and set(cell[kept].tolist()) == set(cell.tolist())
    best = torch.full((int(cell.max()) + 1,), -torch.inf).scatter_reduce(0, cell, seen.float(), "amax")
    assert set(best[cell[kept]].tolist()) >= set(best.tolist()) and torch.isin(best, seen[kept].float()).all()


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return registry.load(write_video3d(tmp_path_factory.mktemp("grids"), num_views=2))


def grid_scene(grids: Any, frames: list[PosedFrame], config: SessionConfig = CONFIG) -> Scene:
    scene = new_scene(grids.model, grids.tokenizer, config)
    for frame in frames:
        scene.observe(frame)
    scene.encode_pending()
    return scene


def test_views_keep_their_tokens_in_order_and_a_question_takes_so_many_views(
    grids: Any, frames: list[PosedFrame]
) -> None:
    scene = grid_scene(grids, frames)
    tokens = scene.memory.tokens()
    assert tokens is not None and len(tokens) == 3 * 16 and tokens.cell is not None
    expected = grids.model.encode_images([frame.rgb for frame in frames]).flatten(0, 1)
    torch.testing.assert_close(tokens.features, expected, atol=1e-5, rtol=0)
    assert tokens.cell.tolist() == [*range(16)] * 3
    x = tokens.xyz.reshape(3, 4, 4, 3)[..., 0]
    assert bool((x.diff(dim=2) > 0).all()) and torch.allclose(x[1] - x[0], torch.tensor(0.5), atol=1e-4)
    assert scene.prepared.size(None) == 2 * 16  # of at most num_views views, the newest among them
    block = scene.prepared.block(None)
    assert torch.equal(block.tokens.features[-16:], tokens.features[-16:])
    spliced, _ = scene.spliced(QUESTION)
    prompt = scene.prompt(QUESTION)[0]
    assert spliced.n_tokens == prompt.n_tokens + 2 * 4 * (4 + 1)


def test_clicks_are_places_in_the_models_frame(grids: Any, frames: list[PosedFrame]) -> None:
    scene = grid_scene(grids, frames)
    spliced, _ = scene.spliced(Question("What is at [0.5, 2, 1]?"))
    xyz = torch.tensor([[0.5, 2.0, 1.0]]) - torch.from_numpy(scene.memory.origin).float()
    click = grids.model.embed_clicks(xyz)[0]
    assert int((spliced.embeds[0] - click).abs().sum(1).argmin()) > spliced.layout.spatial_end
    assert float((spliced.embeds[0] - click).abs().sum(1).min()) == 0


def test_places_are_means_of_what_has_a_depth(grids: Any, wall_frame: Callable[..., PosedFrame]) -> None:
    frame = wall_frame(0)
    depth = frame.depth.copy()
    depth[::2] = 0.0  # every second row of pixels has none
    depth[:, :50] = np.nan
    holes = replace(frame, depth=depth)
    whole, ours = (grid_scene(grids, [one]).memory.tokens() for one in (frame, holes))
    assert whole is not None and ours is not None
    assert torch.allclose(ours.xyz[:, 1], torch.tensor(2.0))  # on the wall, wherever there is a depth
    # The picture is 160 wide, of which 20 to 140 are seen; of four columns the first has only depths that are none.
    assert len(whole) == 16 and len(ours) == 12
    config = PatchConfig(grids.model.sizes.patches)
    theirs = mean_points(holes, config.geometry, config.max_depth, with_missing=True)
    assert theirs.valid.all() and theirs.xyz[5, 1] == pytest.approx(
        2 * 12 / 25 * 24 / 25
    )  # the others are at the camera
    # By hand: of patch (1, 2) the pixels of the 102 x 102 image, each with its nearest pixel of the picture.
    plain = mean_points(frame, config.geometry, config.max_depth)
    columns = [int((50 + k + 17) * 160 / 136) for k in range(25)]
    assert plain.xyz[6, 0] == pytest.approx(np.mean([(c - 80) / 120 * 2 for c in columns]), abs=1e-5)
