# SPDX-License-Identifier: Apache-2.0
"""Many questions on one scene: the prefix [system | spatial tokens] is computed once, each question sees it and itself.

Each question's positions go on from the prefix, exactly as if it were asked alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from adatoken3d_ros.model.llava3d import Llava3D
from adatoken3d_ros.model.prompt import Placeholder, build_prompt, parse_clicks
from adatoken3d_ros.synthetic.furniture import COLOURS, KINDS
from adatoken3d_ros.synthetic.questions import QA, plural
from adatoken3d_ros.training.data import Scene

IGNORE = -100
_CHUNK = 8  # questions padded to the same length

# (layer, queries (rows, heads, d), keys (rows, heads, d)) of all rows after the rotary positions.
Look = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Encoded:
    """One question with its answer, as rows after the prefix.

    Attributes:
        ids: token ids, 0 at clicks. clicks: (row, point) of each click.
        n_prompt: rows of the question; the answer's tokens and the end follow.
        mentions: (row, instances): where something is named or clicked, and what it is.
        about: instances that decide the answer.
    """

    family: str
    ids: tuple[int, ...]
    clicks: tuple[tuple[int, tuple[float, float, float]], ...]
    n_prompt: int
    mentions: tuple[tuple[int, tuple[int, ...]], ...]
    about: tuple[int, ...]


class Encoder:
    """Questions to rows, as `engine.session` does it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        system = build_prompt(tokenizer, "x").pieces[0]
        assert isinstance(system, tuple)  # the template begins with text
        self.system = system
        names = {form: kind for kind in KINDS for form in (kind, plural(kind))}
        # Longest first, so that an office chair is not taken for a chair.
        self._names = sorted(((self.text(form), kind) for form, kind in names.items()), key=lambda n: -len(n[0]))
        self._colours = {self.text(colour)[-1]: colour for colour in COLOURS}

    def text(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def encode(self, qa: QA, scene: Scene) -> Encoded:
        """The question's rows. Raises PromptError for a text that is no question."""
        text, points = parse_clicks(qa.question)
        ids: list[int] = []
        clicks: list[tuple[int, tuple[float, float, float]]] = []
        for piece in build_prompt(self.tokenizer, text, n_clicks=len(points)).pieces[2:]:
            if isinstance(piece, Placeholder):
                clicks.append((len(ids), points[piece.index]))
                ids.append(0)
            else:
                ids.extend(piece)
        mentions = self._mentions(ids, qa, scene)
        if qa.family != "direction":  # there, a click is where somebody stands
            mentions += [(row, qa.about[:1]) for row, _ in clicks]
        end = self.tokenizer.eos_token_id
        answer = (*self.text(qa.answer), end)
        return Encoded(qa.family, (*ids, *answer), tuple(clicks), len(ids), tuple(mentions), qa.about)

    def _mentions(self, ids: Sequence[int], qa: QA, scene: Scene) -> list[tuple[int, tuple[int, ...]]]:
        """The last row of each name of something that the question is about."""
        taken: set[int] = set()
        found = []
        items = [scene.room.item(instance) for instance in qa.about]
        for name, kind in self._names:
            for start in range(len(ids) - len(name) + 1):
                rows = range(start, start + len(name))
                if tuple(ids[start : start + len(name)]) != name or taken & set(rows):
                    continue
                taken |= set(rows)
                colour = self._colours.get(ids[start - 1]) if start else None
                meant = tuple(i.instance for i in items if i.kind == kind and colour in (None, i.colour))
                if meant:
                    found.append((rows[-1], meant))
        return found


@dataclass(frozen=True, eq=False)
class Packed:
    """Encoded questions as R rows in chunks of equal length, right padded.

    Attributes:
        ids: (R,) int64. position: (R,) int64, counted from the question's first row.
        label: (R,) int64, the token that follows where it is part of an answer, else IGNORE.
        question: (R,) int64, index of the question.
        chunks: (first row, questions, length) of each chunk.
        start: (Q,) int64, first row of each question.
        click_row: (n,) int64. click_xyz: (n, 3) float32.
    """

    questions: tuple[Encoded, ...]
    ids: Tensor
    position: Tensor
    label: Tensor
    question: Tensor
    chunks: tuple[tuple[int, int, int], ...]
    start: Tensor
    click_row: Tensor
    click_xyz: Tensor

    def to(self, device: torch.device | str) -> Packed:
        """On another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.type == "Tensor"}
        return replace(self, **moved)


def pack(questions: Sequence[Encoded]) -> Packed:
    """Sorts the questions by length and lays them out."""
    ordered = sorted(questions, key=lambda q: len(q.ids))
    columns: dict[str, list[int]] = {name: [] for name in ("ids", "position", "label", "question", "start")}
    chunks: list[tuple[int, int, int]] = []
    clicks: list[tuple[int, tuple[float, float, float]]] = []
    row = 0
    for first in range(0, len(ordered), _CHUNK):
        group = ordered[first : first + _CHUNK]
        length = len(group[-1].ids)
        chunks.append((row, len(group), length))
        for number, q in enumerate(group, first):
            n = len(q.ids)
            columns["ids"] += [*q.ids, *[0] * (length - n)]
            following = [*q.ids[1:], IGNORE]
            columns["label"] += [*[IGNORE] * (q.n_prompt - 1), *following[q.n_prompt - 1 :], *[IGNORE] * (length - n)]
            columns["position"] += range(length)
            columns["question"] += [number] * length
            columns["start"].append(row)
            clicks += [(row + r, xyz) for r, xyz in q.clicks]
            row += length
    return Packed(
        questions=tuple(ordered),
        chunks=tuple(chunks),
        click_row=torch.tensor([r for r, _ in clicks], dtype=torch.int64),
        click_xyz=torch.tensor([xyz for _, xyz in clicks], dtype=torch.float32).reshape(-1, 3),
        **{name: torch.tensor(values, dtype=torch.int64) for name, values in columns.items()},
    )


def spatial_tokens(model: Llava3D, scene: Scene, *, blind: bool = False) -> Tensor:
    """(M, D) what `session.spliced` puts into the prompt; one empty token for a model that may not see the scene.

    The last layer of the position embedding is linear, so it is applied to the voxels' means.
    """
    features, xyz, voxel = (t.to(model.device) for t in (scene.features, scene.xyz, scene.voxel))
    if blind:
        return model.project(features.new_zeros(1, features.shape[1]))
    with torch.autocast(model.device.type, enabled=False):
        position = model.position
        hidden = functional.relu(position.norm(position.lift(xyz)))
        count = torch.bincount(voxel, minlength=len(features))
        total = hidden.new_zeros(len(features), hidden.shape[1]).index_add(0, voxel, hidden)
        return model.project(features + position.out(total / count[:, None]))


def embed(model: Llava3D, packed: Packed) -> Tensor:
    """(R, D) the questions' rows with the clicks' vectors in their places."""
    table = model.language.model.embed_tokens
    rows: Tensor = table(packed.ids)
    if len(packed.click_row):
        with torch.autocast(model.device.type, enabled=False):
            rows = rows.index_copy(0, packed.click_row, model.embed_clicks(packed.click_xyz).to(rows.dtype))
    return rows


def run(
    language: LlamaForCausalLM,
    prefix: Tensor,
    rows: Tensor,
    packed: Packed,
    *,
    look: Look | None = None,
    states: Mapping[int, list[Tensor]] | None = None,
) -> Tensor:
    """The decoder on a prefix (N, D) and the questions' rows (R, D); returns the hidden states (N + R, D) after it.

    Args:
        look: called in every layer.
        states: where the input of layer k is wanted, an empty list under k, which gets it.
    """
    n = len(prefix)
    x = torch.cat([prefix, rows])
    position = torch.cat([torch.arange(n, device=x.device), n + packed.position])[None]
    cos, sin = language.model.rotary_emb(x[None], position)
    sizes = [n, *(b * t for _, b, t in packed.chunks)]
    for number, layer in enumerate(language.model.layers):
        if states is not None and number in states:
            states[number].append(x)
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        # (1, heads, rows, d) each
        q, k, v = (
            projection(h).unflatten(1, (-1, attention.head_dim)).transpose(0, 1)[None]
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype))
        if look is not None:
            look(number, q[0].transpose(0, 1), k[0].transpose(0, 1))
        groups = attention.num_key_value_groups
        if groups > 1:
            k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
        # One split a tensor: the gradient of each slice taken apart would be a tensor of zeros as large as all rows.
        parts = [[a.transpose(0, 1) for a in t[0].split(sizes, dim=1)] for t in (q, k, v)]
        q0, k0, v0 = (part[0] for part in parts)
        out = [_attend_prefix(q0, k0, v0, attention.scaling)]
        for chunk, (_, b, t) in enumerate(packed.chunks, 1):
            own = [part[chunk].unflatten(0, (b, t)).transpose(1, 2) for part in parts]
            out.append(_attend_question(own[0], own[1], own[2], k0, v0, attention.scaling))
        x = x + attention.o_proj(torch.cat(out))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    final: Tensor = language.model.norm(x)
    return final


def _attend_prefix(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Causal attention of the prefix (n, heads, d) -> (n, heads d).

    Written out: in bfloat16 on a CPU, twice as fast as torch's fused kernel with its gradient.
    """
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    score = (q * scaling @ k.transpose(1, 2)).masked_fill_(later, float("-inf"))
    return (score.softmax(dim=2).to(v.dtype) @ v).transpose(0, 1).flatten(1)


def _attend_question(q: Tensor, k: Tensor, v: Tensor, k0: Tensor, v0: Tensor, scaling: float) -> Tensor:
    """Attention of b questions (b, heads, t, d) to the prefix (n, heads, d) and, causally, to themselves ->
    (b t, heads d).

    The prefix's keys are the same for all questions: one product for all of them, instead of copies of the keys.
    """
    b, _, t, _ = q.shape
    q = q * scaling
    together = q.transpose(0, 1).flatten(1, 2)  # (heads, b t, d)
    to_prefix = (together @ k0.permute(1, 2, 0)).unflatten(1, (b, t)).transpose(0, 1)
    later = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
    to_own = (q @ k.transpose(2, 3)).masked_fill(later, float("-inf"))
    weight = torch.cat([to_prefix, to_own], dim=3).softmax(dim=3).to(v.dtype)
    prefix, own = weight.split([len(k0), t], dim=3)
    out = (prefix.transpose(0, 1).flatten(1, 2) @ v0.transpose(0, 1)).unflatten(1, (b, t)).transpose(0, 1) + own @ v
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def exact(logits: Tensor, packed: Packed, labelled: Tensor) -> np.ndarray:
    """(Q,) bool: whether greedy decoding would give each answer to the letter.

    It does so where every token of the answer is the best one after those before it.

    Args:
        logits: (n, V) of the labelled rows. labelled: (n,) int64, those rows.
    """
    right = logits.argmax(dim=1) == packed.label[labelled]
    wrong = torch.zeros_like(packed.start).index_add(0, packed.question[labelled], (~right).long())
    return np.asarray((wrong == 0).cpu().numpy())
