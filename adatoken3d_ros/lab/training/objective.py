# SPDX-License-Identifier: Apache-2.0
"""What training makes small: the answers' loss, and losses of heads that say what the tokens and layers should know."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM
from adatoken3d_ros.lab.training.data import Scene
from adatoken3d_ros.lab.training.losses import (
    DenseHead,
    MentionHead,
    RelationHead,
    Truth,
    answer_loss,
    finding_loss,
    pointing_loss,
)
from adatoken3d_ros.lab.training.packing import (
    IGNORE,
    Encoder,
    Packed,
    decoder_layer,
    embed,
    exact,
    run,
    spatial_tokens,
)
from adatoken3d_ros.lab.training.recipe import TrainConfig
from adatoken3d_ros.lmm.interface import SpatialLMM

_CLICKS = 64  # points a scene whose tokens are to be found


class Objective:
    """The losses of a batch on a model.

    Attributes:
        heads: modules that only training needs; their weights are drawn from the configuration's seed.
        finding: whether clicks are to find their tokens by likeness: where weights embed places, which learn it.
    """

    def __init__(self, model: SpatialLMM, encoder: Encoder, config: TrainConfig, *, finding: bool = True) -> None:
        self.model, self.encoder, self.config, self.finds = model, encoder, config, finding
        layers, width = len(model.decoder), model.decoder.size.hidden
        # Where the tokens are told apart, where words look for them, and where the answer does.
        self.depths = sorted({0, max(1, layers // 4), max(1, layers // 2)})
        self.mention_layers = sorted({layers // 6, min(layers // 6 + 1, layers - 1)})
        self.about_layers = sorted({layers * 5 // 12, min(layers * 7 // 12, layers - 1)})
        # Right behind those layers: what they have found.
        self.told = sorted(
            {layer + 1 for layer in (self.mention_layers[-1], self.about_layers[0])} & set(range(layers))
        )
        self.related = min(self.about_layers[-1] + 1, layers - 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            self.heads = nn.ModuleDict(
                {
                    **{f"dense{d}": DenseHead(width, encoder, ranks=d > 0) for d in self.depths},
                    **{f"told{d}": MentionHead(width) for d in self.told},
                    "related": RelationHead(width),
                }
            ).to(model.device)
        self.layer_step = torch.compile(decoder_layer, dynamic=False) if config.compiled else decoder_layer

    def alignment(self, scenes: Sequence[Scene]) -> tuple[Tensor, dict[str, list[float]]]:
        """The losses of the projected tokens alone, which no layer has read."""
        table = self.model.decoder.language.model.embed_tokens.weight
        truth = Truth.joined([Truth.of(scene) for scene in scenes]).to(self.model.device)
        tokens = spatial_tokens(self.model, scenes)
        found = self.heads["dense0"](torch.cat(tokens), truth, table)
        if self.finds:
            found["click"] = self.finding(scenes, tokens)
        return torch.stack(list(found.values())).sum(), {f"{n}@0": [float(v.detach())] for n, v in found.items()}

    def finding(self, scenes: Sequence[Scene], tokens: Sequence[Tensor]) -> Tensor:
        """How badly points on items are found among their scene's tokens by likeness to their encoded clicks."""
        found = []
        for scene, own in zip(scenes, tokens, strict=True):
            on_items = torch.nonzero(scene.instance >= FIRST_ITEM)[:, 0]
            every = on_items[:: max(1, len(on_items) // _CLICKS)]
            clicks = self.model.embed_clicks(scene.xyz[every].to(self.model.device))
            found.append(finding_loss(own, clicks, scene.voxel[every].to(self.model.device)))
        return torch.stack(found).mean()

    def losses(self, scenes: Sequence[Scene], packed: Packed) -> tuple[Tensor, dict[str, list[float]]]:
        """The weighted sum of all losses of a batch, and each by name."""
        model, config, device = self.model, self.config, self.model.device
        packed = packed.to(device)
        truths = [Truth.of(scene) for scene in scenes]
        truth = Truth.joined(truths).to(device)
        first_item = np.cumsum([0, *(len(t.kind) for t in truths)]) - FIRST_ITEM
        n = packed.shape.prefix
        at = packed.shape.sizes[0]
        # What is named or clicked, and what decides the answer (to be looked at where that begins), by scene:
        # (row, items of the joined truth).
        mentions: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in scenes]
        abouts: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in scenes]
        related: list[tuple[int, tuple[int, ...]]] = []
        for q, start, number in zip(packed.questions, packed.start.tolist(), packed.scene.tolist(), strict=True):
            first = int(first_item[number])
            own = [(at + start + row, tuple(first + i for i in about)) for row, about in sorted(q.mentions)]
            mentions[number] += own
            answers = at + start + q.n_prompt - 1
            if q.about:
                abouts[number].append((answers, tuple(first + i for i in q.about)))
            related.append((answers, tuple(items[0] for _, items in own if len(items) == 1)))
        points: list[Tensor] = []
        places: list[Tensor] = []  # rows of each scene's tokens in its prefix

        def look(layer: int, queries: Tensor, keys: Tensor) -> None:
            heads = [config.guided_heads, queries.shape[1] - config.guided_heads]
            shared = queries.shape[1] // keys.shape[1]  # heads that have a key head in common
            kept = -(-config.guided_heads // shared)
            scaling = model.decoder.layers[layer].scaling
            for layers, targets in ((self.mention_layers, mentions), (self.about_layers, abouts)):
                if layer not in layers or not any(targets):
                    continue
                # One piece of each tensor: a gradient for every slice would be a tensor of zeros as large as all rows.
                rows = queries[[row for own in targets for row, _ in own]].split(heads, dim=1)[0]
                looking = rows.split([len(own) for own in targets])
                guided = keys.split([at, len(keys) - at])[0].split([kept, keys.shape[1] - kept], dim=1)[0]
                if shared > 1:
                    guided = guided.repeat_interleave(shared, dim=1)[:, : config.guided_heads]
                prefix = guided.split(n)
                found, begin = [], 0
                for number, own in enumerate(targets):
                    m = len(truths[number].share)
                    if own:
                        seen = prefix[number][places[number]]
                        share = truth.share[begin : begin + m]
                        found.append(pointing_loss(looking[number], seen, scaling, share, [items for _, items in own]))
                    begin += m
                points.append(torch.stack(found).sum() / sum(map(len, targets)))

        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            tokens = spatial_tokens(model, scenes, blind=config.blind)
            prefixes, places = self.prefixes(scenes, tokens)
            depths = {*self.depths, *self.told, self.related}
            states: dict[int, list[Tensor]] = {} if config.blind else {d: [] for d in depths}
            hidden = run(
                model.decoder.language,
                prefixes,
                embed(model, packed),
                packed,
                look=None if config.blind else look,
                states=states,
                layer_step=self.layer_step,
            )
            labelled = torch.nonzero(packed.label != IGNORE)[:, 0]
            logits = model.decoder.language.lm_head(hidden[at + labelled])
        total, per_question = answer_loss(logits, packed, labelled)
        parts: dict[str, list[float]] = defaultdict(list)
        parts["answer"].append(float(total.detach()))
        for q, value, right in zip(
            packed.questions, per_question.tolist(), exact(logits, packed, labelled), strict=True
        ):
            parts[f"answer/{q.family}"].append(value)
            parts[f"right/{q.family}"].append(float(right))
        if not states:
            return total, parts
        auxiliary: dict[str, tuple[float, Tensor]] = {}
        table = model.decoder.language.model.embed_tokens.weight
        shown = torch.cat([k * n + own for k, own in enumerate(places)])
        for depth in self.depths:
            for name, value in self.heads[f"dense{depth}"](states[depth][0][shown], truth, table).items():
                auxiliary[f"{name}@{depth}"] = (1 / len(self.depths), value)
        if self.finds:
            with torch.autocast(device.type, enabled=False):
                auxiliary["click@0"] = (1 / len(self.depths), self.finding(scenes, tokens))
        named = [mention for own in mentions for mention in own]
        for depth in self.told:
            for name, value in self.heads[f"told{depth}"](states[depth][0], truth, named).items():
                auxiliary[f"told {name}@{depth}"] = (1 / len(self.told), value)
        auxiliary["related"] = (1.0, self.heads["related"](states[self.related][0], truth, related))
        if points:
            auxiliary["pointing"] = (0.5, torch.stack(points).mean())
        for name, (factor, value) in auxiliary.items():
            total = total + config.auxiliary * factor * value
            parts[name].append(float(value.detach()))
        return total, parts

    def prefixes(self, scenes: Sequence[Scene], tokens: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(N, D) of each scene, the system's text and the scene as a prompt has it, and the rows (M,) of its tokens."""
        system = self.model.decoder.embed(torch.tensor(self.encoder.system, device=self.model.device))
        found: list[Tensor] = []
        places: list[Tensor] = []
        for scene, own in zip(scenes, tokens, strict=True):
            rows, at = self.model.lay_out(own.to(system.dtype), None if self.config.blind else scene.where)
            found.append(torch.cat([system, rows]))
            places.append(len(system) + (torch.arange(len(rows), device=rows.device) if at is None else at))
        return found, places
