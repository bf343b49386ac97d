# SPDX-License-Identifier: Apache-2.0
"""Colours of tokens, what a rectangle or a ray on the screen hits, answers as escaped HTML. Nothing of a browser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.engine.answer import TokenReport, status_name
from adatoken3d_ros.engine.stages import STAGES
from adatoken3d_ros.view.dialogue import Asked, Pair
from adatoken3d_ros.view.source import Shown

LIVE_PICTURE, LIVE_AGE, LAYER, SHARE, PICTURE = (
    "scene now: picture",
    "scene now: age",
    "answer: last layer",
    "answer: contribution",
    "answer: picture",
)
MODES = (LIVE_PICTURE, LIVE_AGE, LAYER, SHARE, PICTURE)
_RAMP = np.array([[48, 18, 110], [38, 110, 170], [60, 180, 110], [250, 220, 60]], dtype=np.float64)
_STAGE_COLOURS = dict(zip(STAGES, ("#777", "#8a5fbf", "#2f8fa5", "#2f6fd0", "#3d8f5a"), strict=True))
_GONE = 0.75  # how dark a patch becomes whose token is not left
HIT = 0.25  # metres from a ray within which a token is clicked
AWAY = np.array([-0.33, -0.41, 0.47])  # from a scene's middle to who looks at it, in its diagonals


def ramp(t: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(N,) from 0 to 1 -> (N, 3) colours from dark blue over green to yellow."""
    at = np.clip(np.nan_to_num(t), 0, 1) * (len(_RAMP) - 1)
    channels = [np.interp(at, np.arange(len(_RAMP)), _RAMP[:, k]) for k in range(3)]
    return np.stack(channels, axis=1).astype(np.uint8)


def colours(mode: str, scene: Shown, tokens: TokenReport | None) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Points (N, 3) and colours (N, 3): of the scene as it is now, or of an answer's tokens, where there is one."""
    if tokens is None or mode in (LIVE_PICTURE, LIVE_AGE):
        if mode != LIVE_AGE or not len(scene.xyz):
            return scene.xyz, scene.rgb
        age = (scene.stamp_ns - scene.since_ns) / 1e9
        return scene.xyz, ramp(1 - age / max(float(age.max()), 1e-9))
    if mode == PICTURE:
        return tokens.xyz, tokens.rgb
    if mode == SHARE:
        most = max(float(tokens.contribution.max(initial=0.0)), 1e-12)
        return tokens.xyz, ramp(np.sqrt(tokens.contribution / most))
    return tokens.xyz, ramp(tokens.last_layer / max(1, len(tokens.spatial_per_layer) - 1))


def viewpoint(xyz: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where to stand (3,) and what to look at (3,) to see points (N, 3) from above; a few far ones do not matter."""
    if not len(xyz):
        xyz = np.array([[-3.0, -3.0, 0.0], [3.0, 3.0, 2.0]])
    low, high = np.percentile(xyz.astype(np.float64), [2, 98], axis=0)
    middle = (low + high) / 2
    return middle + AWAY * max(1.0, float(np.linalg.norm(high - low))), middle


def in_rectangle(
    xyz: NDArray[np.floating],
    T_camera_world: NDArray[np.floating],
    fov: float,
    aspect: float,
    low: tuple[float, float],
    high: tuple[float, float],
) -> NDArray[np.bool_]:
    """(N,) which points (N, 3) a camera shows within a rectangle of its picture.

    Args:
        T_camera_world: (4, 4) scene frame to camera (x right, y down, z forward). fov: vertical, radians.
        low, high: corners of the rectangle, (0, 0) top left of the picture to (1, 1) bottom right.
    """
    seen = xyz @ T_camera_world[:3, :3].T + T_camera_world[:3, 3]
    high_tan = math.tan(fov / 2)
    front = seen[:, 2] > 1e-6
    z = np.where(front, seen[:, 2], 1.0)
    u = 0.5 + seen[:, 0] / z / (2 * high_tan * aspect)
    v = 0.5 + seen[:, 1] / z / (2 * high_tan)
    inside: NDArray[np.bool_] = front & (u >= low[0]) & (u <= high[0]) & (v >= low[1]) & (v <= high[1])
    return inside


def hit(xyz: NDArray[np.floating], origin: NDArray[np.float64], direction: NDArray[np.float64]) -> int | None:
    """Number of the first point (N, 3) that a ray comes nearly as close to as to any; None if to none within HIT."""
    direction = direction / np.linalg.norm(direction)
    to = xyz - origin
    along = to @ direction
    off = np.linalg.norm(to - along[:, None] * direction, axis=1)
    off = np.where(along > 0, off, np.inf)
    if not len(off) or off.min() > HIT:
        return None
    near = np.flatnonzero(off <= off.min() + 0.05)
    return int(near[along[near].argmin()])


def lit_picture(rgb: NDArray[np.uint8], grid: tuple[int, int], area: Iterable[float], lit: Any) -> NDArray[np.uint8]:
    """A picture (h, w, 3) that is dark but for the patches `lit` of its grid, which covers `area`."""
    (height, width), (rows, columns), (left, top, right, bottom) = rgb.shape[:2], grid, area
    if not rows:
        return rgb
    bright = np.zeros((height, width), bool)
    x = np.rint(width * (left + (right - left) * np.arange(columns + 1) / columns)).astype(int)
    y = np.rint(height * (top + (bottom - top) * np.arange(rows + 1) / rows)).astype(int)
    for number in lit:
        row, column = divmod(int(number), columns)
        bright[y[row] : y[row + 1], x[column] : x[column + 1]] = True
    return np.where(bright[..., None], rgb, (rgb * (1 - _GONE)).astype(np.uint8))


# --- HTML: every text comes from outside ---

INSET = 'style="margin:0 10px"'  # as far as viser's own rows


def writing_html(question: str, text: str, stage: str) -> str:
    """An answer while it is written."""
    return f"<div {INSET}><b>{escape(question)}</b><br>{_big(text)}<i>{escape(stage)} ...</i></div>"


def answer_html(record: Mapping[str, Any]) -> str:
    """An answer with what it cost."""
    sure = record.get("confidence")
    facts = [_status(record), "" if sure is None else f"{sure:.0%} likely to be right", record["status_message"]]
    told = escape("; ".join(filter(None, facts)))
    kept = f"{record['retained_tokens']} of {record['spatial_tokens']} tokens left, strategy {record['strategy']}"
    said = f"<b>{escape(record['question'])}</b><br>{_big(record['text'] or '(empty)')}"
    return f'<div id="adatoken3d-answer" {INSET}>{said}<small>{told}<br>{escape(kept)}</small>{bar_html(record)}</div>'


def bar_html(record: Mapping[str, Any]) -> str:
    """The stages' times, with a mark where the budget ends."""
    budget, total = record["latency_budget_ms"] or 0.0, record["total_ms"]
    whole = max(budget, total, 1e-9)
    spans = "".join(
        f'<span title="{stage} {record[f"{stage}_ms"]:.1f} ms" style="background:{colour};display:inline-block;'
        f'height:14px;width:{99 * record[f"{stage}_ms"] / whole:.2f}%"></span>'
        for stage, colour in _STAGE_COLOURS.items()
    )
    mark = (
        '<span style="border-left:2px solid #d33;height:18px;position:absolute;top:-2px;'
        f'left:{99 * budget / whole:.2f}%"></span>'
    )
    legend = ", ".join(f"{stage} {record[f'{stage}_ms']:.0f}" for stage in STAGES if record[f"{stage}_ms"] >= 0.5)
    verdict = f"; budget {budget:g} ms {'met' if record['budget_met'] else 'missed'}" if budget else ""
    return (
        f'<div style="background:#8883;font-size:0;margin-top:4px;position:relative;white-space:nowrap">{spans}'
        f"{mark if budget else ''}</div><small>{total:.0f} ms: {legend}{verdict}</small>"
    )


def pair_html(pair: Pair) -> str:
    """Two answers side by side, and how their probabilities change."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in pair.names)
    sides = (pair.left.answer.record, pair.right.answer.record)

    def row(name: str, values: Iterable[str]) -> str:
        return f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"

    rows = [
        row("answer", (one["text"] or "(empty)" for one in sides)),
        row("status", map(_status, sides)),
        *(row(f"probability of {text!r}", _change(a, b)) for text, a, b in pair.chances),
        row("tokens", (f"{one['spatial_tokens']}, {one['retained_tokens']} left" for one in sides)),
        row("time (ms)", (f"{one['total_ms']:.0f}" for one in sides)),
        row("prefill FLOPs", (f"{one['prefill_flops']:.3g}" for one in sides)),
    ]
    table = f"<table><tr><th></th>{heads}</tr>{''.join(rows)}</table>"
    return f'<div id="adatoken3d-pair" {INSET}><b>{escape(pair.left.question.text)}</b>{table}</div>'


def _status(record: Mapping[str, Any]) -> str:
    return status_name(record["status"], record["status_message"])


def _change(before: float, after: float) -> tuple[str, str]:
    """Two probabilities, NaN where one is not known; small ones are told, too."""
    one, other = ("not known" if math.isnan(value) else f"{value:#.3g}" for value in (before, after))
    return one, other if math.isnan(before + after) else f"{other} ({after - before:+#.3g})"


def history_html(history: Iterable[Asked], most: int = 20) -> str:
    """The newest answers, newest first."""
    rows = []
    for asked in list(history)[::-1][:most]:
        record = asked.answer.record
        texts = (record["question"], record["text"] or "(empty)", _status(record), f"{record['total_ms']:.0f} ms")
        rows.append(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>")
    told = f"<table>{''.join(rows)}</table>" if rows else "<i>nothing was asked yet</i>"
    return f"<div {INSET}>{told}</div>"


def _big(text: str) -> str:
    return f'<span style="font-size:1.5em;overflow-wrap:anywhere">{escape(text)}</span><br>'
