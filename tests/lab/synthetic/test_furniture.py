# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatoken3d_ros.lab.synthetic.furniture import (
    ASSETS,
    COLOURS,
    KINDS,
    PackError,
    colour_names,
    lab,
    load_pack,
    models_of,
)

PACK = load_pack()


def test_the_pack_is_small_and_has_no_pickle() -> None:
    path = ASSETS / "furniture.npz"
    assert path.stat().st_size < 4e6
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            array = np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
            assert array.dtype.kind in "ui", name


def test_there_is_much_to_choose_from() -> None:
    assert len(PACK) >= 170
    assert {m.kind for m in PACK.values()} == set(KINDS) and len(KINDS) >= 59
    assert all(len(m.faces) <= 3000 for m in PACK.values())


@pytest.mark.parametrize("model", PACK.values(), ids=lambda m: m.id)
def test_models_are_sound(model) -> None:  # type: ignore[no-untyped-def]
    assert model.faces.max() < len(model.vertices)
    assert model.colour.max() < len(model.palette) == len(model.shares)
    assert model.shares.sum() == pytest.approx(1, abs=0.01)
    low, high = model.vertices.min(axis=0), model.vertices.max(axis=0)
    # In real size, on the floor, around the origin.
    np.testing.assert_allclose(high - low, model.size, atol=0.002)
    np.testing.assert_allclose((low + high)[:2], 0, atol=0.004)
    assert low[2] == pytest.approx(0, abs=1e-3)
    assert 0.02 < max(model.size) < 3.0
    np.testing.assert_allclose(np.linalg.norm(model.corner_normals, axis=2)[model.areas > 1e-7], 1, atol=1e-3)
    if model.surface:
        s = model.surface
        assert s.x0 < s.x1 and s.y0 < s.y1 and 0.2 < s.height <= model.size[2] + 1e-3


def test_every_model_is_attributed_under_a_free_licence() -> None:
    text = (ASSETS / "FURNITURE_ATTRIBUTION.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ") and "`" in line]
    listed = {row[1].strip("`"): row for row in rows}
    assert set(listed) == set(PACK)
    for model in PACK.values():
        _, _, name, creator, licence, _ = listed[model.id]
        assert (name, creator, licence) == (model.name, model.creator, model.licence)
        assert creator and licence in ("CC0 1.0", "CC BY 3.0", "CC BY 3.0 US")
    for address in ("by/3.0/us/", "by/3.0/", "zero/1.0/"):
        assert f"https://creativecommons.org/licenses/{address}" in text or f"publicdomain/{address}" in text


def test_a_fifth_of_the_models_of_larger_classes_is_held_out() -> None:
    for kind in KINDS:
        known, unseen = len(models_of(kind, held_out=False)), len(models_of(kind, held_out=True))
        assert known >= 1
        if known + unseen >= 3:
            assert unseen == max(1, round(0.2 * (known + unseen)))
        else:
            assert unseen == 0


def test_lab_of_known_colours() -> None:
    np.testing.assert_allclose(lab(np.array([255.0, 255, 255])), [100, 0, 0], atol=0.02)
    np.testing.assert_allclose(lab(np.array([255.0, 0, 0])), [53.24, 80.09, 67.20], atol=0.05)


@given(
    st.sampled_from(sorted(COLOURS)),
    st.floats(0.94, 1.06),
    st.lists(st.floats(-5, 5), min_size=3, max_size=3),
)
def test_a_shade_of_a_named_colour_has_that_name(name: str, factor: float, shift: list[float]) -> None:
    shade = np.clip(np.array(COLOURS[name]) * factor + shift, 0, 255)
    assert name in colour_names(shade)
    nearest = min(COLOURS, key=lambda n: float(np.linalg.norm(lab(shade) - lab(np.array(COLOURS[n], float)))))
    assert nearest == name


@pytest.mark.parametrize("model", [m for m in PACK.values() if KINDS[m.kind].tint], ids=lambda m: m.id)
def test_a_tinted_model_is_mostly_of_its_colour(model) -> None:  # type: ignore[no-untyped-def]
    palette = model.tinted(COLOURS["blue"])
    named = np.array(["blue" in colour_names(rgb) for rgb in palette])
    assert model.shares[named].sum() > 0.69
    assert (palette[~model.main] == model.palette[~model.main]).all()


def test_a_damaged_pack_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "furniture.npz"
    np.savez(path, meta=np.frombuffer(b"[]", np.uint8))
    with pytest.raises(PackError, match="not a furniture pack"):
        load_pack(path)
    with pytest.raises(FileNotFoundError):
        load_pack(tmp_path / "nothing.npz")
