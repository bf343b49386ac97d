# SPDX-License-Identifier: Apache-2.0
"""How much a token matters: pure functions on tensors, no state, no randomness."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

ROWS_AT_ONCE = 64


def attention_of_last_rows(queries: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Attention (n,) that the last R of n rows pay each token: full causal softmax, mean over heads and rows.

    Args:
        queries: (H, R, head_dim), rotated, of the last R rows.
        keys: (H_kv, n, head_dim), rotated; H is a multiple of H_kv (grouped queries), R <= n.
        scaling: factor of the products, usually head_dim ** -0.5.

    Computed in float32, ROWS_AT_ONCE rows at a time, so that no n x n map exists for any R.
    """
    n_heads, n_rows, _ = queries.shape
    chunks = causal_attention(queries, keys, scaling)
    sums = (probabilities.flatten(0, 1).sum(0) for _, probabilities in chunks)  # much faster than over two dimensions
    return sum(sums, start=next(sums)).div_(n_heads * n_rows)


def causal_attention(queries: Tensor, keys: Tensor, scaling: float) -> Iterator[tuple[int, Tensor]]:
    """Float32 attention of the last R of n rows in chunks: (index of the chunk's first row, (H, chunk, n)).

    Arguments as in `attention_of_last_rows`.
    """
    (n_heads, n_rows, dim), (n_kv, n, _) = queries.shape, keys.shape
    transposed = keys.float().transpose(1, 2)
    for first in range(0, n_rows, ROWS_AT_ONCE):
        chunk = queries[:, first : first + ROWS_AT_ONCE].float() * scaling
        # The heads of a group are consecutive: (H_kv, group * chunk, head_dim) x (H_kv, head_dim, n).
        logits = (chunk.reshape(n_kv, -1, dim) @ transposed).view(n_heads, -1, n)
        rows, sees_all = chunk.shape[1], n - n_rows + first
        future = torch.ones(rows, n - sees_all, dtype=torch.bool, device=keys.device).triu_(1)
        logits[:, :, sees_all:].masked_fill_(future, -torch.inf)
        yield first, logits.softmax(-1)


def keep_top(scores: Tensor, k: int) -> Tensor:
    """Indices (k,) of the k highest of `scores` (n,), in rising order; ties go to the earlier token."""
    return scores.sort(descending=True, stable=True).indices[:k].sort().values


def likeness(tokens: Tensor, words: Tensor) -> Tensor:
    """(n,) how much each of `tokens` (n, D) stands out as like one of `words` (m, D), m >= 1.

    Cosines with a word are counted in standard deviations from their mean over the tokens, so that no word, and nothing
    that all tokens share, counts more than another; of each token the greatest over the words. In float32.
    """
    cosines = normalize(tokens.float(), dim=-1) @ normalize(words.float(), dim=-1).T
    spread = cosines.std(0, correction=0).clamp_min(torch.finfo(torch.float32).eps)
    return ((cosines - cosines.mean(0)) / spread).amax(1)


def sink_tokens(hidden: Tensor, dims: tuple[int, ...], threshold: float) -> Tensor:
    """Mask (n,) of attention sinks: tokens of `hidden` (n, D) whose RMS-normalised activation in one of `dims` is huge.

    The dimensions belong to the language model (1415 and 2533 for LLaMA-2-7B, threshold 20; arXiv 2503.03321).
    """
    rows = hidden.float()
    return (rows[:, list(dims)].abs() > threshold * rows.pow(2).mean(-1, keepdim=True).sqrt()).any(-1)


def position_bias(curve: Tensor, index: Tensor, n: int) -> Tensor:
    """Score (k,) to expect at tokens `index` (k,) of n: `curve` (m,) over the relative position, linear between."""
    at = index.double() / max(1, n - 1) * (len(curve) - 1)
    left = at.long().clamp(max=max(0, len(curve) - 2))
    right = (left + 1).clamp(max=len(curve) - 1)
    return torch.lerp(curve[left].double(), curve[right].double(), at - left).to(curve.dtype)


def farthest_points(xyz: Tensor, most: int | None = None) -> Tensor:
    """(n,) int64: the point of `xyz` (n, 3) nearest to the centroid, then always the one farthest from all before.

    Of these the first `most`, and no more work than they take.

    Greedy and deterministic. O(n) memory, O(n^2) time in float32, on the CPU wherever `xyz` is: the steps are too small
    for a GPU.
    """
    points = _columns(xyz)
    return _max_min(points, _squares(points), most).to(xyz.device)


def diverse_places(xyz: Tensor, features: Tensor, per_metre: float = 0.05, most: int | None = None) -> Tensor:
    """(n,) int64: tokens in an order in which each shows something else or is somewhere else.

    The nearest to the centroid comes first, then always the one whose nearest among all before is farthest, by 1 -
    cosine of the features and `per_metre` for each metre.

    Args:
        xyz: (n, 3), metres. features: (n, D).

    Of these the first `most`. Greedy and deterministic. O(n^2) memory; the products are made where `features` are, the
    steps on the CPU.
    """
    points, unit = _columns(xyz), normalize(features.detach().float(), dim=-1)
    apart = (1 - unit @ unit.T).cpu().numpy()
    squares = _squares(points)
    order = _max_min(points, lambda i: apart[i] + per_metre * np.sqrt(squares(i)), most)
    return order.to(xyz.device)


def _columns(xyz: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(xyz.detach().float().cpu().numpy().T)


def _squares(points: NDArray[np.float32]) -> Callable[[int], NDArray[np.float32]]:
    """Of points (3, n) the squares of the distances (n,) from the i-th, which hold until the next are asked for."""
    gap, found = np.empty_like(points), np.empty(points.shape[1], np.float32)

    def squares(i: int) -> NDArray[np.float32]:
        np.subtract(points, points[:, i, None], out=gap)
        return np.einsum("cn,cn->n", gap, gap, out=found)

    return squares


def _max_min(
    points: NDArray[np.float32], distances: Callable[[int], NDArray[np.float32]], most: int | None = None
) -> Tensor:
    """(n,) int64: the point of (3, n) nearest to the centroid, then always the one farthest from its nearest before; at
    most `most` of them."""
    n = points.shape[1]
    best = int(np.square(points - points.mean(1, keepdims=True)).sum(0).argmin())
    wanted = n if most is None else min(n, most)
    nearest, order = np.full(n, np.inf, np.float32), np.empty(wanted, np.int64)
    for i in range(wanted):
        order[i] = best
        np.minimum(nearest, distances(best), out=nearest)
        nearest[best] = -1.0
        best = int(nearest.argmax())
    return torch.from_numpy(order)


def diverse_features(features: Tensor, k: int) -> Tensor:
    """Indices (k,) of rows of `features` (n, D) by greedy max-min cosine distance (DivPrune, arXiv 2503.02175).

    The first is the row whose nearest neighbour is farthest. O(n^2 D) for the distances, O(k n) for the choice.
    """
    unit = normalize(features.float(), dim=-1)
    distance = (1 - unit @ unit.T).fill_diagonal_(torch.inf)
    best = distance.amin(1).argmax(0, keepdim=True)
    picked, nearest = [best], distance[best][0]
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, distance[best][0]).index_fill(0, best, -1.0)
        best = nearest.argmax(0, keepdim=True)
        picked.append(best)
    return torch.cat(picked)[:k]
