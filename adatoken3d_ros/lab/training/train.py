# SPDX-License-Identifier: Apache-2.0
"""The training loop. Everything random follows from the seed and the number of the step, so a run that was ended and
resumed is the run that was not, and so is one that several processes share (torch.distributed)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from adatoken3d_ros.lab.synthetic.questions import FAMILIES, generate
from adatoken3d_ros.lab.synthetic.unseen import unseen
from adatoken3d_ros.lab.training.data import Scene, detects
from adatoken3d_ros.lab.training.language import (
    config_content,
    new_model,
    save_model,
    shape_hash_of,
    tokenizer,
    vocabulary_of,
)
from adatoken3d_ros.lab.training.objective import Objective
from adatoken3d_ros.lab.training.packing import (
    IGNORE,
    Encoded,
    Encoder,
    Packed,
    Shape,
    embed,
    exact,
    pack,
    run,
    spatial_tokens,
)
from adatoken3d_ros.lab.training.recipe import TrainConfig, TrainingError
from adatoken3d_ros.lab.training.variants import detected, thinned, turned, without_models
from adatoken3d_ros.lmm.untrained import ModelSize, trainable, trainable_of
from adatoken3d_ros.lmm.vision.ssd import CLASSES
from adatoken3d_ros.lmm.vision.tower import VisionTower

_MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")  # of AdamW and of Muon
_EVIDENCE_NOISE = 0.2  # beside that of other features: of small things it is weak
_ALIGNED_SCENES = 4  # of a batch while aligning
_SHAPELESS = ("num_attention_heads", "num_key_value_heads", "rope_theta")  # what no weight's shape tells
STATE = "training"  # folder in the checkpoint, which the loader does not read


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
        self.form = trainable(size.tokens)
        self.tokenizer = tokenizer(size.tokens)
        self.content = config_content(size, len(self.tokenizer))
        self.model = new_model(self.content, vision, config.seed).to(device)
        self.encoder = Encoder(self.tokenizer, self.model.prompt, self.form.ANSWER_LEAD)
        with torch.no_grad():  # rows of one token, which is all that a blind model gets
            empty = torch.zeros(1, self.model.decoder.size.hidden, device=self.model.device)
            self.alone = len(self.model.lay_out(empty, None)[0])
        self.objective = Objective(self.model, self.encoder, config, finding=self.form.LEARNS_PLACES)
        self.detects = detects(vision)
        self.parameters = {
            **{n: p for n, p in self.model.named_parameters() if p.requires_grad},
            **{f"heads.{n}": p for n, p in self.objective.heads.named_parameters()},
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
        self.recipe = dict(recipe or {})
        self.step = 0
        self.seconds = 0.0

    # --- one step ---

    def questions(self, scene: Scene, counts: Mapping[str, int], rng: np.random.Generator) -> list[Encoded]:
        """Encoded questions about a scene."""
        found: list[Encoded] = []
        for number in sorted(set(counts.values())):
            families = [family for family in FAMILIES if counts.get(family) == number]
            asked = generate(scene.room, rng, scene.sights, per_family=number, families=families, told=self.config.told)
            for qa in asked:
                found.append(self.encoder.encode(qa, scene))
        return found

    def unseen(self, scene: Scene, rng: np.random.Generator) -> list[Encoded]:
        """Encoded questions about what no view shows."""
        if not self.config.unseen:
            return []
        asked = unseen(scene.room, scene.sights, scene.xyz.numpy(), rng, self.config.unseen)
        return [self.encoder.encode(qa, scene) for qa in asked]

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
            scene = detected(scene, config.simulated, config.strange, rng)
            if (part := config.left_out(step)) is not None:
                scene = without_models(scene, part, config.turns)
            if not aligning:
                asked.append(self.questions(scene, config.counts(step), rng) + self.unseen(scene, rng))
                scene = thinned(scene, *config.kept(kind, rng), rng, most=rows - len(self.encoder.system))
            noise = torch.from_numpy(rng.standard_normal(scene.features.shape, dtype=np.float32))
            if self.detects:
                noise[..., -len(CLASSES) :] *= _EVIDENCE_NOISE
            scenes.append(replace(scene, features=scene.features.float() + config.noise * noise))
        if aligning:
            return scenes, None
        lengths = [len(self.encoder.system) + (self.alone if config.blind else scene.rows) for scene in scenes]
        shape = Shape(n, max(rows, *lengths) if not config.blind else lengths[0], config.groups)
        return scenes, pack(asked, lengths, shape)

    def train_step(self) -> Report:
        """One step of the optimizer, the same in every process."""
        started = time.monotonic()
        rate = self.config.rate_at(self.step)
        learning = self.learning()
        parameters = list(learning.values())
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
        for every in self.parameters.values():
            every.grad = None  # what does not learn does not decay either
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

    def learning(self) -> dict[str, torch.nn.Parameter]:
        """What the next step changes, by name."""
        if self.step >= self.config.heads_first:
            return self.parameters
        return {name: p for name, p in self.parameters.items() if name.startswith("heads.")}

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
        """Of a batch's loss by all that learns, None where it plays no part; and the losses by name."""
        scenes, packed = self.sample(step, batch)
        loss, parts = self.objective.alignment(scenes) if packed is None else self.objective.losses(scenes, packed)
        return torch.autograd.grad(loss, list(self.learning().values()), allow_unused=True), parts

    # --- measuring ---

    @torch.no_grad()
    def evaluate(self, scenes: Sequence[Scene], per_family: int = 2, seed: int = 0) -> dict[str, float]:
        """Share of answers right to the letter, by family, and their mean as `macro`."""
        judged = []
        for number in range(self.rank, len(scenes), self.processes):
            scene, rng = scenes[number], np.random.default_rng([seed, number])
            asked = self.questions(scene, dict.fromkeys(FAMILIES, per_family), rng)
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.config.autocast):
                tokens = spatial_tokens(self.model, [scene], blind=self.config.blind)
                prefixes, _ = self.objective.prefixes([scene], tokens)
                packed = pack([asked], [len(prefixes[0])]).to(self.model.device)
                language = self.model.decoder.language
                hidden = run(language, prefixes, embed(self.model, packed), packed)
                labelled = torch.nonzero(packed.label != IGNORE)[:, 0]
                logits = language.lm_head(hidden[packed.shape.sizes[0] + labelled])
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

    def export(self, directory: Path, tower: Path | None = None) -> None:
        """The model alone, all but the tower in float16: for those who only run it; for `tower` see `save_model`."""
        save_model(self.model, self.content, self.tokenizer, directory, self._recipe(), torch.float16, tower)

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
        state: dict[str, Tensor] = {f"heads.{n}": p.detach() for n, p in self.objective.heads.named_parameters()}
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

    def start(self, directory: Path) -> None:
        """Begins with the weights of a trained model, which may know fewer words and have a tower without a detector.

        Raises:
            TrainingError: if they do not fit otherwise.
        """
        try:
            content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            form, theirs = trainable_of(content), vocabulary_of(directory, content)
            weights = load_file(directory / "model.safetensors")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise TrainingError(f"{directory} cannot be started from: {error}") from error
        if form is not self.form:
            raise TrainingError(f"{directory} holds a model whose tokens are not {self.size.tokens}")
        for key in _SHAPELESS:
            if content.get(key) != self.content.get(key):
                raise TrainingError(f"{directory} has {key} {content.get(key)}, wanted is {self.content.get(key)}")
        table = self.model.decoder.language.model.embed_tokens.weight
        state = self.model.state_dict()
        for name, official in self.form.official_names(self.model).items():
            new, vision = state[name], name.startswith("vision.")
            if official not in weights:
                if vision:  # what the new tower has besides, or all of one that is kept elsewhere
                    continue
                raise TrainingError(f"{directory} lacks {official}")
            old = weights[official].float().to(new.device)
            if len(new) == len(table) and name.endswith("embed_tokens.weight"):
                if old.shape[1:] != new.shape[1:]:
                    raise TrainingError(f"{directory} has words of {tuple(old.shape[1:])} for {tuple(new.shape[1:])}")
                with torch.no_grad():
                    for word, row in self.tokenizer.get_vocab().items():
                        if word in theirs:
                            new[row] = old[theirs[word]]
                continue
            if old.ndim != new.ndim or any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
                raise TrainingError(f"{directory} holds {official} of shape {tuple(old.shape)} for {tuple(new.shape)}")
            if not vision:
                new.copy_(self.form.widened(name, old, new.shape))
            elif old.shape != new.shape or not torch.allclose(old, new, rtol=1e-3, atol=1e-3):
                raise TrainingError(f"{directory} was trained with another vision tower: {official} differs")
        self.recipe["started_from"] = {k: content.get("training", {}).get(k) for k in ("step", "hours", "rooms")}

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
        except (OSError, ValueError, SafetensorError) as error:
            raise TrainingError(f"{directory} cannot be resumed: {error}") from error
        if facts["step"] != str(content["training"]["step"]):
            raise TrainingError(f"{path} is of step {facts['step']}, config.json of {content['training']['step']}")
        if shape_hash_of(content) != self.model.shape_hash:
            raise TrainingError(f"{directory} holds a model of other sizes: {facts['size']}")
        if vocabulary_of(directory, content) != self.tokenizer.get_vocab():
            raise TrainingError(f"{directory} has another vocabulary")
        with torch.no_grad():
            ours = self.model.state_dict()
            for name, official in self.form.official_names(self.model).items():
                ours[name].copy_(weights[official])
            for name, parameter in self.objective.heads.named_parameters():
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
        if "started_from" in content["training"]:
            self.recipe["started_from"] = content["training"]["started_from"]
