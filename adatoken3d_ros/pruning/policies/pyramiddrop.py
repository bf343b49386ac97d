# SPDX-License-Identifier: Apache-2.0
"""`pyramiddrop`: PyramidDrop (arXiv 2410.17247), and what the published code of AdaToken-3D runs."""

from __future__ import annotations

from dataclasses import dataclass

from adatoken3d_ros.pruning.schedule import Schedule, scaled_to_depth, truncated
from adatoken3d_ros.pruning.scores import attention_of_last_rows, keep_top
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, PolicyError, Rope, Selection


@dataclass(frozen=True)
class PyramidDrop:
    """Attention of the last question row in the *next* layer.

    Scored the method's own way: queries and keys of all rows are computed for one row's attention and thrown away, then
    computed again by the layer. Positions are renumbered after each drop, as in its code.
    """

    name: str = "pyramiddrop"
    rope: Rope = "renumber"
    layers: tuple[int, ...] = (8, 16, 24)
    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    kept = staticmethod(truncated)

    def select(self, view: GateView) -> Selection:
        keys = view.above.keys(view.hidden, view.cos, view.sin)
        queries = view.above.queries(view.hidden, view.cos, view.sin)
        scores = attention_of_last_rows(queries[:, -1:], keys, view.above.scaling)[view.spatial]
        return Selection(keep_top(scores, view.n_keep), scores)

    def default_schedule(self, n_layers: int) -> Schedule:
        return scaled_to_depth(list(self.layers), list(self.ratios), n_layers)

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        return 2.0 * gate.n_rows * (decoder.hidden * (decoder.queries + decoder.keys) + decoder.queries)


RELEASED_LISTS: dict[str, tuple[tuple[int, ...], tuple[float, ...]]] = {
    "model": ((8, 16, 24), (0.5, 0.25, 0.125)),
    "run": ((8, 16, 24), (0.8, 0.5, 0.25)),
    "scanqa": ((8, 16, 24), (0.8, 0.6, 0.4)),
    "ate": ((4, 8, 12, 16, 18, 20, 22, 24, 26, 28), (0.9, 0.8, 0.75, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.25)),
    "plot": ((4, 8, 12, 16, 18, 20), (0.75, 0.5, 0.4, 0.3, 0.25, 0.15)),
}


def adatoken_release(lists: str = "ate", renumber: bool = True) -> PyramidDrop:
    """`adatoken_release`: what the published code of AdaToken-3D runs, PyramidDrop's gate on its own lists.

    `adatoken_release_original` is the same with original positions.

    Args:
        lists: which of the lists found in its scripts, a key of RELEASED_LISTS.
        renumber: renumber positions after each drop, as published.
    """
    if lists not in RELEASED_LISTS:
        raise PolicyError(f"no released lists {lists!r}; there are {', '.join(RELEASED_LISTS)}")
    layers, ratios = RELEASED_LISTS[lists]
    if renumber:
        return PyramidDrop("adatoken_release", "renumber", layers, ratios)
    return PyramidDrop("adatoken_release_original", "original", layers, ratios)
