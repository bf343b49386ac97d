# SPDX-License-Identifier: Apache-2.0
"""Does a model of its real size load and answer here, and how much memory does that take?

Writes a checkpoint of random weights in the published layout and size to a scratch folder, loads it in a process of its
own as the node does, asks one question about two views of 640 x 480 pixels, and removes the folder. What the answer
says means nothing; sizes, memory and times are those of the real weights.

    weights_gb   of what is kept in memory, 10^9 bytes (in bfloat16, as the published files)
    peak_rss_gb  most memory that the process held, 10^9 bytes: libraries, weights, what was read of the files meanwhile
    load_s       from the directory to an engine that can be asked
    load_peak_gb       most memory until then, libraries_gb of it before anything was read
    load_bound_gb      what a load may take at most: the kept weights, the largest file (a memory map), and a tenth
    load_within_bound  whether load_peak_gb, libraries and all, is at most that
    stage_ms     of the answer: two views through the vision tower, tokens, prefill with the default gates, decoding

With --quantization its linear layers are converted while they are read, figures are then below `real_size.KIND`;
`unpruned` is the same question once more with no token pruned.

    python -m benchmarks.real_size --model qwen3-vl-2b --json F [--quantization int4] [--device cpu] [--threads 2]
        [--scratch DIR]
    python -m benchmarks.real_size --model llava-3d-7b --write DIR    # the checkpoint alone, for `adatoken3d benchmark`
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from adatoken3d_ros.lmm.quantized.formats import KINDS

SHARD = 5 * 10**9  # bytes of a file, at most, unless one tensor is larger: as 7B models are published
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


# LLaVA-3D-7B as its config.json has it, with the vision tower in it and words of bytes for a tokenizer.
_LLAVA_3D = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_video_tower": "SpatialAwareModule",
}

# Folder of the architecture, and the config.json.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-vl-2b": ("qwen3vl", _qwen3vl(2048, 6144, 28, 16, _SMALL_TOWER, True)),
    "qwen3-vl-4b": ("qwen3vl", _qwen3vl(2560, 9728, 36, 32, _SMALL_TOWER, True)),
    "qwen3-vl-8b": ("qwen3vl", _qwen3vl(4096, 12288, 36, 32, _LARGE_TOWER, False)),
    "llava-3d-7b": ("llava3d", _LLAVA_3D),
}


def write_checkpoint(folder: str, config: dict[str, Any], directory: Path, seed: int = 0) -> int:
    """Writes a checkpoint of random weights in bfloat16; returns the bytes of its weights.

    The tokenizer is that of the architecture's tiny checkpoint, with the ids that the config gets from it.
    """
    import torch
    from safetensors.torch import save_file

    from adatoken3d_ros.lmm.random_weights import random_weights
    from adatoken3d_ros.lmm.registry import outline

    tiny, checkpoint = (import_module(f"adatoken3d_ros.lmm.{folder}.{name}") for name in ("tiny", "checkpoint"))
    numbers = tiny.write_tokenizer(directory)
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


def child(path: str, device: str, threads: int, quantization: str = "none") -> dict[str, Any]:
    """One fresh process: loads, sees two views, answers, with tokens pruned and without."""
    import torch

    from adatoken3d_ros.engine.answer import Question
    from adatoken3d_ros.engine.loading import load_engine, open_scene
    from adatoken3d_ros.lab.machine import peak_memory_gb
    from adatoken3d_ros.lmm.registry import outline
    from adatoken3d_ros.pruning.strategy import default_strategy
    from adatoken3d_ros.settings import Settings

    torch.set_num_threads(threads)
    here = torch.device("cpu")
    given = {"model.path": path, "model.dtype": "bfloat16", "model.device": device, "budget.warm_up": False}
    settings = Settings({**given, "model.quantization": quantization, "scene.max_views": 2})
    libraries, began = peak_memory_gb(here)["process"], time.perf_counter()
    engine = load_engine(settings)
    loaded, peak = time.perf_counter(), peak_memory_gb(here)["process"]
    scene = open_scene(engine, settings)
    for index in range(2):
        scene.observe(view(index))
    question = Question("What is on the table?", max_new_tokens=NEW_TOKENS)
    answer = engine.ask(scene, question)
    scene.set_strategy(default_strategy("none", engine.n_layers))
    unpruned = engine.ask(scene, question)
    model = engine.model
    held = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    weights = sum(tensor.nbytes for tensor in held.values()) / 1e9
    bound = 1.1 * (weights + max(file.stat().st_size for file in Path(path).glob("*.safetensors")) / 1e9)
    figures: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in outline(path).parameters()),
        "weights_gb": round(weights, 2),
        "load_s": round(loaded - began, 1),
        "libraries_gb": round(libraries, 2),
        "load_peak_gb": round(peak, 2),
        "load_bound_gb": round(bound, 2),
        "load_within_bound": peak <= bound,
        "stage_ms": _stages(answer),
        "unpruned": {"stage_ms": _stages(unpruned), "status": unpruned.status.name},
        "status": answer.status.name,
        "status_message": answer.status_message,
        "views": len(scene.poses),
        "spatial_tokens": answer.spatial_tokens,
        "retained_tokens": answer.retained_tokens,
        "strategy": answer.strategy,
        "peak_rss_gb": round(peak_memory_gb(here)["process"], 2),
        "torch": torch.__version__,
    }
    if engine.model.device.type == "cuda":
        figures["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return figures


def _stages(answer: Any) -> dict[str, int]:
    """Milliseconds."""
    return {name: round(getattr(answer.times, name)) for name in ("encode", "tokens", "prefill", "decode", "total")}


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


def measure(
    name: str, kinds: Sequence[str], device: str, threads: int, scratch: Path | None, console: Console
) -> dict[str, Any]:
    """All figures. Raises RuntimeError with the process's words if it fails."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=scratch, prefix="adatoken3d-real-size-") as folder:
        with console.status(f"writing {name} with random weights"):
            size = write_checkpoint(*MODELS[name], Path(folder))
        for kind in kinds:
            given = json.dumps({"path": folder, "device": device, "threads": threads, "quantization": kind})
            with console.status(f"loading it, {kind}, and asking"):
                done = subprocess.run([sys.executable, "-c", _CHILD, given], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the process that loads {name} ended with {done.returncode}: {done.stderr[-800:]}")
            found[kind] = json.loads(done.stdout.splitlines()[-1])
    machine = {"machine": platform.machine(), "device": device, "threads": threads, "torch": torch_of(found)}
    files = round(size / 1e9, 2)
    if list(found) == ["none"]:
        return {"model": name, "weights_gb": files, **found["none"], "setting": machine}
    return {"model": name, "files_gb": files, "real_size": found, "setting": machine}


def torch_of(found: dict[str, Any]) -> str:
    """The version that the processes had; taken out of what they found."""
    return [figures.pop("torch") for figures in found.values()][-1]


def report(figures: dict[str, Any]) -> Table:
    """For people."""
    table = Table(title=f"{figures['model']}, random weights in bfloat16")
    ways = figures.get("real_size", {"none": figures})
    for column in ("", *ways):
        table.add_column(column)
    first = next(iter(ways.values()))
    table.add_row("numbers", *(f"{one['parameters']:,} numbers" for one in ways.values()))
    table.add_row("weights", *(f"{one['weights_gb']:.2f} GB" for one in ways.values()))
    table.add_row("peak memory of the process", *(f"{one['peak_rss_gb']:.2f} GB" for one in ways.values()))
    table.add_row("load", *(f"{one['load_s']:.1f} s" for one in ways.values()))
    table.add_row(
        "memory while it loads, bound",
        *(f"{o['load_peak_gb']:.2f}, {o['load_bound_gb']:.2f} GB" for o in ways.values()),
    )
    table.add_row(
        "spatial tokens, at the end", *(f"{o['spatial_tokens']}, {o['retained_tokens']}" for o in ways.values())
    )
    for stage in first["stage_ms"]:
        table.add_row(stage, *(f"{one['stage_ms'][stage] / 1e3:.1f} s" for one in ways.values()))
    for stage in ("prefill", "total"):
        table.add_row(
            f"{stage}, none pruned", *(f"{o['unpruned']['stage_ms'][stage] / 1e3:.1f} s" for o in ways.values())
        )
    table.add_row("answer", *(one["status"] for one in ways.values()))
    return table


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends the program for what cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_size", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", choices=MODELS, default="qwen3-vl-2b", help="whose sizes (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="file to write the figures to")
    parser.add_argument("--write", type=Path, metavar="DIR", help="only write the checkpoint, to a new folder")
    parser.add_argument(
        "--quantization", nargs="+", choices=("none", *KINDS), default=["none"], help="each in a process of its own"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the checkpoint is written for the time")
    arguments = parser.parse_args(words)
    if (arguments.json is None) == (arguments.write is None):
        parser.error("one of --json F and --write DIR is needed")
    if arguments.write is not None and (arguments.write.exists() or not arguments.write.resolve().parent.is_dir()):
        parser.error(f"--write: {arguments.write} is there already, or cannot be made")
    if arguments.threads < 1:
        parser.error(f"--threads {arguments.threads} must be at least 1")
    if arguments.scratch is not None and not arguments.scratch.is_dir():
        parser.error(f"--scratch: {arguments.scratch} is no folder")
    return arguments


def main() -> None:
    arguments, console = parse(), Console()
    if arguments.write is not None:
        arguments.write.mkdir()
        with console.status(f"writing {arguments.model} with random weights"):
            size = write_checkpoint(*MODELS[arguments.model], arguments.write)
        console.print(f"{arguments.write}: {size / 1e9:.2f} GB of random weights")
        return
    figures = measure(
        arguments.model, arguments.quantization, arguments.device, arguments.threads, arguments.scratch, console
    )
    console.print(report(figures))
    arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
