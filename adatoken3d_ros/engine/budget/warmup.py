# SPDX-License-Identifier: Apache-2.0
"""A few seconds of measuring when a model is loaded: what `engine.budget.latency` fits its formula to."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.decode import Steps
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.decoder.prefix import ScenePrefix
from adatoken3d_ros.engine.budget.latency import (
    TERMS,
    FloatArray,
    LatencyError,
    LatencyModel,
    decode_terms,
    encode_terms,
    follow_up_terms,
    read_terms,
    token_terms,
)
from adatoken3d_ros.lmm.interface import PromptIds, SpatialLMM, Spliced
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.pruning.view import SceneTokens

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
T = TypeVar("T")

SIZES = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the most spatial tokens that the model takes
REPEATS = 3
MOST_SECONDS = 4.0  # no larger size is begun that would end after this; the formula goes on from there
GROWTH = 3.0  # how much longer the next size is likely to take
DECODE_STEPS = 4
IMAGE = (480, 640)
BUCKETS, BUCKET_ROWS, BUCKET_REPEATS = (16, 64, 128), 512, 9


def latency_model(
    model: SpatialLMM,
    tokenizer: Any,
    strategy: Strategy,
    cache: Path | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[LatencyModel, bool]:
    """The latency model of a model on this machine.

    Args:
        model, tokenizer: as loaded. strategy: whose policy scores at the gates.
        cache: directory where fits are kept; None to measure each time.
        progress: told (done, of) after each step of the measurement.

    Returns:
        The latency model, and whether it came out of the cache. A file in the cache that is broken or was made for
        another model is measured anew; a directory that cannot be written is logged.
    """
    key = key_of(model, strategy)
    path = None if cache is None else Path(cache).expanduser() / file_name(key)
    if path is not None:
        try:
            return LatencyModel.load(path, key), True
        except FileNotFoundError:
            pass
        except (LatencyError, OSError) as error:
            logger.warning("measuring the latency model anew: %s", error)
    measured = measure(model, tokenizer, strategy, progress, clock)
    # On CPUs rounding up was measured to save nothing (docs/onboard.md).
    bucket = 1 if model.device.type == "cpu" else bucket_of(model.decoder, clock)
    found = LatencyModel.fitted(*measured, key, bucket)
    if path is not None:
        try:
            found.save(path)
        except (OSError, ValueError) as error:  # the latter for a name that no folder can have
            logger.warning("the latency model could not be kept: %s", error)
    return found, False


def synchronised(look: Callable[[], T], device: torch.device) -> Callable[[], T]:
    """A look at the clock, or at whether to stop, that on a GPU first waits until all that was launched is done: it
    would else be of the time of launching. Elsewhere it is itself. What waiting costs was not measured on a GPU."""
    if device.type != "cuda":
        return look

    def done() -> T:
        torch.cuda.synchronize(device)
        return look()

    return done


@torch.inference_mode()
def bucket_of(decoder: Decoder, clock: Callable[[], float]) -> int:
    """The largest of BUCKETS so that a layer over a multiple of so many rows takes no longer than over half a bucket
    less, as far as rounding up goes in the mean; 1 where none does, or the context is too small for it.

    On a GPU products go by tiles of rows, and what is left of the last tile costs nothing.
    """
    n = min(BUCKET_ROWS, decoder.context // max(BUCKETS) * max(BUCKETS))
    if not n:
        return 1
    clock = synchronised(clock, decoder.device)
    # Odd: of no multiple of anything.
    fewer = {bucket: n - bucket // 2 - 1 for bucket in BUCKETS}
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1, n, decoder.size.hidden, generator=generator).to(decoder.device, decoder.dtype)
    cos, sin = decoder.rotary(rows, torch.arange(n, device=decoder.device))
    took: dict[int, list[float]] = {m: [] for m in (n, *fewer.values())}
    for repeat in range(BUCKET_REPEATS + 1):
        for m, times in took.items():
            began = clock()
            decoder.layers[0].run(rows[:, :m], (cos[:, :m], sin[:, :m]))
            ended = clock()
            if repeat:  # the first one warms up
                times.append(ended - began)
    whole = median(took[n])
    return max((bucket for bucket, m in fewer.items() if whole <= median(took[m])), default=1)


def key_of(model: SpatialLMM, strategy: Strategy) -> dict[str, str]:
    """What a fit holds for: this model in this number type on this machine, and gates of this strategy's policy."""
    cuda = model.device.type == "cuda"
    return {
        "model": model.identity,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "machine": torch.cuda.get_device_name(model.device) if cuda else f"{platform.node()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "policy": strategy.policy,  # what a gate costs is its policy's
    }


def file_name(key: Mapping[str, str]) -> str:
    """Name of the file in the cache."""
    device = key["device"].replace(":", "")
    return f"latency-{key['model']}-{key['dtype']}-{device}-{key['threads']}-{key['policy']}.json"


Log = Callable[[str, FloatArray, float], None]  # told stage, terms and seconds


def measure(
    model: SpatialLMM,
    tokenizer: Any,
    strategy: Strategy,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Runs every stage on made-up inputs of several sizes, each REPEATS times after a run that does not count.

    Returns, by stage of TERMS, the terms (m, k) and the seconds (m,).
    """
    terms: dict[str, list[FloatArray]] = {name: [] for name in TERMS}
    seconds: dict[str, list[float]] = {name: [] for name in TERMS}

    def log(stage: str, of: FloatArray, took: float) -> None:
        terms[stage].append(of)
        seconds[stage].append(took)

    clock = synchronised(clock, model.device)
    steps = _steps(model, tokenizer, strategy, log, clock)
    total, done = 2 + len(SIZES), 0
    began = last = clock()
    with torch.inference_mode():
        for _ in steps:
            done += 1
            if progress is not None:
                progress(done, total)
            now = clock()
            # Three sizes at least: fewer cannot tell a constant from a slope and a bend.
            if done >= 5 and now - began + GROWTH * (now - last) > MOST_SECONDS:
                break
            last = now
    if progress is not None and done < total:
        progress(total, total)
    return (
        {name: np.stack(rows) for name, rows in terms.items()},
        {name: np.maximum(np.array(times), 1e-7) for name, times in seconds.items()},
    )


def _steps(
    model: SpatialLMM, tokenizer: Any, strategy: Strategy, log: Log, clock: Callable[[], float]
) -> Iterator[None]:
    """Views one and two, then the sizes from small to large."""
    generator = np.random.default_rng(0)
    for views in (1, 2):
        images = [generator.integers(0, 255, (*IMAGE, 3), dtype=np.uint8) for _ in range(views)]
        log("encode", encode_terms(views), _median(partial(model.encode_images, images), clock))
        yield
    room = model.sizes.context_length - _prompt(model, tokenizer).n_tokens - DECODE_STEPS - 1
    most = max(8, min(model.sizes.max_spatial_tokens, room))
    for size in sorted({max(8, round(share * most)) for share in SIZES}):
        _measure_size(model, tokenizer, strategy, size, log, clock)
        yield


def _measure_size(
    model: SpatialLMM, tokenizer: Any, strategy: Strategy, n: int, log: Log, clock: Callable[[], float]
) -> None:
    """Tokens, prefill with and without gates, a follow-up question and decoding, for a scene of n tokens."""
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, model.sizes.feature_width, generator=generator).to(model.device)
    xyz = torch.rand(n, 3, generator=generator) * torch.tensor([8.0, 6.0, 2.5])
    prompt, places = _prompt(model, tokenizer), model.lift_places(xyz)

    def build() -> tuple[Spliced, SceneTokens]:
        spatial = model.scene_tokens(features, places)
        scene = SceneTokens(xyz.to(model.device), spatial[:, : model.decoder.size.hidden])
        _ = scene.order
        return model.splice(prompt, spatial), scene

    log("tokens", token_terms(n), _median(build, clock))
    spliced, scene = build()
    layout = spliced.layout
    n_layers, n_text = len(model.decoder), spliced.n_tokens - n
    policy = make_policy(strategy.policy, **strategy.options)
    for schedule in dict.fromkeys((Schedule(), strategy.schedule)):

        def read(schedule: Schedule = schedule) -> Any:
            return prefill(model.decoder, spliced.embeds, layout, schedule, policy, scene=scene)

        filled = read()
        log("prefill", read_terms(filled.trace.counted(n_text), n, n_text), _median(read, clock))
        filled, times, cached = read(), [], sum(filled.trace.rows_per_layer)
        steps = Steps(model.decoder, filled, 0, DECODE_STEPS + 1)
        for step in range(DECODE_STEPS + 1):
            began = clock()
            steps.next()
            if step:
                times.append(clock() - began)
        log("decode", decode_terms(1, cached, n_layers), median(times))
    end = layout.spatial_end
    prefix = ScenePrefix(model.decoder, spliced.embeds[:, :end], spliced.spatial_start, layout=layout, measure=True)
    rows = spliced.embeds[:, end:]

    def follow_up() -> None:
        with prefix.asking(rows):
            pass

    log("prefill", follow_up_terms(rows.shape[1], prefix.n_tokens, n_layers), _median(follow_up, clock))


def _prompt(model: SpatialLMM, tokenizer: Any) -> PromptIds:
    return model.prompt(tokenizer, "What is on the table?")


def _median(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        began = clock()
        work()
        times.append(clock() - began)
    return median(times)
