# SPDX-License-Identifier: Apache-2.0
"""What it looks like when memory runs out, and what can be given back then. torch is imported where it is needed."""

from __future__ import annotations

import ctypes
import gc

# torch has a class of its own for a GPU only; the CPU's allocator raises a RuntimeError that says this.
_CPU_ALLOCATOR = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the GPU's or the machine's memory has run out."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)


def describe(error: BaseException) -> str:
    """An exception in one line: torch adds paragraphs of advice to how much it could not get."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def free_cached(*, gpu: bool = True) -> None:
    """Gives memory that is no longer referenced back to the GPU and to the system.

    Call it outside of the `except` block: the exception holds the variables of every function on its way.
    """
    gc.collect()
    if gpu:
        import torch

        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Gives freed memory back to the system; others run meanwhile.

    glibc keeps it in an arena for each thread that there was: of what a node had allocated after some hundred cycles of
    loading, asking and clearing, a third was free and still held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
