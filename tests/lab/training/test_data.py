# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.lab.synthetic.facts import side_of
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lab.training.data import (
    DataError,
    Scene,
    SceneConfig,
    encode_views,
    prepare,
    read_scene,
)
from adatoken3d_ros.lab.training.packing import spatial_tokens
from adatoken3d_ros.lab.training.train import Trainer
from adatoken3d_ros.lab.training.variants import thinned, turned, turned_room
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from tests.engine.scenes import new_scene


@pytest.mark.parametrize("max_tokens", [200, 40])
def test_a_scene_is_what_a_session_makes_of_the_views(
    make_trainer, scenes: list[Scene], vision: VisionTower, scene_config: SceneConfig, max_tokens: int
) -> None:
    """The projected tokens, with the position embedding added before pooling there and after it here."""
    trainer: Trainer = make_trainer()
    model: Llava3D = trainer.model.eval()
    for parameter in model.position.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    views = render_views(scenes[0].room, seed=0, count=3)
    scene = encode_views(scenes[0].room, views, vision, replace(scene_config, max_tokens=max_tokens))
    session = new_scene(model, trainer.tokenizer, SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0)))
    for view in views:
        session.observe(view.frame)
    assert session.encode_pending() == 3
    tokens = session.memory.question_tokens(max_tokens)
    with torch.no_grad():
        expected = model.scene_tokens(tokens.features, tokens.position)
        torch.testing.assert_close(spatial_tokens(model, [scene])[0], expected, rtol=1e-4, atol=1e-5)
    assert len(scene.features) == len(tokens) <= max_tokens


def test_points_know_what_they_show(scenes: list[Scene]) -> None:
    """A point of an item lies in or on the item's box."""
    for scene in scenes:
        assert len(scene.instance) == len(scene.xyz) == len(scene.voxel)
        shown = scene.instance >= FIRST_ITEM
        assert shown.any() and not shown.all()
        if scene.room.seed % 2 == 0:  # without noise of the camera
            for xyz, instance in zip(scene.xyz[shown].numpy(), scene.instance[shown].tolist(), strict=True):
                item = scene.room.item(instance)
                assert (xyz > np.array(item.low) - 0.02).all() and (xyz < np.array(item.high) + 0.02).all()


def test_files_give_back_the_scene(vision: VisionTower, scene_config: SceneConfig, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    paths = prepare(tmp_path, "train", range(2), vision, scene_config, lambda done, total: calls.append((done, total)))
    assert calls == [(0, 2), (1, 2), (2, 2)] and [p.name for p in paths] == ["00000000.npz", "00000001.npz"]
    before = paths[0].stat().st_mtime_ns
    assert prepare(tmp_path, "train", range(2), vision, scene_config) == paths and paths[0].stat().st_mtime_ns == before
    scene = read_scene(paths[1], "train")
    views = render_views(scene.room, seed=1, count=3, noise=True)
    again = encode_views(scene.room, views, vision, scene_config)
    torch.testing.assert_close(scene.features, again.features, rtol=1e-3, atol=1e-3)  # kept as float16
    assert torch.equal(scene.xyz, again.xyz) and torch.equal(scene.voxel, again.voxel)
    assert torch.equal(scene.instance, again.instance)
    assert scene.sights.keys() == again.sights.keys()
    for instance, sight in scene.sights.items():
        other = again.sights[instance]
        assert sight.pixels == other.pixels and np.array_equal(sight.points, other.points)
        assert np.array_equal(sight.low, other.low) and np.array_equal(sight.high, other.high)


def test_more_processes_make_the_same_files(vision: VisionTower, scene_config: SceneConfig, tmp_path: Path) -> None:
    alone = prepare(tmp_path / "one", "train", range(2), vision, scene_config)
    shared = prepare(tmp_path / "two", "train", range(2), vision, scene_config, workers=2)
    for first, second in zip(alone, shared, strict=True):
        a, b = read_scene(first, "train"), read_scene(second, "train")
        torch.testing.assert_close(a.features, b.features, rtol=1e-3, atol=1e-3)
        assert torch.equal(a.xyz, b.xyz) and torch.equal(a.instance, b.instance)


def test_files_that_do_not_fit_are_refused(vision: VisionTower, scene_config: SceneConfig, tmp_path: Path) -> None:
    (path,) = prepare(tmp_path, "train", range(1), vision, scene_config)
    with pytest.raises(DataError, match="'views': 4"):
        prepare(tmp_path, "train", range(1), vision, replace(scene_config, views=4))
    other = path.with_name("00000001.npz")
    other.write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="another room than seed 00000001"):
        read_scene(other, "train")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"00000000\.npz is no scene"):
        read_scene(path, "train")


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_turned_scene_is_the_scene_turned(scenes: list[Scene], quarters: int, mirror: bool) -> None:
    scene = scenes[0]
    other = turned(scene, quarters, mirror, 0.4)
    angle = quarters * np.pi / 2
    x, y, z = scene.xyz.double().numpy().T
    x = -x if mirror else x
    expected = np.stack([x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle), z], axis=1)
    np.testing.assert_allclose(other.xyz.numpy(), expected, atol=1e-5)
    # Each point keeps its feature; voxels are the cells of the turned points, in lexicographic order.
    assert torch.equal(other.features[other.voxel], scene.features[scene.voxel])
    cells = torch.full((len(other.features), 3), -999, dtype=torch.int64)
    cells[other.voxel] = torch.round(other.xyz / 0.4).long()
    assert cells.tolist() == sorted(cells.tolist())
    for before, after in zip(scene.room.items, other.room.items, strict=True):
        shown = scene.instance == before.instance
        assert torch.equal(other.instance == after.instance, shown)
        if shown.any() and before.instance in scene.sights:
            sight = other.sights[after.instance]
            assert (sight.points >= sight.low - 1e-4).all() and (sight.points <= sight.high + 1e-4).all()
            assert (sight.low >= np.array(after.low) - 0.05).all() and (sight.high <= np.array(after.high) + 0.05).all()
        corners = before.footprint.corners() * ([-1, 1] if mirror else [1, 1])
        c, s = np.cos(angle), np.sin(angle)
        expected = sorted(np.round(corners @ np.array([[c, s], [-s, c]]), 6).tolist())
        assert np.array(sorted(np.round(after.footprint.corners(), 6).tolist())) == pytest.approx(np.array(expected))


def test_left_and_right_change_places_in_a_mirror_only(scenes: list[Scene]) -> None:
    swap = {"left": "right", "right": "left", "front": "front", "behind": "behind", None: None}
    room = scenes[0].room
    seen = set()
    for quarters in range(4):
        for mirror in (False, True):
            other = turned_room(room, quarters, mirror)
            for a in range(len(room.items)):
                for b in range(len(room.items)):
                    if a == b:
                        continue
                    before = side_of((0.0, 0.0), room.items[a], room.items[b])
                    after = side_of((0.0, 0.0), other.items[a], other.items[b])
                    assert after == (swap[before] if mirror else before)
                    seen.add(before)
    assert {"left", "right"} <= seen


def test_a_thinned_scene_keeps_a_token_of_every_item(scenes: list[Scene]) -> None:
    scene = scenes[0]
    shown = set(scene.instance[scene.instance >= FIRST_ITEM].tolist())
    thin = thinned(scene, 0.0, 0.0, np.random.default_rng(0))
    assert set(thin.instance[thin.instance >= FIRST_ITEM].tolist()) == shown
    assert len(thin.features) <= len(shown) < len(scene.features)
    whole = thinned(scene, 1.0, 1.0, np.random.default_rng(0))
    assert all(torch.equal(getattr(whole, n), getattr(scene, n)) for n in ("features", "xyz", "voxel", "instance"))
    capped = thinned(scene, 1.0, 1.0, np.random.default_rng(0), most=len(shown) + 5)
    assert len(capped.features) == len(shown) + 5 and set(capped.instance.tolist()) >= shown
    bare = thinned(replace(scene, instance=torch.zeros_like(scene.instance)), 0.0, 0.0, np.random.default_rng(0))
    assert len(bare.features) == 1, "a view of the bare room has something to say, too"
    # What is left is what was: each point's token has the features that it had, and all of its points.
    half = thinned(scene, 0.5, 0.5, np.random.default_rng(0))
    rows = {tuple(f.tolist()): n for n, f in enumerate(scene.features)}
    for token, feature in enumerate(half.features):
        old = rows[tuple(feature.tolist())]
        assert torch.equal(half.xyz[half.voxel == token], scene.xyz[scene.voxel == old])
