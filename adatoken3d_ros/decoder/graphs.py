# SPDX-License-Identifier: Apache-2.0
"""Decode steps in one piece: compiled on a CPU, recorded as a CUDA graph on a GPU, and why where neither can be.

What is prepared here runs `decoder.fixed.step`, and so does eager decoding: there is one way to write a token.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch

from adatoken3d_ros.decoder import fixed
from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.cache import RaggedCache
from adatoken3d_ros.decoder.fixed import SLOTS, Buffers

logger = logging.getLogger(__name__)

_PROOF_STEPS = 3


def prepare(decoder: Decoder) -> str:
    """Makes further decode steps of this decoder run in one piece; why they stay eager, else an empty text.

    On a CPU a step is compiled now, for all lengths that the layers' caches may have, and compared with an eager one;
    that takes a minute, less where torch finds it in its cache. On a GPU each answer's second step is recorded, and
    those after it replay it.
    """
    decoder.stepping = None
    if decoder.device.type == "cuda":
        decoder.stepping = recorded
        return ""
    if decoder.device.type != "cpu":
        return f"no graph is made on a device of type {decoder.device.type}"
    try:
        from torch._inductor.async_compile import shutdown_compile_workers

        compiled = _compiled()
        with torch.inference_mode():
            for first in (1, 3):  # two sets of lengths: the graph may know none of them
                if problem := _differs(decoder, compiled, first):
                    return problem
        shutdown_compile_workers()  # processes that would wait for more to compile
    except Exception as error:  # whatever a compiler and its tools may raise
        lines = str(error).splitlines() or [""]
        return f"a decode step could not be compiled: {type(error).__name__}: {lines[0]}"
    decoder.stepping = compiled
    return ""


def _compiled(backend: str = "inductor") -> Any:
    """`fixed.step` compiled for buffers of any size, to be called for one decoder alone."""
    # What is compiled is kept with a function's code; without guards each decoder needs a copy of its own.
    code: CodeType = fixed.step.__code__.replace()
    own = FunctionType(code, fixed.step.__globals__, fixed.step.__name__)
    # Guards would be checked before each step, for longer than the step takes on a small model. What they would find
    # cannot change: the decoder is one, and of the buffers only the dimensions marked here differ.
    options: Any = {"guard_filter_fn": lambda guards: [False for _ in guards]}
    run = torch.compile(own, fullgraph=True, options=options, backend=backend)

    def begin(decoder: Decoder, state: Buffers) -> Callable[[], None]:
        for tensor, dim in state.varying():
            torch._dynamo.mark_dynamic(tensor, dim)
        return lambda: run(decoder, state)

    return begin


def _differs(decoder: Decoder, begin: fixed.Begin, first: int) -> str:
    """How compiled steps differ from eager ones after made-up keys and values; empty where they do not."""
    states = []
    for _ in range(2):
        cache, generator = RaggedCache(len(decoder)), torch.Generator().manual_seed(first)
        layer = decoder.layers[0].module.self_attn
        heads, dim = layer.k_proj.out_features // layer.head_dim, layer.head_dim
        for i in range(len(decoder)):
            shape = 1, heads, (first + i) * SLOTS - 1, dim  # another size for each layer
            keys, values = (torch.randn(shape, generator=generator).to(decoder.dtype) for _ in range(2))
            cache.update(keys, values, i)
        states.append(fixed.buffers(decoder, cache, 0, 7, _PROOF_STEPS))
    one, other = fixed.eager(decoder, states[0]), begin(decoder, states[1])
    for number in range(_PROOF_STEPS):
        one()
        other()
        for a, b in zip(states[0].keys, states[1].keys, strict=True):
            off = float((a - b).abs().max())
            # In 16 bits a difference of rounding grows from layer to layer.
            if not off <= (1e-3 if decoder.dtype == torch.float32 else 0.5) * float(a.abs().max()):
                return f"compiled step {number} makes keys that differ from eager ones by {off:.3g}"
        states[1].token.copy_(states[0].token)
    return ""


def recorded(decoder: Decoder, state: Buffers) -> Callable[[], None]:
    """Steps over these buffers on a GPU: the first as it is, which loads what kernels need, then one graph."""
    run = fixed.eager(decoder, state)
    graph: Any = None
    count = 0

    def one() -> None:
        nonlocal graph, count
        count += 1
        if count == 2:
            graph = _record(run)
        if graph is None:
            run()
        else:
            graph.replay()

    return one


def _record(run: Callable[[], None]) -> Any:
    """A CUDA graph of one step, which recording does not run; None, and it is logged, where it cannot be recorded."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[0]
        logger.warning("decode steps run one by one, no CUDA graph could be recorded: %s", first)
        return None
    return graph
