# SPDX-License-Identifier: Apache-2.0
"""How much each decoder layer and each spatial token contributes to the answer.

A prompt is [system | spatial tokens | question]. `mine` runs it once through the decoder layers and measures, per
layer, how much information flows among the spatial tokens (intra-modal) and between them and the text (inter-modal), as
in AdaToken-3D (arXiv 2505.12782), and, per spatial token, which share of what the question rows read comes from it.

Every layer's own forward runs on SDPA. The statistics come from that layer's queries and keys, recomputed from its
input and streamed over chunks of query rows, so no more than one chunk of attention weights exists at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from adatoken3d_ros.decoder.adapter import CosSin, Decoder, Layer

MEASURES = ("attention", "norm", "projection")

SYSTEM_WEIGHT = 0.7
QUESTION_WEIGHT = 0.3
DECAY = 0.73
CONTRIBUTION_WEIGHTS = (0.4, 0.3, 0.3)

CLAIMED_TOKENS = 0.60
CLAIMED_SHARE = 0.05

_CHUNK_BYTES = 64 * 2**20

FloatArray = NDArray[np.float64]


class InformationError(ValueError):
    """A prompt, a model or a file that cannot be mined; the message names the offending value."""


@dataclass(frozen=True)
class Information:
    """What one prompt with N spatial tokens shows on a model of L layers (all float64).

    intra, inter, accumulated (L,): sums of head-mean attention, see `region_sums` and `accumulate`.
    residual_weight (L,): mean over question rows of ||attention output|| / ||residual stream after it||.
    attention, norm, projection (L, N): mean over the question rows of each spatial token's share; over all tokens of
    the prompt (text too) each measure sums to 1 per layer. Projection shares are signed.
    """

    n_system: int
    n_question: int
    intra: FloatArray
    inter: FloatArray
    residual_weight: FloatArray
    attention: FloatArray
    norm: FloatArray
    projection: FloatArray

    @property
    def n_layers(self) -> int:
        return len(self.intra)

    @property
    def n_spatial(self) -> int:
        return self.attention.shape[1]

    @property
    def accumulated(self) -> FloatArray:
        return accumulate(self.intra)

    @property
    def contribution(self) -> FloatArray:
        """(L,) in [0, 1], see `layer_contribution`."""
        return layer_contribution(self.intra, self.inter)

    def token_shares(self, measure: str) -> FloatArray:
        """(N,) each spatial token's share of the spatial contribution, over all layers; non-negative, sums to 1.

        Layers count by their residual weight; negative projection shares count as no contribution.
        """
        return _shares(self.residual_weight @ np.maximum(self._measure(measure), 0.0))

    def layer_token_shares(self, measure: str) -> FloatArray:
        """(L, N) the same within each layer."""
        return np.stack([_shares(np.maximum(layer, 0.0)) for layer in self._measure(measure)])

    def _measure(self, measure: str) -> FloatArray:
        if measure not in MEASURES:
            raise InformationError(f"unknown measure {measure!r}; there are {', '.join(MEASURES)}")
        return getattr(self, measure)


def accumulate(intra: FloatArray, decay: float = DECAY) -> FloatArray:
    """(L,) accumulated information m[l] = intra[0] + decay * sum(intra[1..l])."""
    return intra[0] + decay * np.concatenate([[0.0], np.cumsum(intra[1:])])


def layer_contribution(intra: FloatArray, inter: FloatArray) -> FloatArray:
    """(L,) 0.4 intra + 0.3 inter + 0.3 accumulated, scaled to [0, 1] over the layers (all ones if they are equal)."""
    alpha, beta, gamma = CONTRIBUTION_WEIGHTS
    return _min_max(alpha * intra + beta * inter + gamma * accumulate(intra))


def _min_max(values: FloatArray) -> FloatArray:
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.ones_like(values)


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


def release_region_sums(attention: Tensor, spatial_start: int, n_spatial: int) -> tuple[Tensor, Tensor]:
    """(intra, inter) by the index order of AdaToken-3D's published script: query index < key index.

    attention (n, n), rows = queries. All three regions lie above the diagonal, where a causal map is 0: kept to show
    that, and never used for a result.
    """
    end = spatial_start + n_spatial
    among = attention[spatial_start:end, spatial_start:end]
    system, question = attention[:spatial_start, spatial_start:end], attention[spatial_start:end, end:]
    return torch.triu(among, diagonal=1).sum(), SYSTEM_WEIGHT * system.sum() + QUESTION_WEIGHT * question.sum()


@torch.inference_mode()
def mine(
    decoder: Decoder,
    embeds: Tensor,
    *,
    spatial_start: int,
    n_spatial: int,
    progress: Callable[[int, int], None] | None = None,
    chunk_bytes: int = _CHUNK_BYTES,
) -> Information:
    """Mines one prompt on a causal language model with SDPA or flash attention.

    embeds (1, S, D) in the model's dtype and on its device: rows [0, spatial_start) are the system prompt, the next
    n_spatial the spatial tokens, the rest the question. `progress(done, total)` is called after every layer;
    `chunk_bytes` bounds one chunk of fp32 attention weights. Raises InformationError.
    """
    n_tokens, n_question = _check_layout(embeds, spatial_start, n_spatial)
    _check_attention(decoder)
    if n_tokens > decoder.context:
        raise InformationError(f"{n_tokens} tokens exceed the context of {decoder.context}")
    cos_sin = decoder.rotary(embeds, torch.arange(n_tokens, device=embeds.device))
    mined = []
    hidden = embeds
    for index, layer in enumerate(decoder.layers):
        mined.append(_mine_layer(layer, hidden, cos_sin, spatial_start, n_spatial, chunk_bytes))
        if not all(np.isfinite(value).all() for value in mined[-1]):
            raise InformationError(f"layer {index} gives values that are not finite")
        # No mask: SDPA then runs its causal kernel, and nothing here is padded.
        hidden = layer.run(hidden, cos_sin)
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
    layer: Layer, hidden: Tensor, cos_sin: CosSin, start: int, n_spatial: int, chunk_bytes: int
) -> tuple[Any, ...]:
    """(intra, inter, residual_weight) scalars and (attention, norm, projection) rows of n_spatial shares."""
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
    end = start + n_spatial
    regions = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    shares = torch.zeros(3, n_tokens, dtype=torch.float64, device=hidden.device)
    residual = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for low, high in _chunks(start, end, chunk):
        weights = _attention_rows(query[:, low:high], key, low, layer.scaling)
        regions += torch.stack(region_sums(weights.mean(0), low, start, n_spatial))
    for low, high in _chunks(end, n_tokens, chunk):
        weights = _attention_rows(query[:, low:high], key, low, layer.scaling)
        keys = weights.shape[2]
        regions += torch.stack(region_sums(weights.mean(0), low, start, n_spatial))
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
    by_token = (shares[:, start:end] / n_question).cpu().numpy()
    return np.float64(intra), np.float64(inter), np.float64(residual.item() / n_question), *by_token


def _chunks(low: int, high: int, size: int) -> list[tuple[int, int]]:
    return [(at, min(at + size, high)) for at in range(low, high, size)]


def _attention_rows(query: Tensor, key: Tensor, first_row: int, scaling: float) -> Tensor:
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


# Lorenz curves ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Concentration:
    """How unequal a set of contributions is.

    lowest_share: S(0.60), the part that the 60 % of tokens with the least contribution have in sum.
    largest_q: q*, the largest share of tokens that have less than 5 % in sum. gini: 0 (equal) to 1.
    """

    lowest_share: float
    largest_q: float
    gini: float

    @classmethod
    def of(cls, shares: FloatArray) -> Concentration:
        tokens, mass = lorenz(shares)
        return cls(
            lowest_share=float(np.interp(CLAIMED_TOKENS, tokens, mass)),
            largest_q=_inverse(tokens, mass, CLAIMED_SHARE),
            gini=float(1.0 - (mass[:-1] + mass[1:]).mean()),
        )


def lorenz(shares: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The Lorenz curve of contributions (N,) >= 0: (N + 1,) shares of tokens, and of what the lowest have in sum."""
    if len(shares) == 0 or not (np.isfinite(shares).all() and (shares >= 0).all()):
        raise InformationError(f"a Lorenz curve needs finite contributions of at least 0, not {shares!r}")
    mass = np.concatenate([[0.0], np.cumsum(np.sort(_shares(shares)))])
    return np.linspace(0.0, 1.0, len(shares) + 1), np.minimum(mass, 1.0)


def _inverse(tokens: FloatArray, mass: FloatArray, level: float) -> float:
    """The largest q with S(q) <= level, by linear interpolation of a curve that never falls."""
    above = int(np.searchsorted(mass, level, side="right"))
    if above == len(mass):
        return 1.0
    q0, q1, m0, m1 = tokens[above - 1], tokens[above], mass[above - 1], mass[above]
    return float(q0 + (q1 - q0) * (level - m0) / (m1 - m0))


def _shares(values: FloatArray) -> FloatArray:
    """Non-negative values divided by their sum; equal shares where nothing contributes."""
    total = values.sum()
    return values / total if total > 0 else np.full(len(values), 1.0 / len(values))


# A calibration set -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A mean over scenes and its 95 % bootstrap interval over scenes (None with a single scene)."""

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class InformationSet:
    """Mined prompts of one model. scenes and questions (one each per prompt) say where they come from."""

    prompts: tuple[Information, ...]
    scenes: tuple[str, ...]
    questions: tuple[str, ...]
    model_hash: str

    def __post_init__(self) -> None:
        if not self.prompts or not len(self.prompts) == len(self.scenes) == len(self.questions):
            raise InformationError(
                f"{len(self.prompts)} mined prompts, {len(self.scenes)} scene names and {len(self.questions)} questions"
            )
        depths = {prompt.n_layers for prompt in self.prompts}
        if len(depths) > 1:
            raise InformationError(f"prompts of models with {sorted(depths)} layers in one set")

    @property
    def contribution(self) -> FloatArray:
        """(L,) mean of the prompts' contributions, scaled to [0, 1] again."""
        return _min_max(np.mean([prompt.contribution for prompt in self.prompts], axis=0))

    def mean(self, name: str) -> FloatArray:
        """(L,) mean over the prompts of `intra`, `inter`, `accumulated` or `residual_weight`."""
        return np.mean([getattr(prompt, name) for prompt in self.prompts], axis=0)

    def lorenz(self, measure: str, points: int = 201) -> tuple[FloatArray, FloatArray]:
        """Mean Lorenz curve of the prompts, on `points` equally spaced shares of tokens."""
        q = np.linspace(0.0, 1.0, points)
        return q, np.mean([np.interp(q, *lorenz(p.token_shares(measure))) for p in self.prompts], axis=0)

    def concentration(self, measure: str, resamples: int = 2000, seed: int = 0) -> dict[str, Estimate]:
        """`Concentration`'s figures over all layers: prompts averaged within scenes, then over scenes."""
        figures = [Concentration.of(prompt.token_shares(measure)) for prompt in self.prompts]
        names = [field.name for field in fields(Concentration)]
        return {n: self._estimate([getattr(f, n) for f in figures], resamples, seed) for n in names}

    def position_curve(self, points: int) -> list[float]:
        """Mean question attention by relative position of a token, at `points` positions from the first to the last.

        Mean over the prompts and over the layers that a gate can read (all but the last), each with a mean of 1;
        linear between the points, as `scores.position_bias` reads it. At least 1e-3, so that it can divide.
        """
        if points < 1:
            raise InformationError(f"a curve of {points} points")
        sums, weights = np.zeros(points), np.zeros(points)
        for prompt in self.prompts:
            layers = prompt.attention[: max(1, prompt.n_layers - 1)]
            shares = (layers / layers.mean(axis=1, keepdims=True)).mean(axis=0)
            at = np.linspace(0.0, points - 1.0, prompt.n_spatial)
            left = np.minimum(at.astype(int), max(points - 2, 0))
            for point, weight in ((left, 1.0 - (at - left)), (np.minimum(left + 1, points - 1), at - left)):
                np.add.at(sums, point, weight * shares)
                np.add.at(weights, point, weight)
        seen = weights > 0
        curve = np.interp(np.arange(points), np.flatnonzero(seen), sums[seen] / weights[seen])
        return [round(max(float(value), 1e-3), 4) for value in curve]

    def layer_lowest_share(self, measure: str) -> FloatArray:
        """(L,) S(0.60) within each layer, mean over the prompts."""
        return np.mean(
            [[Concentration.of(s).lowest_share for s in p.layer_token_shares(measure)] for p in self.prompts], axis=0
        )

    def _estimate(self, values: list[float], resamples: int, seed: int) -> Estimate:
        by_scene: dict[str, list[float]] = {}
        for scene, value in zip(self.scenes, values, strict=True):
            by_scene.setdefault(scene, []).append(value)
        means = np.array([np.mean(group) for group in by_scene.values()])
        if len(means) < 2:
            return Estimate(float(means[0]), None, None)
        drawn = np.random.default_rng(seed).integers(len(means), size=(resamples, len(means)))
        low, high = np.quantile(means[drawn].mean(axis=1), [0.025, 0.975])
        return Estimate(float(means.mean()), float(low), float(high))

    def figures(self) -> dict[str, Any]:
        """What the set shows, as plain numbers for a report or a JSON file."""
        return {
            "contribution": self.contribution.tolist(),
            **{name: self.mean(name).tolist() for name in ("intra", "inter", "accumulated", "residual_weight")},
            "claim": {"tokens": CLAIMED_TOKENS, "share": CLAIMED_SHARE},
            "concentration": {
                measure: {
                    **{name: vars(value) for name, value in self.concentration(measure).items()},
                    "lowest_share_by_layer": self.layer_lowest_share(measure).tolist(),
                }
                for measure in MEASURES
            },
        }

    def save(self, path: Path | str) -> tuple[Path, Path]:
        """Writes `path` + .safetensors (per prompt, layer and token) and + .json (where it comes from, figures)."""
        tensors_path, json_path = _paths(path)
        tensors = {
            f"{index}.{name}": np.ascontiguousarray(getattr(prompt, name), dtype=np.float64)
            for index, prompt in enumerate(self.prompts)
            for name in _ARRAYS
        }
        sizes = [{"n_system": prompt.n_system, "n_question": prompt.n_question} for prompt in self.prompts]
        prompts = [
            {"scene": scene, "question": question, **size}
            for scene, question, size in zip(self.scenes, self.questions, sizes, strict=True)
        ]
        content = {"format": _FORMAT, "model_hash": self.model_hash, "prompts": prompts, "figures": self.figures()}
        save_file(tensors, tensors_path)
        json_path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return tensors_path, json_path

    @classmethod
    def load(cls, path: Path | str) -> InformationSet:
        """Reads what `save` wrote. Raises InformationError naming what is missing or malformed, OSError for files."""
        tensors_path, json_path = _paths(path)
        try:
            content = json.loads(json_path.read_text(encoding="utf-8"))
            tensors = load_file(tensors_path)
        except (json.JSONDecodeError, SafetensorError) as error:
            raise InformationError(f"{path}: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise InformationError(f"{json_path} is not a file of format {_FORMAT}")
        try:
            entries = content["prompts"]
            prompts = tuple(
                Information(entry["n_system"], entry["n_question"], *(tensors[f"{i}.{name}"] for name in _ARRAYS))
                for i, entry in enumerate(entries)
            )
            scenes, questions = (tuple(entry[key] for entry in entries) for key in ("scene", "question"))
            return cls(prompts, scenes, questions, content["model_hash"])
        except KeyError as error:
            raise InformationError(f"{path} lacks {error}") from error


_FORMAT = "adatoken3d-information/1"
_ARRAYS = ("intra", "inter", "residual_weight", "attention", "norm", "projection")


def _paths(path: Path | str) -> tuple[Path, Path]:
    # with_name, not with_suffix: "7b-v1.5" must not lose its ".5".
    path = Path(path)
    return path.with_name(path.name + ".safetensors"), path.with_name(path.name + ".json")


def draw(
    information: InformationSet,
    path: Path | str,
    *,
    curve: FloatArray | None = None,
    kept: FloatArray | None = None,
) -> None:
    """A picture (PNG): contribution by layer, and Lorenz curves of the three measures with the paper's claim.

    curve (L,): the fitted share of tokens per layer. kept (L,): the share that a schedule really keeps per layer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    layers = np.arange(len(information.contribution))
    for name, colour in (("intra", "#4c72b0"), ("inter", "#55a868"), ("accumulated", "#8172b3")):
        left.plot(
            layers,
            _min_max(information.mean(name)),
            color=colour,
            linewidth=1,
            linestyle="--",
            label=f"{name}-modal" if name != "accumulated" else name,
        )
    left.plot(
        layers, information.contribution, color="black", linewidth=2.2, marker="o", markersize=4, label="contribution"
    )
    if curve is not None:
        left.plot(layers, curve, color="#c44e52", linewidth=2, label="fitted decay f")
    if kept is not None:
        left.step(layers, kept, where="post", color="#dd8452", linewidth=2, label="share kept by the schedule")
    left.set(
        title="Information by decoder layer (mined figures scaled to 0..1)",
        xlabel="decoder layer",
        ylabel="scaled figure, share of tokens",
        ylim=(-0.03, 1.05),
    )
    left.grid(alpha=0.3)
    left.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    right.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="all tokens equal")
    # Curves may coincide: the broad one below stays visible.
    for measure, colour, width in zip(MEASURES, ("#4c72b0", "#55a868", "#c44e52"), (5.0, 2.0, 2.0), strict=True):
        found = information.concentration(measure)["lowest_share"].mean
        label = f"{measure} share: lowest 60 % have {found:.1%}"
        right.plot(*information.lorenz(measure), color=colour, linewidth=width, label=label)
    right.plot(CLAIMED_TOKENS, CLAIMED_SHARE, "k*", markersize=13, label="paper's claim: 60 % have less than 5 %")
    right.axhline(CLAIMED_SHARE, xmax=CLAIMED_TOKENS, color="black", linewidth=0.8, linestyle="--")
    right.axvline(CLAIMED_TOKENS, ymax=CLAIMED_SHARE, color="black", linewidth=0.8, linestyle="--")
    n_scenes = len(set(information.scenes))
    right.set(
        title=f"Contribution of spatial tokens ({len(information.prompts)} prompts, {n_scenes} scenes)",
        xlabel="share of spatial tokens, least first",
        ylabel="their share of the contribution",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    right.grid(alpha=0.3)
    right.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(Path(path), dpi=130)
