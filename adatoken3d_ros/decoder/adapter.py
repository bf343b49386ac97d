# SPDX-License-Identifier: Apache-2.0
"""The one place that knows the inside of a decoder: transformers' own modules, driven layer by layer.

Fits every causal language model of Llama's shape in transformers (Llama, Mistral, Qwen2, Qwen3 and their text models
inside a multimodal one): grouped queries, biases, norms on queries and keys. Rotary positions have one axis, or several
(M-RoPE), of which text has the same number in each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adatoken3d_ros.pruning.view import DecoderSize

CosSin = tuple[Tensor, Tensor]
_PARTS = ("layers", "norm", "rotary_emb", "embed_tokens")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj", "act_fn")


class DecoderError(ValueError):
    """A language model that cannot be driven layer by layer; the message names what it has instead."""


class Layer:
    """One decoder layer: run it, or ask for the queries, keys and values that it makes of its input rows (n, D).

    What it gives is rounded as the layer itself rounds it, and turned to the rows' positions (cos, sin: (n, head_dim)).
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def scaling(self) -> float:
        """Factor of the products of queries and keys, usually head_dim ** -0.5."""
        return float(self.module.self_attn.scaling)

    @property
    def output(self) -> Any:
        """The projection (H * head_dim -> D) that writes what attention has read into the residual stream."""
        return self.module.self_attn.o_proj

    def run(self, hidden: Tensor, cos_sin: CosSin, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """(1, q, D) -> (1, q, D); keys and values of the rows are appended to `cache`, if one is given."""
        states: Tensor = self.module(hidden, attention_mask=mask, position_embeddings=cos_sin, past_key_values=cache)
        return states

    def step(self, hidden: Tensor, cos_sin: CosSin, keys: Tensor, values: Tensor, seen: Tensor, slot: Tensor) -> Tensor:
        """As `run` of one row (1, D) over buffers of fixed size, without a read of the device.

        Args:
            cos_sin: of the row's position, (1, head_dim) each.
            keys, values: (1, H_kv, slots, head_dim); those of the row are written to `slot` (1,) int64.
            seen: (1, slots) what is added to the row's scores: 0 for a slot that it sees, its own too, else -inf.
        """
        module, mlp = self.module, self.module.mlp
        rows = module.input_layernorm(hidden)
        keys.index_copy_(2, slot, self._turned("k", rows, cos_sin)[None])
        values.index_copy_(2, slot, self._projected("v", rows).transpose(0, 1)[None])
        # Queries that share their keys are rows of one attention: nothing is repeated for them.
        queries = self._turned("q", rows, cos_sin).reshape(1, keys.shape[1], -1, keys.shape[-1])
        read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=self.scaling)
        hidden = hidden + of_row(self.output, read.reshape(1, -1))
        rows = module.post_attention_layernorm(hidden)
        inner = mlp.act_fn(of_row(mlp.gate_proj, rows)) * of_row(mlp.up_proj, rows)
        return hidden + of_row(mlp.down_proj, inner)

    @contextmanager
    def watched(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Within it, what attention and MLP were given and what they gave back (q, D) is listed as the layer runs."""
        seen: list[tuple[Tensor, Tensor]] = []

        def note(module: Any, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
            rows = named["hidden_states"] if "hidden_states" in named else args[0]
            seen.append((rows[0], (out[0] if isinstance(out, tuple) else out)[0]))

        parts = self.module.self_attn, self.module.mlp
        hooks = [part.register_forward_hook(note, with_kwargs=True) for part in parts]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def asked(self, n: int) -> Iterator[list[Tensor]]:
        """Within it, what the query projection makes of the last `n` rows, (n, H * head_dim), is listed as the layer
        runs: `queries_of` turns it into queries, and spares the product. Nothing for n = 0."""
        made: list[Tensor] = []
        if not n:
            yield made
            return

        def take(_module: Any, _args: Any, out: Tensor) -> None:
            rows = out.flatten(0, -2)
            if len(rows) >= n:  # else some were known already, and the layer was not asked for them
                made.append(rows[-n:].clone())

        hook = self.module.self_attn.q_proj.register_forward_hook(take)
        try:
            yield made
        finally:
            hook.remove()

    def queries(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(H, n, head_dim)."""
        return self._turned("q", self.module.input_layernorm(rows), (cos, sin))

    def queries_of(self, projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(H, n, head_dim) of what the query projection has made of rows, (n, H * head_dim)."""
        return self._turn("q", projected.unflatten(-1, (-1, self.module.self_attn.head_dim)), (cos, sin))

    def keys(self, rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(H_kv, n, head_dim)."""
        return self._turned("k", self.module.input_layernorm(rows), (cos, sin))

    def values(self, rows: Tensor) -> Tensor:
        """(H_kv, n, head_dim)."""
        return self._projected("v", self.module.input_layernorm(rows)).transpose(0, 1)

    def _projected(self, kind: str, rows: Tensor) -> Tensor:
        attention = self.module.self_attn
        projected: Tensor = of_row(getattr(attention, f"{kind}_proj"), rows)
        return projected.unflatten(-1, (-1, attention.head_dim))

    def _turned(self, kind: str, rows: Tensor, cos_sin: CosSin) -> Tensor:
        return self._turn(kind, self._projected(kind, rows), cos_sin)

    def _turn(self, kind: str, heads: Tensor, cos_sin: CosSin) -> Tensor:
        norm = getattr(self.module.self_attn, f"{kind}_norm", None)  # Qwen3 normalises queries and keys of each head
        heads = (heads if norm is None else norm(heads)).transpose(0, 1)
        return turned(heads, *cos_sin)


class Decoder:
    """A causal language model, layer by layer.

    Args:
        language: transformers' model with a language-modelling head, in evaluation mode.
        first_gate: the first layer before which spatial tokens may be dropped; layers before it need them all.

    Raises:
        DecoderError: the model is of another shape.

    Attributes:
        language: the model itself.
        layers: its decoder layers.
        size: what its operations depend on.
        context: most tokens that it was made for.
        first_gate: as given.
        stepping: how decode steps run over buffers of fixed size, where that was prepared (`decoder.graphs`).
    """

    stepping: Any = None

    def __init__(self, language: Any, first_gate: int = 0) -> None:
        body: Any = getattr(language, "model", None)
        if missing := [name for name in _PARTS if not hasattr(body, name)]:
            raise DecoderError(f"{type(language).__name__} has no model.{', model.'.join(missing)}")
        for index, layer in enumerate(body.layers):
            for name in _PROJECTIONS:
                if not hasattr(layer.self_attn, name):
                    raise DecoderError(f"layer {index} ({type(layer.self_attn).__name__}) has no {name}")
            for name in _MLP:
                if not hasattr(layer.mlp, name):
                    raise DecoderError(f"layer {index} ({type(layer.mlp).__name__}) has no {name}")
        self.language, self.first_gate = language, first_gate
        self.layers = tuple(Layer(module) for module in body.layers)
        self.size = size_of(language.config)
        self.context = int(language.config.max_position_embeddings)

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        weight: Tensor = self.language.model.embed_tokens.weight
        return weight.device

    @property
    def dtype(self) -> torch.dtype:
        weight: Tensor = self.language.model.embed_tokens.weight
        return weight.dtype

    @property
    def attention(self) -> str | None:
        """Which kernel attention runs on."""
        kind: str | None = getattr(self.language.config, "_attn_implementation", None)
        return kind

    @property
    def window(self) -> int | None:
        """Most tokens that a layer's attention looks back, where one has such a limit."""
        config = self.language.config
        window: int | None = getattr(config, "sliding_window", None)
        sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
        return window if sliding else None

    def linears(self) -> Iterator[nn.Linear]:
        """The linear layers inside the decoder layers; the table of words and the output layer are none of them."""
        for layer in self.layers:
            yield from (part for part in layer.module.modules() if isinstance(part, nn.Linear))

    def restore_buffers(self, device: torch.device) -> None:
        """Computes the rotary frequencies, which no checkpoint holds, in float32 whatever the weights are."""
        kind = type(self.language.model.rotary_emb)
        self.language.model.rotary_emb = kind(self.language.config).to(device)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> (..., D)."""
        rows: Tensor = self.language.model.embed_tokens(ids)
        return rows

    def rotary(self, hidden: Tensor, positions: Tensor) -> CosSin:
        """Cosines and sines (1, n, head_dim) of positions (n,), or (axes, n), in the dtype of `hidden`."""
        cos, sin = self.language.model.rotary_emb(hidden, positions.unsqueeze(-2))
        return cos, sin

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits (..., V) of rows (..., D) that have left the last layer."""
        return of_row(self.language.lm_head, self.language.model.norm(hidden)).float()


def of_row(linear: Any, rows: Tensor) -> Tensor:
    """linear(rows). One row on a CPU is a sum of products where it is compiled: that reads weights as fast as memory
    gives them, the libraries' product of a matrix and one row at a third of it."""
    plain = isinstance(linear, nn.Linear) and rows.device.type == "cpu" and rows.shape[:-1] == (1,)
    if not (plain and torch.compiler.is_compiling()):
        out: Tensor = linear(rows)
        return out
    weight = linear.weight
    sums = (weight.float() * rows.float()).sum(dim=-1)
    return (sums if linear.bias is None else sums + linear.bias).to(rows.dtype)[None]


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (..., head_dim) turned to the positions whose cosines and sines (..., head_dim) are given."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-right, left], dim=-1) * sin


def size_of(config: Any) -> DecoderSize:
    """From transformers' configuration of a text model."""
    heads, hidden = int(config.num_attention_heads), int(config.hidden_size)
    head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
    return DecoderSize(
        n_layers=int(config.num_hidden_layers),
        hidden=hidden,
        intermediate=int(config.intermediate_size),
        vocabulary=int(config.vocab_size),
        queries=heads * head_dim,
        keys=int(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
    )


def causal_chunk(n: int, q: int, device: torch.device) -> Tensor | None:
    """Mask (1, 1, q, n) for the last q of n rows, true where a row may look.

    None where that is all of them (q = 1) or SDPA's own causal mask (q = n). Never for a chunk over a prefix: with
    None, SDPA would cut the keys to the first q.
    """
    if q in (1, n):
        return None
    column, row = torch.arange(n, device=device), torch.arange(n - q, n, device=device)[:, None]
    return (column <= row)[None, None]
