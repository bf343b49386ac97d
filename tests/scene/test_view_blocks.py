# SPDX-License-Identifier: Apache-2.0
"""A scene of views' own tokens: which there are, in which order, which go, and what a file of them holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from adatoken3d_ros.scene import storage, view_storage
from adatoken3d_ros.scene.storage import SceneFileError, load_scene, save_scene
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.view_blocks import ViewTokenMap, first_of_each
from adatoken3d_ros.scene.voxels import TokenMapError, voxel_keys

GRIDS = {30: (2, 3), 10: (1, 4), 20: (2, 2)}  # by key, in the order of arrival


def make_map() -> ViewTokenMap:
    """Points on a line; token k of a view at x = k metres, the second of each view without a place."""
    token_map = ViewTokenMap(0.5)
    for order, (key, grid) in enumerate(GRIDS.items()):
        n = grid[0] * grid[1]
        xyz = np.stack([np.arange(n), np.zeros(n), np.zeros(n)], axis=1).astype(np.float32)
        valid = np.arange(n) != 1
        xyz[1] = np.nan
        features = torch.arange(n)[:, None] + 100.0 * order + torch.tensor([0.0, 0.5])
        token_map.add_block(key, features, xyz, np.full((n, 3), order, np.uint8), valid, grid, order=order)
    return token_map


def test_tokens_are_those_of_the_views_in_their_order() -> None:
    token_map = make_map()
    tokens = token_map.tokens()
    assert tokens.view is not None and tokens.cell is not None
    assert tokens.view.tolist() == [0] * 5 + [1] * 3 + [2] * 3 and tokens.grids == tuple(GRIDS.values())
    assert tokens.cell.tolist() == [0, 2, 3, 4, 5, 0, 2, 3, 0, 2, 3]
    assert torch.equal(tokens.features[:, 0], tokens.cell + 100.0 * tokens.view)
    assert torch.equal(tokens.xyz[:, 0], tokens.cell.float()) and tokens.rgb[:, 0].tolist() == tokens.view.tolist()
    assert token_map.n_tokens == len(tokens) == 11 and token_map.n_voxels == 5


def test_a_cap_keeps_one_of_each_voxel_and_the_newest() -> None:
    token_map = make_map()
    few = token_map.tokens(5)
    assert few.view is not None and few.cell is not None
    assert few.cell.tolist() == [4, 5, 0, 2, 3] and few.view.tolist() == [0, 0, 2, 2, 2]
    assert first_of_each(torch.tensor([7, 7, 3, 7]), 3).tolist() == [1, 2, 3]
    assert len(token_map.tokens(100)) == 11
    with pytest.raises(TokenMapError, match="max_tokens 0"):
        token_map.tokens(0)


def test_what_is_carved_or_removed_is_gone_from_the_blocks() -> None:
    token_map = make_map()
    place = voxel_keys(torch.tensor([[2.0, 0.0, 0.0]]), 0.5)
    assert token_map.carve(place, before=2) == 2
    tokens = token_map.tokens()
    assert tokens.view is not None and tokens.cell is not None
    gone = (tokens.cell == 2) & (tokens.view < 2)
    assert token_map.n_tokens == len(tokens) == 9 and not gone.any()
    token_map.remove_view(10)
    assert token_map.n_tokens == 7 and set(token_map.blocks()) == {30, 20}
    part = token_map.subset([20])
    assert part.n_tokens == 3 and part.tokens().grids == (GRIDS[20],)
    token_map.clear()
    assert token_map.n_tokens == 0
    with pytest.raises(TokenMapError, match="empty"):
        token_map.tokens()


def test_places_of_smaller_patches_stay_with_their_tokens(tmp_path: Path) -> None:
    token_map = ViewTokenMap(0.5, parts=2)
    xyz = np.arange(12, dtype=np.float32).reshape(4, 3)
    parts = np.stack([xyz, np.full_like(xyz, np.nan)], axis=1)
    valid = np.array([True, False, True, True])
    token_map.add_block(1, torch.zeros(4, 2), xyz, np.zeros((4, 3), np.uint8), valid, (2, 2), order=0, parts=parts)
    for order, key in enumerate((2, 3), 1):
        more = parts + np.float32(order)
        token_map.add_block(key, torch.ones(4, 2), xyz, xyz.astype(np.uint8), valid, (2, 2), order=order, parts=more)
    place = voxel_keys(torch.from_numpy(xyz[2:3]), 0.5)
    assert token_map.carve(place, before=1) == 1
    expected = np.concatenate([parts[[0, 3]], parts[[0, 2, 3]] + 1, parts[[0, 2, 3]] + 2])
    found = token_map.tokens().parts
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), expected)
    few = token_map.subset([3]).tokens(2)
    assert few.parts is not None and few.cell is not None
    np.testing.assert_array_equal(few.parts.numpy(), (parts + 2)[few.cell.numpy()])
    save_scene(tmp_path / "scene", token_map, {key: np.eye(4) for key in (1, 2, 3)}, model_hash="m", frame_id="map")
    again = ViewTokenMap(0.5, parts=2)
    load_scene(tmp_path / "scene", again, model_hash="m", frame_id="map", channels=2)
    assert torch.equal(torch.nan_to_num(again.tokens().parts), torch.nan_to_num(found))
    with pytest.raises(SceneFileError, match="it holds .*block_parts"):
        load_scene(tmp_path / "scene", ViewTokenMap(0.5), model_hash="m", frame_id="map", channels=2)
    rgb = np.zeros((4, 3), np.uint8)
    for wrong in (None, parts[:, :1]):
        with pytest.raises(TokenMapError, match="of 4 tokens, each has 2 here"):
            token_map.add_block(4, torch.zeros(4, 2), xyz, rgb, valid, (2, 2), parts=wrong)
    assert len(token_map) == 3


@pytest.mark.parametrize(
    ("value", "message"), [(float("inf"), "a place of which a part is not finite"), (1e7, "more than 1e\\+06")]
)
def test_a_file_of_no_places_of_smaller_patches_is_refused(tmp_path: Path, value: float, message: str) -> None:
    token_map = ViewTokenMap(0.5, parts=1)
    xyz, parts = np.zeros((1, 3), np.float32), np.zeros((1, 1, 3), np.float32)
    parts[0, 0, 1] = value
    rgb = np.zeros((1, 3), np.uint8)
    token_map.add_block(1, torch.zeros(1, 2), xyz, rgb, np.array([True]), (1, 1), parts=parts)
    save_scene(tmp_path / "scene", token_map, {1: np.eye(4)}, model_hash="m", frame_id="map")
    with pytest.raises(SceneFileError, match=message):
        load_scene(tmp_path / "scene", ViewTokenMap(0.5, parts=1), model_hash="m", frame_id="map", channels=2)


def test_bad_blocks_are_refused() -> None:
    token_map = ViewTokenMap(0.5)
    xyz, rgb, valid = np.zeros((4, 3), np.float32), np.zeros((4, 3), np.uint8), np.ones(4, bool)
    with pytest.raises(TokenMapError, match="4 tokens for a grid of 2 x 3"):
        token_map.add_block(1, torch.zeros(4, 2), xyz, rgb, valid, (2, 3))
    with pytest.raises(TokenMapError, match="feature of patch 2 is not finite"):
        bad = torch.zeros(4, 2).index_fill(0, torch.tensor([2]), torch.nan)
        token_map.add_block(1, bad, xyz, rgb, valid, (2, 2))
    assert len(token_map) == 0


def poses() -> dict[int, np.ndarray]:
    return {key: np.eye(4) for key in GRIDS}


def test_a_file_gives_it_back(tmp_path: Path) -> None:
    saved, loaded = make_map(), ViewTokenMap(0.5)
    saved.carve(voxel_keys(torch.tensor([[2.0, 0.0, 0.0]]), 0.5), before=2)
    save_scene(tmp_path / "scene", saved, poses(), model_hash="m", frame_id="map")
    assert list(load_scene(tmp_path / "scene", loaded, model_hash="m", frame_id="map", channels=2)[0]) == list(GRIDS)
    a, b = saved.tokens(), loaded.tokens()
    for name in ("features", "xyz", "rgb", "voxel", "view", "cell"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.grids == b.grids
    with pytest.raises(SceneFileError, match="is no scene: it holds"):
        load_scene(tmp_path / "scene", TokenMap(0.5), model_hash="m", frame_id="map", channels=2)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("block_grids", lambda t: t.fill_(0), "grid of 0 x 0"),
        ("block_cells", lambda t: t.flip(0), "do not ascend in its grid"),
        ("block_cells", lambda t: t + 5, "do not ascend in its grid"),
        ("block_rows", lambda t: t + 1, "have 14 tokens, there are 11"),
        ("block_features", lambda t: t.fill_(torch.nan), "block_features holds a number that is not finite"),
        ("block_points", lambda t: t + 3, "not in the voxels that it holds"),
    ],
)
def test_a_file_of_nonsense_is_refused(
    tmp_path: Path, monkeypatch, name: str, spoil: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    def parts(token_map: TokenMap) -> dict[str, list[torch.Tensor]]:
        found = view_storage.block_parts(token_map)
        return {**found, name: [spoil(torch.cat(found[name]))]}

    monkeypatch.setattr(storage, "block_parts", parts)
    save_scene(tmp_path / "scene", make_map(), poses(), model_hash="m", frame_id="map")
    loaded = make_map()
    with pytest.raises(SceneFileError, match=message):
        load_scene(tmp_path / "scene", loaded, model_hash="m", frame_id="map", channels=2)
    assert loaded.n_tokens == 11
