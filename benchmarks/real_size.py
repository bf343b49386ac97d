# SPDX-License-Identifier: Apache-2.0
"""Does a model of its real size load and answer here, and how much memory does that take?

Writes a checkpoint of random weights in the published layout and size to a scratch folder, loads it in a process of its
own as the node does, asks one question about two views of 640 x 480 pixels, and removes the folder. What the answer
says means nothing; sizes, memory and times are those of the real weights.

    weights_gb   of the files, 10^9 bytes (the number type of the published weights, bfloat16)
    peak_rss_gb  most memory that the process held, 10^9 bytes: libraries, weights, what was read of the files meanwhile
    load_s       from the directory to an engine that can be asked
    stage_ms     of the answer: two views through the vision tower, tokens, prefill with the default gates, decoding

    python -m benchmarks.real_size --model qwen3-vl-2b --json F [--device cpu] [--threads 2] [--scratch DIR]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

SHARD = 2 * 10**9  # bytes of a file, at most, unless one tensor is larger
NEW_TOKENS = 8
_CHILD = "import sys, json; from benchmarks.real_size import child; print(json.dumps(child(**json.loads(sys.argv[1]))))"

_ROPE = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
_TEXT = {
    "model_type": "qwen3_vl_text",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "rope_scaling": _ROPE,
}
_VISION = {
    "model_type": "qwen3_vl",
    "in_channels": 3,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
}
_SMALL_TOWER = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
_LARGE_TOWER = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}


def _qwen3vl(hidden: int, inner: int, layers: int, heads: int, tower: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The config.json of a published Qwen3-VL."""
    text = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": tied,
        "text_config": {**_TEXT, **text},
        "vision_config": {**_VISION, **tower, "out_hidden_size": hidden},
    }


# Folder of the architecture, and the config.json.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-vl-2b": ("qwen3vl", _qwen3vl(2048, 6144, 28, 16, _SMALL_TOWER, True)),
    "qwen3-vl-4b": ("qwen3vl", _qwen3vl(2560, 9728, 36, 32, _SMALL_TOWER, True)),
    "qwen3-vl-8b": ("qwen3vl", _qwen3vl(4096, 12288, 36, 32, _LARGE_TOWER, False)),
}


def write_checkpoint(folder: str, config: dict[str, Any], directory: Path, seed: int = 0) -> int:
    """Writes a checkpoint of random weights in bfloat16; returns the bytes of its weights.

    The tokenizer is that of the architecture's tiny checkpoint: bytes and control tokens, whose ids the config gets.
    """
    import torch
    from safetensors.torch import save_file

    from adatoken3d_ros.lmm.random_weights import random_weights
    from adatoken3d_ros.lmm.registry import outline

    tiny, checkpoint = (import_module(f"adatoken3d_ros.lmm.{folder}.{name}") for name in ("tiny", "checkpoint"))
    tokenizer = tiny.byte_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    numbers = {key: tokenizer.token_to_id(token) for key, token in ids.items()}
    (directory / "config.json").write_text(json.dumps({**config, **numbers}, indent=2), encoding="utf-8")

    model = outline(directory)
    sizes = {name: 2 * tensor.numel() for name, tensor in model.state_dict().items()}
    shards: list[dict[str, str]] = [{}]
    room = SHARD
    names: dict[str, str] = checkpoint.official_names(model)
    for ours, official in names.items():
        if sizes[ours] > room and shards[-1]:
            shards.append({})
            room = SHARD
        shards[-1][ours] = official
        room -= sizes[ours]
    for number, shard in enumerate(shards, 1):
        # One tensor after the other: all of them as float32 would be twice what they are in the file.
        weights = {
            official: random_weights(model, {ours: official}, seed + k)[official].to(torch.bfloat16)
            for k, (ours, official) in enumerate(shard.items(), 1000 * number)
        }
        save_file(weights, directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors", {"format": "pt"})
    return sum(sizes[ours] for ours in names)


def child(path: str, device: str, threads: int) -> dict[str, Any]:
    """One fresh process: loads, sees two views, answers."""
    import torch

    from adatoken3d_ros.engine.answer import Question
    from adatoken3d_ros.engine.loading import load_engine, open_scene
    from adatoken3d_ros.settings import Settings

    torch.set_num_threads(threads)
    settings = Settings(
        {"model.path": path, "model.dtype": "bfloat16", "model.device": device, "budget.warm_up": False}
    )
    began = time.perf_counter()
    engine = load_engine(settings)
    loaded = time.perf_counter()
    scene = open_scene(engine, settings)
    for index in range(2):
        scene.observe(view(index))
    answer = engine.ask(scene, Question("What is on the table?", max_new_tokens=NEW_TOKENS))
    figures = {
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
        "load_s": round(loaded - began, 1),
        "stage_ms": {
            name: round(getattr(answer.times, name)) for name in ("encode", "tokens", "prefill", "decode", "total")
        },
        "status": answer.status.name,
        "status_message": answer.status_message,
        "views": len(scene.poses),
        "spatial_tokens": answer.spatial_tokens,
        "retained_tokens": answer.retained_tokens,
        "strategy": answer.strategy,
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "torch": torch.__version__,
    }
    if engine.model.device.type == "cuda":
        figures["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return figures


def view(index: int) -> Any:
    """A picture of noise at an uneven wall, 2 m in front of a camera that has moved to the side."""
    from adatoken3d_ros.scene.frames import PosedFrame

    random = np.random.default_rng(index)
    depth = random.uniform(1.9, 2.1, (480, 640)).astype(np.float32)
    K = np.array([[525.0, 0, 319.5], [0, 525.0, 239.5], [0, 0, 1]])
    T = np.eye(4)
    T[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    T[:3, 3] = (0.8 * index, 0.0, 1.0)
    rgb = random.integers(0, 255, (480, 640, 3), dtype=np.uint8)
    return PosedFrame(rgb, depth, K, T, stamp_ns=(index + 1) * 10**9)


def measure(name: str, device: str, threads: int, scratch: Path | None, console: Console) -> dict[str, Any]:
    """All figures. Raises RuntimeError with the process's words if it fails."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="adatoken3d-real-size-") as folder:
        with console.status(f"writing {name} with random weights"):
            size = write_checkpoint(*MODELS[name], Path(folder))
        given = json.dumps({"path": folder, "device": device, "threads": threads})
        with console.status("loading it, and asking"):
            done = subprocess.run([sys.executable, "-c", _CHILD, given], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the process that loads {name} ended with {done.returncode}: {done.stderr[-800:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    machine = {"machine": platform.machine(), "device": device, "threads": threads, "torch": figures.pop("torch")}
    return {"model": name, "weights_gb": round(size / 1e9, 2), **figures, "setting": machine}


def report(figures: dict[str, Any]) -> Table:
    """For people."""
    table = Table(title=f"{figures['model']}, random weights in bfloat16", show_header=False)
    table.add_row("weights", f"{figures['weights_gb']:.2f} GB, {figures['parameters']:,} numbers")
    table.add_row("peak memory of the process", f"{figures['peak_rss_gb']:.2f} GB")
    table.add_row("load", f"{figures['load_s']:.1f} s")
    table.add_row("spatial tokens", f"{figures['spatial_tokens']}, at the end {figures['retained_tokens']}")
    for stage, ms in figures["stage_ms"].items():
        table.add_row(stage, f"{ms / 1e3:.1f} s")
    table.add_row("answer", figures["status"])
    return table


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", choices=MODELS, default="qwen3-vl-2b", help="whose sizes (%(default)s)")
    parser.add_argument("--json", type=Path, required=True, metavar="F", help="file to write the figures to")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the checkpoint is written for the time")
    arguments = parser.parse_args(words)
    if arguments.threads < 1:
        parser.error(f"--threads {arguments.threads} must be at least 1")
    if arguments.scratch is not None and not arguments.scratch.is_dir():
        parser.error(f"--scratch: {arguments.scratch} is no folder")
    return arguments


def main() -> None:
    arguments, console = parse(), Console()
    figures = measure(arguments.model, arguments.device, arguments.threads, arguments.scratch, console)
    console.print(report(figures))
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
