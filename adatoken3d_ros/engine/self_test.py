# SPDX-License-Identifier: Apache-2.0
"""Does a model that was just loaded say anything sensible, before a robot listens to it?

A fixed question about a fixed, made-up scene: one picture through the tower, a few of its tokens, some steps of the
language model, no token pruned. Where the answer of the 16-bit weights is known (`self_test.json` beside the
checkpoint) each step is compared with it, given the same words before: the token, and the Kullback-Leibler divergence
of the distribution from the known one. Where it is not known, garbage is what no working model gives: numbers that are
not finite, distributions that are as good as even, the same few tokens again and again without doubt.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adatoken3d_ros.decoder.decode import decode
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.files import parse_json, read_file, replacing
from adatoken3d_ros.lmm.identity import original_identity
from adatoken3d_ros.lmm.interface import SpatialLMM, ViewTokens
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.text import shown

logger = logging.getLogger(__name__)

FILE = "self_test.json"
QUESTION = "What is on the table?"
TOKENS = 8  # of the scene
STEPS = 8  # of the answer
KEPT = 32  # likeliest tokens of a step whose probabilities are written down
MOST_KL = 0.5  # nats, mean over the steps: quantised models are below 0.1, wrong numbers at several
SURE = 0.95  # probability from which on a token must be the same
_EVEN = 0.98  # share of the largest entropy there is
_CYCLE = 3  # tokens, at most, that are repeated
_MAX_BYTES = 2**20


class SelfTestError(ValueError):
    """A model that gives garbage; the message says what it gave."""


@dataclass(frozen=True)
class Known:
    """What the 16-bit weights answered.

    Attributes:
        model: their identity. tokens: of the answer, `STEPS` or up to its end.
        steps: of each, {token: probability} of the likeliest.
        losses: by quantisation, the most right answers that it costs, points of a hundred: upper ends of the 95 %
            intervals of `benchmarks.quantised`; only of those that were measured.
    """

    model: str
    tokens: tuple[int, ...]
    steps: tuple[Mapping[int, float], ...]
    losses: Mapping[str, float]


def check(model: SpatialLMM, tokenizer: Any, known: Known | None) -> str:
    """Runs the test; returns what was found, for the log.

    Raises:
        SelfTestError: for a model that gives garbage.
    """
    if known is not None and known.model not in (model.identity, original_identity(model.identity)):
        logger.warning("%s is of another model, %s: only sanity is tested", FILE, shown(known.model))
        known = None
    tokens, logits = answer(model, tokenizer, None if known is None else known.tokens)
    _sane(tokens, logits)
    if known is None:
        return "self-test: sane (what the model should answer is not known)"
    kl = float(np.mean([divergence(step, one) for step, one in zip(known.steps, logits, strict=True)]))
    wrong = [
        step
        for step, (token, expected) in enumerate(zip(tokens, known.tokens, strict=True))
        if token != expected and known.steps[step].get(expected, 0.0) >= SURE
    ]
    same = sum(a == b for a, b in zip(tokens, known.tokens, strict=True))
    found = f"{same} of {len(tokens)} tokens as known, {kl:.3g} nats from the known distributions"
    if not kl <= MOST_KL or wrong:
        surely = f", another token at step {wrong[0]}, which is sure" if wrong else ""
        raise SelfTestError(
            f"self-test: the model gives garbage: {found}{surely} (at most {MOST_KL:g} nats). Its weights, their "
            f"quantisation ({model.quantization}) or this machine's kernels are wrong: try model.quantization: none, "
            "another model.dtype or model.device: cpu; model.self_test: false loads it all the same"
        )
    return f"self-test: {found}"


@torch.inference_mode()
def answer(model: SpatialLMM, tokenizer: Any, given: Sequence[int] | None = None) -> tuple[list[int], list[Tensor]]:
    """The likeliest token of each step up to the one that ends the answer, and its float32 logits (V,).

    Args:
        given: what is taken for said so far, whatever the model would say; its own words where None.
    """
    ramp = np.linspace(0, 255, 96, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(128)), axis=-1)
    features = model.encode_images([np.ascontiguousarray(picture)])[0]
    features = features[:: max(1, len(features) // TOKENS)][:TOKENS]
    steps = torch.arange(len(features), dtype=torch.float32)[:, None]
    xyz = steps * torch.tensor([0.3, -0.2, 0.1]) + torch.tensor([-1.0, 0.8, 0.4])
    spatial = model.scene_tokens(features.to(model.device), model.lift_places(xyz))
    where = ViewTokens.of_one_view(len(spatial)) if model.sizes.tokens == "views" else None
    spliced = model.splice(model.prompt(tokenizer, QUESTION), spatial, where=where)
    read = prefill(model.decoder, spliced.embeds, spliced.layout, Schedule(), make_policy("none"))
    tokens: list[int] = []
    logits = [read.logits.float().cpu()]
    for step in range(STEPS if given is None else len(given)):
        if step:
            logits.append(decode(model.decoder, read, tokens[-1] if given is None else given[step - 1]).float().cpu())
        tokens.append(int(logits[-1].argmax()))
        if given is None and tokens[-1] == tokenizer.eos_token_id:
            break
    return tokens, logits


def divergence(known: Mapping[int, float], logits: Tensor) -> float:
    """KL(known || found), nats, all tokens that were not written down together; infinite where it is not a number."""
    found = logits.double().softmax(-1)
    ids = torch.tensor(list(known))
    if not len(ids) or int(ids.max()) >= len(found):
        return math.inf
    p = torch.tensor(list(known.values()), dtype=torch.float64)
    p, q = (torch.cat([x, (1 - x.sum()).clamp_min(0)[None]]).clamp_min(1e-12) for x in (p, found[ids]))
    value = float((p * (p / q).log()).sum())
    return value if math.isfinite(value) else math.inf


def _sane(tokens: Sequence[int], logits: Sequence[Tensor]) -> None:
    probabilities = []
    for step, one in enumerate(logits):
        if not bool(torch.isfinite(one).all()):
            raise SelfTestError(f"self-test: the model gives garbage: logits that are not finite at step {step}")
        p = one.double().softmax(-1)
        entropy = float(-(p * p.clamp_min(1e-30).log()).sum())
        if entropy > _EVEN * math.log(len(p)):
            raise SelfTestError(
                f"self-test: the model gives garbage: at step {step} every token is as likely as any other "
                f"({entropy:.2f} nats of {math.log(len(p)):.2f})"
            )
        probabilities.append(float(p.max()))
    for length in range(1, _CYCLE + 1):
        again = all(a == b for a, b in zip(tokens, tokens[length:], strict=False))
        if again and len(tokens) == STEPS and min(probabilities) > SURE:
            raise SelfTestError(f"self-test: the model gives garbage: {tokens[:length]} again and again, without doubt")


def read_known(directory: Path) -> Known | None:
    """What is known of a checkpoint; None without the file.

    Raises:
        SelfTestError: for a file that is damaged.
    """
    path = directory / FILE
    try:
        content: Any = parse_json(read_file(path, _MAX_BYTES))
        steps = tuple({int(k): float(v) for k, v in step.items()} for step in content["steps"])
        tokens, losses = tuple(map(int, content["tokens"])), content.get("accuracy_loss", {})
        if not steps or len(steps) != len(tokens) or len(tokens) > STEPS or any(k < 0 for step in steps for k in step):
            raise ValueError(f"{len(tokens)} tokens and {len(steps)} steps")
        return Known(str(content["model"]), tokens, steps, {str(k): float(v) for k, v in losses.items()})
    except FileNotFoundError:
        return None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise SelfTestError(f"{path} is damaged: {type(error).__name__}: {shown(error, 200)}") from error


def is_missing(directory: Path, model: SpatialLMM) -> bool:
    """Whether the file is not there or of other weights, and these are not quantised, which others cannot be compared
    with.

    Raises:
        SelfTestError: for a file that is damaged.
    """
    known = read_known(directory)
    return original_identity(model.identity) == model.identity and (known is None or known.model != model.identity)


def write_known(directory: Path, model: SpatialLMM, tokenizer: Any, losses: Mapping[str, float] | None = None) -> None:
    """Writes down what a model answers, complete or not at all; losses that were known of it stay.

    Args:
        losses: see `Known`.
    """
    tokens, logits = answer(model, tokenizer)
    _sane(tokens, logits)
    try:
        before = read_known(directory)
    except SelfTestError:
        before = None
    kept = dict(before.losses) if before is not None and before.model == model.identity else {}
    steps = []
    for one in logits:
        top = one.double().softmax(-1).topk(min(KEPT, len(one)))
        steps.append({str(int(k)): float(f"{v:.4g}") for v, k in zip(top.values, top.indices, strict=True)})
    content = {"model": model.identity, "tokens": tokens, "steps": steps, "accuracy_loss": {**kept, **(losses or {})}}
    with replacing(directory / FILE) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())
