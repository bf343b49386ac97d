# SPDX-License-Identifier: Apache-2.0
"""The training loop. Everything random follows from the seed and the number of the step, so a run that was ended and
resumed is the run that was not."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adatoken3d_ros.model.checkpoint import official_names
from adatoken3d_ros.model.config import Llava3DConfig
from adatoken3d_ros.model.llava3d import Llava3D
from adatoken3d_ros.model.tokenizer import load_tokenizer
from adatoken3d_ros.model.vision import VisionTower
from adatoken3d_ros.synthetic.furnished import FIRST_ITEM
from adatoken3d_ros.synthetic.questions import FAMILIES, generate
from adatoken3d_ros.training.data import Scene, thinned, turned
from adatoken3d_ros.training.language import ModelSize, config_content, new_model, save_model, tokenizer
from adatoken3d_ros.training.losses import DenseHead, MentionHead, Truth, answer_loss, finding_loss, pointing_loss
from adatoken3d_ros.training.packing import IGNORE, Encoded, Encoder, Packed, embed, exact, pack, run, spatial_tokens

_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # of AdamW and of Muon
_OFTEN_THIN = 0.5
_CLICKS = 64  # points a scene whose tokens are to be found
STATE = "training"  # folder in the checkpoint, which the loader does not read

# Questions of each family asked of a scene: at first mostly what one token tells, then everything.
_EARLY = {
    **{"class": 5, "colour": 4, "existence": 4, "count": 2, "on": 2},
    **dict.fromkeys(("nearest", "box", "distance", "closer"), 1),
}
_LATE = {**dict.fromkeys(FAMILIES, 2), "existence": 3, "count": 3, "box": 1}


class TrainingError(ValueError):
    """A run that cannot be started or resumed; the message names the setting or file."""


@dataclass(frozen=True)
class TrainConfig:
    """A run's recipe.

    Attributes:
        steps: of the optimizer. scenes_per_step: rooms whose gradients are added.
        rate: learning rate. It rises in the first `warmup` steps, and again where the language model begins to learn,
            and falls to a twentieth in the last `decay` of all steps.
        align: first steps, in which only projector and position embedding learn, from what each token shows: without
            the language model these cost a tenth, and what it reads makes sense from its first step on.
        early: steps after those with mostly simple questions.
        auxiliary: factor of the losses on tokens and attention.
        guided_heads: heads whose attention is shown what to look at. noise: deviation of noise on vision features.
        thinnest: scenes lose tokens at random, at most all but this part of those that show something and of the
            others: half the work, and a model that does not mind which of them are there. In the early steps they
            always lose so many, and later every second time: what words mean is learned from a few tokens in a third
            of the time.
        threads: scenes computed at once, each in one thread, while aligning and after it; the result is the same.
        blind: train without spatial tokens, to see what can be guessed.
        autocast: matrix products in bfloat16.
    """

    steps: int = 4000
    seed: int = 0
    scenes_per_step: int = 4
    rate: float = 1.5e-3
    warmup: int = 150
    decay: float = 0.25
    weight_decay: float = 0.05
    clip: float = 1.0
    align: int = 1000
    early: int = 800
    auxiliary: float = 1.0
    guided_heads: int = 2
    noise: float = 0.3
    thinnest: tuple[float, float] = (0.25, 0.05)
    threads: int = 1
    blind: bool = False
    autocast: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "scenes_per_step", "rate", "clip"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be positive, got {getattr(self, name)}")

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ..."""
        falling = min(1.0, max(0.05, (self.steps - step) / max(1.0, self.decay * self.steps)))
        begun = step - self.align if step >= self.align else step
        return self.rate * min(1.0, (begun + 1) / max(1, self.warmup)) * falling

    def thinning(self, step: int, rng: np.random.Generator) -> tuple[float, float]:
        """Parts of the tokens that a scene keeps: of those that show something, of the others."""
        if self.align <= step < self.align + self.early or (step >= self.align and rng.random() < _OFTEN_THIN):
            return self.thinnest
        items, rest = self.thinnest
        return max(items, float(rng.uniform(0.0, 1.0)) ** 0.5), float(rng.uniform(rest, 1.0))

    def counts(self, step: int) -> Mapping[str, int]:
        """Questions of each family."""
        return _EARLY if step < self.align + self.early else _LATE


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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + 1)
            self.heads = nn.ModuleDict(
                {
                    **{f"dense{d}": DenseHead(size.width, self.encoder, ranks=d > 0) for d in self.depths},
                    **{f"told{d}": MentionHead(size.width) for d in self.told},
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
        muons = (
            torch.optim.Muon(
                [self.parameters[n] for n in sorted(inner)[k :: config.threads]],
                lr=config.rate,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            for k in range(config.threads)
        )
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (*muons, adam)
        self.pool = ThreadPoolExecutor(config.threads, "scene", torch.set_num_threads, (1,))
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

    def sample(self, number: int) -> tuple[Scene, Packed | None]:
        """Scene 0, 1, ... of the run and the questions, None while aligning.

        Each epoch has its own order, and rooms are turned and mirrored at random.
        """
        config = self.config
        step, (epoch, place) = number // config.scenes_per_step, divmod(number, len(self.scenes))
        order = np.random.default_rng([config.seed, 0, epoch]).permutation(len(self.scenes))
        rng = np.random.default_rng([config.seed, 1, number])
        scene = self.scenes[int(order[place])]
        scene = turned(scene, int(rng.integers(4)), bool(rng.integers(2)), self.size.voxel_size)
        scene = thinned(scene, *config.thinning(step, rng), rng)
        noise = torch.from_numpy(rng.standard_normal(scene.features.shape, dtype=np.float32))
        scene = replace(scene, features=scene.features.float() + config.noise * noise)
        if step < config.align and not config.blind:
            return scene, None
        asked = self.questions(scene, config.counts(step), rng)
        return scene, pack(asked)

    def train_step(self) -> Report:
        """One step of the optimizer."""
        started = time.monotonic()
        rate = self.config.rate_at(self.step)
        totals: dict[str, list[float]] = defaultdict(list)
        n = self.config.scenes_per_step
        for parameter in self.parameters.values():
            parameter.grad = None
        # Added in the scenes' order, so that threads change nothing.
        for gradients, parts in self.pool.map(self._gradients, range(self.step * n, (self.step + 1) * n)):
            for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
                if gradient is not None:
                    gradient = gradient / n
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            for name, values in parts.items():
                totals[name].extend(values)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip)
        if not torch.isfinite(norm):
            raise TrainingError(f"the gradient of step {self.step} is not finite")
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        for _ in self.pool.map(lambda optimizer: optimizer.step(), self.optimizers):
            pass
        self.step += 1
        self.seconds += time.monotonic() - started
        losses = {name: float(np.mean(values)) for name, values in sorted(totals.items())}
        return Report(self.step, losses, rate, time.monotonic() - started)

    def _gradients(self, number: int) -> tuple[tuple[Tensor | None, ...], dict[str, list[float]]]:
        """Of a sample's loss by every parameter, None where it plays no part; and the losses by name."""
        scene, packed = self.sample(number)
        loss, parts = self.alignment(scene) if packed is None else self.losses(scene, packed)
        return torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True), parts

    def alignment(self, scene: Scene) -> tuple[Tensor, dict[str, list[float]]]:
        """The losses of the projected tokens alone, which no layer has read."""
        table = self.model.language.model.embed_tokens.weight
        truth = Truth.of(scene).to(self.model.device)
        tokens = spatial_tokens(self.model, scene)
        found = {**self.heads["dense0"](tokens, truth, table), "click": self.finding(scene, tokens)}
        return torch.stack(list(found.values())).sum(), {f"{n}@0": [float(v.detach())] for n, v in found.items()}

    def finding(self, scene: Scene, tokens: Tensor) -> Tensor:
        """How badly points on items are found among the tokens by likeness to their encoded clicks."""
        on_items = torch.nonzero(scene.instance >= FIRST_ITEM)[:, 0]
        every = on_items[:: max(1, len(on_items) // _CLICKS)]
        clicks = self.model.embed_clicks(scene.xyz[every].to(self.model.device))
        return finding_loss(tokens, clicks, scene.voxel[every].to(self.model.device))

    def losses(self, scene: Scene, packed: Packed) -> tuple[Tensor, dict[str, list[float]]]:
        """The weighted sum of all losses of a scene, and each by name."""
        model, config, device = self.model, self.config, self.model.device
        packed = packed.to(device)
        truth = Truth.of(scene).to(device)
        first = len(self.encoder.system)
        points: list[Tensor] = []
        with torch.autocast(device.type, torch.bfloat16, enabled=config.autocast):
            prefix = self.prefix(scene)
            states: dict[int, list[Tensor]] = {} if config.blind else {d: [] for d in (*self.depths, *self.told)}
            at = len(prefix)
            mentions = [
                (at + int(packed.start[n]) + row, about)
                for n, q in enumerate(packed.questions)
                for row, about in q.mentions
            ]
            # The row that begins the answer looks at what decides it.
            abouts = [(at + int(packed.start[n]) + q.n_prompt - 1, q.about) for n, q in enumerate(packed.questions)]

            def look(layer: int, queries: Tensor, keys: Tensor) -> None:
                for layers, targets in ((self.mention_layers, mentions), (self.about_layers, abouts)):
                    if layer in layers and targets:
                        own = slice(0, config.guided_heads)
                        scaling = model.language.model.layers[layer].self_attn.scaling
                        points.append(pointing_loss(queries[:, own], keys[first:at, own], scaling, truth, targets))

            hidden = run(
                model.language,
                prefix,
                embed(model, packed),
                packed,
                look=None if config.blind else look,
                states=states,
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
        table = model.language.model.embed_tokens.weight
        for depth in self.depths if states else ():
            for name, value in self.heads[f"dense{depth}"](states[depth][0][first:at], truth, table).items():
                total = total + config.auxiliary * value / len(self.depths)
                parts[f"{name}@{depth}"].append(float(value.detach()))
        if states:
            with torch.autocast(device.type, enabled=False):
                found = self.finding(scene, prefix[first:])
            total = total + config.auxiliary * found / len(self.depths)
            parts["click@0"].append(float(found.detach()))
        for depth in self.told if states else ():
            for name, value in self.heads[f"told{depth}"](states[depth][0], truth, mentions).items():
                total = total + config.auxiliary * value / len(self.told)
                parts[f"told {name}@{depth}"].append(float(value.detach()))
        if points:
            pointing = torch.stack(points).mean()
            total = total + 0.5 * config.auxiliary * pointing
            parts["pointing"].append(float(pointing.detach()))
        return total, parts

    def prefix(self, scene: Scene) -> Tensor:
        """(N, D) the system's text and the scene's tokens."""
        table = self.model.language.model.embed_tokens
        system = table(torch.tensor(self.encoder.system, device=self.model.device))
        return torch.cat([system, spatial_tokens(self.model, scene, blind=self.config.blind).to(system.dtype)])

    # --- measuring ---

    def evaluate(self, scenes: Sequence[Scene], per_family: int = 2, seed: int = 0) -> dict[str, float]:
        """Share of answers right to the letter, by family, and their mean as `macro`."""

        @torch.no_grad()
        def judge(number: int, scene: Scene) -> list[tuple[str, bool]]:
            asked = self.questions(scene, dict.fromkeys(FAMILIES, per_family), np.random.default_rng([seed, number]))
            packed = pack(asked).to(self.model.device)
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.autocast):
                prefix = self.prefix(scene)
                hidden = run(self.model.language, prefix, embed(self.model, packed), packed)
                labelled = torch.nonzero(packed.label != IGNORE)[:, 0]
                logits = self.model.language.lm_head(hidden[len(prefix) + labelled])
            right = exact(logits, packed, labelled)
            return [(q.family, bool(ok)) for q, ok in zip(packed.questions, right, strict=True)]

        judged = [answer for answers in self.pool.map(judge, range(len(scenes)), scenes) for answer in answers]
        shares = {
            family: float(np.mean([ok for other, ok in judged if other == family]))
            for family in FAMILIES
            if any(other == family for other, _ in judged)
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
