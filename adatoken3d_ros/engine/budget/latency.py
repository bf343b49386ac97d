# SPDX-License-Identifier: Apache-2.0
"""How long a question will take: a formula fitted to this machine, corrected by what is measured while it runs.

    t = a_enc * new views + (p0 + p1 M + p2 M^2) + sum over layers of (a + b n + c n (n + kv)) + gates + T (e + f kv)

M spatial tokens are built; a layer reads n rows after kv cached ones (0 but for a kept prefix); a gate costs a constant
and something per row in front of it; T tokens are decoded over kv cached rows, summed over the layers. All coefficients
are at least 0, in seconds.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from adatoken3d_ros.files import UnusableFile, parse_json, read_file, replacing
from adatoken3d_ros.text import quoted, shown

FloatArray = NDArray[np.float64]

FORMAT = "adatoken3d-latency/1"
MAX_BYTES = 2**20  # of a file
MOST_SECONDS = 3600.0  # no unit of any term takes longer
MOST_BUCKET = 1024
_MOST_SCATTER = 1000.0  # measured / predicted; beyond it or its inverse nothing was measured
# Terms of each stage; `follow_up` is a prefill of the question alone, over a kept prefix, with a ratio of its own.
TERMS: Mapping[str, tuple[str, ...]] = {
    "encode": ("view",),
    "tokens": ("build", "token", "token^2"),
    "prefill": ("layer", "row", "row^2", "gate", "gate row"),
    "decode": ("step", "kv"),
}
FORMULA = {"encode": "encode", "tokens": "tokens", "prefill": "prefill", "follow_up": "prefill", "decode": "decode"}


class LatencyError(ValueError):
    """Measurements that nothing can be fitted to, or a file that is not this machine's; the message names the value."""


# The terms of a piece of work -------------------------------------------------------------------------------------


def encode_terms(views: int) -> FloatArray:
    return np.array([views], dtype=np.float64)


def token_terms(n_tokens: int) -> FloatArray:
    """Building and projecting `n_tokens` spatial tokens; 0: they are there already."""
    return np.array([1.0, n_tokens, n_tokens**2]) if n_tokens else np.zeros(3)


def read_terms(spatial_per_layer: Any, n_spatial: Any, n_text: int) -> FloatArray:
    """(..., 5) of a prefill without a prefix.

    Args:
        spatial_per_layer: (..., L) spatial tokens seen by each layer.
        n_spatial: (...) spatial tokens of the prompt.
        n_text: its other rows.
    """
    counts = np.asarray(spatial_per_layer, dtype=np.float64)
    before = np.concatenate([np.asarray(n_spatial, dtype=np.float64)[..., None], counts[..., :-1]], axis=-1)
    gated = (counts != before) & (counts > 0)
    rows = counts + n_text
    layers = np.full(counts.shape[:-1], float(counts.shape[-1]))
    gate_rows = ((before + n_text) * gated).sum(-1)
    return np.stack([layers, rows.sum(-1), (rows**2).sum(-1), gated.sum(-1), gate_rows], axis=-1)


def follow_up_terms(n_rows: int, n_cached: int, n_layers: int) -> FloatArray:
    """(5,) of a chunk of `n_rows` after `n_cached` rows that each layer keeps."""
    return np.array([n_layers, n_layers * n_rows, n_layers * n_rows * (n_rows + n_cached), 0.0, 0.0])


def decode_terms(steps: Any, cached: Any, n_layers: int) -> FloatArray:
    """(..., 2) of `steps` decode steps; `cached`: rows kept at the first, summed over the layers."""
    steps, cached = np.broadcast_arrays(np.asarray(steps, np.float64), np.asarray(cached, np.float64))
    return np.stack([steps, steps * cached + n_layers * steps * (steps - 1) / 2], axis=-1)


# The fit ----------------------------------------------------------------------------------------------------------


def fit(stage: str, terms: FloatArray, seconds: FloatArray) -> FloatArray:
    """Coefficients (k,) >= 0 with the least sum of squared relative errors (non-negative least squares).

    Raises:
        LatencyError: shapes that disagree, no measurement, or a time that is not positive.
    """
    terms, seconds = np.asarray(terms, np.float64), np.asarray(seconds, np.float64)
    if terms.shape != (len(seconds), len(TERMS[stage])) or not len(seconds):
        raise LatencyError(f"{stage}: terms {terms.shape} for {seconds.shape} times of {len(TERMS[stage])} terms")
    if not (np.isfinite(seconds).all() and (seconds > 0).all() and np.isfinite(terms).all()):
        raise LatencyError(f"{stage}: times must be positive and finite, got {seconds.tolist()}")
    rows = terms / seconds[:, None]
    scale = rows.max(axis=0)  # columns of size 1: the solver compares them
    scale[scale == 0] = 1.0
    found, _ = nnls(rows / scale, np.ones(len(seconds)))
    return np.asarray(found / scale, dtype=np.float64)


# Correction at run time -------------------------------------------------------------------------------------------


class Ratio:
    """Measured over fitted time of one stage: an exponentially weighted mean of its logarithm, and how it scatters.

    One measurement that is off by more than a factor of 1.5 changes nothing; a second one on the same side right after
    it does at once: then it is not an accident but another speed, as when another program starts. What is known of few
    measurements only is guarded more widely, but not by the size of an accident among them.

    Args:
        scatter: measured / predicted of the warm-up, the first entries of the window.
        value: before the first measurement.

    Attributes:
        guard: 95th percentile of measured / predicted, at least 1: p95 over p50.
    """

    _WEIGHT = 0.2  # of a new measurement
    _WINDOW = 64  # measurements that the percentile is taken of
    _OUTLIER = math.log(1.5)
    _EARLY = 0.3  # by how much an unmeasured speed may be off; half after a measurement, a third after two

    def __init__(self, scatter: Iterable[float] = (), *, value: float = 1.0) -> None:
        self.value = value
        self.count = 0  # measurements that `value` follows
        self.observed = 0  # all of them
        self._held: float | None = None
        self._scatter: deque[float] = deque(scatter, maxlen=self._WINDOW)
        self.guard = self._percentile()

    def observe(self, ratio: float) -> bool:
        """Takes one measured / fitted time into account; whether it shows another speed, as the first one does.

        Raises:
            LatencyError: for a ratio that is not positive and finite.
        """
        if not 0 < ratio < math.inf:
            raise LatencyError(f"a ratio of {ratio}")
        self.observed += 1
        off = math.log(ratio / self.value)
        self._scatter.append(ratio / self.value)
        held, self._held = self._held, None
        # The first measurement of all is no outlier: there is nothing yet that it could be compared with.
        far, first = abs(off) > self._OUTLIER, not self.count
        if far and not first:
            if held is None or held * off < 0:
                self._held = off
                self.guard = self._percentile()
                return False
            step = (held + off) / 2
            # What the old speed scattered by says nothing of the new one, nor do the two that led here.
            self._scatter = deque([1.0], maxlen=self._WINDOW)
        else:
            step = max(self._WEIGHT, 1 / (self.count + 1)) * off
        self.value *= math.exp(step)
        self.count += 1
        self.guard = self._percentile()
        return far or first

    def _percentile(self) -> float:
        # Few measurements know little of their tail: as if one more had been somewhat late.
        known = [*self._scatter, 1.1]
        if len(known) <= 20:  # their 95th percentile leans on the largest alone
            known = [min(ratio, math.exp(self._OUTLIER)) for ratio in known]
        return max(1.0 + self._EARLY / (1 + self.count), float(np.percentile(known, 95)))


class LatencyModel:
    """Predicts the seconds of each stage.

    Args:
        coefficients: by formula (see TERMS), (k,) seconds per unit of each term.
        key: the model, number type, device and machine that it was measured on.
        scatter: by formula, measured / predicted of the fit.
        bucket: rows of which gates make a multiple, because that is no slower on this machine (`warmup.bucket_of`).

    Raises:
        LatencyError: coefficients that are missing, of another length, negative or beyond MOST_SECONDS, and a bucket
            below 1 or above MOST_BUCKET.
    """

    def __init__(
        self,
        coefficients: Mapping[str, Sequence[float] | FloatArray],
        key: Mapping[str, str] | None = None,
        scatter: Mapping[str, Sequence[float]] | None = None,
        bucket: int = 1,
    ) -> None:
        self.key = dict(key or {})
        if type(bucket) is not int or not 1 <= bucket <= MOST_BUCKET:
            raise LatencyError(f"bucket is {quoted(bucket)}, expected a whole number from 1 to {MOST_BUCKET}")
        self.bucket = bucket
        self.coefficients: dict[str, FloatArray] = {}
        for name, terms in TERMS.items():
            values = np.asarray(coefficients.get(name, ()), dtype=np.float64)
            if values.shape != (len(terms),) or not ((values >= 0) & (values <= MOST_SECONDS)).all():
                raise LatencyError(
                    f"{name} needs {len(terms)} coefficients from 0 to {MOST_SECONDS:g}, got {quoted(values)}"
                )
            self.coefficients[name] = values
        self._by_policy = {self.key.get("policy", ""): self}
        self.scatter = {name: list((scatter or {}).get(name, ())) for name in TERMS}
        self.ratios = {stage: Ratio(self.scatter[name]) for stage, name in FORMULA.items()}
        self.answers = Ratio()  # of whole answers: what is in no stage, and what slows all of them at once

    @property
    def version(self) -> int:
        """Changes with everything that is learned."""
        return self.answers.observed + sum(ratio.observed for ratio in self.ratios.values())

    @classmethod
    def fitted(
        cls,
        terms: Mapping[str, FloatArray],
        seconds: Mapping[str, FloatArray],
        key: Mapping[str, str] | None = None,
        bucket: int = 1,
    ) -> LatencyModel:
        """From what a warm-up measured, by stage of TERMS: the terms (m, k) and the seconds (m,); and the bucket."""
        coefficients = {name: fit(name, terms[name], seconds[name]) for name in TERMS}
        scatter = {
            name: (seconds[name] / np.maximum(terms[name] @ values, 1e-9)).tolist()
            for name, values in coefficients.items()
        }
        return cls(coefficients, key, scatter, bucket)

    def fitted_seconds(self, stage: str, terms: FloatArray) -> Any:
        """(...) seconds by the formula alone, of terms (..., k)."""
        return terms @ self.coefficients[FORMULA[stage]]

    def p50(self, stage: str, terms: FloatArray) -> Any:
        """(...) seconds that half of such stages stay under."""
        return self.fitted_seconds(stage, terms) * self.ratios[stage].value

    def p95(self, stage: str, terms: FloatArray) -> Any:
        """(...) seconds that 19 of 20 such stages stay under."""
        return self.p50(stage, terms) * self.ratios[stage].guard

    def for_policy(self, policy: str) -> LatencyModel:
        """The same model with the gates of this policy; whatever is in no gate, both learn together.

        Where the gates of another policy were measured, a gate counts as a layer over the same rows, rather too much
        than too little, until questions tell how long prefills take.
        """
        if policy not in self._by_policy:
            other = copy(self)
            prefill = self.coefficients["prefill"].copy()
            if self.key.get("policy", policy) != policy:
                prefill[3:] = np.maximum(prefill[3:], prefill[:2])
            other.coefficients = {**self.coefficients, "prefill": prefill}
            # How slow the machine is at that time holds on; how far that can be relied on was learned of other gates.
            ratio = Ratio(self.scatter["prefill"], value=self.ratios["prefill"].value)
            other.ratios = {**self.ratios, "prefill": ratio}
            self._by_policy[policy] = other
        return self._by_policy[policy]

    def observe(self, stage: str, terms: FloatArray, seconds: float) -> bool:
        """Takes into account that a stage took `seconds`; one with nothing to do says nothing.

        Returns whether the stage has another speed from now on.
        """
        expected = float(self.fitted_seconds(stage, terms))
        if not (expected > 0 and seconds > 0):
            return False
        return self.ratios[stage].observe(seconds / expected)

    def p95_answer(self, p50: Any, p95: Any) -> Any:
        """(...) seconds that 19 of 20 answers stay under, from the sum of their stages' p50 and what its p95 is (...)
        where stages vary on their own."""
        return np.maximum(p95, p50 * self.answers.value * self.answers.guard)

    def observe_answer(self, p50: float, seconds: float) -> None:
        """Takes into account that a whole answer took `seconds`, of which its stages' p50 explain `p50`."""
        if p50 > 0 and seconds > 0:
            self.answers.observe(seconds / p50)

    @property
    def drift(self) -> dict[str, float]:
        """By stage, how many times slower it runs than when it was fitted; only stages that were measured."""
        return {stage: ratio.value for stage, ratio in self.ratios.items() if ratio.count}

    @property
    def slower(self) -> float:
        """How many times slower than fitted the slowest stage or the answers as a whole are."""
        return max(self.answers.value, *(ratio.value for ratio in self.ratios.values()))

    # --- files ---

    def save(self, path: Path | str) -> None:
        """Writes the fit (not the correction) as JSON, atomically."""
        content = {
            "format": FORMAT,
            "key": self.key,
            "coefficients": {name: values.tolist() for name, values in self.coefficients.items()},
            "scatter": self.scatter,
            "bucket": self.bucket,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path | str, key: Mapping[str, str]) -> LatencyModel:
        """Reads a fit, a regular file of at most MAX_BYTES.

        Raises:
            LatencyError: no such format, made for another key, or numbers that no measurement gives; the message names
                what differs.
            OSError: for the file.
        """
        try:
            content = parse_json(read_file(path, MAX_BYTES))
            if content["format"] != FORMAT:
                raise LatencyError(f"format is {quoted(content['format'])}, this program reads {FORMAT!r}")
            for name, value in key.items():
                if content["key"].get(name) != value:
                    raise LatencyError(f"was measured for {name} {quoted(content['key'].get(name))}, this is {value!r}")
            coefficients, scatter = content["coefficients"], content["scatter"]
            for name, values in (*coefficients.items(), *scatter.items()):
                if not isinstance(values, list) or not all(type(x) in (int, float) for x in values):
                    raise LatencyError(f"{shown(name, 80)} holds {quoted(values)}, not a list of numbers")
            for name, values in scatter.items():
                if not all(1 / _MOST_SCATTER <= x <= _MOST_SCATTER for x in values):
                    raise LatencyError(
                        f"the scatter of {shown(name, 80)} is {quoted(values)}: not within {_MOST_SCATTER:g} times"
                    )
            return cls(coefficients, {name: key[name] for name in key}, scatter, content.get("bucket", 1))
        except UnusableFile as error:
            raise LatencyError(str(error)) from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise LatencyError(f"{path}: {error}") from error
