# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from adatoken3d_ros.scene import sealed_file, storage
from adatoken3d_ros.scene.agreement import Sketch
from adatoken3d_ros.scene.looked import LOOKS, Looked
from adatoken3d_ros.scene.occupancy import CELLS
from adatoken3d_ros.scene.sealed_file import SceneFileError
from adatoken3d_ros.scene.storage import About, load_scene, save_scene
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.tombstones import Thing

IDENTITY = {"model_hash": "abc", "frame_id": "map"}
_RNG = np.random.default_rng(0)
SKETCHES = {
    stamp: Sketch(
        _RNG.uniform(1, 9, (4, 5 + stamp)).astype(np.float32),
        np.array([[9.0, 0, 2], [0, 9.0, 2], [0, 0, 1]]),
        _RNG.uniform(-1, 1, (3, 3)).astype(np.float32),
        _RNG.uniform(-1, 1, (2, 3)).astype(np.float32),
        np.eye(4) + np.eye(4, k=3) * stamp,
    )
    for stamp in (1, 3)
}


def _thing(gone_ns: int, moved_to: tuple[float, float, float] | None = None) -> Thing:
    g = torch.Generator().manual_seed(gone_ns)
    keys, features, xyz = torch.arange(3), torch.randn(3, 5, generator=g), torch.rand(3, 3, generator=g)
    rgb, count = torch.full((3, 3), 7, dtype=torch.uint8), torch.tensor([1, 2, 3])
    return Thing(
        np.zeros(3), np.ones(3), keys, features, xyz, rgb, count, 1, 2, 2, gone_ns, moved_to, 0.75 * bool(moved_to)
    )


THINGS = [_thing(3), _thing(4, (1.0, 2.0, 3.0)), _thing(0)]
LOOKED = Looked(
    np.array([0.1, 0.2, 0.3]),
    np.array([[0, -1, 2], [5, 0, 0]]),
    _RNG.integers(0, 3, (2, len(LOOKS), CELLS)).astype(np.int32),
    np.array([4, 9]),
)
ABOUT = About("cellar", SKETCHES, {"marks": ["dock"]}, THINGS, 7, LOOKED, 9)


def scene(views: int = 3, **options: Any) -> tuple[TokenMap, dict[int, Any]]:
    token_map = TokenMap(0.2, **options)
    g = torch.Generator().manual_seed(views)
    for stamp in range(1, views + 1):
        xyz, rgb = torch.rand(30, 3, generator=g), torch.randint(0, 256, (30, 3), generator=g).to(torch.uint8)
        token_map.add_view(stamp, torch.randn(30, 5, generator=g), xyz, rgb)
    return token_map, {stamp: np.eye(4) + np.eye(4, k=3) * stamp for stamp in range(1, views + 1)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_scene(tmp_path / "scene.safetensors", *scene(), about=ABOUT, **IDENTITY)
    return tmp_path / "scene.safetensors"


def test_a_scene_comes_back_bit_by_bit_and_lives_on(tmp_path: Path) -> None:
    token_map, poses = scene()
    token_map.carve(token_map.occupied_keys[::3], before=3)
    save_scene(tmp_path / "s", token_map, {**poses, 99: np.eye(4)}, **IDENTITY)
    other, _ = scene(5)
    found, _ = load_scene(tmp_path / "s", other, channels=5, **IDENTITY)
    assert other.keys() == (1, 2, 3) and found.keys() == poses.keys()
    np.testing.assert_array_equal(found[2], poses[2])
    for remove in (None, 2):
        if remove is not None:
            other.remove_view(remove)
            token_map.remove_view(remove)
        a, b = other.tokens(), token_map.tokens()
        for name in ("features", "xyz", "rgb", "count", "voxel"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_views_come_back_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    token_map, poses = TokenMap(0.2), {}
    for order, stamp in enumerate((100, 101, 3)):
        token_map.add_view(stamp, torch.full((1, 5), 0.1 * stamp), torch.zeros(1, 3), torch.zeros(1, 3), order=order)
        poses[stamp] = np.eye(4)
    save_scene(tmp_path / "s", token_map, poses, **IDENTITY)
    other = TokenMap(0.2)
    assert tuple(load_scene(tmp_path / "s", other, channels=5, **IDENTITY)[0]) == (100, 101, 3) == other.keys()
    assert torch.equal(other.tokens().features, token_map.tokens().features)
    assert other.carve(other.occupied_keys, before=2) == 2


def test_what_is_known_beside_the_views_comes_back(saved: Path) -> None:
    _, about = load_scene(saved, scene(1)[0], channels=5, map_id="cellar", **IDENTITY)
    assert (about.map_id, about.notes, about.saved_ns) == ("cellar", {"marks": ["dock"]}, 7)
    assert about.sketches.keys() == SKETCHES.keys(), "the view at 2 ns has none"
    assert about.looked is not None and about.confirmed_ns == 9
    for name, value in vars(LOOKED).items():
        np.testing.assert_array_equal(getattr(about.looked, name), value)
    assert len(about.things) == 3
    for thing, other in zip(about.things, THINGS, strict=True):
        for name, value in vars(other).items():
            np.testing.assert_array_equal(getattr(thing, name), value)
    for stamp, sketch in about.sketches.items():
        for name, value in vars(SKETCHES[stamp]).items():
            np.testing.assert_array_equal(getattr(sketch, name), value)


def test_a_view_of_which_nothing_is_left_comes_back(tmp_path: Path) -> None:
    token_map, poses = scene(2)
    token_map.carve(token_map.occupied_keys, before=2)
    save_scene(tmp_path / "s", token_map, poses, **IDENTITY)
    other = TokenMap(0.2)
    load_scene(tmp_path / "s", other, channels=5, **IDENTITY)
    assert other.keys() == (1, 2) and torch.equal(other.tokens().features, token_map.tokens().features)


def test_saving_again_replaces_and_leaves_nothing_else(saved: Path) -> None:
    save_scene(saved, *scene(2), **IDENTITY)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    token_map = TokenMap(0.2)
    load_scene(saved, token_map, channels=5, **IDENTITY)
    assert len(token_map) == 2


def test_a_save_that_fails_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, chunks = saved.read_bytes(), sealed_file._bytes

    def full(*args: Any) -> Any:
        yield next(chunks(*args))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sealed_file, "_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_scene(saved, *scene(1), **IDENTITY)
    assert saved.read_bytes() == before and len(list(saved.parent.iterdir())) == 1


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="this system has no full device")
def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever writes the file, the error is the one that is documented."""
    opened = os.open
    monkeypatch.setattr("os.open", lambda path, flags, *mode: opened("/dev/full", os.O_RDWR))
    with pytest.raises(OSError, match="No space left"):
        save_scene(tmp_path / "s", *scene(1), **IDENTITY)


def test_a_saved_file_is_one_that_others_can_read(tmp_path: Path) -> None:
    token_map, poses = scene()
    save_scene(tmp_path / "s", token_map, poses, **IDENTITY)
    views = token_map.contributions()
    with safe_open(tmp_path / "s", framework="pt") as file:
        for name in storage._OF_PATCHES:
            assert torch.equal(file.get_tensor(name), torch.cat([getattr(views[key], name) for key in views])), name
        assert len(file.get_tensor("poses")) == 3
        content = json.loads(file.metadata()["adatoken3d_scene"])
    assert (content["model"], content["frame"], content["map"], content["newest_ns"]) == ("abc", "map", "", 3)
    low, high = np.array(content["extent"])
    assert (low <= 0.1).all() and (high >= 0.9).all() and (high - low <= 1.41).all()


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(SceneFileError, match="no view"):
        save_scene(tmp_path / "s", TokenMap(), {}, **IDENTITY)
    token_map, poses = scene()
    del poses[2]
    with pytest.raises(SceneFileError, match="view at 2 ns has no pose"):
        save_scene(tmp_path / "s", token_map, poses, **IDENTITY)
    with pytest.raises(OSError, match="nowhere"):
        save_scene(tmp_path / "nowhere" / "s", *scene(), **IDENTITY)


def sealed(tensors: dict[str, torch.Tensor], content: Any, path: Path) -> None:
    """Writes a scene whose checksum is right, whatever is in it."""
    metadata = {"adatoken3d_scene": content if isinstance(content, str) else json.dumps(content), "sha256": "0" * 64}
    data = save(tensors, metadata)
    if b"0" * 64 in data[:4096]:
        data = data.replace(b"0" * 64, sealed_file.checksum(data, "0" * 64).encode(), 1)
    path.write_bytes(data)


def content_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (no mapping)
        return tensors, json.loads(file.metadata()["adatoken3d_scene"])


def refused(path: Path, named: str, token_map: TokenMap | None = None, **changes: Any) -> None:
    token_map = token_map or scene(1)[0]
    before = token_map.tokens()
    with pytest.raises(SceneFileError, match=named):
        load_scene(path, token_map, **{"channels": 5, **IDENTITY, **changes})
    assert torch.equal(token_map.tokens().features, before.features), "the map is as it was"


def test_a_scene_of_another_model_frame_or_map_is_refused(saved: Path) -> None:
    refused(saved, "model 'abc'.*'xyz'", model_hash="xyz")
    refused(saved, "frame 'map'.*'odom'", frame_id="odom")
    refused(saved, r"patches is .*5\].*6\]", channels=6)
    refused(saved, "map 'cellar', here it is 'attic'", map_id="attic")
    refused(saved, "origin", scene(1, origin=(1.0, 0.0, 0.0))[0])
    tensors, content = content_of(saved)
    sealed(tensors, {**content, "numbers": "bfloat16"}, saved)
    refused(saved, "numbers 'bfloat16'.*'float32'")


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("patches", lambda t: t.fill_(float("nan")), "patches holds a number that is not finite"),
        ("patches", lambda t: t.fill_(1e30), "patches holds 1e.30, more than"),
        ("patches", lambda t: t.double(), "patches is .*F64"),
        ("points", lambda t: t[:, :2], "points is"),
        ("points", lambda t: t.fill_(3e6), "points holds 3e.06, more than"),
        ("points", lambda t: t.fill_(9e5), "more than 1048576 voxels"),
        ("points", lambda t: t[1:], "level is"),
        ("points", lambda t: t.fill_(float("inf")), "points holds a number that is not finite"),
        ("colours", lambda t: t.long(), "colours is"),
        ("level", lambda t: t.float(), "level is"),
        ("rows", lambda t: t + 1, "patches, there are"),
        ("rows", lambda t: t * torch.tensor([-1, 1, 1]), "patches, there are"),
        ("rows", lambda t: t + torch.tensor([2**62, 2**62, -(2**63)]), "patches, there are"),
        ("stamps", lambda t: t.clamp(max=2), "same stamp"),
        ("stamps", lambda t: t[:0], "0 views"),
        ("stamps", lambda t: t - 2, "a view at -1 ns"),
        ("stamps", lambda t: t + 2**62, "a view at 46.* ns, not 0 to"),
        ("poses", lambda t: t + 1e9 * torch.eye(4).roll(3, 1), "poses holds 1e.09"),
        ("poses", lambda t: t * 2, "view at 1 ns: the pose is not a rigid"),
        ("poses", None, "no scene: it holds colours"),
        ("notes", lambda t: t[:1], "its notes are of no use"),
        ("notes", lambda t: torch.full((2**20 + 1,), 32, dtype=torch.uint8), "notes are of no use: 1048577 bytes"),
        ("thing_times", lambda t: t + 1, "things of"),
        ("thing_times", lambda t: t - torch.tensor([9, 0, 0, 0, 0]), "a thing at -8"),
        ("thing_boxes", lambda t: t * float("inf"), "thing_boxes holds a number"),
        ("thing_moves", lambda t: t * 2e6, "thing_moves holds a number"),
        ("thing_features", lambda t: t * float("nan"), "thing_features holds a number"),
        ("thing_count", lambda t: t * 0, "one of no patch"),
        ("sketch_near", lambda t: -t, "sketch_near holds a depth that is not positive"),
        ("sketch_near", lambda t: t[1:], "sketch_near has .* rows, the views"),
        ("sketch_points", lambda t: t * float("nan"), "sketch_points holds a number"),
        ("sketch_normals", lambda t: t + 5, "sketch_normals holds a number"),
        ("sketch_sizes", lambda t: t - 1000, "a sketch of"),
        ("sketch_cameras", lambda t: t * 0, "the sketch at 1 ns has the camera"),
    ],
)
def test_a_tampered_file_is_named(saved: Path, name: str, change: Any, named: str) -> None:
    tensors, content = content_of(saved)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).contiguous()
    sealed(tensors, content, saved)
    refused(saved, named)


def test_files_that_are_no_scene_are_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[:-7])
    refused(saved, "scene.safetensors is damaged: its checksum is")
    for damaged in (b"", b"hello, world", b"\xff" * 64):
        saved.write_bytes(damaged)
        refused(saved, "scene.safetensors is no scene")
    save_file({"a": torch.zeros(1)}, saved, metadata={"adatoken3d_scene": json.dumps([1])})
    refused(saved, "is no scene: it describes itself by a list")
    sealed({"a": torch.zeros(1)}, {"format": storage.FORMAT, **dict.fromkeys(("a", "b"))}, saved)
    refused(saved, "model None")
    saved.write_bytes(content)
    monkeypatch.setattr(storage, "MAX_BYTES", 100)
    refused(saved, "more than 100")
    with pytest.raises(FileNotFoundError):
        load_scene(saved.parent / "none", TokenMap(), channels=5, **IDENTITY)


def test_the_files_origins_are_taken_over_where_they_may_be(tmp_path: Path) -> None:
    def embed(points: torch.Tensor) -> torch.Tensor:
        return torch.relu(points @ torch.tensor([[1.0], [2.0], [3.0]]))

    token_map, poses = scene(origin=(0.0, 0.0, 0.07), embed=embed)
    token_map.move_origin((3, -2, 1))
    save_scene(tmp_path / "s", token_map, poses, **IDENTITY)
    other = TokenMap(0.2, embed=embed)
    load_scene(tmp_path / "s", other, channels=5, adopt_origin=True, **IDENTITY)
    np.testing.assert_allclose(other.model_origin, [0.6, -0.4, 0.27])
    assert torch.equal(other.tokens().position, token_map.tokens().position)
    # A map that stays where it is embeds the same points as it sees them.
    fixed = TokenMap(0.2, (0.0, 0.0, 0.07), embed=embed)
    load_scene(tmp_path / "s", fixed, channels=5, **IDENTITY)
    assert fixed.shift.tolist() == [0, 0, 0] and fixed.tokens().position.sum() != other.tokens().position.sum()
    token_map.move_origin((0, 0, 0))
    assert torch.equal(fixed.tokens().position, token_map.tokens().position)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("origin", [0.0, 0.0]),
        ("origin", ["a"] * 3),
        ("origin", [1e300, 0.0, 0.0]),
        ("shift", [0.5, 0, 0]),
        ("shift", [2**40, 0, 0]),
        ("shift", None),
    ],
)
def test_origins_that_are_none_are_named(saved: Path, name: str, value: Any) -> None:
    tensors, content = content_of(saved)
    sealed(tensors, {**content, name: value}, saved)
    refused(saved, f"{name} ", adopt_origin=True)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[" * 5000 + "]" * 5000, "nested deeper"),
        ("x" * 70_000, "a header of"),
        ('{"format": %s}' % ("9" * 5000), "is no scene|format 999"),  # as Python's version limits integers or not
        ('{"format": {"a": [%s]}}' % ("0," * 9999 + "0"), "format {'a': .{,200}, this program"),
        ("null", "describes itself by a NoneType"),
        ('{"format": 3}', "format 3, this program reads 4 and 5"),
        ('{"format": 2}', "format 2, this program reads 4 and 5"),
    ],
    ids=["nested", "long", "digits", "wide", "nothing", "three", "two"],
)
def test_a_description_that_is_none_is_named(saved: Path, content: str, named: str) -> None:
    sealed(content_of(saved)[0], content, saved)
    refused(saved, named)


def test_a_scene_of_the_format_without_a_checksum_is_refused_by_its_name(saved: Path) -> None:
    tensors, content = content_of(saved)
    save_file(tensors, saved, metadata={"adatoken3d_scene": json.dumps({**content, "format": 2})})
    refused(saved, "format 2, this program reads 4 and 5")
    save_file(tensors, saved, metadata={"adatoken3d_scene": json.dumps(content)})
    refused(saved, "no checksum")


def test_no_byte_of_a_scene_can_change(tmp_path: Path) -> None:
    """Every byte of the header and a sample of the others, each changed in a way of its own."""
    path, choose = tmp_path / "s", random.Random(0)
    save_scene(path, *scene(1), **IDENTITY)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in [*range(header), *choose.sample(range(header, len(content)), 500)]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << choose.randrange(8) if at % 2 else choose.randrange(1, 256)
        path.write_bytes(damaged)
        with pytest.raises(SceneFileError):
            load_scene(path, TokenMap(0.2), channels=5, adopt_origin=True, **IDENTITY)
    path.write_bytes(content)
    assert len(load_scene(path, TokenMap(0.2), channels=5, adopt_origin=True, **IDENTITY)[0]) == 1


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3000), st.integers(0, 3000))
def test_any_bytes_are_refused_by_the_documented_error(tmp_path_factory: Any, noise: bytes, at: int, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "noise"
    save_scene(path, *scene(1), **IDENTITY)
    content = path.read_bytes()
    changed = content[:at] + noise + content[at + cut :]
    path.write_bytes(changed)
    if changed != content:
        with pytest.raises(SceneFileError):
            load_scene(path, TokenMap(0.2), channels=5, **IDENTITY)


def test_a_loaded_scene_does_not_change_with_its_file(saved: Path) -> None:
    token_map = TokenMap(0.2)
    load_scene(saved, token_map, channels=5, **IDENTITY)
    before = token_map.tokens()
    with saved.open("r+b") as file:  # in place, as an editor or a copy does
        file.write(b"\xff" * saved.stat().st_size)
    os.truncate(saved, 0)
    after = TokenMap(0.2)
    after.restore(token_map.contributions())
    for name in ("features", "xyz", "rgb", "count"):
        assert torch.equal(getattr(after.tokens(), name), getattr(before, name)), name


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero"):
        refused(tmp_path / name, f"{name} is no regular file")
