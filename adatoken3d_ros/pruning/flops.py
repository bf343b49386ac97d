# SPDX-License-Identifier: Apache-2.0
"""Operations of a prefill, a decode and the vision encoder, in the conventions that papers and we use.

"paper" is the formula of FastV, PyramidDrop and DivPrune, `4 n d^2 + 2 n^2 d + 2 n d m` a layer: multiply-adds, an MLP
of two matrices, nothing else. "exact" counts two operations a multiply-add, grouped keys and values, the lower triangle
of the attention, the three matrices of a gated MLP and the LM head on the last row. The third convention is the sum of
encoder, exact prefill and decode; `three_conventions` gives all of them. Norms, softmax, activations and rotary
positions are left out everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from adatoken3d_ros.pruning.view import DecoderSize, GateSize, Policy

Convention = Literal["exact", "paper"]


class FlopsError(ValueError):
    """Counts that belong to no model; the message names the value."""


def layer_flops(decoder: DecoderSize, n: int, convention: Convention = "exact") -> float:
    """Prefill of `n` tokens in one decoder layer."""
    d, m = decoder.hidden, decoder.intermediate
    if convention == "paper":
        return 4.0 * n * d * d + 2.0 * n * n * d + 2.0 * n * d * m
    if convention != "exact":
        raise FlopsError(f"no convention {convention!r}; there are 'exact' and 'paper'")
    q, kv = decoder.queries, decoder.keys
    return 4.0 * n * d * q + 4.0 * n * d * kv + 2.0 * n * n * q + 6.0 * n * d * m


def prefill_flops(
    decoder: DecoderSize, spatial_per_layer: Sequence[int], n_text: int, convention: Convention = "exact"
) -> float:
    """Prefill in which layer i sees `spatial_per_layer[i]` spatial tokens and `n_text` others; scoring not included."""
    if len(spatial_per_layer) != decoder.n_layers:
        raise FlopsError(f"counts for {len(spatial_per_layer)} layers, the model has {decoder.n_layers}")
    head = 2.0 * decoder.hidden * decoder.vocabulary if convention == "exact" else 0.0
    return sum(layer_flops(decoder, n + n_text, convention) for n in spatial_per_layer) + head


def scoring_flops(
    policy: Policy,
    decoder: DecoderSize,
    n_spatial: int,
    spatial_per_layer: Sequence[int],
    n_text: int,
    n_question: int,
    rows_per_layer: Sequence[int] = (),
) -> float:
    """What `policy` spends on choosing at the gates of a prefill that starts from `n_spatial` tokens, exact.

    rows_per_layer: rows that each layer sees, where others went with the spatial tokens; empty: `n_text` beside them.
    """
    rows = rows_per_layer or [n + n_text for n in spatial_per_layer]
    return sum(
        policy.flops(decoder, GateSize(layer, before, n, kept, n_question, n_spatial))
        for layer, (before, (n, kept)) in enumerate(
            zip((n_spatial + n_text, *rows), pairwise((n_spatial, *spatial_per_layer)), strict=False)
        )
        if 0 < kept < n
    )


def decode_flops(decoder: DecoderSize, spatial_per_layer: Sequence[int], n_text: int, n_new: int) -> float:
    """`n_new` decode steps after such a prefill, each over all that its layer has cached, itself included."""
    d, m = decoder.hidden, decoder.intermediate
    q, kv = decoder.queries, decoder.keys
    layer = 4.0 * d * q + 4.0 * d * kv + 6.0 * d * m
    linear = n_new * (len(spatial_per_layer) * layer + 2.0 * d * decoder.vocabulary)
    seen = sum(n_new * (n + n_text) + n_new * (n_new + 1) // 2 for n in spatial_per_layer)
    return linear + 4.0 * q * seen


def three_conventions(
    decoder: DecoderSize,
    spatial_per_layer: Sequence[int],
    n_text: int,
    *,
    n_new: int,
    encoder: float,
    scoring: float = 0.0,
) -> dict[str, float]:
    """Operations of a finished answer: by the papers' formula, of the exact prefill, and of everything that it took.

    Args:
        decoder: the language model.
        spatial_per_layer: spatial tokens seen by each layer, as a trace reports them.
        n_text: the prompt's other tokens.
        n_new: tokens decoded.
        encoder: operations of the vision tower.
        scoring: what choosing took, see `scoring_flops`; the papers' formula leaves it out.
    """
    exact = prefill_flops(decoder, spatial_per_layer, n_text) + scoring
    return {
        "papers": prefill_flops(decoder, spatial_per_layer, n_text, "paper"),
        "exact": exact,
        "with_encoder_and_answer": encoder + exact + decode_flops(decoder, spatial_per_layer, n_text, n_new),
    }


def reduction(pruned: float, full: float) -> float:
    """Share of the operations that pruning saves, 1 - pruned / full."""
    if full <= 0:
        raise FlopsError(f"a full run of {full} operations")
    return 1.0 - pruned / full
