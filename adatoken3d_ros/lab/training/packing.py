# SPDX-License-Identifier: Apache-2.0
"""Many questions on each of several scenes: a scene's prefix [system | spatial tokens] is computed once, each question
sees it and itself.

Each question's positions go on from its scene's prefix, exactly as if it were asked alone. Prefixes and questions are
padded, so that a layer is a few large products of always the same shapes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adatoken3d_ros.decoder.adapter import turned
from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS
from adatoken3d_ros.lab.synthetic.wordings import QA, plural
from adatoken3d_ros.lab.training.data import Scene
from adatoken3d_ros.lmm.interface import Placeholder, PromptIds, SpatialLMM
from adatoken3d_ros.lmm.text_places import parse_clicks

D = TypeVar("D")
IGNORE = -100
_STEP = 8  # lengths that questions are padded to, where no shape is asked for
_DECIMAL_WEIGHT = 0.15  # of a box's hundredths and commas: the former nobody can know, the latter everybody

# (layer, queries (rows, heads, d), keys (rows, heads, d)) of all rows after the rotary positions.
Look = Callable[[int, Tensor, Tensor], None]
# What `decoder_layer` does.
Layer = Callable[[Any, Tensor, Tensor, Tensor, Tensor, "Shape"], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Encoded:
    """One question with its answer, as rows after the prefix.

    Attributes:
        ids: token ids, 0 at clicks. clicks: (row, point) of each click.
        n_prompt: rows of the question; the answer's tokens and the end follow.
        mentions: (row, instances): where something is named or clicked, and what it is.
        about: instances that decide the answer.
        weights: of the answer's tokens and the end in the loss.
    """

    family: str
    ids: tuple[int, ...]
    clicks: tuple[tuple[int, tuple[float, float, float]], ...]
    n_prompt: int
    mentions: tuple[tuple[int, tuple[int, ...]], ...]
    about: tuple[int, ...]
    weights: tuple[float, ...]


class _Remembering:
    """A tokenizer that need not be asked twice: most of a prompt is the same in each, and so are many questions."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.encode = lru_cache(maxsize=4096)(tokenizer.encode)
        self.get_added_vocab = lru_cache(maxsize=1)(tokenizer.get_added_vocab)
        self.all_special_tokens, self.all_special_ids = tokenizer.all_special_tokens, tokenizer.all_special_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Encoder:
    """Questions to rows, as `engine.scene` does it.

    Args:
        tokenizer: of the model. prompt: its own (`SpatialLMM.prompt`). lead: stands before an answer.
    """

    def __init__(self, tokenizer: Any, prompt: Callable[..., PromptIds], lead: str = "") -> None:
        self.tokenizer, self._prompt, self._lead = _Remembering(tokenizer), prompt, lead
        system = prompt(tokenizer, "x").pieces[0]
        assert isinstance(system, tuple)  # the template begins with text
        self.system = system
        names = {form: kind for kind in KINDS for form in (kind, plural(kind))}
        # Longest first, so that an office chair is not taken for a chair.
        self._names = sorted(((self.text(form), kind) for form, kind in names.items()), key=lambda n: -len(n[0]))
        self._begun: dict[int, list[int]] = {}  # by their first token
        for rank, (name, _) in enumerate(self._names):
            self._begun.setdefault(name[0], []).append(rank)
        self._colours = {self.text(colour)[-1]: colour for colour in COLOURS}
        said = {token: str(tokenizer.decode([token])).strip() for token in self.text("[-1.25, 0.50]")}
        self._ends = {token for token, text in said.items() if text in (",", "]")}
        self._fillers = {token for token, text in said.items() if text in ("", ".")}  # where digits are tokens

    def text(self, text: str) -> tuple[int, ...]:
        """Of a run of words by itself."""
        return tuple(self.tokenizer.encode(self._lead + text, add_special_tokens=False))

    def encode(self, qa: QA, scene: Scene) -> Encoded:
        """The question's rows. Raises PromptError for a text that is no question."""
        text, points = parse_clicks(qa.question)
        ids: list[int] = []
        clicks: list[tuple[int, tuple[float, float, float]]] = []
        for piece in self._prompt(self.tokenizer, text, n_clicks=len(points)).pieces[2:]:
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
        weights = tuple(map(self._weight, answer, answer[1:])) if qa.family == "box" else (1.0,) * (len(answer) - 1)
        return Encoded(qa.family, (*ids, *answer), tuple(clicks), len(ids), tuple(mentions), qa.about, (*weights, 1.0))

    def _weight(self, token: int, following: int) -> float:
        """Of a token of a box: little for the comma, and for the hundredths before it."""
        return _DECIMAL_WEIGHT if {token, following} & self._ends or token in self._fillers else 1.0

    def _mentions(self, ids: Sequence[int], qa: QA, scene: Scene) -> list[tuple[int, tuple[int, ...]]]:
        """The last row of each name of something that the question is about."""
        taken: set[int] = set()
        found = []
        items = [scene.room.item(instance) for instance in qa.about]
        begun = [(rank, start) for start, token in enumerate(ids) for rank in self._begun.get(token, ())]
        for rank, start in sorted(begun):
            name, kind = self._names[rank]
            rows = range(start, start + len(name))
            if tuple(ids[start : start + len(name)]) != name or taken & set(rows):
                continue
            taken |= set(rows)
            colour = self._colours.get(ids[start - 1]) if start else None
            meant = tuple(i.instance for i in items if i.kind == kind and colour in (None, i.colour))
            if meant:
                found.append((rows[-1], meant))
        return found


def on_device(self: D, device: torch.device | str) -> D:
    """A dataclass with its tensors on another device."""
    made: Any = self
    moved = {f.name: getattr(self, f.name).to(device) for f in fields(made) if f.type == "Tensor"}
    copy: D = replace(made, **moved)
    return copy


@dataclass(frozen=True)
class Shape:
    """S scenes, each with N rows of prefix, and groups of questions.

    Attributes:
        scenes: S. prefix: N. groups: (Q, T) of each group: questions a scene, rows a question.
    """

    scenes: int
    prefix: int
    groups: tuple[tuple[int, int], ...]

    @property
    def sizes(self) -> list[int]:
        """Rows of all prefixes, and of each group: the order in which they lie."""
        return [self.scenes * self.prefix, *(self.scenes * q * t for q, t in self.groups)]


@dataclass(frozen=True, eq=False)
class Packed:
    """Encoded questions as R rows, right padded, group by group, scene by scene.

    Attributes:
        questions: the Q of them that have found a place. scene: (Q,) int64, whose.
        start: (Q,) int64, first row of each.
        n_prefix: (S,) int64, rows of each scene's prefix that are no padding.
        ids: (R,) int64. position: (R,) int64, in the scene's sequence.
        label: (R,) int64, the token that follows where it is part of an answer, else IGNORE.
        weight: (R,) float32, of the label in the loss.
        question: (R,) int64, index of the question, -1 where there is none.
        click_row: (n,) int64. click_xyz: (n, 3) float32.
    """

    shape: Shape
    questions: tuple[Encoded, ...]
    scene: Tensor
    start: Tensor
    n_prefix: Tensor
    ids: Tensor
    position: Tensor
    label: Tensor
    weight: Tensor
    question: Tensor
    click_row: Tensor
    click_xyz: Tensor

    to = on_device


def shape_of(asked: Sequence[Sequence[Encoded]], n_prefix: Sequence[int]) -> Shape:
    """The smallest shape that holds all these questions on prefixes of so many rows."""
    lengths = [[-(-len(q.ids) // _STEP) * _STEP for q in own] for own in asked]
    groups = {t: max(own.count(t) for own in lengths) for t in sorted(set(itertools.chain(*lengths)))}
    return Shape(len(asked), max(n_prefix), tuple((q, t) for t, q in groups.items()))


def pack(asked: Sequence[Sequence[Encoded]], n_prefix: Sequence[int], shape: Shape | None = None) -> Packed:
    """Lays out the questions of each scene.

    Args:
        asked: questions of each of S scenes. n_prefix: rows of each scene's prefix.
        shape: to fill; questions that do not fit are left out, short ones first. None: one in which all do.

    Raises:
        ValueError: if a prefix is longer than the shape's.
    """
    shape = shape or shape_of(asked, n_prefix)
    if max(n_prefix) > shape.prefix:
        raise ValueError(f"a prefix of {max(n_prefix)} rows does not fit into {shape.prefix}")
    columns = {name: np.zeros(sum(shape.sizes[1:]), np.int64) for name in ("ids", "position")}
    label, question = np.full(len(columns["ids"]), IGNORE), np.full(len(columns["ids"]), -1)
    weight = np.ones(len(label), np.float32)
    placed: list[tuple[int, int, Encoded]] = []  # first row, scene, question
    begins = np.cumsum([0, *shape.sizes[1:]])
    for number, own in enumerate(asked):
        free = [q for q, _ in shape.groups]
        for encoded in sorted(own, key=lambda q: -len(q.ids)):
            fitting = [g for g, (_, t) in enumerate(shape.groups) if len(encoded.ids) <= t and free[g]]
            if fitting:
                (q, t), begin = shape.groups[fitting[0]], int(begins[fitting[0]])
                placed.append((begin + (number * q + q - free[fitting[0]]) * t, number, encoded))
                free[fitting[0]] -= 1
    placed.sort(key=lambda p: p[0])
    clicks: list[tuple[int, tuple[float, float, float]]] = []
    for index, (row, number, encoded) in enumerate(placed):
        end = row + len(encoded.ids)
        columns["ids"][row:end] = encoded.ids
        columns["position"][row:end] = n_prefix[number] + np.arange(len(encoded.ids))
        label[row + encoded.n_prompt - 1 : end - 1] = encoded.ids[encoded.n_prompt :]
        weight[row + encoded.n_prompt - 1 : end - 1] = encoded.weights
        question[row:end] = index
        clicks += [(row + r, xyz) for r, xyz in encoded.clicks]
    return Packed(
        shape,
        tuple(encoded for _, _, encoded in placed),
        scene=torch.tensor([number for _, number, _ in placed], dtype=torch.int64),
        start=torch.tensor([row for row, _, _ in placed], dtype=torch.int64),
        n_prefix=torch.tensor(n_prefix, dtype=torch.int64),
        label=torch.from_numpy(label),
        weight=torch.from_numpy(weight),
        question=torch.from_numpy(question),
        click_row=torch.tensor([r for r, _ in clicks], dtype=torch.int64),
        click_xyz=torch.tensor([xyz for _, xyz in clicks], dtype=torch.float32).reshape(-1, 3),
        **{name: torch.from_numpy(values) for name, values in columns.items()},
    )


def spatial_tokens(model: SpatialLMM, scenes: Sequence[Scene], *, blind: bool = False) -> list[Tensor]:
    """(M, D) of each scene, what `Scene.spliced` puts into the prompt; one empty token for a model that may not see.

    The last layer of the position embedding is linear, so it is applied to the voxels' means.
    """
    numbers = [len(scene.features) for scene in scenes]
    features = torch.cat([scene.features for scene in scenes]).to(model.device)
    if blind:
        empty = features.new_zeros(1, model.sizes.feature_width)
        return [model.scene_tokens(empty, empty.new_zeros(1, 0))] * len(scenes)
    if features.ndim == 3:  # of the patches that a token is made of
        features = model.merge_patches(features.float())
        places = torch.cat([scene.place for scene in scenes if scene.place is not None])
        with torch.autocast(model.device.type, enabled=False):
            return list(model.scene_tokens(features.float(), model.lift_places(places)).split(numbers))
    xyz = torch.cat([scene.xyz for scene in scenes])
    begins = [0, *itertools.accumulate(numbers)]
    voxel = torch.cat([scene.voxel + b for scene, b in zip(scenes, begins, strict=False)]).to(model.device)
    with torch.autocast(model.device.type, enabled=False):
        lifted = model.lift_places(xyz)
        count = torch.bincount(voxel, minlength=len(features))
        total = lifted.new_zeros(len(features), lifted.shape[1]).index_add(0, voxel, lifted)
        return list(model.scene_tokens(features, total / count[:, None]).split(numbers))


def embed(model: SpatialLMM, packed: Packed) -> Tensor:
    """(R, D) the questions' rows with the clicks' vectors in their places."""
    rows = model.decoder.embed(packed.ids)
    if len(packed.click_row):
        with torch.autocast(model.device.type, enabled=False):
            rows = rows.index_copy(0, packed.click_row, model.embed_clicks(packed.click_xyz).to(rows.dtype))
    return rows


def run(
    language: Any,
    prefixes: Sequence[Tensor],
    rows: Tensor,
    packed: Packed,
    *,
    look: Look | None = None,
    states: Mapping[int, list[Tensor]] | None = None,
    layer_step: Layer | None = None,
) -> Tensor:
    """The decoder on S prefixes (n, D) and the questions' rows (R, D); returns the hidden states (S N + R, D) after it.

    Args:
        look: called in every layer.
        states: where the input of layer k is wanted, an empty list under k, which gets it.
        layer_step: `decoder_layer`, or that compiled.
    """
    shape, device = packed.shape, rows.device
    padded = [functional.pad(prefix, (0, 0, 0, shape.prefix - len(prefix))) for prefix in prefixes]
    x = torch.cat([*padded, rows.to(padded[0].dtype)])
    counted = torch.arange(shape.prefix, device=device)
    position = torch.cat([counted.repeat(shape.scenes), packed.position])[None]
    cos, sin = (t[0] for t in language.model.rotary_emb(x[None], position))
    # Of a prefix's padding nothing is read. The first row is always real.
    hidden_keys = torch.where(counted < packed.n_prefix[:, None], 0.0, float("-inf")).to(x.dtype)
    for number, layer in enumerate(language.model.layers):
        if states is not None and number in states:
            states[number].append(x)
        x, q, k = (layer_step or decoder_layer)(layer, x, cos, sin, hidden_keys, shape)
        if look is not None:
            look(number, q, k)
    final: Tensor = language.model.norm(x)
    return final


def decoder_layer(
    layer: Any, x: Tensor, cos: Tensor, sin: Tensor, hidden_keys: Tensor, shape: Shape
) -> tuple[Tensor, Tensor, Tensor]:
    """A decoder layer on all rows (rows, D), its attention laid out for prefixes and questions.

    Args:
        cos, sin: (rows, d). hidden_keys: (S, N), -inf where a prefix is padding, else 0.

    Returns:
        The rows after it, and queries and keys (rows, heads, d) with their positions.
    """
    attention, n = layer.self_attn, shape.prefix
    groups = attention.num_key_value_groups
    h = layer.input_layernorm(x)
    q, k, v = (
        projection(h).unflatten(1, (-1, attention.head_dim))
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = (turned(heads, cos[:, None].to(q.dtype), sin[:, None].to(q.dtype)) for heads in (q, k))
    every_k, every_v = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (k, v))
    q_parts, k_parts, v_parts = ((t.split(shape.sizes)) for t in (q * attention.scaling, every_k, every_v))
    # (S, heads, N, d) each
    q0, k0, v0 = (t[0].unflatten(0, (shape.scenes, n)).transpose(1, 2) for t in (q_parts, k_parts, v_parts))
    later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
    score = (q0 @ k0.transpose(2, 3)).masked_fill(later, float("-inf"))
    out = [(score.float().softmax(dim=3).to(v0.dtype) @ v0).transpose(1, 2).flatten(0, 1).flatten(1)]
    for number, (b, t) in enumerate(shape.groups, 1):
        # (S, b, heads, t, d)
        own_q, own_k, own_v = (
            part[number].unflatten(0, (shape.scenes, b, t)).transpose(2, 3) for part in (q_parts, k_parts, v_parts)
        )
        # The prefix's keys are the same for all questions on it: one product, instead of copies of the keys.
        together = own_q.transpose(1, 2).flatten(2, 3)  # (S, heads, b t, d)
        to_prefix = together @ k0.transpose(2, 3) + hidden_keys[:, None, None]
        later = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        to_own = (own_q @ own_k.transpose(3, 4)).masked_fill(later, float("-inf"))
        both = torch.cat([to_prefix, to_own.transpose(1, 2).flatten(2, 3)], dim=3)
        of_prefix, of_own = both.float().softmax(dim=3).to(v0.dtype).split([n, t], dim=3)
        found = of_own.unflatten(2, (b, t)).transpose(1, 2) @ own_v  # (S, b, heads, t, d)
        found = (of_prefix @ v0).unflatten(2, (b, t)).transpose(1, 2) + found
        out.append(found.transpose(2, 3).flatten(0, 2).flatten(1))
    x = x + attention.o_proj(torch.cat(out))
    x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x, q, k


def exact(logits: Tensor, packed: Packed, labelled: Tensor) -> np.ndarray:
    """(Q,) bool: whether greedy decoding would give each answer to the letter.

    It does so where every token of the answer is the best one after those before it.

    Args:
        logits: (n, V) of the labelled rows. labelled: (n,) int64, those rows.
    """
    right = logits.argmax(dim=1) == packed.label[labelled]
    wrong = torch.zeros_like(packed.start).index_add(0, packed.question[labelled], (~right).long())
    return np.asarray((wrong == 0).cpu().numpy())
