# SPDX-License-Identifier: Apache-2.0
"""How much each decoder layer and each spatial token contributes to the answer, of one prompt and of many.

`lab.mining` measures it as in AdaToken-3D (arXiv 2505.12782); here are the numbers, what is derived from them (the
contribution of a layer, Lorenz curves over the tokens) and their files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

MEASURES = ("attention", "norm", "projection")

DECAY = 0.73
CONTRIBUTION_WEIGHTS = (0.4, 0.3, 0.3)

CLAIMED_TOKENS = 0.60
CLAIMED_SHARE = 0.05

FloatArray = NDArray[np.float64]


class InformationError(ValueError):
    """A prompt, a model or a file that cannot be mined; the message names the offending value."""


@dataclass(frozen=True)
class Information:
    """What one prompt with N spatial tokens shows on a model of L layers (all float64).

    intra, inter, accumulated (L,): sums of head-mean attention, see `mining.region_sums` and `accumulate`.
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


def accumulate(intra: FloatArray) -> FloatArray:
    """(L,) accumulated information m[l] = intra[0] + DECAY * sum(intra[1..l])."""
    return intra[0] + DECAY * np.concatenate([[0.0], np.cumsum(intra[1:])])


def layer_contribution(intra: FloatArray, inter: FloatArray) -> FloatArray:
    """(L,) 0.4 intra + 0.3 inter + 0.3 accumulated, scaled to [0, 1] over the layers (all ones if they are equal)."""
    alpha, beta, gamma = CONTRIBUTION_WEIGHTS
    return min_max(alpha * intra + beta * inter + gamma * accumulate(intra))


def min_max(values: FloatArray) -> FloatArray:
    """Scaled to [0, 1]; all ones where they are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.ones_like(values)


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
        return min_max(np.mean([prompt.contribution for prompt in self.prompts], axis=0))

    def mean(self, name: str) -> FloatArray:
        """(L,) mean over the prompts of `intra`, `inter`, `accumulated` or `residual_weight`."""
        return np.mean([getattr(prompt, name) for prompt in self.prompts], axis=0)

    def lorenz(self, measure: str) -> tuple[FloatArray, FloatArray]:
        """Mean Lorenz curve of the prompts, on 201 equally spaced shares of tokens."""
        q = np.linspace(0.0, 1.0, 201)
        return q, np.mean([np.interp(q, *lorenz(p.token_shares(measure))) for p in self.prompts], axis=0)

    def concentration(self, measure: str) -> dict[str, Estimate]:
        """`Concentration`'s figures over all layers: prompts averaged within scenes, then over scenes."""
        figures = [Concentration.of(prompt.token_shares(measure)) for prompt in self.prompts]
        names = [field.name for field in fields(Concentration)]
        return {n: self._estimate([getattr(f, n) for f in figures]) for n in names}

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

    def _estimate(self, values: list[float]) -> Estimate:
        by_scene: dict[str, list[float]] = {}
        for scene, value in zip(self.scenes, values, strict=True):
            by_scene.setdefault(scene, []).append(value)
        means = np.array([np.mean(group) for group in by_scene.values()])
        if len(means) < 2:
            return Estimate(float(means[0]), None, None)
        drawn = np.random.default_rng(0).integers(len(means), size=(2000, len(means)))
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
            for name in ARRAYS
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
                Information(entry["n_system"], entry["n_question"], *(tensors[f"{i}.{name}"] for name in ARRAYS))
                for i, entry in enumerate(entries)
            )
            scenes, questions = (tuple(entry[key] for entry in entries) for key in ("scene", "question"))
            return cls(prompts, scenes, questions, content["model_hash"])
        except KeyError as error:
            raise InformationError(f"{path} lacks {error}") from error


_FORMAT = "adatoken3d-information/1"
ARRAYS = ("intra", "inter", "residual_weight", "attention", "norm", "projection")


def _paths(path: Path | str) -> tuple[Path, Path]:
    # with_name, not with_suffix: "7b-v1.5" must not lose its ".5".
    path = Path(path)
    return path.with_name(path.name + ".safetensors"), path.with_name(path.name + ".json")
