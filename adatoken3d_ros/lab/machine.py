# SPDX-License-Identifier: Apache-2.0
"""What a machine can do and how it is set: measured peaks, and clocks, power mode and temperatures where it tells them.

Published peaks are those of a chip at its highest clocks; a board in a saving mode, or a hot one, has others. What is
measured here is what a model can be compared with.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
_SECONDS = 0.4  # for each peak
_LEAST, _MOST = 1, 200  # runs
_LIMIT = 5.0  # seconds that a program of the system may take
_QUERY = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,memory.total"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second, multiply and add apart, of the best of several products of square matrices; of int8 with
    sums of 32 bits.

    Raises:
        RuntimeError: the device has no product of that number type.
    """
    best = 0.0
    for n in (256, 512, 1024, 2048, 4096, 8192):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = _best(partial(torch._int_mm if dtype is torch.int8 else torch.mm, a, b.T), device)
        best = max(best, 2.0 * n**3 / seconds)
        if seconds > _SECONDS / 16:  # the next one takes eight times as long; a type that is slow here is left at once
            break
    return best


def peak_bandwidth(device: torch.device) -> float:
    """Bytes a second that are read of a memory area larger than any cache; on a GPU read and written."""
    numbers = torch.ones((2**30 if device.type == "cuda" else 2**28) // 4, device=device)
    if device.type == "cuda":
        other = torch.empty_like(numbers)
        return 2.0 * numbers.numel() * 4 / _best(lambda: other.copy_(numbers), device)
    return numbers.numel() * 4 / _best(numbers.sum, device)


def peaks(device: torch.device) -> dict[str, float]:
    """`<number type>_tflops` (of int8 as many operations) of those that the device has, and `bandwidth_gb_s`."""
    found: dict[str, float] = {}
    for name, dtype in _DTYPES.items():
        try:
            found[f"{name}_tflops"] = peak_flops(device, dtype) / 1e12
        except RuntimeError:
            continue
    return {**found, "bandwidth_gb_s": peak_bandwidth(device) / 1e9}


def wait(device: torch.device) -> None:
    """Until all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest run, after one that does not count."""
    work()
    wait(device)
    best, began = float("inf"), time.perf_counter()
    for number in range(_MOST):
        start = time.perf_counter()
        if number >= _LEAST and start - began > _SECONDS:
            break
        work()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def description(device: torch.device) -> dict[str, Any]:
    """What the machine is: name, processors, memory, versions; of a GPU its name, driver, compute capability."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "threads": torch.get_num_threads(),
        "memory_gb": round(_bytes("/proc/meminfo", "MemTotal") / 1e9, 1),
        "torch": torch.__version__,
    }
    board = _read(Path("/proc/device-tree/model")).strip("\0")
    if board:
        found["board"] = board
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["cuda"] = torch.version.cuda
    return found


def state(device: torch.device) -> dict[str, str]:
    """How it is set just now, where the system tells: clocks, power mode and temperatures, by name; and its load, since
    a time that was measured beside other programs is of no use."""
    found = {"load": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"} if hasattr(os, "getloadavg") else {}
    clocks = [
        _read(path) for path in sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    ]
    if known := [int(text) for text in clocks if text.strip().isdigit()]:
        found["processor clocks"] = f"{min(known) / 1e6:.2f} to {max(known) / 1e6:.2f} GHz"
    elif mhz := _field("/proc/cpuinfo", "cpu MHz"):
        found["processor clocks"] = f"{float(mhz) / 1e3:.2f} GHz"
    governor = _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip()
    if governor:
        found["governor"] = governor
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*")):
        degrees = _read(zone / "temp").strip()
        if degrees.lstrip("-").isdigit() and int(degrees) > 0:
            name = _read(zone / "type").strip() or zone.name
            found[f"temperature {name}"] = f"{int(degrees) / 1e3:.0f} C"
    if mode := _said("nvpmodel", "-q"):
        found["power mode"] = " ".join(mode.split())[:120]
    if device.type == "cuda" and (row := _said("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader")):
        index = device.index or 0
        lines = row.splitlines()
        if index < len(lines):
            found |= {
                f"gpu {name}": value.strip()
                for name, value in zip(_QUERY.split(","), lines[index].split(","), strict=False)
            }
    return found


def peak_memory_gb(device: torch.device) -> dict[str, float]:
    """Most memory so far, 10^9 bytes: of this process, and what torch has taken of the GPU."""
    found = {"process": _bytes("/proc/self/status", "VmHWM") / 1e9}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.max_memory_allocated(device) / 1e9
    return found


def _said(*command: str) -> str:
    """What a program of the system writes; empty where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(path: str, name: str) -> str:
    for line in _read(Path(path)).splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _bytes(path: str, name: str) -> int:
    """Of a field in kB, which the kernel means to be 1,024 bytes."""
    return 1024 * int((_field(path, name) or "0").split()[0])
