# SPDX-License-Identifier: Apache-2.0
"""A report of answers: one HTML page that needs no network, with everything that is known of each.

Questions and answers are texts from outside: as HTML they are escaped, in the page's data there is no `<`, and the page
allows no script but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adatoken3d_ros import __version__
from adatoken3d_ros.engine.answer import TokenReport, status_name
from adatoken3d_ros.engine.pictures import Left, Picture, voxels_of
from adatoken3d_ros.engine.stages import STAGES
from adatoken3d_ros.files import replacing

if TYPE_CHECKING:
    from adatoken3d_ros.engine.scene import Scene

MOST_BYTES = 5_000_000
MOST_POINTS = 2000  # that are drawn of one answer
POINTS_IN_ALL = 40_000
MOST_PICTURES = 24
LIBRARIES = ("torch", "transformers", "numpy")
_REACH = 150.0  # millimetres from a camera to the picture that is drawn before it


class ReportError(ValueError):
    """A report that would be too large; the message has its size."""


@dataclass(frozen=True, eq=False)
class Reported:
    """An answer for a report.

    Attributes:
        record: under the names of adatoken3d/msg/Answer; `clicks` may be there beside them.
        tokens: what became of the scene's tokens; None where the question did not come so far.
        left: where those were that were left after the last gate; None where it is not known.
    """

    record: Mapping[str, Any]
    tokens: TokenReport | None = None
    left: Left | None = None


def reported(record: Mapping[str, Any], tokens: TokenReport | None, scene: Scene) -> Reported:
    """An answer about a scene, in the thread that owns it."""
    left = None if tokens is None else Left.of(voxels_of(scene), tokens.xyz[tokens.retained])
    return Reported(record, tokens, left)


def versions() -> dict[str, str]:
    """What answers came from: this package, Python, libraries, machine."""
    found = {"adatoken3d": __version__, "Python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, "machine": f"{platform.system()} {platform.machine()}, {sys.platform}"}


def write_report(path: Path, answers: Sequence[Reported], pictures: Sequence[Picture], command: str) -> None:
    """Writes the page to a file, which replaces another as a whole; raises as `report_page`, and OSError."""
    page = report_page(answers, pictures, command).encode()
    with replacing(path) as file:
        file.write(page)


def report_page(answers: Sequence[Reported], pictures: Sequence[Picture], command: str) -> str:
    """The page.

    Args:
        answers: in the order in which they are shown.
        pictures: of the key frames that the answers are about.
        command: the line that gives the same answers again.

    Raises:
        ReportError: if it has more than MOST_BYTES.
    """
    pictures = pictures[:: max(1, math.ceil(len(pictures) / MOST_PICTURES))]
    points = min(MOST_POINTS, POINTS_IN_ALL // max(1, len(answers)))
    data = {
        "pictures": [_picture(one) for one in pictures],
        "answers": [
            {
                "tokens": None if one.tokens is None else _tokens(one.tokens, one.record, points),
                # Where it is not known what was left, nothing is darkened either.
                "lit": None if one.left is None else [picture.lit(one.left).tolist() for picture in pictures],
            }
            for one in answers
        ],
    }
    body = [_section(i, one, pictures) for i, one in enumerate(answers)]
    about = {**versions(), "model": _named(answers, "model_id"), "seed": _named(answers, "seed")}
    body.append(f"<section><h3>To repeat this</h3><pre>{escape(command)}</pre>{_table(about.items())}</section>")
    script, page = _file("report.js"), _file("report.html")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    filled = {
        "POLICY": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        "TITLE": f"adatoken3d report: {len(answers)} answer{'s' * (len(answers) != 1)}",
        "BODY": "\n".join(body),
        "DATA": _harmless(json.dumps(data, separators=(",", ":"), allow_nan=False)),
        "SCRIPT": script,
    }
    # All at once: what is filled in may look like a place to be filled in.
    page = re.sub("@@([A-Z]+)@@", lambda found: filled[found[1]], page)
    if len(page.encode()) > MOST_BYTES:
        raise ReportError(
            f"a report of {len(answers)} answers and {len(pictures)} pictures has {len(page.encode())} bytes, more "
            f"than {MOST_BYTES}: report fewer answers at once"
        )
    return page


@cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _harmless(text: str) -> str:
    """JSON that cannot end the element in which it stands."""
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _tokens(tokens: TokenReport, record: Mapping[str, Any], most: int) -> dict[str, Any]:
    """What the page draws: of more than `most` tokens those that came farthest, then those that gave most."""
    shown = np.lexsort((-tokens.contribution, -tokens.last_layer))[:most]
    rgb = tokens.rgb[shown].astype(np.int64)
    clicks = np.asarray(record.get("clicks") or [], dtype=np.float64).reshape(-1, 3)
    return {
        "all": len(tokens.xyz),
        "layers": len(tokens.spatial_per_layer),
        "per_layer": list(tokens.spatial_per_layer),
        "xyz": np.rint(tokens.xyz[shown].astype(np.float64) * 1000).astype(np.int64).ravel().tolist(),
        "rgb": ((rgb[:, 0] << 16) | (rgb[:, 1] << 8) | rgb[:, 2]).tolist(),
        "layer": tokens.last_layer[shown].tolist(),
        "share": [round(float(share), 6) for share in tokens.contribution[shown]],
        "boxes": [[round(1000 * v) for v in (*box["center"], *box["size"])] for box in record["boxes"]],
        "evidence": [[round(1000 * v) for v in (*one["place"], *one["extent"])] for one in record.get("evidence", ())],
        "clicks": np.rint(clicks * 1000).tolist(),
    }


def _picture(picture: Picture) -> dict[str, Any]:
    high = math.tan(picture.fov / 2)
    wide = high * picture.aspect
    corners = np.array([[-wide, -high, 1.0], [wide, -high, 1.0], [wide, high, 1.0], [-wide, high, 1.0]]) * _REACH
    ends = corners @ picture.pose[:3, :3].T + picture.pose[:3, 3] * 1000
    apex = picture.pose[:3, 3] * 1000
    pairs = [(apex, end) for end in ends] + [(ends[i], ends[(i + 1) % 4]) for i in range(4)]
    return {
        "jpeg": picture.base64,
        "rows": picture.grid[0],
        "columns": picture.grid[1],
        "area": list(picture.area),
        "lines": [np.rint(np.concatenate(pair)).tolist() for pair in pairs],
    }


def _section(number: int, answer: Reported, pictures: Sequence[Picture]) -> str:
    record, tokens = answer.record, answer.tokens
    status = status_name(record["status"], record["status_message"])
    badge = "good" if status == "OK" else "plain" if record["text"] else "bad"
    parts = [
        f'<section data-answer="{number}"><h2>{escape(record["question"])}</h2>',
        f'<div class="answer">{escape(record["text"] or "(empty)")}</div>',
        f'<span class="badge {badge}">{escape(status)}</span> {_budget(record)}',
        f'<div class="note">{escape(record["status_message"])}</div>' if record["status_message"] else "",
        f"<h3>Time</h3>{_bar(record)}",
    ]
    if tokens is not None:
        parts += ["<h3>What each layer saw</h3>", _VIEW.format(last=max(0, len(tokens.spatial_per_layer) - 1))]
        parts += [_layers(tokens)]
    if pictures:
        lit = "the patches of the tokens that were left after the last gate are lit" if answer.left is not None else ""
        figures = "".join(
            f'<figure><canvas data-picture="{i}"></canvas><figcaption>{one.stamp_ns / 1e9:.2f} s</figcaption></figure>'
            for i, one in enumerate(pictures)
        )
        parts.append(f'<h3>Key frames{": " + lit if lit else ""}</h3><div class="pictures">{figures}</div>')
    return "\n".join([*parts, f"<h3>In numbers</h3>{_table(_numbers(record, tokens))}</section>"])


_VIEW = """<canvas class="scene"></canvas>
<div class="tools"><button class="play">play</button>
<label>layer <input type="range" class="layer" min="0" max="{last}" value="0"></label>
<label>colour <select class="by"><option value="layer">last layer</option><option value="share">contribution</option>
<option value="rgb">picture</option></select></label><span class="said"></span></div>"""


def _budget(record: Mapping[str, Any]) -> str:
    if not record["latency_budget_ms"]:
        return '<span class="badge plain">no budget</span>'
    met = record["budget_met"]
    told = f"budget of {record['latency_budget_ms']:g} ms {'met' if met else 'missed'}"
    return f'<span class="badge {"good" if met else "bad"}">{told}: {record["total_ms"]:.1f} ms</span>'


def _bar(record: Mapping[str, Any]) -> str:
    """Stages as a bar, with a mark where the budget ends."""
    budget, total = record["latency_budget_ms"] or 0.0, record["total_ms"]
    whole = max(budget, total, 1e-9)
    spans = []
    for i, stage in enumerate(STAGES):
        share = 100 * record[f"{stage}_ms"] / whole
        told = f"{stage} {record[f'{stage}_ms']:.1f} ms"
        spans.append(f'<span class="s{i}" style="width:{share:.3f}%" title="{told}">{told if share > 8 else ""}</span>')
    mark = f'<i style="left:{100 * budget / whole:.3f}%" title="budget"></i>' if budget else ""
    return f'<div class="bar">{"".join(spans)}{mark}</div>'


def _layers(tokens: TokenReport) -> str:
    """Tokens that each layer saw, and how much those gave that went no further."""
    seen, flops = tokens.spatial_per_layer, tokens.flops_per_layer
    gave = np.bincount(tokens.last_layer.clip(0), weights=tokens.contribution, minlength=len(seen)).tolist()
    counts = [(n, f"layer {i}: {n} tokens, {flops[i]:.4g} FLOPs") for i, n in enumerate(seen)]
    shares = [(s, f"last seen by layer {i}: {s:.1%} of the contribution") for i, s in enumerate(gave)]
    told = f'<h3>Tokens by layer</h3><div class="layers">{_columns(counts)}</div>'
    if any(gave):  # a strategy without gates measures none
        told += "<h3>Contribution of the tokens by the last layer that saw them</h3>"
        told += f'<div class="layers shares">{_columns(shares)}</div>'
    return told


def _columns(values: Sequence[tuple[float, str]]) -> str:
    most = max((value for value, _ in values), default=0) or 1
    return "".join(f'<div style="height:{100 * value / most:.2f}%" title="{told}"></div>' for value, told in values)


def _numbers(record: Mapping[str, Any], tokens: TokenReport | None) -> list[tuple[str, str]]:
    full, done = record["prefill_flops_unpruned"], record["prefill_flops"]
    sure = record.get("confidence")
    found = [
        ("confidence", "not known" if sure is None else f"{sure:.0%} likely to be right"),
        ("spatial tokens", f"{record['spatial_tokens']}, {record['retained_tokens']} after the last gate"),
        ("prefill FLOPs", f"{done:.4g} of {full:.4g}, {1 - done / full:.1%} saved" if full else "none"),
        ("stages (ms)", ", ".join(f"{stage} {record[f'{stage}_ms']:.2f}" for stage in (*STAGES, "total"))),
        ("strategy", record["strategy"]),
        ("plan", record["plan"]),
        ("clicks (m)", "; ".join(str(click) for click in record.get("clicks") or [])),
        ("boxes (m)", "; ".join(f"centre {box['center']} size {box['size']}" for box in record["boxes"])),
    ]
    if tokens is not None and not math.isnan(tokens.lorenz_share_60):
        found.append(("the least 60 % of the tokens give", f"{tokens.lorenz_share_60:.1%} of the contribution"))
    return [(name, told) for name, told in found if told]


def _table(rows: Any) -> str:
    return f"<table>{''.join(f'<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows)}</table>"


def _named(answers: Sequence[Reported], name: str) -> str:
    return ", ".join(dict.fromkeys(str(one.record[name]) for one in answers))
