# SPDX-License-Identifier: Apache-2.0
"""One prompt through the decoder, watched: which information flows in each layer, and from which spatial token.

A prompt is [system | spatial tokens | question]. `mine` measures, per layer, how much information flows among the
spatial tokens (intra-modal) and between them and the text (inter-modal), as in AdaToken-3D (arXiv 2505.12782), and, per
spatial token, which share of what the question rows read comes from it.

Every layer's own forward runs on SDPA. The statistics come from that layer's queries and keys, recomputed from its
input and streamed over chunks of query rows, so no more than one chunk of attention weights exists at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adatoken3d_ros.decoder.adapter import CosSin, Decoder, Layer
from adatoken3d_ros.decoder.prefill import Layout
from adatoken3d_ros.lab.information import Information, InformationError

SYSTEM_WEIGHT = 0.7
QUESTION_WEIGHT = 0.3

_CHUNK_BYTES = 64 * 2**20


def region_sums(rows: Tensor, first_row: int, spatial_start: int, n_spatial: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over three regions of a causal attention map, for some of its rows.

    rows (c, m): attention weights of queries first_row .. first_row + c - 1 on the first m keys.
    Returns float64 scalars: spatial queries on earlier spatial keys, spatial queries on system keys, question queries
    on spatial keys. The regions lie below the diagonal, the only half of a causal map that is not 0.
    """
    rows = rows.double()
    end = spatial_start + n_spatial
    # Clamped, so that a chunk outside a region gives an empty slice and not one counted from the end.
    low = min(max(spatial_start - first_row, 0), len(rows))
    high = min(max(end - first_row, 0), len(rows))
    spatial, question = rows[low:high], rows[high:]
    among = spatial[:, spatial_start:end]
    first = first_row + low - spatial_start
    return (
        torch.tril(among, diagonal=first - 1).sum(),
        spatial[:, :spatial_start].sum(),
        question[:, spatial_start:end].sum(),
    )


@torch.inference_mode()
def mine(
    decoder: Decoder,
    embeds: Tensor,
    *,
    spatial_start: int,
    n_spatial: int,
    layout: Layout | None = None,
    progress: Callable[[int, int], None] | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
) -> Information:
    """Mines one prompt on a causal language model with SDPA or flash attention.

    embeds (1, S, D) in the model's dtype and on its device: rows [0, spatial_start) are the system prompt, the next
    n_spatial the spatial tokens, the rest the question. `layout` says more, where rows lie between the tokens (which
    count as scene in the regions, and have no share of their own) or positions are not the rows' numbers.
    `progress(done, total)` is called after every layer; `chunk_bytes` bounds one chunk of fp32 attention weights.
    Raises InformationError.
    """
    n_block = n_spatial if layout is None else layout.spatial_end - spatial_start
    n_tokens, n_question = _check_layout(embeds, spatial_start, n_block)
    where = layout or Layout(spatial_start, n_spatial, n_tokens)
    _check_attention(decoder)
    if n_tokens > decoder.context:
        raise InformationError(f"{n_tokens} tokens exceed the context of {decoder.context}")
    positions = torch.arange(n_tokens) if where.positions is None else where.positions
    cos_sin = decoder.rotary(embeds, positions.to(embeds.device))
    first, end = spatial_start, where.spatial_end
    rows = None if where.rows is None else where.rows.to(embeds.device)
    mined = []
    hidden = embeds
    for index, layer in enumerate(decoder.layers):
        mined.append(_mine_layer(layer, hidden, cos_sin, (first, end, rows), chunk_bytes))
        if not all(np.isfinite(value).all() for value in mined[-1]):
            raise InformationError(f"layer {index} gives values that are not finite")
        # No mask: SDPA then runs its causal kernel, and nothing here is padded.
        hidden = layer.run(hidden, cos_sin)
        if index < len(where.added):
            hidden[0, slice(first, end) if rows is None else rows] += where.added[index].to(hidden.dtype)
        if progress is not None:
            progress(index + 1, len(decoder))
    intra, inter, residual, attention, norm, projection = (np.stack(values) for values in zip(*mined, strict=True))
    return Information(spatial_start, n_question, intra, inter, residual, attention, norm, projection)


def _check_layout(embeds: Tensor, spatial_start: int, n_spatial: int) -> tuple[int, int]:
    if embeds.ndim != 3 or embeds.shape[0] != 1:
        raise InformationError(f"one prompt of shape (1, S, D) is mined at a time, not {tuple(embeds.shape)}")
    n_tokens = embeds.shape[1]
    n_question = n_tokens - spatial_start - n_spatial
    if spatial_start < 0 or n_spatial < 1 or n_question < 1:
        raise InformationError(
            f"{n_tokens} tokens cannot hold {n_spatial} spatial tokens at {spatial_start} and a question after them"
        )
    return n_tokens, n_question


def _check_attention(decoder: Decoder) -> None:
    if decoder.attention in (None, "eager"):
        raise InformationError(
            f"attention implementation {decoder.attention!r} is not causal without a mask; load the model with sdpa"
        )
    if decoder.window is not None:
        raise InformationError(f"the model attends to a sliding window of {decoder.window} tokens")


def _mine_layer(
    layer: Layer, hidden: Tensor, cos_sin: CosSin, scene: tuple[int, int, Tensor | None], chunk_bytes: int
) -> tuple[Any, ...]:
    """(intra, inter, residual_weight) scalars and (attention, norm, projection) rows of n_spatial shares.

    `scene`: first and last + 1 of its rows, and those of the tokens where others lie between them.
    """
    start, end, tokens = scene
    rows, cos, sin = hidden[0], cos_sin[0][0], cos_sin[1][0]
    query, key = layer.queries(rows, cos, sin).float(), layer.keys(rows, cos, sin).float()
    value = layer.values(rows).float()
    heads, n_tokens, head_dim = query.shape
    weight, bias = layer.output.weight.float(), layer.output.bias
    # (H, head_dim, D): what each head's values add to the residual stream.
    output = weight.reshape(-1, heads, head_dim).permute(1, 2, 0).contiguous()
    value = value.repeat_interleave(heads // len(value), dim=0)
    gram = _head_gram(value, output, chunk_bytes)
    chunk = max(1, chunk_bytes // (4 * heads * n_tokens))
    regions = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    shares = torch.zeros(3, n_tokens, dtype=torch.float64, device=hidden.device)
    residual = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for low, high in _chunks(start, end, chunk):
        weights = attention_rows(query[:, low:high], key, low, layer.scaling)
        regions += torch.stack(region_sums(weights.mean(0), low, start, end - start))
    for low, high in _chunks(end, n_tokens, chunk):
        weights = attention_rows(query[:, low:high], key, low, layer.scaling)
        keys = weights.shape[2]
        regions += torch.stack(region_sums(weights.mean(0), low, start, end - start))
        read = weights @ value[:, :keys]
        update = torch.einsum("hrd,hdo->ro", read, output)
        shares[0, :keys] += weights.mean(0).double().sum(0)
        shares[1, :keys] += _norm_shares(weights, gram[:keys]).double().sum(0)
        shares[2, :keys] += _projection_shares(weights, value[:, :keys], update, output).double().sum(0)
        # A bias belongs to the attention's output but to no token.
        written = update if bias is None else update + bias.float()
        after = hidden[0, low:high].float() + written
        residual += (written.norm(dim=-1) / after.norm(dim=-1)).double().sum()
    n_question = n_tokens - end
    intra, system, question = regions.tolist()
    inter = SYSTEM_WEIGHT * system + QUESTION_WEIGHT * question
    by_token = (shares[:, slice(start, end) if tokens is None else tokens] / n_question).cpu().numpy()
    return np.float64(intra), np.float64(inter), np.float64(residual.item() / n_question), *by_token


def _chunks(low: int, high: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, high)) for at in range(low, high, size)]


def attention_rows(query: Tensor, key: Tensor, first_row: int, scaling: float) -> Tensor:
    """(H, c, first_row + c) attention weights of c consecutive queries (H, c, head_dim) on keys (H_kv, S, head_dim)."""
    heads, rows, head_dim = query.shape
    keys = first_row + rows
    grouped = query.reshape(len(key), -1, head_dim)
    scores = (grouped @ key[:, :keys].transpose(1, 2)).mul_(scaling).view(heads, rows, keys)
    future = torch.ones(rows, rows, dtype=torch.bool, device=query.device).triu_(1)
    scores[:, :, first_row:].masked_fill_(future, -math.inf)
    return scores.softmax(-1)


def _head_gram(value: Tensor, output: Tensor, chunk_bytes: int) -> Tensor:
    """(S, H, H) inner products of what the heads write for each key: <W_O^h v_j^h, W_O^g v_j^g>.

    value (H, S, head_dim), output (H, head_dim, D). With these, the norm of a weighted sum over heads needs no (rows,
    S, D) tensor.
    """
    heads, n_tokens, _ = value.shape
    gram = value.new_empty(n_tokens, heads, heads)
    for low, high in _chunks(0, n_tokens, max(1, chunk_bytes // (4 * heads * output.shape[2]))):
        written = torch.bmm(value[:, low:high], output).transpose(0, 1)
        gram[low:high] = written @ written.transpose(1, 2)
    return gram


def _norm_shares(weights: Tensor, gram: Tensor) -> Tensor:
    """(R, S) share of ||sum_h A_ij^h W_O^h v_j^h|| over the keys j; weights (H, R, S), gram (S, H, H)."""
    per_key = weights.permute(2, 1, 0)
    norms = ((per_key @ gram) * per_key).sum(-1).clamp_(min=0.0).sqrt_().T
    return norms / norms.sum(-1, keepdim=True)


def _projection_shares(weights: Tensor, value: Tensor, update: Tensor, output: Tensor) -> Tensor:
    """(R, S) signed shares <sum_h A_ij^h W_O^h v_j^h, y_i> / ||y_i||^2, which sum to 1 over the keys j.

    weights (H, R, S), value (H, S, head_dim), update y (R, D), output (H, head_dim, D).
    """
    towards = torch.einsum("ro,hdo->hrd", update, output)
    along = towards @ value.transpose(1, 2)
    return (weights * along).sum(0) / update.square().sum(-1, keepdim=True)
