# SPDX-License-Identifier: Apache-2.0
"""The training loop. Everything random follows from the seed and the number of the step, so a run that was ended and
resumed is the run that was not, and so is one that several processes share (torch.distributed)."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM
from adatoken3d_ros.lab.synthetic.questions import FAMILIES, generate
from adatoken3d_ros.lab.training.data import Scene, thinned, turned
from adatoken3d_ros.lab.training.language import ModelSize, config_content, new_model, save_model, tokenizer
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
    Encoded,
    Encoder,
    Packed,
    Shape,
    decoder_layer,
    embed,
    exact,
    pack,
    run,
    spatial_tokens,
)
from adatoken3d_ros.lab.training.recipe import TrainConfig, TrainingError
from adatoken3d_ros.lmm.llava3d.checkpoint import official_names
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.tokenizer import load_tokenizer
from adatoken3d_ros.lmm.vision.tower import VisionTower

_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # of AdamW and of Muon
_CLICKS = 64  # points a scene whose tokens are to be found
_ALIGNED_SCENES = 4  # of a batch while aligning
STATE = "training"  # folder in the checkpoint, which the loader does not read
# (questions a scene, rows a question): room for most of these. What finds no place is left out.
_GROUPS = ((16, 16), (9, 24), (4, 32), (6, 40))


@dataclass
class Report:
    """One line of the log: losses by name, and by family as `answer/<family>`."""

    step: int
    losses: dict[str, float] = field(default_factory=dict)
    rate: float = 0.0
    seconds: float = 0.0


class Trainer:
    """A model in training, its heads, its optimizer and the scenes."""

    def __init__(
        self,
        config: TrainConfig,
        size: ModelSize,
        vision: VisionTower,
        scenes: Sequence[Scene],
        *,
        device: torch.device | str = "cpu",
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """Makes a new model.

        Args:
            scenes: to train on; their features may be float16, to save memory.
            recipe: what else the checkpoint shall say about how it was made.
        """
        if not scenes:
            raise TrainingError("there is no scene to train on")
        self.config, self.size, self.scenes = config, size, scenes
        self.tokenizer = tokenizer()
        self.content = config_content(size, len(self.tokenizer))
        self.model: Llava3D = new_model(self.content, vision, config.seed).to(device)
        self.encoder = Encoder(self.tokenizer)
        layers = size.layers
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
                    **{f"dense{d}": DenseHead(size.width, self.encoder, ranks=d > 0) for d in self.depths},
                    **{f"told{d}": MentionHead(size.width) for d in self.told},
                    "related": RelationHead(size.width),
                }
            ).to(device)
        self.parameters = {
            **{n: p for n, p in self.model.named_parameters() if p.requires_grad},
            **{f"heads.{n}": p for n, p in self.heads.named_parameters()},
        }
        # The decoder's matrices by Muon (Jordan et al. 2024), which needs about half the steps here; the rest by AdamW.
        inner = {n for n, p in self.parameters.items() if p.ndim == 2 and ".layers." in n}
        matrices = [p for n, p in self.parameters.items() if p.ndim > 1 and n not in inner and "embed_tokens" not in n]
        others = [p for n, p in self.parameters.items() if p.ndim <= 1 or "embed_tokens" in n]
        adam = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.rate,
            betas=(0.9, 0.98),
        )
        muon = torch.optim.Muon(
            [self.parameters[n] for n in sorted(inner)],
            lr=config.rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (muon, adam)
        self.processes = config.processes
        self.rank = dist.get_rank() if self.processes > 1 else 0
        self.layer_step = torch.compile(decoder_layer, dynamic=False) if config.compiled else decoder_layer
        self.recipe = dict(recipe or {})
        self.step = 0
        self.seconds = 0.0

    # --- one step ---

    def questions(self, scene: Scene, counts: Mapping[str, int], rng: np.random.Generator) -> list[Encoded]:
        """Encoded questions about a scene."""
        found: list[Encoded] = []
        for number in sorted(set(counts.values())):
            families = [family for family in FAMILIES if counts.get(family) == number]
            for qa in generate(scene.room, rng, scene.sights, per_family=number, families=families):
                found.append(self.encoder.encode(qa, scene))
        return found

    def sample(self, step: int, batch: int) -> tuple[list[Scene], Packed | None]:
        """Some scenes, turned, mirrored and thinned at random, and questions on them, none while aligning."""
        config = self.config
        rng = np.random.default_rng([config.seed, 1, step, batch])
        aligning = step < config.align and not config.blind
        kind = config.kind(step)
        rows, n = config.sizes[kind]
        n = min(_ALIGNED_SCENES if aligning else n, len(self.scenes))
        scenes, asked = [], []
        for number in rng.choice(len(self.scenes), n, replace=False).tolist():
            scene = turned(self.scenes[number], int(rng.integers(4)), bool(rng.integers(2)), self.size.voxel_size)
            if not aligning:
                asked.append(self.questions(scene, config.counts(step), rng))
                scene = thinned(scene, *config.kept(kind, rng), rng, most=rows - len(self.encoder.system))
            noise = torch.from_numpy(rng.standard_normal(scene.features.shape, dtype=np.float32))
            scenes.append(replace(scene, features=scene.features.float() + config.noise * noise))
        if aligning:
            return scenes, None
        lengths = [len(self.encoder.system) + (1 if config.blind else len(scene.features)) for scene in scenes]
        shape = Shape(n, max(rows, *lengths) if not config.blind else lengths[0], _GROUPS)
        return scenes, pack(asked, lengths, shape)

    def train_step(self) -> Report:
        """One step of the optimizer, the same in every process."""
        started = time.monotonic()
        rate = self.config.rate_at(self.step)
        parameters = list(self.parameters.values())
        total = torch.zeros(sum(p.numel() for p in parameters), device=self.model.device)
        found: list[dict[str, list[float]]] = []
        for batch in range(self.rank, self.config.batches, self.processes):
            gradients, parts = self._gradients(self.step, batch)
            total += torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters, gradients, strict=True)
                ]
            )
            found.append(parts)
        if self.processes > 1:
            dist.all_reduce(total)
        found = self._gathered(found)
        norm = total.div_(self.config.batches).norm()
        if not torch.isfinite(norm):
            raise TrainingError(f"the gradient of step {self.step} is not finite")
        total *= min(1.0, self.config.clip / (float(norm) + 1e-6))
        for parameter, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)
        aligning = self.step < self.config.align and not self.config.blind
        for optimizer in self.optimizers[aligning:]:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.step += 1
        self.seconds += time.monotonic() - started
        names = sorted({name for parts in found for name in parts})
        losses = {name: float(np.mean([v for parts in found for v in parts.get(name, ())])) for name in names}
        return Report(self.step, losses, rate, time.monotonic() - started)

    def agreed(self, go_on: bool) -> bool:
        """What the first process says."""
        if self.processes == 1:
            return go_on
        said = torch.tensor([int(go_on)])
        dist.broadcast(said, 0)
        return bool(said)

    def _gathered(self, own: list[Any]) -> list[Any]:
        """The entries of all processes, in the order of what they are about: each has every n-th."""
        if self.processes == 1:
            return own
        every: list[Any] = [None] * self.processes
        dist.all_gather_object(every, own)
        return [every[k % self.processes][k // self.processes] for k in range(sum(map(len, every)))]

    def _gradients(self, step: int, batch: int) -> tuple[tuple[Tensor | None, ...], dict[str, list[float]]]:
        """Of a batch's loss by every parameter, None where it plays no part; and the losses by name."""
        scenes, packed = self.sample(step, batch)
        loss, parts = self.alignment(scenes) if packed is None else self.losses(scenes, packed)
        return torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True), parts

    def alignment(self, scenes: Sequence[Scene]) -> tuple[Tensor, dict[str, list[float]]]:
        """The losses of the projected tokens alone, which no layer has read."""
        table = self.model.language.model.embed_tokens.weight
        truth = Truth.joined([Truth.of(scene) for scene in scenes]).to(self.model.device)
        tokens = spatial_tokens(self.model, scenes)
        found = {**self.heads["dense0"](torch.cat(tokens), truth, table), "click": self.finding(scenes, tokens)}
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
        system, n = len(self.encoder.system), packed.shape.prefix
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

        def look(layer: int, queries: Tensor, keys: Tensor) -> None:
            heads = [config.guided_heads, queries.shape[1] - config.guided_heads]
            scaling = model.language.model.layers[layer].self_attn.scaling
            for layers, targets in ((self.mention_layers, mentions), (self.about_layers, abouts)):
                if layer not in layers or not any(targets):
                    continue
                # One piece of each tensor: a gradient for every slice would be a tensor of zeros as large as all rows.
                rows = queries[[row for own in targets for row, _ in own]].split(heads, dim=1)[0]
                looking = rows.split([len(own) for own in targets])
                prefix = keys.split([at, len(keys) - at])[0].split(heads, dim=1)[0].split(n)
                found, begin = [], 0
                for number, own in enumerate(targets):
                    m = len(truths[number].share)
                    seen = prefix[number].split([system, m, n - system - m])[1]
                    if own:
                        share = truth.share[begin : begin + m]
                        found.append(pointing_loss(looking[number], seen, scaling, share, [items for _, items in own]))
                    begin += m
                points.append(torch.stack(found).sum() / sum(map(len, targets)))

        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            tokens = spatial_tokens(model, scenes, blind=config.blind)
            depths = {*self.depths, *self.told, self.related}
            states: dict[int, list[Tensor]] = {} if config.blind else {d: [] for d in depths}
            hidden = run(
                model.language,
                self.prefixes(tokens),
                embed(model, packed),
                packed,
                look=None if config.blind else look,
                states=states,
                layer_step=self.layer_step,
            )
            labelled = torch.nonzero(packed.label != IGNORE)[:, 0]
            logits = model.language.lm_head(hidden[at + labelled])
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
        table = model.language.model.embed_tokens.weight
        shown = torch.cat([k * n + system + torch.arange(len(t.share), device=device) for k, t in enumerate(truths)])
        for depth in self.depths:
            for name, value in self.heads[f"dense{depth}"](states[depth][0][shown], truth, table).items():
                auxiliary[f"{name}@{depth}"] = (1 / len(self.depths), value)
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

    def prefixes(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """(N, D) of each scene: the system's text and the scene's tokens."""
        table = self.model.language.model.embed_tokens
        system = table(torch.tensor(self.encoder.system, device=self.model.device))
        return [torch.cat([system, own.to(system.dtype)]) for own in tokens]

    # --- measuring ---

    @torch.no_grad()
    def evaluate(self, scenes: Sequence[Scene], per_family: int = 2, seed: int = 0) -> dict[str, float]:
        """Share of answers right to the letter, by family, and their mean as `macro`."""
        judged = []
        for number in range(self.rank, len(scenes), self.processes):
            scene, rng = scenes[number], np.random.default_rng([seed, number])
            asked = self.questions(scene, dict.fromkeys(FAMILIES, per_family), rng)
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.autocast):
                prefixes = self.prefixes(spatial_tokens(self.model, [scene], blind=self.config.blind))
                packed = pack([asked], [len(prefixes[0])]).to(self.model.device)
                hidden = run(self.model.language, prefixes, embed(self.model, packed), packed)
                labelled = torch.nonzero(packed.label != IGNORE)[:, 0]
                logits = self.model.language.lm_head(hidden[packed.shape.sizes[0] + labelled])
            right = exact(logits, packed, labelled)
            judged.append([(q.family, bool(ok)) for q, ok in zip(packed.questions, right, strict=True)])
        every = [answer for answers in self._gathered(judged) for answer in answers]
        shares = {
            family: float(np.mean([ok for other, ok in every if other == family]))
            for family in FAMILIES
            if any(other == family for other, _ in every)
        }
        return {**shares, "macro": float(np.mean(list(shares.values())))}

    # --- files ---

    def export(self, directory: Path) -> None:
        """The model alone, all but the tower in float16: for those who only run it."""
        save_model(self.model, self.content, self.tokenizer, directory, self._recipe(), torch.float16)

    def _recipe(self) -> dict[str, Any]:
        return {
            **self.recipe,
            **asdict(self.config),
            "step": self.step,
            "hours": round(self.seconds / 3600, 3),
            "rooms": len(self.scenes),
        }

    def save(self, directory: Path) -> None:
        """The model as the loader reads it, and in a folder beside it what a resumed run needs."""
        save_model(self.model, self.content, self.tokenizer, directory, self._recipe())
        state: dict[str, Tensor] = {f"heads.{n}": p.detach() for n, p in self.heads.named_parameters()}
        for name, parameter in self.parameters.items():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    state[f"{key}.{name}"] = value.detach()
        folder = directory / STATE
        folder.mkdir(exist_ok=True)
        partial = folder / "state.safetensors.part"
        # The step is in the file, so that weights and moments cannot be of two different moments unnoticed.
        save_file(
            {n: t.contiguous() for n, t in state.items()},
            partial,
            metadata={"step": str(self.step), "seconds": str(self.seconds), "size": json.dumps(asdict(self.size))},
        )
        partial.replace(folder / "state.safetensors")

    def resume(self, directory: Path) -> None:
        """Goes on from what `save` wrote.

        Raises:
            TrainingError: if it is of another model, or not complete.
        """
        path = directory / STATE / "state.safetensors"
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = file.metadata()
            content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            weights, state = load_file(directory / "model.safetensors"), load_file(path)
        except (OSError, ValueError) as error:
            raise TrainingError(f"{directory} cannot be resumed: {error}") from error
        if facts["step"] != str(content["training"]["step"]):
            raise TrainingError(f"{path} is of step {facts['step']}, config.json of {content['training']['step']}")
        if Llava3DConfig.from_dict(content).hash() != self.model.config.hash():
            raise TrainingError(f"{directory} holds a model of other sizes: {facts['size']}")
        if load_tokenizer(directory)[0].get_vocab() != self.tokenizer.get_vocab():
            raise TrainingError(f"{directory} has another vocabulary")
        with torch.no_grad():
            ours = self.model.state_dict()
            for name, official in official_names(self.model).items():
                ours[name].copy_(weights[official])
            for name, parameter in self.heads.named_parameters():
                parameter.copy_(state[f"heads.{name}"])
        owner = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, parameter in self.parameters.items():
            optimizer = owner[parameter]
            moments = {key: state[f"{key}.{name}"] for key in _MOMENTS if f"{key}.{name}" in state}
            if moments:
                optimizer.state[parameter] = {
                    key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
                }
        self.step, self.seconds = int(facts["step"]), float(facts["seconds"])
