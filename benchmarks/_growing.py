# SPDX-License-Identifier: Apache-2.0
"""The way answers were written before buffers had a fixed size: the whole prompt is read for each question, then
transformers' layers take one token a chunk, over caches that grow. It is what the new way is measured against, and has
to agree with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import decode
from adatoken3d_ros.decoder.prefill import Prefill, prefill
from adatoken3d_ros.engine import answering

Generate = Callable[..., Iterator[int]]


def growing(
    decoder: Decoder,
    prefilled: Prefill,
    *,
    max_new_tokens: int,
    eos_ids: Collection[int],
    should_stop: Callable[[], bool] | None = None,
) -> Iterator[int]:
    """As `decoder.decode.generate`."""
    logits = prefilled.logits
    for i in range(max_new_tokens):
        if should_stop is not None and should_stop():
            return
        token = int(logits.argmax())
        if token in eos_ids:
            return
        yield token
        if i + 1 < max_new_tokens:
            logits = decode(decoder, prefilled, token)


def step_of(decoder: Decoder, prefilled: Prefill, token: int) -> Callable[[], int]:
    """One step after the other, to be timed."""
    last = token

    def one() -> int:
        nonlocal last
        last = int(decode(decoder, prefilled, last).argmax())
        return last

    return one


@contextmanager
def written_by(generate: Generate, into: list[int]) -> Iterator[None]:
    """Within it, the engine's answers are written by `generate`, by `growing` after a whole prompt was read; what it
    gives is also added to `into`."""

    def whole(*args: Any, stems: Any = None, **named: Any) -> Prefill:
        return prefill(*args, **named)

    def noted(*args: Any, **named: Any) -> Iterator[int]:
        for token in generate(*args, **named):
            into.append(token)
            yield token

    before = {name: vars(answering)[name] for name in ("generate", "prefill")}
    vars(answering)["generate"] = noted
    if generate is growing:
        vars(answering)["prefill"] = whole
    try:
        with torch.inference_mode():
            yield
    finally:
        vars(answering).update(before)
