# SPDX-License-Identifier: Apache-2.0
"""What the language model's benchmarks share: a random Llama and its prompt, fair timing, peak memory, the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.autograd.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import Layout
from adatoken3d_ros.pruning.view import SceneTokens

T = TypeVar("T")


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Flags for sizes, device and repeats; the defaults are a sixteenth of LLaVA-3D-7B, its prompt in full."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="F", help="write the figures to this file")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size")
    parser.add_argument("--intermediate", type=int, default=2752, help="inner size of the MLP")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--heads", type=int, default=16, help="attention heads")
    parser.add_argument("--kv-heads", type=int, help="key/value heads; as many as heads if not given")
    parser.add_argument("--vocab", type=int, default=32000, help="vocabulary")
    parser.add_argument("--system-tokens", type=int, default=37, help="text before the scene")
    parser.add_argument("--scene-tokens", type=int, default=1659, help="spatial tokens")
    parser.add_argument("--question-tokens", type=int, default=24, help="text after the scene")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds; the median counts")
    parser.add_argument("--warmup", type=int, default=1, help="rounds before them")
    return parser


@dataclass(frozen=True, eq=False)
class Case:
    """A model with random weights and a prompt for it: system, scene, question."""

    decoder: Decoder
    embeds: Tensor
    layout: Layout
    scene: SceneTokens
    device: torch.device


def make_case(args: argparse.Namespace) -> Case:
    """From the flags; seeded."""
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    n_tokens = args.system_tokens + args.scene_tokens + args.question_tokens
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads,
        max_position_embeddings=max(4096, 2 * n_tokens),
    )
    with device:
        language = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()
    embeds = torch.randn(1, n_tokens, args.hidden).to(device, dtype)
    room = torch.tensor([8.0, 6.0, 2.5])
    scene = SceneTokens((torch.rand(args.scene_tokens, 3) * room).to(device))
    return Case(Decoder(language), embeds, Layout(args.system_tokens, args.scene_tokens, n_tokens), scene, device)


def interleaved(ways: dict[str, Callable[[], T]], args: argparse.Namespace) -> dict[str, list[tuple[float, T]]]:
    """(seconds, result) of each way, run in turn, so that the machine's moods fall on all of them; shows progress."""
    cuda = torch.device(args.device).type == "cuda"
    measured: dict[str, list[tuple[float, T]]] = {name: [] for name in ways}
    columns = TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task("", total=(args.warmup + args.repeats) * len(ways))
        for round_ in range(args.warmup + args.repeats):
            for name, way in ways.items():
                progress.update(task, description=name)
                if cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                result = way()
                if cuda:
                    torch.cuda.synchronize()
                if round_ >= args.warmup:
                    measured[name].append((time.perf_counter() - start, result))
                progress.advance(task)
    return measured


def peak_megabytes(way: Callable[[], Any], device: torch.device) -> float:
    """Most memory (10^6 bytes) that the tensors made by `way` hold at one time, weights and inputs not included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        way()
        return (torch.cuda.max_memory_allocated(device) - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes to the terminal
    with profile(profile_memory=True) as profiler:
        way()
    held = peak = 0
    for event in sorted(profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions and sizes, to be kept beside the figures."""
    cuda = torch.device(args.device).type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(args.device) if cuda else _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: value for name, value in vars(args).items() if name != "json"},
    }


def write_rows(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """A JSON object with one line a key."""
    lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def rounded(figures: dict[str, float]) -> dict[str, float]:
    """To five significant digits: more than a measured time has."""
    return {name: float(f"{value:.5g}") for name, value in figures.items()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
