# SPDX-License-Identifier: Apache-2.0
"""What the model is asked for besides the answer: what each spatial token shows, and where a word's tokens are.

The ray caster knows which item every patch shows. From answers alone a small model finds neither the classes nor the
tokens that a word means in any reasonable time; with these losses it does. The heads are not part of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM
from adatoken3d_ros.lab.training.data import Scene
from adatoken3d_ros.lab.training.packing import Encoder, Packed, on_device

_KINDS = {kind: k for k, kind in enumerate(KINDS)}
_COLOURS = {colour: k for k, colour in enumerate(COLOURS)}
MAX_RANK = 8  # as far as questions count
_SHARPNESS = 16.0
_BACKGROUND_WEIGHT = 0.2  # most tokens show floor and walls


@dataclass(frozen=True, eq=False)
class Truth:
    """What the M tokens of a scene show; I items, the last column of `share` is everything else.

    Attributes:
        share: (M, I + 1) float32, part of the token's patches that shows each item.
        kind: (I,) int64. colour: (I,) int64, -1 where the item was given none.
        box: (I, 6) float32, centre and size, metres.
        xyz: (M, 3) float32, mean point.
        rank: (I,) int64, how many items of its class are met up to this one, itself left out, in the tokens' order.
        scenes: how many this is the truth of.
    """

    share: Tensor
    kind: Tensor
    colour: Tensor
    box: Tensor
    xyz: Tensor
    rank: Tensor
    scenes: int = 1

    @classmethod
    def of(cls, scene: Scene) -> Truth:
        items, m = scene.room.items, len(scene.features)
        column = torch.where(scene.instance < FIRST_ITEM, len(items), scene.instance - FIRST_ITEM)
        votes = torch.zeros(m, len(items) + 1)
        votes.index_put_((scene.voxel, column), torch.ones(len(column)), accumulate=True)
        count = votes.sum(dim=1, keepdim=True)
        kind = torch.tensor([_KINDS[i.kind] for i in items])
        # The first token of each item; of those that are not seen, none.
        first = torch.where(votes[:, :-1] > 0, torch.arange(m)[:, None], m).amin(dim=0)
        rank = ((kind[:, None] == kind) & (first < first[:, None])).sum(dim=1)
        return cls(
            votes / count,
            kind,
            torch.tensor([-1 if i.colour is None else _COLOURS[i.colour] for i in items]),
            torch.tensor([[*i.centre, *i.size] for i in items], dtype=torch.float32),
            torch.zeros(m, 3).index_add_(0, scene.voxel, scene.xyz) / count,
            rank.clamp(max=MAX_RANK - 1),
        )

    @classmethod
    def joined(cls, truths: Sequence[Truth]) -> Truth:
        """Of the tokens and items of several scenes, one scene after the other."""
        own = [truth.share[:, :-1] for truth in truths]
        rest = torch.cat([truth.share[:, -1:] for truth in truths])
        columns = {
            f.name: torch.cat([getattr(truth, f.name) for truth in truths])
            for f in fields(cls)
            if f.name not in ("share", "scenes")
        }
        return cls(torch.cat([torch.block_diag(*own), rest], dim=1), scenes=sum(t.scenes for t in truths), **columns)

    to = on_device


class DenseHead(nn.Module):
    """From a token's hidden state: class and colour, by the embeddings of their words, and the item's box.

    Because a class is told by its word's own embedding, the word can later find the token by likeness. With `ranks`
    also the item's rank in its class, which is what counting needs and no token can tell before it has seen others.
    """

    word_ids: Tensor
    word_starts: Tensor

    def __init__(self, width: int, words: Encoder, *, ranks: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        # The identity at first: a token is drawn to its class's word itself, which can then find it by likeness.
        self.kind = nn.Linear(width, width)
        self.colour = nn.Linear(width, width)
        for linear in (self.kind, self.colour):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.box = nn.Linear(width, 6)
        self.rank = nn.Linear(width, MAX_RANK) if ranks else None
        self.nothing = nn.Parameter(torch.zeros(width))
        ids = [words.text(name) for name in (*KINDS, *COLOURS)]
        starts = [0, *itertools.accumulate(len(i) for i in ids[:-1])]
        self.register_buffer("word_ids", torch.tensor([k for i in ids for k in i]), persistent=False)
        self.register_buffer("word_starts", torch.tensor(starts), persistent=False)

    def forward(self, hidden: Tensor, truth: Truth, table: Tensor) -> dict[str, Tensor]:
        """Losses of the tokens' hidden states (M, D), given the embedding table (V, D)."""
        h = self.norm(hidden.float())
        # The mean of a name's tokens, of all names at once: one gradient as large as the table instead of 70.
        names = functional.embedding_bag(self.word_ids, table, self.word_starts, mode="mean")
        kinds, colours = names.split([len(KINDS), len(COLOURS)])
        inside = 1 - truth.share[:, -1]
        # (M, K + 1): the share of each class
        target = torch.zeros(len(h), len(kinds) + 1, device=h.device)
        target.index_add_(1, truth.kind, truth.share[:, :-1])
        target[:, -1] = truth.share[:, -1]
        log_kind = functional.log_softmax(
            self.kind(h).float() @ torch.cat([kinds, self.nothing[None]]).T.float(), dim=1
        )
        # Questions are as often about small things as about large ones, which most tokens show.
        tokens = truth.share.new_tensor([len(h) / truth.scenes])
        size = torch.cat([truth.share[:, :-1].sum(dim=0).clamp(min=1.0), tokens])
        weight = (truth.share / size.sqrt()).sum(dim=1) * torch.where(inside > 0, 1.0, _BACKGROUND_WEIGHT)
        losses = {"kind": -((target * log_kind).sum(dim=1) * weight).sum() / weight.sum()}
        shown = inside > 0.25
        item = truth.share[:, :-1].argmax(dim=1)
        if bool(shown.any()):
            box = self.box(h[shown]).float()
            wanted = truth.box[item[shown]].clone()
            wanted[:, :3] -= truth.xyz[shown]
            losses["box"] = functional.smooth_l1_loss(box, wanted, beta=0.2)
            if self.rank is not None:
                losses["rank"] = functional.cross_entropy(self.rank(h[shown]).float(), truth.rank[item[shown]])
        painted = shown & (truth.colour[item] >= 0)
        if bool(painted.any()):
            logits = self.colour(h[painted]).float() @ colours.T.float()
            losses["colour"] = functional.cross_entropy(logits, truth.colour[item[painted]])
        return losses


class MentionHead(nn.Module):
    """From the hidden state where one thing is named or clicked: its class and colour, and its box.

    What an answer needs of a thing must be gathered from its tokens first; this says so for every thing of every
    question, where the answer's own loss says it for one word.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, len(KINDS))
        self.colour = nn.Linear(width, len(COLOURS))
        self.box = nn.Linear(width, 6)

    def forward(self, hidden: Tensor, truth: Truth, targets: Sequence[tuple[int, Sequence[int]]]) -> dict[str, Tensor]:
        """Losses of the rows of hidden (rows, D) that mean one item; targets: (row, items)."""
        single = [(row, items[0]) for row, items in targets if len(items) == 1]
        if not single:
            return {}
        item = torch.tensor([i for _, i in single], device=hidden.device)
        h = self.norm(hidden[[row for row, _ in single]].float())
        colour = truth.colour[item]
        losses = {
            "kind": functional.cross_entropy(self.kind(h).float(), truth.kind[item]),
            "box": functional.smooth_l1_loss(self.box(h).float(), truth.box[item], beta=0.2),
        }
        if bool((colour >= 0).any()):
            losses["colour"] = functional.cross_entropy(self.colour(h).float(), colour, ignore_index=-1)
        return losses


class RelationHead(nn.Module):
    """From the hidden state where an answer begins: the boxes of the first things that the question names, in order.

    Who is to say how far apart two things are, or which is taller, needs both in one place first.
    """

    def __init__(self, width: int, things: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.boxes = nn.Linear(width, 6 * things)
        self.things = things

    def forward(self, hidden: Tensor, truth: Truth, targets: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """The loss of the rows of hidden (rows, D); targets: (row, items in the order of their names)."""
        entries = [(n, k, i) for n, (_, items) in enumerate(targets) for k, i in enumerate(items[: self.things])]
        if not entries:
            return hidden.new_zeros((), dtype=torch.float32)
        number, place, item = (torch.tensor(column, device=hidden.device) for column in zip(*entries, strict=True))
        h = self.norm(hidden[[row for row, _ in targets]].float())
        boxes = self.boxes(h).float().unflatten(1, (self.things, 6))
        return functional.smooth_l1_loss(boxes[number, place], truth.box[item], beta=0.2)


def finding_loss(tokens: Tensor, clicks: Tensor, voxel: Tensor) -> Tensor:
    """-log of the part of a softmax over likeness that a clicked point gives to its own token.

    Args:
        tokens: (M, D) as projected. clicks: (n, D) as encoded. voxel: (n,) int64, the token of each clicked point.
    """
    likeness = functional.normalize(clicks.float(), dim=1) @ functional.normalize(tokens.float(), dim=1).T
    return functional.cross_entropy(_SHARPNESS * likeness, voxel)


def pointing_loss(
    queries: Tensor, keys: Tensor, scaling: float, share: Tensor, targets: Sequence[Sequence[int]]
) -> Tensor:
    """Sum over rows of -log of the attention that they pay the tokens of some items, out of that paid to all spatial
    tokens of the scene; the mean over heads.

    Args:
        queries: (rows, heads, d) of these rows. keys: (M, heads, d) of the scene's spatial tokens.
        share: (M, I), part of each token that shows each item. targets: items of each row; rows whose items no token
            shows count 0.
    """
    wanted = torch.stack([share[:, list(items)].sum(dim=1) for items in targets])
    attention = torch.einsum("rhd,mhd->rhm", queries.float(), keys.float()).mul(scaling).softmax(dim=2)
    found = -torch.einsum("rhm,rm->rh", attention, wanted).clamp_min(1e-6).log().mean(dim=1)
    return (found * (wanted.sum(dim=1) > 0)).sum()


def answer_loss(logits: Tensor, packed: Packed, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the questions of the weighted mean cross entropy of an answer's tokens, and that of each (Q,)."""
    weight, question = packed.weight[labelled], packed.question[labelled]
    loss = functional.cross_entropy(logits.float(), packed.label[labelled], reduction="none") * weight
    n = torch.zeros(len(packed.questions), device=loss.device).index_add(0, question, weight)
    per_question = torch.zeros_like(n).index_add(0, question, loss) / n
    return per_question.mean(), per_question.detach()
