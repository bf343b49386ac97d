# SPDX-License-Identifier: Apache-2.0
"""Which weights a model has: what was computed with other ones must not be taken for its own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

_CHUNK = 64 * 1024  # bytes that are added up to one number; smaller tensors are hashed as they are
_WORD = 8  # bytes
_SAMPLE = 1024  # words of each larger tensor that are hashed as they are


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """Of a tensor's shape, dtype and content, the same on any device.

    Every byte counts: large tensors as sums of 64 KiB in 64-bit words, modulo 2**64, and a thousand single words. That
    runs as fast as memory can be read, where a cryptographic hash of 13.5 GB takes half a minute; it tells weights
    apart, and does not protect against somebody who looks for two that are taken for the same.
    """
    found = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = len(flat) // _CHUNK * _CHUNK
    if whole:
        words = flat[:whole]
        if words.storage_offset() % _WORD or words.data_ptr() % _WORD:
            words = words.clone()
        words = words.view(torch.int64)
        _add(found, words.view(-1, _CHUNK // _WORD).sum(1))
        _add(found, words[:: -(-len(words) // _SAMPLE)])
    _add(found, flat[whole:])
    return found.digest()


def weights_identity(digests: Iterable[tuple[str, bytes]]) -> str:
    """16 hexadecimal digits of all (name, `tensor_digest`), in any order."""
    found = hashlib.sha256()
    for name, digest in sorted(digests):
        found.update(name.encode() + b"\0" + digest)
    return found.hexdigest()[:16]


def model_identity(shape: str, weights: str, quantization: str = "none", original: str = "") -> str:
    """What scenes, strategies and fits are marked with: the hashes of a model's shape and of its weights; of weights in
    few bits also how many these are, and the hash of those that they were made of."""
    made = "" if quantization == "none" else f"-{quantization}-of-{original or 'unknown'}"
    return f"{shape}-{weights}{made}"


def shape_of(identity: str) -> str:
    """The hash of the shape alone; the whole of an identity from the time when there was no other."""
    return identity.partition("-")[0]


def original_identity(identity: str) -> str:
    """The identity of the weights before they were quantised; of others their own."""
    made, of, original = identity.partition("-of-")
    return f"{shape_of(made)}-{original}" if of else identity


def _add(found: hashlib._Hash, values: torch.Tensor) -> None:
    found.update(values.cpu().numpy().tobytes())
