# SPDX-License-Identifier: Apache-2.0
"""Build the furniture pack that the synthetic rooms are furnished with.

Nobody who uses the project needs this script: its two results are committed. It reads the catalogues of Debian's
package `sweethome3d-furniture` (`apt-get download sweethome3d-furniture`, then `dpkg-deb -x *.deb DIR`), takes the
models of `furniture_models.py`, all CC0 or CC BY, and writes

* `furniture.npz`: meshes in metres (x forward, y left, z up, the origin at the footprint's centre on the floor),
  decimated, with one colour a face out of a palette a model. No pickle.
* `FURNITURE_ATTRIBUTION.md`: name, creator, licence and source of every model, and what was changed.

    python scripts/build_furniture_pack.py DIR/usr/share/sweethome3d/furniture
"""

from __future__ import annotations

import argparse
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
from furniture_meshes import build, compact_order, support_of
from furniture_models import LIBRARIES, LICENCES, MODELS, SUPPORTS, held_out, items
from furniture_reading import catalogue, licence_of, placed, read_obj
from numpy.typing import NDArray

OUT = Path(__file__).resolve().parents[1] / "adatoken3d_ros" / "lab" / "synthetic" / "assets"
SMALL_FACES = 1400  # for what stands on tables
LARGE_FACES = 2400
LEAFY_FACES = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("furniture", type=Path, help="folder with the .sh3f files of sweethome3d-furniture")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    archives = {k: zipfile.ZipFile(arguments.furniture / f"{n}.sh3f") for k, n in LIBRARIES.items()}
    catalogues = {k: catalogue(a) for k, a in archives.items()}
    unseen = {n: held_out(m.split()) for n, m in MODELS.items()}
    meta, parts = [], []
    for name, library, identifier in items():
        entry = catalogues[library][identifier]
        path = entry["model"].lstrip("/")
        licence, address, source = licence_of(archives[library], path.rsplit("/", 1)[0], library)
        mesh = placed(read_obj(archives[library], path), entry)
        size = [float(entry[k]) / 100 for k in ("depth", "width", "height")]
        leafy = name in ("plant", "christmas tree")
        target = LEAFY_FACES if leafy or name == "person" else LARGE_FACES if max(size) > 0.6 else SMALL_FACES
        vertices, faces, index, palette, looks = build(mesh, target, leafy)
        support = support_of(vertices, faces) if name in SUPPORTS else None
        vertices, faces, index = compact_order(vertices, faces, index)
        half = np.array([size[0] / 2, size[1] / 2, 0])
        parts.append(
            (np.round((vertices + half) / size * 65535).clip(0, 65535).astype(np.uint16), faces, index, palette)
        )
        meta.append(
            {
                "id": f"{LIBRARIES[library]}/{identifier}",
                "class": name,
                "name": entry["name"],
                "creator": entry["creator"],
                "licence": licence,
                "source": source,
                "size": size,
                "elevation": float(entry.get("elevation", 0)) / 100,
                "support": support,
                "held_out": f"{library}:{identifier}" in unseen[name],
                "shares": [round(float(share), 4) for share in looks],
                "counts": [len(vertices), len(faces), len(palette)],
            }
        )
        print(f"{name:18} {identifier:34} {len(mesh.faces):7} -> {len(faces):5} faces, {licence}", file=sys.stderr)
    write(arguments.out, meta, parts)


def write(out: Path, meta: list[dict], parts: list[tuple[NDArray, NDArray, NDArray, NDArray]]) -> None:
    """Write the archive and the attribution."""
    out.mkdir(parents=True, exist_ok=True)
    deltas = [np.diff(f.astype(np.int64), axis=0, prepend=0).astype(np.int16) for _, f, _, _ in parts]
    arrays = {
        "meta": np.frombuffer(json.dumps(meta, separators=(",", ":"), ensure_ascii=False).encode(), np.uint8),
        # Columns apart and differences instead of values: the same numbers in two thirds of the bytes.
        "vertices": np.concatenate([p[0] for p in parts]).T.copy(),
        "faces": np.concatenate(deltas).T.copy(),
        "colour": np.concatenate([p[2] for p in parts]),
        "palette": np.concatenate([p[3] for p in parts]),
    }
    path = out / "furniture.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            # A fixed date keeps the bytes the same from build to build.
            info = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w") as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    classes = len({m["class"] for m in meta})
    print(f"{len(meta)} models in {classes} classes, {path.stat().st_size / 1e6:.2f} MB -> {path}", file=sys.stderr)
    write_attribution(out, meta)


def write_attribution(out: Path, meta: list[dict]) -> None:
    """Write who made the models."""
    addresses = dict(LICENCES.values())
    lines = [
        "# Furniture models: who made them and under which licence",
        "",
        "`furniture.npz` holds simplified copies of the models below. They come from the furniture libraries for",
        "Sweet Home 3D (https://www.sweethome3d.com), as Debian packages them in `sweethome3d-furniture` 1.8.",
        "**Changes made:** reduced to at most 3,000 faces, materials and textures averaged to one colour a face, faces",
        "that nobody can see removed, scaled to the catalogue's size in metres, turned to x forward and z up; the",
        "rooms made of them recolour and scale them further. No creator endorses this project or its use of the",
        "models.",
        "",
        *(f"* {name}: {address}" for name, address in sorted(addresses.items())),
        "",
        "The Scopia library is (C) 2006-2020 Scopia Visual Interfaces Systems, s.l. (http://www.scopia.es) and, in",
        "part, (C) 2014-2020 Emmanuel Puybaret / eTeks <info@eteks.com>; the KatorLegaz library is (C) 2003-2008",
        "Andrew Kator & Jennifer Legaz; the Reallusion library is (C) 2008-2011 Reallusion",
        "(http://www.reallusion.com); the Blend Swap models are by the contributors named",
        "(http://www.blendswap.com).",
        "",
        "| class here | model | name | creator | licence | source |",
        "|---|---|---|---|---|---|",
    ]
    for m in sorted(meta, key=lambda m: (m["class"], m["id"])):
        source = m["source"] or "library"
        lines.append(f"| {m['class']} | `{m['id']}` | {m['name']} | {m['creator']} | {m['licence']} | {source} |")
    (out / "FURNITURE_ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
