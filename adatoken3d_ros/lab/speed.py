# SPDX-License-Identifier: Apache-2.0
"""How fast a model is on this machine: each stage of an answer, beside what the machine can do at most.

The scene is made up: pictures of noise before an uneven wall. Times do not depend on what is seen, only on how much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch

from adatoken3d_ros.decoder.decode import Steps
from adatoken3d_ros.decoder.prefill import Prefill, prefill
from adatoken3d_ros.decoder.prefix import ScenePrefix
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.loading import load_engine, open_scene, strategy_of
from adatoken3d_ros.engine.report import prefill_flops
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab import machine
from adatoken3d_ros.lab.machine import wait
from adatoken3d_ros.lmm.interface import Spliced
from adatoken3d_ros.lmm.quantized.linear import QuantizedLinear
from adatoken3d_ros.pruning import flops
from adatoken3d_ros.pruning.schedule import Schedule, scaled
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.pruning.view import DecoderSize, Policy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import Settings

QUESTION = "Is there a chair in the room?"
SAVED = (0.0, 0.63, 0.8)  # shares of a prefill's operations
ANSWER = 16  # tokens of the answer that is told at the end
BUDGETS = 10
Progress = Callable[[str, int, int | None], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Effort:
    """How long to measure: views of the scene, runs of each time, decode steps.

    `quick`: no run that does not count before those that do, no latency budgets, which need many prefills to know what
    the machine takes, and steps in one piece only where `model.decoding` says so, since they are compiled first.
    """

    views: int = 20
    repeats: int = 3
    steps: int = 24
    quick: bool = False


def measure(settings: Settings, effort: Effort, progress: Progress) -> dict[str, Any]:
    """All figures; JSON can hold them.

    Args:
        settings: model, device, number type, quantisation and decoding, as for the node.
        progress: told (step, done, of how many).

    Raises:
        ValueError, OSError: as `load_engine`.
    """
    began = time.perf_counter()

    def loading(share: float, _: str) -> None:
        progress("loading", min(99, round(100 * share)), 100)

    settings = settings | {"scene.max_views": effort.views}
    engine = load_engine(settings | {"budget.warm_up": False, "model.decoding": "eager"}, loading)
    device, load_s = engine.model.device, time.perf_counter() - began
    loaded_gb = machine.peak_memory_gb(device)
    progress("loading", 100, 100)
    progress("peaks", 0, 1)
    before, highest = machine.state(device), machine.peaks(device)
    progress("peaks", 1, 1)
    began = time.perf_counter()
    progress("preparing", 0, 1)
    eager_because = _prepare(engine, settings, effort)
    prepared_s = time.perf_counter() - began
    progress("preparing", 1, 1)
    if not effort.quick:
        strategy = strategy_of(engine, settings["strategy"])
        engine.warm_up(strategy, None, lambda done, of: progress("its own speed", done, of))
    scene = open_scene(engine, settings | {"scene.min_sharpness": 0.0})
    encode_ms = _show(engine, scene, effort, progress)
    figures: dict[str, Any] = {
        "model": engine.model_id,
        "quantization": engine.model.quantization,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "machine": machine.description(device),
        "state_before": before,
        "peaks": highest,
        "load_s": load_s,
        "loaded_gb": loaded_gb,
        "weights_gb": _weight_bytes(engine) / 1e9,
        "prepared_s": prepared_s,
        "decoding": "eager" if engine.model.decoder.stepping is None else "graph",
        "eager_because": eager_because,
        "views": len(scene.poses),
        "encode_ms_a_view": encode_ms,
    }
    with torch.inference_mode():
        figures |= _answering(engine, scene, effort, highest, progress)
    figures["asked"] = _asked(engine, scene, progress)
    figures["budgets"] = [] if effort.quick else _budgets(engine, scene, progress)
    figures["peak_gb"] = machine.peak_memory_gb(device)
    figures["state_after"] = machine.state(device)
    figures["sentence"] = sentence(figures)
    return figures


def sentence(figures: dict[str, Any]) -> str:
    """What it all comes to."""
    times = [told(row["answer_ms"]) for row in figures["prefill"]]
    ends = [
        times[0] + " unpruned",
        *(f"{ms} at -{row['saved']:.0%}" for ms, row in zip(times[1:], figures["prefill"][1:], strict=True)),
    ]
    return (
        f"On this machine this model answers a question about {figures['views']} views in {', '.join(ends)} "
        f"({ANSWER} tokens, {figures['spatial_tokens']} spatial tokens, views encoded before)."
    )


def told(ms: float) -> str:
    """A time for people."""
    return f"{ms:.0f} ms" if ms < 10_000 else f"{ms / 1e3:.0f} s"


def _prepare(engine: Engine, settings: Settings, effort: Effort) -> str:
    if settings["model.decoding"] == "eager":
        return "model.decoding is eager"
    if settings["model.decoding"] == "auto" and effort.quick:
        return "nothing was compiled for a quick look"
    return engine.prepare_decoding(Path(settings["budget.cache"]) if settings["budget.cache"] else None)


def view(index: int) -> PosedFrame:
    """A picture of noise at an uneven wall, 2 m in front of a camera that moves to the side."""
    random = np.random.default_rng(index)
    depth = random.uniform(1.8, 2.2, (480, 640)).astype(np.float32)
    K = np.array([[525.0, 0, 319.5], [0, 525.0, 239.5], [0, 0, 1]])
    T = np.eye(4)
    T[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    T[:3, 3] = (0.8 * (index % 7), 0.7 * (index // 7), 1.0)
    rgb = random.integers(0, 255, (480, 640, 3), dtype=np.uint8)
    return PosedFrame(rgb, depth, K, T, stamp_ns=(index + 1) * 10**9)


def _show(engine: Engine, scene: Scene, effort: Effort, progress: Progress) -> float:
    """Encodes the views; milliseconds of one, the median of all but the first."""
    times = []
    for index in range(effort.views):
        progress("views", index, effort.views)
        scene.observe(view(index))
        began = time.perf_counter()
        scene.encode_pending()
        wait(engine.model.device)
        times.append(1e3 * (time.perf_counter() - began))
    progress("views", effort.views, effort.views)
    return median(times[1:] or times)


def _answering(
    engine: Engine, scene: Scene, effort: Effort, highest: dict[str, float], progress: Progress
) -> dict[str, Any]:
    """Prefill by share saved, decode steps, a follow-up question."""
    model, device = engine.model, engine.model.device
    decoder, size = model.decoder, model.decoder.size
    prompt, clicks = scene.prompt(Question(QUESTION))
    block = scene.prepared.block(None)
    spliced = scene.splice(prompt, clicks, block)
    products = _products(engine)
    top = highest.get(f"{products}_tflops", 0.0) * 1e12
    policy = scene.make_policy(scene.strategy)

    def read(schedule: Schedule) -> Prefill:
        return prefill(decoder, spliced.embeds, spliced.layout, schedule, policy, scene=block.scene)

    steps_ms, step_bytes = _steps(engine, read(scene.strategy.schedule), effort)
    rows: list[dict[str, Any]] = []
    full = prefill_flops(size, policy, None, spliced)
    for number, saved in enumerate(SAVED):
        progress("prefill", number, len(SAVED))
        schedule = _that_saves(saved, scene.strategy.schedule, lambda s: _planned(size, s, policy, spliced) / full)
        seconds, filled = _median(partial(read, schedule), device, effort)
        ms, trace = 1e3 * seconds, filled.trace
        spent = prefill_flops(size, policy, trace, spliced)
        rows.append(
            {
                "saved": 1 - spent / full,
                "kept_token_layers": sum(trace.spatial_per_layer) / max(1, spliced.n_spatial * size.n_layers),
                "flops": spent,
                "ms": ms,
                "mfu": spent / (ms / 1e3) / top if top else None,
                "gate_share": trace.gate_seconds / (ms / 1e3),
                "answer_ms": ms + (ANSWER - 1) * steps_ms,
            }
        )
    progress("prefill", len(SAVED), len(SAVED))
    for row in rows:
        row["speedup"], row["predicted"] = rows[0]["ms"] / row["ms"], rows[0]["flops"] / row["flops"]
    end = spliced.layout.spatial_end
    prefix = ScenePrefix(decoder, spliced.embeds[:, :end], spliced.spatial_start, layout=spliced.layout)

    def follow_up() -> None:
        with prefix.asking(spliced.embeds[:, end:]):
            pass

    return {
        "spatial_tokens": spliced.n_spatial,
        "prompt_rows": spliced.n_tokens,
        "products": products,
        "prefill": rows,
        "decode": {
            "ms": steps_ms,
            "tokens_per_s": 1e3 / steps_ms,
            "bytes_a_step": step_bytes,
            "share_of_bandwidth": step_bytes / (steps_ms / 1e3) / (highest["bandwidth_gb_s"] * 1e9),
        },
        "follow_up_ms": 1e3 * _median(follow_up, device, effort)[0],
    }


def _steps(engine: Engine, filled: Prefill, effort: Effort) -> tuple[float, float]:
    """Milliseconds of a decode step, the median; and the bytes that one reads: weights, keys and values."""
    steps = Steps(engine.model.decoder, filled, 0, effort.steps + 2)
    read = _weight_bytes(engine, language=True) + filled.cache.held  # slots that are not seen are read as well
    times = []
    for number in range(effort.steps + 2):
        began = time.perf_counter()
        steps.next()
        if number >= 2:
            times.append(1e3 * (time.perf_counter() - began))
    return median(times), read


def _products(engine: Engine) -> str:
    """Number type of most products of the language model, whose peak is what a prefill is held against."""
    kernels = {part.kernel for part in engine.model.decoder.language.modules() if isinstance(part, QuantizedLinear)}
    if "int8_rows" in kernels:
        return "int8"
    four = any(kernel.startswith("int4") for kernel in kernels)
    return "bfloat16" if four else str(engine.model.dtype).removeprefix("torch.")


def _weight_bytes(engine: Engine, language: bool = False) -> float:
    """Of all weights as they lie in memory; `language`: what a decode step reads, all but the table of words."""
    of: Any = engine.model.decoder.language if language else engine.model
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in (*of.parameters(), *of.buffers())}
    if language and (table := of.model.embed_tokens.weight).data_ptr() != of.lm_head.weight.data_ptr():
        seen.pop(table.data_ptr(), None)
    return float(sum(seen.values()))


def _planned(size: DecoderSize, schedule: Schedule, policy: Policy, spliced: Spliced) -> float:
    """Operations of a prefill by its schedule."""
    counts = schedule.counts(spliced.n_spatial, size.n_layers, policy.kept)
    n_text = spliced.n_tokens - spliced.n_spatial
    scoring = flops.scoring_flops(policy, size, spliced.n_spatial, counts, n_text, spliced.n_question)
    return flops.prefill_flops(size, counts, n_text) + scoring


def _that_saves(saved: float, schedule: Schedule, share: Callable[[Schedule], float]) -> Schedule:
    """The schedule scaled until a prefill takes 1 - saved of the operations, as nearly as it can."""
    if not saved:
        return Schedule()
    low, high = 0.01, 20.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if share(scaled(schedule, middle)) > 1 - saved else (middle, high)
    return scaled(schedule, low)


def _median(work: Callable[[], T], device: torch.device, effort: Effort) -> tuple[float, T]:
    """Seconds, and what the last run gave."""
    if not effort.quick:
        work()
    times = []
    for _ in range(effort.repeats):
        wait(device)
        began = time.perf_counter()
        last = work()
        wait(device)
        times.append(time.perf_counter() - began)
    return median(times), last


def _asked(engine: Engine, scene: Scene, progress: Progress) -> list[dict[str, Any]]:
    """One question as a robot asks it, with the scene's own strategy and with no token pruned."""
    scene.prepare()
    found, own = [], scene.strategy
    for number, strategy in enumerate((own, default_strategy("none", engine.n_layers))):
        progress("a question", number, 2)
        scene.set_strategy(strategy)
        answer = engine.ask(scene, Question(QUESTION, max_new_tokens=ANSWER))
        found.append(
            {
                "strategy": answer.strategy,
                "took_ms": answer.times.total,
                "prefill_ms": answer.times.prefill,
                "decode_ms": answer.times.decode,
                "retained_tokens": answer.retained_tokens,
                "status": answer.status.name,
            }
        )
    scene.set_strategy(own)
    progress("a question", 2, 2)
    return found


def _budgets(engine: Engine, scene: Scene, progress: Progress) -> list[dict[str, Any]]:
    """Ten budgets from where pruning must be strong to where none is needed: what was asked for and what was kept."""
    engine.ask(scene, Question(QUESTION, max_new_tokens=ANSWER))
    slow = engine.ask(scene, Question(QUESTION, max_new_tokens=ANSWER)).times.total
    found = []
    for number, share in enumerate(np.linspace(0.3, 1.5, BUDGETS)):
        progress("budgets", number, BUDGETS)
        budget = float(share * slow)
        answer = engine.ask(scene, Question(QUESTION, max_new_tokens=ANSWER, latency_budget_ms=budget))
        found.append(
            {
                "budget_ms": budget,
                "took_ms": answer.times.total,
                "kept": bool(answer.budget_met),
                "status": answer.status.name,
                "retained_tokens": answer.retained_tokens,
            }
        )
    progress("budgets", BUDGETS, BUDGETS)
    return found
